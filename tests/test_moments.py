"""Moments in bfloat16 and int8: near the numbers, true on average, nothing stuck, few bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llmzoo_jax import moments

SEEDS = jnp.arange(400, dtype=jnp.uint32)


def numbers(shape, *, decades: float, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-decades, 0, shape)
    return jnp.asarray(rng.choice([-1, 1], shape) * size, jnp.float32)


@functools.partial(jax.jit, static_argnames="signed")
def there_and_back(x, seed, signed=True):
    return moments.dequantise(*moments.quantise(x, seed, signed=signed))


def weight(x: jax.Array) -> dict:
    return {"w": nnx.Param(x, axes=("embed", "mlp"))}


@pytest.mark.parametrize("signed", [True, False])
def test_an_int8_code_is_within_a_step_of_its_number(signed):
    x = numbers((6, 3 * 64), decades=1)
    x = x if signed else x**2
    got = there_and_back(x, SEEDS[0], signed)
    # The highest decade has 64 steps (128 without a sign); the next has half as many.
    error = np.abs(got - x) / np.abs(x)
    assert error.max() < (0.3 if signed else 0.31)
    top = np.abs(x) > (0.2 if signed else 0.04)
    assert np.abs(got - x)[top].max() <= (0.9 / 64 if signed else 2 * 0.9 / 128) * 1.01


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_of_a_block_and_zero_are_kept_exactly(signed):
    x = jnp.zeros((2, 64)).at[0, 5].set(3.7)
    got = there_and_back(x, SEEDS[1], signed)
    np.testing.assert_allclose(got, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_decodes_to_a_number_of_its_own_in_order(signed):
    codes = jnp.arange(-127, 128, dtype=jnp.int8) if signed else jnp.arange(256, dtype=jnp.uint8)
    values = np.asarray(jax.jit(moments.dequantise)(codes[None], jnp.ones((1, 1))))[0]
    assert (np.diff(values) > 0).all() and abs(values[-1] - 1) < 1e-6
    range_ = values[-1] / values[values > 0].min()
    assert range_ > (1e6 if signed else 1e14)  # seven decades; twice as many for a root


@pytest.mark.parametrize("way", ["bfloat16", "int8"])
def test_rounding_keeps_the_mean(way):
    x = numbers((4, 64), decades=2)

    def one(seed):
        if way == "int8":
            return there_and_back(x, seed)
        return moments.round_bfloat16(x, seed).astype(jnp.float32)

    got = np.asarray(jax.jit(jax.vmap(one))(SEEDS))
    spread = got.std(0) / len(SEEDS) ** 0.5
    assert (np.abs(got.mean(0) - x) <= 5 * spread + 0.03 * np.abs(x)).all()
    assert np.abs(got.mean() - x.mean()) < 1e-3 * np.abs(x).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_second_moment_falls_when_gradients_stay_away(dtype):
    """What rounding to the nearest would hinder: 0.999 of a number rounds to the number."""
    tx = moments.compressed(optax.scale_by_adam(b2=0.999), dtype)
    shape = (64, 64)

    @jax.jit
    def start():
        return tx.update(weight(numbers(shape, decades=0.5)), tx.init(weight(jnp.zeros(shape))))[1]

    state = start()

    def second(state):
        inner = state if dtype == "float32" else state.inner
        plain = jax.tree.map(moments._unpack, inner, is_leaf=moments._is_moment)
        return float(plain.nu["w"][...].mean())

    def quiet(state, _):
        return tx.update(weight(jnp.zeros(shape)), state)[1], None

    before = second(state)
    after = second(jax.jit(lambda s: jax.lax.scan(quiet, s, length=300)[0])(state))
    assert after / before == pytest.approx(0.999**300, rel=0.02)


def test_moments_of_matrices_take_two_bytes_or_one_and_a_sixteenth():
    params = weight(jnp.zeros((64, 128))) | {"b": nnx.Param(jnp.zeros(128), axes=("mlp",))}
    took = {}
    for dtype in ("float32", "bfloat16", "int8"):
        state = jax.eval_shape(moments.compressed(optax.scale_by_adam(), dtype).init, params)
        took[dtype] = moments.state_bytes(state)
    rest = 2 * 4 * 128 + 8  # the bias in float32, and two counters
    assert took["float32"] == 8 * 64 * 128 + rest - 4
    assert took["bfloat16"] == 4 * 64 * 128 + rest
    assert took["int8"] == 2 * (64 * 128 + 4 * 64 * 128 // 64) + rest


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_moments_begin_at_zero(dtype):
    state = moments.compressed(optax.scale_by_adam(), dtype).init(weight(jnp.ones((4, 64))))
    assert not any(x.any() for x in jax.tree.leaves(state))


def test_blocks_divide_the_axis_and_a_prime_axis_keeps_float32():
    assert [moments.block_size(n) for n in (4096, 11008, 48, 100, 67)] == [64, 64, 48, 50, 1]
    params = weight(jnp.zeros((8, 67)))
    state = jax.eval_shape(moments.compressed(optax.scale_by_adam(), "int8").init, params)
    assert state.inner.mu["w"].dtype == jnp.float32


def test_the_noise_is_that_of_the_step_so_a_resumed_run_rounds_alike():
    tx = moments.compressed(optax.scale_by_lion(), "int8")
    gradients = weight(numbers((16, 64), decades=3))
    update = jax.jit(lambda state: tx.update(gradients, state)[1])
    state = jax.jit(tx.init)(gradients)
    states = [state := update(state) for _ in range(2)]
    again = update(jax.tree.map(jnp.array, states[0]))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
