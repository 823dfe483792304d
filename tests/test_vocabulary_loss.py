"""The loss in chunks is the loss, on every mesh, and holds no [tokens, V]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmzoo_jax import program, sharding
from llmzoo_jax.config import MeshConfig
from llmzoo_jax.vocabulary_loss import TABLE, TOKENS, Loss, X, chunked_loss
from tests import parity

B, T, D, V = 8, 12, 8, 40
TOLERANCE = 1e-5
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)]


@functools.cache
def case():
    """(table, x, targets, mask: rows with all, some and no loss tokens)."""
    rng = np.random.default_rng(0)
    mask = rng.random((B, T)) < np.linspace(0, 1, B)[:, None]
    mask[-1] = True
    return (
        rng.standard_normal((V, D), np.float32),
        rng.standard_normal((B, T, D), np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        mask,
    )


def dense(table, x, targets, mask):
    logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    return Loss(losses.sum(), losses)


def losses_and_gradients(loss, arrays):
    """Of three times the sum, so that the scale counts."""

    def run(table, x, targets, mask):
        total, losses = loss(table, x, targets, mask)
        return 3 * total, losses

    gradients, y = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(*arrays)
    return jax.device_get((y, gradients))


@functools.cache
def wanted():
    return losses_and_gradients(dense, case())


@pytest.mark.parametrize("chunk", [1, 3 * B, 5 * B, 10**6])
def test_chunks_of_any_size_give_the_losses_and_gradients(chunk):
    loss = functools.partial(chunked_loss, chunk=chunk)
    got = losses_and_gradients(loss, case())
    assert parity.max_difference(got, wanted()) <= TOLERANCE
    # Losses alone, as an evaluation has them, are computed without gradients.
    alone = jax.device_get(jax.jit(loss)(*case()))
    assert parity.max_difference(alone.losses, wanted()[0]) <= TOLERANCE
    assert alone.total == pytest.approx(wanted()[0].sum(), rel=1e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_gives_the_losses_and_gradients(sizes):
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
    placed = [
        jax.device_put(x, NamedSharding(mesh, sharding.spec(axes)))
        for x, axes in zip(case(), (TABLE, X, TOKENS, TOKENS), strict=True)
    ]
    with jax.set_mesh(mesh):
        got = losses_and_gradients(functools.partial(chunked_loss, chunk=24), placed)
    assert parity.max_difference(got, wanted()) <= TOLERANCE


def test_a_table_in_float32_gets_its_gradient_in_float32_from_bfloat16_products():
    table, x, targets, mask = case()
    half = (table, x.astype(jnp.bfloat16), targets, mask)
    losses, (d_table, dx) = losses_and_gradients(functools.partial(chunked_loss, chunk=24), half)
    assert d_table.dtype == np.float32 and dx.dtype == jnp.bfloat16
    want, (d_table_wanted, _) = wanted()
    assert parity.max_difference(losses, want) <= 0.1
    assert parity.max_difference(d_table, d_table_wanted) <= 0.1


def test_a_gradient_through_the_losses_is_refused_rather_than_wrong():
    def weighted(table, x, targets, mask):
        return (chunked_loss(table, x, targets, mask, chunk=24).losses * 2).sum()

    with pytest.raises(TypeError, match="through its total"):
        jax.grad(weighted)(*case())


def test_a_frozen_table_gets_no_gradient_and_costs_no_memory_for_one():
    table, x, targets, mask = (jnp.asarray(a) for a in case())

    def total(x, table):
        return chunked_loss(table, x, targets, mask, chunk=24).total

    program = str(jax.make_jaxpr(jax.grad(total))(x, table))
    assert f"f32[24,{V}]" in program  # logits of a chunk
    assert f"f32[{D},{V}]" in str(jax.make_jaxpr(jax.grad(total, argnums=1))(x, table))
    assert f"f32[{D},{V}]" not in program
    frozen = jax.jit(jax.grad(total))(x, table)
    assert parity.max_difference(3 * frozen, wanted()[1][1]) <= TOLERANCE


def compiled_step(mesh, *, chunk, tokens, vocabulary, width=16):
    """The compiled losses and gradients of so many tokens, in rows of 64."""

    def abstract(shape, dtype, axes):
        place = NamedSharding(mesh, sharding.spec(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def run(table, x, targets, mask):
        if chunk:
            return chunked_loss(table, x, targets, mask, chunk=chunk).total
        return dense(table, x, targets, mask).total

    rows = tokens // 64
    with jax.set_mesh(mesh):
        return (
            jax.jit(jax.value_and_grad(run, argnums=(0, 1)))
            .lower(
                abstract((vocabulary, width), jnp.float32, TABLE),
                abstract((rows, 64, width), jnp.float32, X),
                abstract((rows, 64), jnp.int32, TOKENS),
                abstract((rows, 64), jnp.bool_, TOKENS),
            )
            .compile()
        )


def test_memory_grows_with_the_chunk_and_not_with_all_tokens_times_the_vocabulary():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def temporaries(tokens, chunk):
        step = compiled_step(mesh, chunk=chunk, tokens=tokens, vocabulary=5000)
        return step.memory_analysis().temp_size_in_bytes

    logits = 5000 * 4  # bytes a token
    few, many = temporaries(1024, 256), temporaries(8192, 256)
    assert many - few < 7168 * logits / 50  # what more tokens cost is far below their logits
    assert temporaries(8192, 1024) - many > 768 * logits
    assert temporaries(8192, 0) > 8192 * logits


def test_the_table_and_its_gradient_cross_the_network_once_however_many_chunks():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    table = 5000 * 16 * 4  # bytes
    step = compiled_step(mesh, chunk=64, tokens=2048, vocabulary=5000)  # 32 chunks
    traffic = program.count_traffic(step.as_text())
    assert traffic.collectives["all-gather"] <= table
    assert table <= sum(traffic.collectives.values()) <= 2 * table + 1024
