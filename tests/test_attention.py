"""Attention in blocks gives what attention by way of all scores gives, gradients too."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import sharding
from llmzoo_jax.config import ComputeConfig, MeshConfig
from llmzoo_jax.models import attention, packed_attention, splash, triton_attention
from tests import parity

MESH = MeshConfig(replica=2, fsdp=2, tensor=2, sequence=1)
TOLERANCE = 1e-5  # absolute, of values near 1
BLOCK = 8
LENGTHS = [5, 8, 9, 24, 30]  # below, at and over a block; whole blocks; a part of one behind
KINDS = {  # (K, G, with ALiBi)
    "llama": (2, 1, False),
    "llama, grouped queries": (2, 3, False),
    "bloom": (3, 1, True),
}
WAYS = {  # the kernels run as plain JAX here
    "blocks": packed_attention.packed_attention,
    "triton": functools.partial(
        packed_attention.packed_attention, kernel=triton_attention.kernel(interpret=True)
    ),
    "splash": functools.partial(splash.splash_attention, interpret=True),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed_attention, "BLOCK", BLOCK)


def random_case(kind, length, seed=0):
    """q, k, v, what ALiBi needs, and rows of random runs of segments with padding behind."""
    K, G, alibi = KINDS[kind]
    rng = np.random.default_rng(seed)
    B, H = 3, 4
    q = rng.standard_normal((B, K, G, length, H), np.float32)
    k, v = rng.standard_normal((2, B, K, length, H), np.float32)
    segment_ids = np.zeros((B, length), np.int32)
    segment_ids[0] = 1  # one segment, no padding
    for row in segment_ids[1:]:
        used = rng.integers(1, length + 1)
        row[:used] = 1 + np.cumsum(rng.random(used) < 0.2)
    mask = attention.packed_mask(jnp.asarray(segment_ids))
    bias = {}
    if alibi:
        slopes = jnp.asarray(attention.alibi_slopes(K), jnp.float32)[:, None]
        bias = {"slopes": slopes, "positions": jnp.broadcast_to(jnp.arange(length), (B, length))}
    return (jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)), mask, bias, segment_ids


def value_and_gradients(function, arrays):
    """The output, and the gradients of a sum in which every element counts differently."""

    @jax.jit
    def run(arrays):
        out = function(*arrays)
        weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)

        def loss(arrays):
            return (function(*arrays).astype(jnp.float32) * weights).sum()

        return out, jax.grad(loss)(arrays)

    return run(arrays)


def both(kind, length, dtype=jnp.float32, way="blocks"):
    arrays, mask, bias, _ = random_case(kind, length)
    arrays = tuple(x.astype(dtype) for x in arrays)
    got = functools.partial(WAYS[way], starts=mask.first, **bias)
    plain = functools.partial(attention.plain_attention, mask=mask, **bias)
    return value_and_gradients(got, arrays), value_and_gradients(plain, arrays)


def worst(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(parity.max_difference(x.astype(np.float32), y.astype(np.float32)) for x, y in pairs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_all_scores(kind, length, small_blocks):
    got, want = both(kind, length)
    assert worst(got, want) <= TOLERANCE


@pytest.mark.parametrize("length", [30, 300])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["triton", "splash"])
def test_kernels_equal_all_scores(way, kind, length):
    got, want = both(kind, length, way=way)
    assert worst(got, want) <= TOLERANCE


def test_alibi_is_exact_in_bfloat16_features():
    """Where all other features are 0, bfloat16 scores are float32's: slopes and positions that no
    single bfloat16 holds, and weights that a rounded slope would move."""
    length, heads = 700, 3
    q = jnp.zeros((1, heads, 1, length, 8), jnp.bfloat16)
    k = jnp.zeros((1, heads, length, 8), jnp.bfloat16)
    v = jnp.eye(length, dtype=jnp.bfloat16)[None, None].repeat(heads, 1)[..., -8:]  # last weights
    slopes = jnp.asarray([[0.7071], [0.0123], [0.3333]], jnp.float32)
    positions = jnp.arange(length)[None]
    starts = jnp.zeros((1, length), jnp.int32)
    bias = {"slopes": slopes, "positions": positions}
    got = WAYS["splash"](q, k, v, starts, **bias)[0, :, 0, -1]
    scores = slopes * positions.astype(jnp.float32)  # [heads, length]
    want = jax.nn.softmax(scores, axis=-1)[:, -8:]
    np.testing.assert_allclose(np.float32(got), want, rtol=2**-8, atol=1e-6)  # bfloat16's output


def test_bfloat16_stays_near_float32(small_blocks):
    got, _ = both("bloom", 24, jnp.bfloat16)
    _, want = both("bloom", 24)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
    assert worst(got, want) <= 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_other_segments_and_later_keys_change_no_bit(kind, small_blocks):
    (q, k, v), mask, bias, segment_ids = random_case(kind, 30, seed=1)
    run = jax.jit(functools.partial(packed_attention.packed_attention, starts=mask.first, **bias))
    row, query = 1, int((segment_ids[1] == 2).argmax()) + 1
    seen = (segment_ids[row] == segment_ids[row, query]) & (np.arange(30) <= query)
    strange = jnp.where(seen[:, None], 0.0, 1e4)
    changed = run(q, k.at[row].add(strange), v.at[row].add(strange))
    np.testing.assert_array_equal(run(q, k, v)[row, ..., query, :], changed[row, ..., query, :])


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        q = jax.ShapeDtypeStruct((1, 2, 1, length, 16), jnp.float32)
        starts = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, starts):
            return packed_attention.packed_attention(q, k, v, starts).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, x, x, starts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 5 * temporaries(2048)


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_changes_nothing(way):
    arrays, mask, bias, _ = random_case("bloom", 24)
    take = np.arange(8) % 3
    q, k, v = (jnp.concatenate([x, x], axis=1)[take] for x in arrays)  # 6 heads
    bias = {"slopes": jnp.tile(bias["slopes"], (2, 1)), "positions": bias["positions"][take]}
    run = jax.jit(functools.partial(WAYS[way], starts=mask.first[take], **bias))
    want = run(q, k, v)
    with jax.set_mesh(sharding.make_mesh(MESH)):
        got = jax.jit(functools.partial(WAYS[way], starts=mask.first[take], **bias))(q, k, v)
    assert parity.max_difference(got, want) <= TOLERANCE


def test_rows_that_a_mesh_does_not_divide_are_computed_as_one_or_refused(small_blocks):
    (q, k, v), mask, bias, _ = random_case("llama", 24)  # 3 rows
    want = packed_attention.packed_attention(q, k, v, mask.first, **bias)
    with jax.set_mesh(sharding.make_mesh(MESH)):
        got = jax.jit(packed_attention.packed_attention)(q, k, v, mask.first, **bias)
        assert parity.max_difference(got, want) <= TOLERANCE
        for way in ("triton", "splash"):
            with pytest.raises(sharding.ShardingError, match=r"'batch' of size 3.*replica\*fsdp"):
                WAYS[way](q, k, v, mask.first, **bias)


@pytest.mark.parametrize(
    ("name", "platform", "chosen"),
    [
        ("auto", "cpu", "blocks"),
        ("auto", "tpu", "splash"),
        ("auto", "gpu", "triton"),
        ("blocks", "tpu", "blocks"),
        ("scores", "gpu", "scores"),
    ],
)
def test_auto_takes_the_backends_kernel(name, platform, chosen):
    assert attention.choose(name, platform) == chosen


@pytest.mark.parametrize(("name", "platform"), [("splash", "cpu"), ("triton", "tpu")])
def test_a_kernel_elsewhere_is_refused_by_name(name, platform):
    with pytest.raises(attention.AttentionError, match=f"compute.attention={name}.*{platform}"):
        attention.choose(name, platform)


def test_every_choice_of_the_config_is_implemented():
    choices = typing.get_args(typing.get_type_hints(ComputeConfig)["attention"])
    assert set(choices) == {"auto", *attention.IMPLEMENTATIONS}


def test_positions_that_the_features_do_not_hold_are_refused(monkeypatch):
    splash_16 = attention.IMPLEMENTATIONS["splash"]._replace(max_positions=16)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", splash_16)
    x = jnp.zeros((1, 17, 1, 4))
    mask = attention.packed_mask(jnp.ones((1, 17), jnp.int32))
    with pytest.raises(attention.AttentionError, match=r"up to 16.*have 17.*blocks"):
        attention.attend(
            x,
            jnp.swapaxes(x, 1, 2),
            jnp.swapaxes(x, 1, 2),
            mask,
            alibi_slopes=jnp.ones(1),
            key_positions=jnp.arange(17)[None],
            implementation="splash",
        )


def test_a_packed_mask_begins_at_each_run_of_segment_ids():
    mask = attention.packed_mask(jnp.array([[1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1]]))
    assert mask.first.tolist() == [[0, 0, 2, 3, 3, 5, 5], [0] * 7]
    assert mask.last is None
