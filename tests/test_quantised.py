"""Quantised weights: the error that their format allows, the bytes that they should hold, and the
numbers of an explicit dequantised copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import lora, models
from llmzoo_jax import step as steps
from llmzoo_jax.config import BloomConfig, ComputeConfig, LoraConfig
from llmzoo_jax.models import quantised
from llmzoo_jax.models.quantised import BLOCK, NF4_LEVELS, Int8, Nf4, QuantisationError
from tests import parity, test_sharding

SHAPES = {  # (inputs, outputs)
    "qkv": ((128,), (4, 3, 16)),
    "out": ((4, 128), (96,)),
    "short blocks": ((80,), (24,)),
}
AXES = ("embed", "heads", "head", "mlp")


def weight(inputs, outputs, seed=0):
    w = np.random.default_rng(seed).standard_normal((*inputs, *outputs)).astype(np.float32)
    w[(0,) * len(inputs)] *= 7.0  # outliers
    return w


def quantise(kind, w, num_inputs):
    return kind(jnp.asarray(w), num_inputs=num_inputs, axes=AXES[: w.ndim])


@pytest.mark.parametrize("name", SHAPES)
def test_int8_is_within_half_a_step_of_every_weight(name):
    inputs, outputs = SHAPES[name]
    w = weight(inputs, outputs)
    q = quantise(Int8, w, len(inputs))
    step = np.abs(w).max(tuple(range(len(inputs)))) / 127
    assert (np.abs(np.asarray(q.dense(jnp.float32)) - w) <= 0.5001 * step).all()
    assert q.codes[...].dtype == jnp.int8 and q.codes[...].shape == w.shape


def plain_nf4(w, inputs, block):
    """The paper's recipe in NumPy without double quantisation: levels of blocks along the inputs
    of an output, as bitsandbytes cuts torch's [out, in]."""
    rows = w.reshape(-1, np.prod(w.shape[len(inputs) :], dtype=int)).T  # [out,in]
    blocks = rows.reshape(-1, block)
    scale = np.abs(blocks).max(1, keepdims=True)
    levels = np.array(NF4_LEVELS, np.float32)
    nearest = np.abs((blocks / scale)[..., None] - levels).argmin(-1)
    return (levels[nearest] * scale).reshape(rows.shape).T.reshape(w.shape)


@pytest.mark.parametrize("name", SHAPES)
def test_nf4_is_that_of_the_paper_up_to_its_scales_of_8_bits(name):
    inputs, outputs = SHAPES[name]
    w = weight(inputs, outputs)
    q = quantise(Nf4, w, len(inputs))
    assert q.block == (BLOCK if inputs[-1] % BLOCK == 0 else 40)
    dense, want = np.asarray(q.dense(jnp.float32)), plain_nf4(w, inputs, q.block)
    error, least = (np.sqrt(np.mean((x - w) ** 2)) for x in (dense, want))
    print(f"{name}: {error:.4f}, without double quantisation {least:.4f}")
    assert error <= 1.02 * least
    close = np.abs(dense - want) <= 0.02 * np.abs(want) + 1e-6
    assert close.mean() > 0.98  # the others are between two levels


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Appendix E: 8 quantiles below 0 and 9 above, zero in both, scaled to [-1, 1]."""
    from statistics import NormalDist

    offset = 0.9677083  # the mean of 1 - 1/30 and 1 - 1/32
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above])) / max(above)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(quantised._levels(codes), np.array(NF4_LEVELS, np.float32))
    np.testing.assert_array_equal(quantised._nearest_level(jnp.array(NF4_LEVELS)), codes)


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_zeros_and_equal_weights_come_back(kind):
    for value in (0.0, -0.5):
        w = np.full((64, 6), value, np.float32)
        np.testing.assert_allclose(quantise(kind, w, 1).dense(jnp.float32), w, rtol=1e-6)


def test_an_odd_axis_has_no_nf4():
    with pytest.raises(QuantisationError, match=r"size 9 can't be cut into pairs; take int8"):
        quantise(Nf4, np.ones((9, 4), np.float32), 1)


# --- in a model ---------------------------------------------------------------------------------

BLOOM_7B1 = BloomConfig(
    vocab_size=250880, hidden_size=4096, num_layers=30, num_heads=32, layer_norm_eps=1e-5,
    residual_post_layernorm=False, tie_embeddings=True, init_std=0.02,
)  # fmt: skip


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("quantise", "gigabytes", "bits"),
    [("none", 14.14, 16.0), ("int8", 8.11, 8.01), ("nf4", 5.18, 4.14)],
)
def test_a_base_holds_the_bytes_that_its_format_says(quantise, gigabytes, bits):
    """BLOOM-7b1 with a bfloat16 embedding: by shapes and dtypes, no array is made."""
    config = LoraConfig(base_dtype="bfloat16", quantise=quantise)
    freeze = functools.partial(lora.freeze, config=config)
    base = jax.eval_shape(freeze, models.abstract(BLOOM_7B1))
    assert nbytes(base) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    weights = [lora.module(base, path).w for path in lora.TARGETS["bloom"].values()]
    assert 8 * nbytes(weights) / (12 * 30 * 4096**2) == pytest.approx(bits, abs=0.01)
    assert base.embed.w.dtype == base.norm.scale.dtype == base.blocks.up.b.dtype == jnp.bfloat16


def test_arrays_in_memory_are_as_small_as_their_shapes_say():
    model = test_sharding.model_of("llama")
    dense = nbytes(lora.freeze(model, LoraConfig()))
    sizes = {}
    for quantise in ("int8", "nf4"):
        base = lora.freeze(model, LoraConfig(quantise=quantise))
        weights = [lora.module(base, path).w for path in lora.TARGETS["llama"].values()]
        assert sum(x.nbytes for x in jax.tree.leaves(weights)) == nbytes(weights)
        sizes[quantise] = dense - nbytes(base)
    projections = sum(
        x.size for path in lora.TARGETS["llama"].values()
        for x in jax.tree.leaves(lora.module(model, path).w)
    )  # fmt: skip
    assert sizes["int8"] > 2.8 * projections  # of 4 bytes, one is left, and the scales
    assert sizes["nf4"] > 3.2 * projections


def wide(num_layers):
    """Large projections, small activations: the bytes of a step are those of its weights."""
    return BloomConfig(
        vocab_size=64, hidden_size=512, num_layers=num_layers, num_heads=4, layer_norm_eps=1e-5,
        residual_post_layernorm=False, tie_embeddings=True, init_std=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_one_layer_at_a_time_is_dense(remat):
    """The compiled gradient's scratch memory does not grow by dense layers."""
    config = LoraConfig(rank=4, dropout=0.0, quantise="nf4")
    batch = jax.tree.map(lambda x: x[:1], test_sharding.packed_batch())
    grads = functools.partial(
        steps.loss_and_grads, compute=ComputeConfig(remat=remat), accumulation=1
    )
    scratch = []
    for num_layers in (2, 8):
        model = wide(num_layers)
        base = jax.eval_shape(functools.partial(lora.freeze, config=config), models.abstract(model))
        adapters = lora.abstract(config, model)
        compiled = jax.jit(lambda a, b: grads(a, batch, base=b)).lower(adapters, base)
        scratch.append(compiled.compile().memory_analysis().temp_size_in_bytes)
    layer = 4 * 12 * 512**2  # float32
    print(f"{remat}: {scratch[0] / layer:.2f} and {scratch[1] / layer:.2f} dense layers")
    assert scratch[0] < 1.5 * layer
    assert scratch[1] - scratch[0] < 0.5 * layer  # six layers more; it grows by activations alone


@pytest.mark.parametrize(
    ("family", "quantise"),
    [
        ("bloom", "nf4"),
        ("llama", "int8"),
        pytest.param("bloom", "int8", marks=pytest.mark.slow),
        pytest.param("llama", "nf4", marks=pytest.mark.slow),
    ],
)
def test_a_quantised_base_computes_what_its_dense_copy_does(family, quantise):
    """Loss and gradients, against float32 weights made dense beforehand; and near those of the
    weights before they were quantised."""
    config = LoraConfig(rank=2, targets=tuple(lora.TARGETS[family])[:1], quantise=quantise)
    model, batch = test_sharding.CONFIGS[family], test_sharding.packed_batch()
    base = lora.freeze(test_sharding.model_of(family), config)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora.abstract(config, model)
    )
    dense = lora.merge(base, {})
    grads = jax.jit(
        functools.partial(steps.loss_and_grads, compute=ComputeConfig(), accumulation=1)
    )
    loss, _, got = grads(adapters, batch, base=base)
    want_loss, _, want = grads(adapters, batch, base=dense)
    assert abs(float(loss) - float(want_loss)) <= 1e-6
    assert parity.max_difference(got, want) <= 1e-6
    exact, _, _ = grads(adapters, batch, base=test_sharding.model_of(family))
    error = abs(float(loss) / float(exact) - 1)
    print(f"{family} {quantise}: loss {exact:.4f}, off by {error:.2%}")
    assert 0 < error < {"int8": 0.001, "nf4": 0.02}[quantise]
