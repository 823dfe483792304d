"""Every optimiser does what its plain formula says, layer by layer, on any mesh, in any dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llmzoo_jax import checkpoint, models, moments, optim, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.config import ConfigError, MeshConfig, OptimConfig
from llmzoo_jax.models import layers
from llmzoo_jax.sharding import named_leaves, path_name
from tests import parity

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
DTYPES = ("float32", "bfloat16", "int8")
PLAIN = OptimConfig(
    learning_rate=0.02, schedule="constant", warmup_ratio=0.0, weight_decay=0.1, clip_norm=0.0
)


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
              for x in jax.tree.leaves(params)]  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def run(config, params, count=3):
    """Parameters after ``count`` updates with random gradients; of a config or a transformation."""
    tx = optim.update_rule(config, 10) if isinstance(config, OptimConfig) else config

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for seed in range(count):
        params, state = update(params, state, gradients(params, seed))
    return params


# --- against plain formulas ---------------------------------------------------------------------


def test_adamw_is_optax_adamw_bit_for_bit():
    config = dataclasses.replace(PLAIN, schedule="cosine", warmup_ratio=0.3, clip_norm=0.7)
    params = parity.our_model("bloom-7-heads")
    ours = run(config, params)
    theirs = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            optim.schedule(config, 10), b1=config.b1, b2=config.b2, eps=config.eps,
            weight_decay=config.weight_decay, mask=optim.decay_mask,
        ),
    )  # fmt: skip
    for name, x in named_leaves(run(theirs, params)).items():
        np.testing.assert_array_equal(named_leaves(ours)[name], x)


def orthogonal(x):
    """Five Newton-Schulz steps on one matrix (Jordan, 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if flip else x


def matrices_of(name, x, config):
    """The matrices that a weight of a layer holds, as views ``[in, out]``."""
    for layer in x:
        if name.endswith("qkv.w"):  # [D,N,3,H]
            yield from (layer[:, :, i].reshape(len(layer), -1) for i in range(3))
        elif name.endswith("out.w"):  # [N,H,D]
            yield layer.reshape(-1, layer.shape[-1])
        else:
            yield layer.reshape(len(layer), -1)


@pytest.mark.parametrize("case", ["bloom-6-heads-untied", "llama-gqa-4-to-1-bias"])
def test_muon_orthogonalises_each_matrix_of_each_layer_and_adam_does_the_rest(case):
    config = dataclasses.replace(PLAIN, optimizer="muon", weight_decay=0.0, b1=0.95)
    params = parity.our_model(case)
    got = named_leaves(run(config, params, count=2))
    adam = named_leaves(run(dataclasses.replace(config, optimizer="adamw"), params, count=2))
    grads = [named_leaves(gradients(params, seed)) for seed in range(2)]
    for name, before in named_leaves(params).items():
        if not (name.startswith("blocks.") and name.endswith(".w")):
            np.testing.assert_array_equal(got[name], adam[name])
            continue
        # Nesterov momentum with bias correction, as optax has it.
        moved = list(matrices_of(name, np.asarray(got[name] - before, np.float64), config))
        want = [0.0] * len(moved)
        m = [0.0] * len(moved)
        for t in (1, 2):
            parts = matrices_of(name, np.asarray(grads[t - 1][name], np.float64), config)
            for i, g in enumerate(parts):
                m[i] = 0.95 * m[i] + 0.05 * g
                hat = 0.95 * m[i] / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
                want[i] = want[i] - 0.02 * 0.2 * max(hat.shape) ** 0.5 * orthogonal(hat)
        for ours, theirs in zip(moved, want, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_factors_each_matrix_of_each_layer(b1):
    """Shazeer and Stern, 2018, algorithm 4 without its clipping, beside a first moment."""
    config = dataclasses.replace(PLAIN, optimizer="adafactor", weight_decay=0.0, b1=b1, eps=1e-5)
    params = toy(jax.random.key(0))
    got = named_leaves(run(config, params, count=2))
    before = named_leaves(params)
    name = "blocks.out.w"  # [L,N,H,D] as L matrices of [NH,D]
    moved = np.asarray(got[name] - before[name], np.float64).reshape(2, 32, 32)
    row, column, m, want = 0.0, 0.0, 0.0, 0.0
    for t in (1, 2):
        g = np.asarray(named_leaves(gradients(params, t - 1))[name], np.float64)
        g = g.reshape(2, 32, 32)
        decay = min(1 - t**-0.8, config.b2)
        square = g**2 + config.eps**2
        row = decay * row + (1 - decay) * square.mean(2, keepdims=True)
        column = decay * column + (1 - decay) * square.mean(1, keepdims=True)
        u = g / np.sqrt(row * column / row.mean(1, keepdims=True))
        m = b1 * m + (1 - b1) * u
        want = want - 0.02 * m / (1 - b1**t)
    np.testing.assert_allclose(moved, want, atol=2e-5)


def test_lion_moves_by_the_sign_of_its_momentum():
    config = dataclasses.replace(PLAIN, optimizer="lion", weight_decay=0.0, b1=0.8, b2=0.9)
    params = toy(jax.random.key(0))
    got, before = (named_leaves(x)["embed.w"] for x in (run(config, params, count=2), params))
    g = [np.asarray(named_leaves(gradients(params, seed))["embed.w"]) for seed in range(2)]
    want = -0.02 * (np.sign(g[0]) + np.sign(0.8 * 0.1 * g[0] + 0.2 * g[1]))
    np.testing.assert_allclose(got - before, want, atol=1e-6)


# --- a tiny problem, with everything that the models have ----------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        init = {"bias": True, "std": 0.1, "rngs": rngs}
        self.norm = layers.LayerNorm(32, eps=1e-5)
        self.up = layers.Proj((32,), (4, 8), axes=("embed", "heads", "head"), **init)
        self.out = layers.Proj((4, 8), (32,), axes=("heads", "head", "embed"), **init)


class Toy(nnx.Module):
    def __init__(self, rngs):
        self.embed = layers.Embedding(64, 32, std=0.5, rngs=rngs)
        self.blocks = layers.stack(Block, 2, rngs)


def toy(key) -> Toy:
    return Toy(nnx.Rngs(params=key))


def toy_loss(model, tokens, targets):
    x = model.embed(tokens, jnp.float32)

    def body(x, block):
        return x + block.out(jax.nn.gelu(block.up(block.norm(x)))), None

    x, _ = jax.lax.scan(body, x, model.blocks)
    logits = model.embed.logits(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def toy_step(tx):
    """A step on a fixed permutation of the 64 tokens, to be learnt by heart."""
    targets = jnp.asarray(np.random.default_rng(0).permutation(64))

    def step(state, _):
        loss, grads = jax.value_and_grad(toy_loss)(state.params, jnp.arange(64), targets)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return steps.TrainState(state.step + 1, params, opt_state), loss

    return step


def toy_config(optimizer, dtype, **keys):
    rate = {"lion": 2e-3}.get(optimizer, 1e-2)
    return dataclasses.replace(
        PLAIN, optimizer=optimizer, state_dtype=dtype, learning_rate=rate, weight_decay=0.0, **keys
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_learns_and_fewer_bits_learn_as_well(optimizer):
    last = {}
    for dtype in DTYPES:
        tx = optim.make_optimizer(toy_config(optimizer, dtype), 60)
        state = steps.start_state(toy(jax.random.key(1)), tx)
        state, losses = jax.jit(lambda s, tx=tx: jax.lax.scan(toy_step(tx), s, length=60))(state)
        assert losses[0] > 4
        last[dtype] = float(losses[-1])
    assert last["float32"] < 0.3
    assert last["bfloat16"] < last["float32"] * 1.1 + 0.02
    assert last["int8"] < last["float32"] * 1.3 + 0.05


# --- bytes, layout, resume ----------------------------------------------------------------------


def test_what_the_state_of_a_7b_llama_takes():
    """In bytes a parameter; Adafactor without a first moment keeps next to nothing."""
    from tests.test_sharding import CONFIGS

    model = dataclasses.replace(
        CONFIGS["llama"], vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, attention_bias=False,
        mlp_bias=False,
    )  # fmt: skip
    params = models.abstract(model)
    size = models.num_params(params)

    def took(optimizer, dtype, b1=0.9):
        tx = optim.make_optimizer(toy_config(optimizer, dtype, b1=b1), 1)
        return round(moments.state_bytes(jax.eval_shape(tx.init, params)) / size, 2)

    assert size == 6_738_415_616
    assert [took("adamw", dtype) for dtype in DTYPES] == [8.0, 4.0, 2.13]
    assert [took("lion", dtype) for dtype in DTYPES] == [4.0, 2.0, 1.06]
    assert [took("adafactor", dtype) for dtype in DTYPES] == [4.0, 2.0, 1.06]
    assert took("adafactor", "float32", b1=0.0) < 0.01
    assert took("muon", "float32") < 4.2 and took("muon", "int8") < 1.12


MESHES = {(1, 8, 1, 1): (("adamw", "int8"),)} | {
    (2, 2, 2, 1): (
        *((name, "float32") for name in OPTIMIZERS),
        ("muon", "int8"),
        ("adamw", "bfloat16"),
    )
}


@pytest.mark.parametrize(
    ("sizes", "optimizer", "dtype"), [(sizes, *way) for sizes in MESHES for way in MESHES[sizes]]
)
def test_state_is_laid_out_as_the_parameters_and_updates_agree(sizes, optimizer, dtype):
    params = toy(jax.random.key(2))
    tx = optim.make_optimizer(toy_config(optimizer, dtype), 10)
    grads = gradients(params, 0)

    def two(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return updates, state

    want, _ = jax.jit(two)(params, grads)
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
    layout = sharding.tree_shardings(jax.eval_shape(two, params, grads), mesh)
    own = sharding.tree_shardings(params, mesh)
    with jax.set_mesh(mesh):
        got, state = jax.jit(two, out_shardings=layout)(
            jax.device_put(params, own), jax.device_put(grads, own)
        )
    # Where a sum differs in its last bit, a number may be rounded the other way.
    near = 1e-6 if dtype == "float32" else 2e-3
    for name, x in named_leaves(want).items():
        np.testing.assert_allclose(named_leaves(got)[name], x, atol=near, err_msg=name)
    if optimizer == "adafactor":  # its factors are small, and whole on every device
        return
    held = {name: x.sharding.shard_shape(x.shape) for name, x in named_leaves(state).items()}
    layout_of = dict(zip(named_leaves(params), jax.tree.leaves(own), strict=True))
    for name, x in named_leaves(params).items():
        part = layout_of[name].shard_shape(x.shape)
        moments_of = [n for n in held if f".{name}" in n and not n.endswith("scales")]
        assert moments_of
        for moment in moments_of:
            assert held[moment] == part, moment


@pytest.mark.parametrize(("optimizer", "dtype"), [
    ("adamw", "int8"), ("adafactor", "bfloat16"), ("lion", "int8"), ("muon", "int8"),
])  # fmt: skip
def test_a_resumed_run_is_bitwise_the_undisturbed_one(optimizer, dtype, tmp_path):
    tx = optim.make_optimizer(toy_config(optimizer, dtype), 10)
    step = jax.jit(toy_step(tx))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    state = jax.jit(functools.partial(steps.start_state, tx=tx))(toy(jax.random.key(3)))
    abstract = jax.eval_shape(lambda: steps.start_state(toy(jax.random.key(3)), tx))
    for _ in range(3):
        state, _ = step(state, None)
    with checkpoint.open_manager(tmp_path) as manager:
        checkpoint.save(manager, state)
        checkpoint.wait(manager)
        again = checkpoint.restore(manager, abstract, mesh)
    for _ in range(3):
        state, loss = step(state, None)
        again, loss_again = step(again, None)
        assert loss == loss_again
    for name, x in named_leaves(state).items():
        np.testing.assert_array_equal(named_leaves(again)[name], x, err_msg=name)


# --- keys that would do nothing ------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "named"), [
    ({"optimizer": "lion", "eps": 1e-6}, r"optim\.eps=1e-06 has no effect with .*lion"),
    ({"optimizer": "adafactor", "b1": 0.0, "state_dtype": "int8"},
     r"optim\.state_dtype=int8 has no effect with .*adafactor"),
])  # fmt: skip
def test_a_key_without_effect_is_an_error_that_names_it(keys, named):
    with pytest.raises(ConfigError, match=named):
        optim.make_optimizer(dataclasses.replace(PLAIN, **keys), 10)


def test_weights_decay_and_norms_and_biases_do_not_whatever_the_optimiser():
    params = toy(jax.random.key(4))
    zeros = jax.tree.map(jnp.zeros_like, params)
    for optimizer in OPTIMIZERS:
        config = dataclasses.replace(PLAIN, optimizer=optimizer)
        tx = optim.make_optimizer(config, 10)
        updates = jax.jit(lambda p, tx=tx: tx.update(zeros, tx.init(p), p)[0])(params)
        for path, x in jax.tree_util.tree_flatten_with_path(updates)[0]:
            assert bool(jnp.any(x)) == path_name(path).endswith(".w"), (optimizer, path_name(path))
