"""The models compute what Hugging Face computes, whatever the layout, the cache or the remat."""

import ast
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import generate, models, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.config import BloomConfig, ComputeConfig, LlamaConfig, RopeConfig
from llmzoo_jax.models import attention, layers, packed_attention, splash, triton_attention
from llmzoo_jax.models.panels import Panels
from llmzoo_jax.packing import Batch
from tests import parity

TOLERANCE = 1e-4  # of logits, absolute
T = 160  # more than a block of attention
# Rows of segments: one, many, single tokens, a full row, padding behind.
PACKED = ([50, 1, 30, 79], [160], [3, 2, 1, 60])


def random_tokens(config, shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


# --- parity with transformers on torch ----------------------------------------------------------


@pytest.mark.parametrize("case", parity.CASES)
def test_right_padded_logits_equal_transformers(case):
    theirs, ours = parity.pair(case)
    lengths = [160, 77, 1]
    tokens = random_tokens(ours.config, (3, T))
    real = parity.padding_mask(tokens.shape, lengths)
    segment_ids, positions = parity.segments([[n] for n in lengths], T)
    got = np.asarray(parity.forward(ours, tokens, segment_ids, positions))
    want = parity.torch_logits(theirs, tokens, lengths)
    assert got.dtype == np.float32
    difference = parity.max_difference(got[real], want[real])
    print(f"{case}: {difference:.1e} of {np.abs(want[real]).max():.1f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("case", parity.CASES)
def test_each_packed_segment_equals_transformers_on_it_alone(case):
    theirs, ours = parity.pair(case)
    tokens = random_tokens(ours.config, (len(PACKED), T), seed=1)
    got = np.asarray(parity.forward(ours, tokens, *parity.segments(PACKED, T)))
    worst = 0.0
    for row, sizes in enumerate(PACKED):
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            here = (row, slice(start, start + size))
            want = parity.torch_logits(theirs, tokens[here][None])[0]
            worst = max(worst, parity.max_difference(got[here], want))
    print(f"{case}: {worst:.1e}")
    assert worst <= TOLERANCE


def test_alibi_slopes_equal_transformers_for_1_to_70_heads():
    torch = pytest.importorskip("torch")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones((1, 2), dtype=torch.int64)
    for heads in range(1, 71):
        want = build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1].numpy()
        np.testing.assert_allclose(attention.alibi_slopes(heads), want, rtol=1e-6)


# --- one model, several ways to compute it ------------------------------------------------------


@pytest.mark.parametrize(
    "case", [*parity.FAMILIES, "bloom-5-heads-post-norm", "llama-mqa-mlp-bias"]
)
@pytest.mark.parametrize("form", ["stacked", "prepared"])
def test_cached_decoding_equals_the_full_forward(case, form):
    """A ragged prefill, then single tokens, each row at its own position."""
    config, model = parity.our_config(case), parity.our_model(case)
    lengths, slots, decoded = np.array([11, 1, 16, 7]), 40, 6
    tokens = random_tokens(config, (4, 24), seed=2)
    rows = np.arange(4)
    full = np.asarray(
        parity.forward(model, tokens, *parity.segments([[24]] * 4, 24)),
    )
    used = generate.prepare(model) if form == "prepared" else model
    cache = models.init_cache(
        config, 4, slots, dtype=jnp.float32, unrolled=isinstance(used.blocks, tuple)
    )

    @jax.jit
    def extend(model, cache, tokens, positions):
        x, cache = model.hidden(tokens, models.cache_mask(positions), positions, kv_cache=cache)
        return model.logits(x), cache

    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    prompt = np.where(positions < lengths[:, None], tokens[:, :16], 0)
    logits, cache = extend(used, cache, prompt, positions)
    differences = [
        parity.max_difference(logits[row, :n], full[row, :n]) for row, n in enumerate(lengths)
    ]
    for i in range(decoded):
        at = lengths + i
        logits, cache = extend(used, cache, tokens[rows, at][:, None], at[:, None].astype(np.int32))
        differences.append(parity.max_difference(logits[:, 0], full[rows, at]))
    print(f"{case} {form}: {max(differences):.1e}")
    assert max(differences) <= TOLERANCE


def packed_batch(config, length=24) -> Batch:
    """Two packed rows with padding and loss tokens here and there."""
    segment_ids, positions = parity.segments([[9, 1, 12], [7, 5]], length)
    rng = np.random.default_rng(3)
    return Batch(
        tokens=random_tokens(config, (2, length), seed=4),
        targets=random_tokens(config, (2, length), seed=5),
        loss_mask=(rng.random((2, length)) < 0.6) & (segment_ids > 0),
        segment_ids=segment_ids,
        positions=positions,
    )


@functools.cache
def loss_and_gradients(case, **compute):
    config, model = parity.our_config(case), parity.our_model(case)
    run = functools.partial(steps.loss_and_grads, compute=ComputeConfig(**compute), accumulation=1)
    loss, _, grads = jax.jit(run)(model, packed_batch(config))
    return float(loss), grads


@pytest.mark.parametrize("case", parity.FAMILIES)
@pytest.mark.parametrize(
    ("remat", "loss_chunk"),
    [("full", 0), ("dots", 10), ("none", 1), ("full", 1000), ("offload", 0)],
)
def test_remat_and_chunked_loss_change_nothing(case, remat, loss_chunk):
    loss, grads = loss_and_gradients(case, remat=remat, loss_chunk=loss_chunk)
    plain_loss, plain_grads = loss_and_gradients(case, remat="none", loss_chunk=0)
    assert abs(loss - plain_loss) <= 1e-5
    assert parity.max_difference(grads, plain_grads) <= 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain_grads)) > 1e-2


KERNELS_AS_PLAIN_JAX = {
    "blocks": packed_attention.packed_attention,
    "splash": functools.partial(splash.splash_attention, interpret=True),
    "triton": functools.partial(
        packed_attention.packed_attention, kernel=triton_attention.kernel(interpret=True)
    ),
}


@pytest.mark.parametrize("case", parity.FAMILIES)
@pytest.mark.parametrize("name", KERNELS_AS_PLAIN_JAX)
def test_every_attention_gives_the_loss_and_gradients_of_all_scores(case, name, monkeypatch):
    here = attention.IMPLEMENTATIONS[name]._replace(function=KERNELS_AS_PLAIN_JAX[name])
    monkeypatch.setitem(attention.IMPLEMENTATIONS, name, here)
    loss, grads = loss_and_gradients(case, remat="dots", attention=name)
    plain_loss, plain_grads = loss_and_gradients(case, remat="none", attention="scores")
    assert abs(loss - plain_loss) <= 1e-5
    assert parity.max_difference(grads, plain_grads) <= 1e-5


@pytest.mark.parametrize("case", parity.FAMILIES)
def test_bfloat16_is_finite_and_near_float32(case):
    config, model = parity.our_config(case), parity.our_model(case)
    tokens = random_tokens(config, (3, T))
    layout = parity.segments(PACKED, T)
    full = np.asarray(parity.forward(model, tokens, *layout))
    half = parity.forward(model, tokens, *layout, dtype="bfloat16")
    assert half.dtype == jnp.float32  # logits are float32 whatever the activations are
    assert np.isfinite(half).all()
    error = np.sqrt(np.square(half - full).mean() / np.square(full).mean())
    print(f"{case}: relative error {error:.1e}")
    assert 0 < error < 0.03


# --- abstract models ----------------------------------------------------------------------------

LLAMA_13B = LlamaConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    max_positions=2048,
    attention_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
    init_std=0.02,
)
BLOOM_7B1 = BloomConfig(
    vocab_size=250880,
    hidden_size=4096,
    num_layers=30,
    num_heads=32,
    layer_norm_eps=1e-5,
    residual_post_layernorm=False,
    tie_embeddings=True,
    init_std=0.02,
)


@pytest.mark.parametrize(
    ("config", "size"), [(BLOOM_7B1, 7_069_016_064), (LLAMA_13B, 13_015_864_320)]
)
def test_abstract_models_have_the_published_size_and_allocate_nothing(config, size):
    before = {id(x) for x in jax.live_arrays()}
    model = models.abstract(config)
    assert models.num_params(model) == size
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(model))
    assert {id(x) for x in jax.live_arrays()} <= before


# --- products that decode -----------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(3,), (2, 1), (1, 1), (layers.FEW_ROWS + 1,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("panels", [False, True])
def test_a_product_with_a_weight_in_rows_or_panels_equals_numpys(lead, dtype, panels):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (*lead, 8), dtype)
    rows = jax.random.normal(keys[1], (126, 8), dtype)
    w = layers.decoding_weight(rows, ("mlp", "embed"), shards=1, panels=panels)
    assert isinstance(w, Panels) == (panels and dtype == jnp.float32)
    y = jax.jit(lambda x, w: layers.decoding_product(x, w, out=jnp.float32))(x, w)
    assert y.dtype == jnp.float32 and layers.decoding_product(x, w).dtype == dtype
    want = np.asarray(x, np.float32) @ np.asarray(rows, np.float32).T
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "shards", "panels"),
    [(256, 2, 4), (250, 2, 4), (1376 * 2, 2, 44), (192, 2, 0), (257, 2, 0)],
)
def test_panels_are_those_of_shards_and_little_is_padded(rows, shards, panels):
    w = jnp.arange(rows * 4.0).reshape(rows, 4)
    weight = layers.decoding_weight(w, ("mlp", "embed"), shards=shards, panels=True)
    if not panels:
        assert weight.shape == w.shape
        return
    assert weight.values.shape == (panels, 4, 64)
    assert weight.values.get_metadata()["axes"] == ("mlp", "embed", None)
    np.testing.assert_array_equal(weight.matmul(jnp.eye(4)), w.T)


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_cpu_reads_bfloat16_weights_as_they_are(rows):
    """And holds none of them as float32: see ``sharding.compiler_options``. Not of small ones."""
    x, w = jnp.zeros((rows, 512), jnp.bfloat16), jnp.zeros((1024, 512), jnp.bfloat16)
    options = sharding.compiler_options(None) | {"xla_backend_optimization_level": 3}
    lowered = jax.jit(layers.matmul_transposed).lower(x, w)
    entry = lowered.compile(compiler_options=options).as_text().partition("\nENTRY")[2]
    found = set(re.findall(r"\w+\[1024,512\]", entry))
    assert found == {"bf16[1024,512]"}


def test_a_cpu_gets_the_weight_first_and_keeps_it_there():
    """What the compiler makes of it with all its passes: see ``layers.matmul_transposed``."""
    x, w = jnp.zeros((16, 32)), jnp.zeros((64, 32))
    lowered = jax.jit(lambda x, w: jax.nn.relu(layers.matmul_transposed(2 * x, w))).lower(x, w)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 3})
    (product,) = re.findall(r"= (f32\[\d+,\d+\])\S* dot\(", compiled.as_text())
    assert product == "f32[64,16]"


# --- modules are plain pytrees ------------------------------------------------------------------

TRANSFORMS = {
    "jit", "grad", "value_and_grad", "vjp", "jvp", "scan", "vmap", "pmap", "shard_map", "remat",
    "checkpoint", "cond", "while_loop", "fori_loop", "custom_vjp", "eval_shape", "Optimizer",
    "StateAxes", "sow", "Sequential",
}  # fmt: skip


def test_no_nnx_transform_and_no_variable_value_is_used(repository):
    found = []
    for path in sorted((repository / "llmzoo_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            transform = owner == "nnx" and node.attr in TRANSFORMS
            value = node.attr == "value" and not owner.isupper()  # FLAG.value is absl's
            if transform or value:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found
