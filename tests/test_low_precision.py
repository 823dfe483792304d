"""Products in 8 bits are as near as their formats allow, depend on nothing that they should not,
and train as bfloat16 does."""

import functools
import importlib.util
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import flops, lora, models, optim, program, sharding, targets
from llmzoo_jax import step as steps
from llmzoo_jax.config import (
    BloomConfig,
    ComputeConfig,
    ConfigError,
    LoraConfig,
    OptimConfig,
)
from llmzoo_jax.models import low_precision
from llmzoo_jax.models.layers import Proj
from llmzoo_jax.models.low_precision import FORMATS, Codes, Weight, quantise
from llmzoo_jax.packing import Batch
from tests import test_sharding

KINDS = tuple(FORMATS)
DTYPES = (jnp.int8, jnp.float8_e4m3fn)
B, T, K, N = 3, 40, 96, 160


def random_problem(seed=0):
    """``x[B,T,K], w[K,N], dy[B,T,N]`` with rows, columns and outliers of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, T, K)) * np.exp(2 * rng.standard_normal((B, T, 1)))
    w = 0.1 * rng.standard_normal((K, N)) * np.exp(rng.standard_normal((1, N)))
    dy = rng.standard_normal((B, T, N)) * np.exp(3 * rng.standard_normal((B, T, 1)))
    x[..., 5] *= 8.0
    return tuple(a.astype(np.float32) for a in (x, w, dy))


@functools.cache
def products(kind):
    """``(x, w, dy) -> (y, dx, dw)``, jitted."""

    def run(x, w, dy):
        y, backward = jax.vjp(lambda x, w: low_precision.matmul(x, w, kind), x, w)
        return y, *backward(dy)

    return jax.jit(run)


def exact(x, w, dy):
    """``(y, dx, dw)`` in float64."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    return x @ w, dy @ w.T, np.einsum("btk,btn->kn", x, dy)


def dense(q: Codes) -> np.ndarray:
    return np.asarray(q.values.astype(jnp.float32) * q.scale)


def rounding(x, axes, dtype) -> np.ndarray:
    """How far a number may be from its code: half a step of int8, half of the last bit of a float8
    or of its smallest number; and a little for the scale, which is a float32."""
    scale = np.abs(x).max(axes, keepdims=True)
    if dtype == jnp.int8:
        return 0.5001 * scale / 127 * np.ones_like(x)
    info = jnp.finfo(dtype)
    half = 0.5001 * float(info.eps)
    return np.maximum(half * np.abs(x), half * float(info.tiny) * scale / float(info.max))


# --- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [-1, (0, 1)])
def test_a_code_is_the_nearest_to_its_number_and_the_largest_are_exact(axes, dtype):
    x = random_problem()[0]
    q = quantise(jnp.asarray(x), axes, dtype)
    assert q.values.dtype == dtype and q.scale.dtype == jnp.float32
    assert (np.abs(dense(q) - x) <= rounding(x, axes, dtype)).all()
    largest = np.abs(x) == np.abs(x).max(axes, keepdims=True)
    np.testing.assert_allclose(dense(q)[largest], x[largest], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(dtype):
    x = np.ones((5, 4), np.float32)
    x[0], x[1] = 0.0, 1e-43  # the second has no inverse
    x[2, 1], x[3, 2] = np.nan, np.inf
    got = dense(quantise(jnp.asarray(x), -1, dtype)).sum(1)
    assert (got[:2] == 0.0).all() and not np.isfinite(got[2:4]).any() and got[4] == 4.0


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_within_the_rounding_of_their_codes(kind):
    """For every number: the sum of what the operands may be off, at the worst; and in all, what
    errors that are independent leave of it."""
    form, (x, w, dy) = FORMATS[kind], random_problem()
    got, want = products(kind)(x, w, dy), exact(x, w, dy)
    qx, qw = (quantise(jnp.asarray(a), axes, form.codes) for a, axes in ((x, -1), (w, 0)))
    ex, ew = rounding(x, -1, form.codes), rounding(w, 0, form.codes)
    ax, aw, ady = np.abs(x), np.abs(w), np.abs(dy)
    # What dy is made codes with: the scale of the other side is in it.
    e_dx = rounding(dy * np.asarray(qw.scale), -1, form.codes) / np.asarray(qw.scale)
    e_dw = rounding(dy * np.asarray(qx.scale), (0, 1), form.codes) / np.asarray(qx.scale)
    bounds = {
        "y": (ax + ex) @ (aw + ew) - ax @ aw,
        "dx": (ady + e_dx) @ (aw + ew).T - ady @ aw.T,
        "dw": np.einsum("btk,btn->kn", ax + ex, ady + e_dw) - np.einsum("btk,btn->kn", ax, ady),
    }
    for name, a, b in zip(bounds, got, want, strict=True):
        relative = np.linalg.norm(a - b) / np.linalg.norm(b)
        print(f"{kind} {name}: {relative:.4f} of it")
        if name == "dw" and not form.dw:
            assert relative <= 1e-6
            continue
        assert (np.abs(a - b) <= bounds[name] + 1e-5 * np.abs(b).max()).all()
        assert relative <= (0.03 if kind == "int8" else 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_the_nearest_loses_nothing_on_the_whole(kind):
    """Products and gradients are neither smaller nor larger than in float64: their errors are
    across them. So no noise is needed. Of normal numbers there are fewer at the far end of what a
    float8 rounds to one, which takes ``eps**2 / 12`` of them at most."""
    rng = np.random.default_rng(1)
    shapes = (4, 64, 128), (128, 192), (4, 64, 192)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    for a, b in zip(products(kind)(x, w, dy), exact(x, w, dy), strict=True):
        lost = 2 * 2**-6 / 12 if kind == "fp8" else 1e-3
        assert abs(np.vdot(a, b) / np.vdot(b, b) - 1) <= lost


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_product_that_was_computed(kind):
    """Where a row (for dw: a column) of dy has one number only, its code is exact."""
    form, (x, w, dy) = FORMATS[kind], random_problem()
    wq = dense(quantise(jnp.asarray(w), 0, form.codes))
    one_a_row = np.where(np.arange(N) == np.arange(T)[:, None], dy, 0.0).astype(np.float32)
    dx = products(kind)(x, w, one_a_row)[1]
    np.testing.assert_allclose(dx, one_a_row @ wq.T, rtol=1e-5, atol=1e-6 * np.abs(dx).max())
    xq = dense(quantise(jnp.asarray(x), -1, form.codes)) if form.dw else x
    one_a_column = dy * (np.arange(T)[:, None] == 7) * (np.arange(B)[:, None, None] == 1)
    dw = products(kind)(x, w, one_a_column)[2]
    want = np.einsum("btk,btn->kn", xq, one_a_column)
    np.testing.assert_allclose(dw, want, rtol=1e-5, atol=1e-6 * np.abs(dw).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_no_other_row_and_an_output_on_no_other_output(kind):
    x, w, dy = random_problem()
    y, dx, _ = products(kind)(x, w, dy)
    others = np.arange(T)[:, None] != 3
    far = [np.where(others, 1e4 * a, a).astype(np.float32) for a in (x, dy)]
    y_far, dx_far, _ = products(kind)(far[0], w, far[1])
    np.testing.assert_array_equal(y[:, 3], y_far[:, 3])
    np.testing.assert_array_equal(dx[:, 3], dx_far[:, 3])
    w_far = np.where(np.arange(N) != 3, 1e4 * w, w).astype(np.float32)
    np.testing.assert_array_equal(y[..., 3], products(kind)(x, w_far, dy)[0][..., 3])


@pytest.mark.parametrize("kind", KINDS)
def test_results_have_the_dtypes_of_what_they_are_of(kind):
    x, w, dy = random_problem()
    y, dx, dw = products(kind)(x.astype(jnp.bfloat16), w, dy.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    full = products(kind)(x, w, dy)
    for a, b in zip((y, dx, dw), full, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error <= (0.02 if kind == "int8" else 0.06)


# --- models -------------------------------------------------------------------------------------


@functools.cache
def loss_and_grads(matmul, accumulation=1, **compute):
    compute = ComputeConfig(matmul=matmul, **compute)
    return jax.jit(
        functools.partial(steps.loss_and_grads, compute=compute, accumulation=accumulation)
    )


# Of the gradients of two layers with large random weights, whose products are each 1 % (int8) and
# 4 % (fp8) off.
OF_A_MODEL = {"int8": 0.06, "fp8": 0.25}


# Of gradients, where sums in another order are 1e-7 apart, and a code here and there turns over.
TURNED = {"int8": 1e-3, "fp8": 1e-2}


def relative_error(a, b) -> float:
    """Of all gradients together."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("family", test_sharding.CONFIGS)
def test_every_projection_of_the_layers_computes_in_8_bits_and_nothing_else(family):
    model = test_sharding.model_of(family)
    assert low_precision.attach(model, "dtype") is model
    attached = low_precision.attach(model, "int8")
    is_proj = lambda node: isinstance(node, Proj)  # noqa: E731
    found = [p for p in jax.tree.leaves(attached, is_leaf=is_proj) if is_proj(p)]
    assert len(found) == len(lora.TARGETS[family])
    assert all(isinstance(p.w, Weight) for p in found)
    for a, b in zip(jax.tree.leaves(attached), jax.tree.leaves(model), strict=True):
        assert a is b
    assert not any(isinstance(p.w, Weight) for p in jax.tree.leaves(model, is_leaf=is_proj)
                   if is_proj(p))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", test_sharding.CONFIGS)
def test_counted_flops_in_8_bits_are_those_of_the_program(family, kind):
    model, batch = test_sharding.model_of(family), test_sharding.packed_batch()
    work = flops.Work(tokens=batch.tokens.size, pairs=0, loss_tokens=0)
    compute = ComputeConfig(matmul=kind, remat="none", attention="scores")
    run = functools.partial(steps.loss_and_grads, compute=compute, accumulation=1)
    counted = program.count_flops(jax.make_jaxpr(run)(model, batch))
    assert counted.eight_bits == flops.eight_bits(model.config, work, kind)
    dtype = flops.eight_bits(model.config, work, "dtype")
    assert dtype == 0 and counted.eight_bits < counted.projections

    adapters = lora.init(LoraConfig(), model.config, jax.random.key(0))
    run = functools.partial(run, base=model)
    counted = program.count_flops(jax.make_jaxpr(run)(adapters, batch))
    assert counted.eight_bits == flops.eight_bits(model.config, work, kind, frozen=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", test_sharding.CONFIGS)
def test_a_model_is_near_float32(family, kind):
    model, batch = test_sharding.model_of(family), test_sharding.packed_batch()
    want, _, want_grads = loss_and_grads("dtype")(model, batch)
    loss, _, grads = loss_and_grads(kind)(model, batch)
    error = relative_error(grads, want_grads)
    print(f"{family} {kind}: loss {abs(loss - want):.1e}, gradients {error:.4f}")
    assert 0 < error <= OF_A_MODEL[kind]
    assert abs(float(loss) - float(want)) <= 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_remat_chunks_and_accumulation_change_nothing_but_the_scales_of_fp8s_dw(kind):
    """Only that sums over tokens, so that a part of the batch has scales of its own."""
    model, batch = test_sharding.model_of("bloom"), test_sharding.packed_batch()
    loss, _, grads = loss_and_grads(kind)(model, batch)
    again, _, again_grads = loss_and_grads(kind, 2, remat="full", loss_chunk=8)(model, batch)
    assert abs(float(again) - float(loss)) <= 1e-4
    assert relative_error(again_grads, grads) <= {"int8": TURNED["int8"], "fp8": 0.06}[kind]


def test_adapters_learn_over_a_frozen_base_in_8_bits():
    model, batch = test_sharding.model_of("llama"), test_sharding.packed_batch()
    config = LoraConfig(rank=4, base_dtype="bfloat16")
    adapters = lora.init(config, model.config, jax.random.key(1))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    base = lora.freeze(model, config)
    want = loss_and_grads("dtype")(adapters, batch, base=base)
    loss, _, grads = loss_and_grads("fp8")(adapters, batch, base=base)
    assert abs(float(loss) - float(want[0])) <= 0.02
    assert 0 < relative_error(grads, want[2]) <= OF_A_MODEL["fp8"]


def test_held_out_loss_is_that_of_the_model_itself():
    model, batch = test_sharding.model_of("bloom"), test_sharding.packed_batch()
    plain, low = (
        steps.jit_eval_step(ComputeConfig(matmul=matmul))(model, batch)
        for matmul in ("dtype", "int8")
    )
    np.testing.assert_array_equal(plain, low)


# --- meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 4, 2, 1), (1, 2, 4, 1), (1, 1, 8, 1)], ids=str)
def test_scales_are_those_of_whole_rows_and_columns_however_they_are_split(sizes, kind):
    """Rows of x and columns of w over the tensor axis, tokens over fsdp."""
    mesh, (x, w, dy) = test_sharding.mesh_of(sizes), random_problem()
    x, dy = (np.concatenate([a, a[:1]]) for a in (x, dy))  # four rows
    want = products(kind)(x, w, dy)
    layouts = (("batch", None, "mlp"), ("mlp", "embed"), ("batch", None, None))
    placed = [
        jax.device_put(a, jax.sharding.NamedSharding(mesh, sharding.spec(axes)))
        for a, axes in zip((x, w, dy), layouts, strict=True)
    ]
    with jax.set_mesh(mesh):
        got = products(kind)(*placed)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "sizes"), [("bloom", (2, 2, 2, 1)), ("llama", (1, 2, 2, 2))], ids=str
)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(family, sizes, kind):
    model, batch = test_sharding.model_of(family), test_sharding.packed_batch()
    mesh = test_sharding.mesh_of(sizes)
    want, _, want_grads = jax.device_get(loss_and_grads(kind)(model, batch))
    placed = jax.device_put(model, sharding.tree_shardings(model, mesh))
    rows = jax.device_put(batch, sharding.batch_sharding(mesh, batch.tokens.shape))
    with jax.set_mesh(mesh):
        loss, _, grads = jax.device_get(loss_and_grads(kind)(placed, rows))
    error = relative_error(grads, want_grads)
    print(f"{family} {sizes} {kind}: {abs(loss - want):.1e} {error:.1e}")
    assert abs(float(loss) - float(want)) <= 1e-4
    assert error <= TURNED[kind]


# --- training -----------------------------------------------------------------------------------

STEPS = 120
OPTIM = OptimConfig(learning_rate=5e-3, b2=0.98)
MODEL = BloomConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    layer_norm_eps=1e-5,
    residual_post_layernorm=False,
    tie_embeddings=True,
    init_std=0.05,
)


def arithmetic(step) -> Batch:
    """Rows that count up by 1 to 4, from anywhere: each token follows from the two before it."""
    rng = np.random.default_rng(step)
    start, by = rng.integers(0, 64, (32, 1)), rng.integers(1, 5, (32, 1))
    row = ((start + by * np.arange(9)) % 64).astype(np.int32)
    ones = np.ones((32, 8), np.int32)
    mask = ones.astype(bool)
    mask[:, 0] = False
    return Batch(row[:, :-1], row[:, 1:], mask, ones, np.cumsum(ones, 1) - 1)


class Run(NamedTuple):
    start: steps.TrainState
    half: steps.TrainState
    end: steps.TrainState
    losses: np.ndarray  # [STEPS]


@functools.cache
def half_a_run(matmul):
    """``(state, batches) -> (state, losses)``, jitted: one program for both halves."""
    compute = ComputeConfig(dtype="bfloat16", matmul=matmul)
    tx = optim.make_optimizer(OPTIM, STEPS)

    def one(state, batch):
        state, metrics = steps.train_step(state, batch, tx=tx, compute=compute, accumulation=1)
        return state, metrics.loss

    return jax.jit(lambda state, batches: jax.lax.scan(one, state, batches))


def batches(first: int) -> Batch:
    rows = [arithmetic(step) for step in range(first, first + STEPS // 2)]
    return jax.tree.map(lambda *x: np.stack(x), *rows)


@functools.cache
def trained(matmul) -> Run:
    tx = optim.make_optimizer(OPTIM, STEPS)
    start = steps.start_state(models.init(MODEL, jax.random.key(3)), tx)
    half, first = half_a_run(matmul)(start, batches(0))
    end, second = half_a_run(matmul)(half, batches(STEPS // 2))
    return jax.device_get(Run(start, half, end, np.concatenate([first, second])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_the_loss_of_bfloat16(kind):
    """The mean of the last ten losses, within 2 % of the way that bfloat16 came from the first."""
    want, got = (trained(k).losses for k in ("dtype", kind))
    fallen = want[0] - want[-10:].mean()
    print(f"{kind}: {got[-10:].mean():.4f}, bfloat16 {want[-10:].mean():.4f} from {want[0]:.4f}")
    assert fallen > 2.0
    assert abs(got[-10:].mean() - want[-10:].mean()) <= 0.02 * fallen
    assert (got != want).any()


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_going_on_from_a_saved_state_gives_bitwise_the_same(kind):
    """Nothing but the state and the batch is in a step: no scale and no noise of its own."""
    run = trained(kind)
    end, losses = half_a_run(kind)(run.half, batches(STEPS // 2))
    np.testing.assert_array_equal(losses, run.losses[STEPS // 2 :])
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(run.end), strict=True):
        np.testing.assert_array_equal(a, b)


# --- what is refused ----------------------------------------------------------------------------


class Device(NamedTuple):
    platform: str
    device_kind: str


class OneDevice(NamedTuple):
    devices: np.ndarray


def mesh_of(platform, kind) -> OneDevice:
    device = np.empty((1,), object)
    device[0] = Device(platform, kind)
    return OneDevice(device)


@pytest.mark.parametrize(
    ("platform", "kind", "faster"),
    [
        ("tpu", "TPU v4", ()),
        ("tpu", "TPU v5 lite", ("int8",)),
        ("tpu", "TPU v5p", ("int8",)),
        ("tpu", "TPU v6 lite", ("int8",)),
        ("tpu", "TPU7x", ("fp8",)),
        ("gpu", "NVIDIA A100-SXM4-80GB", ("int8",)),
        ("gpu", "NVIDIA H100 80GB HBM3", ("int8", "fp8")),
        ("gpu", "NVIDIA H200", ("int8", "fp8")),
        ("gpu", "Quantum 9000", ("int8", "fp8")),  # not known to be slow
        ("cpu", "cpu", ("int8", "fp8")),
    ],
)
def test_what_a_device_multiplies_no_faster_is_refused_with_what_it_does(platform, kind, faster):
    mesh = mesh_of(platform, kind)
    for matmul in KINDS:
        compute = ComputeConfig(matmul=matmul)
        if matmul in faster:
            assert steps.resolve(compute, mesh).matmul == matmul
            continue
        instead = " or ".join(("dtype", *faster))
        message = f"compute.matmul={matmul}: a {kind} .*set compute.matmul={instead}$"
        with pytest.raises(ConfigError, match=message):
            steps.resolve(compute, mesh)


@pytest.mark.parametrize("quantise", ["int8", "nf4"])
def test_a_quantised_base_has_no_products_in_8_bits(quantise):
    mesh, config = mesh_of("tpu", "TPU v5 lite"), LoraConfig(quantise=quantise)
    with pytest.raises(
        ConfigError, match=rf"compute.matmul=int8: .*{quantise}.*lora.quantise=none"
    ):
        steps.resolve(ComputeConfig(matmul="int8"), mesh, lora=config)
    assert steps.resolve(ComputeConfig(), mesh, lora=config).matmul == "dtype"
    assert steps.resolve(ComputeConfig(matmul="int8"), mesh, lora=LoraConfig()).matmul == "int8"


# --- compiled for accelerators that are not here ------------------------------------------------


def compiled_for(target, kind, **options) -> str:
    module = "libtpu" if target[0] in "tv" else "jax_plugins.xla_cuda13"
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"needs {module}: pip install 'jax[tpu]' or 'jax[cuda13]'")
    device = targets.load(target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = (
        ((2, 256, 512), jnp.bfloat16),
        ((512, 1024), jnp.float32),
        ((2, 256, 1024), jnp.bfloat16),
    )
    args = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    return products(kind).lower(*args).compile(compiler_options=options or None).as_text()


@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_a_tpu_multiplies_codes_of_8_bits(target):
    kind = "fp8" if target.startswith("tpu7x") else "int8"
    hlo = compiled_for(target, kind)
    dtypes = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", hlo))
    found = [
        (out, *sorted((dtypes[a], dtypes[b])))
        for out, a, b in re.findall(
            r"= (\w+)\[[^\]]*\]\S* convolution\(%([\w.\-]+), %([\w.\-]+)\)", hlo
        )
    ]
    assert (
        sorted(found)
        == {
            "int8": [("bf16", "bf16", "bf16"), ("s32", "s8", "s8"), ("s32", "s8", "s8")],
            "fp8": [("bf16", "f8e4m3fn", "f8e4m3fn")] * 3,
        }[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_multiplies_codes_of_8_bits(kind):
    """By cuBLASLt or by Triton: with a card XLA takes the faster one, without it Triton."""
    hlo = compiled_for("h200:1", kind, xla_gpu_enable_triton_gemm=False)
    float8 = re.findall(r'custom_call_target="__cublas\$lt\$matmul\$f8"', hlo)
    ints = re.findall(r"= \(s32\[.*custom_call_target=\"__cublas\$lt\$matmul\"", hlo)
    assert (len(float8), len(ints)) == {"int8": (0, 2), "fp8": (3, 0)}[kind]
    hlo = compiled_for("h200:1", kind)
    dtypes = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", hlo))
    operands = re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", hlo)
    eight = [pair for pair in operands if all(dtypes[x].startswith(("s8", "f8")) for x in pair)]
    assert len(eight) == flops.EIGHT_BIT_PRODUCTS[kind]
