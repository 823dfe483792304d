"""FLOPs, bytes and collectives are those of the whole step: a loop's body counts at every turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmzoo_jax import program

ROWS, WIDTH, LAYERS = 64, 32, 7


def layers(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()


def test_a_scan_counts_all_its_turns():
    x, ws = jnp.zeros((ROWS, WIDTH)), jnp.zeros((LAYERS, WIDTH, WIDTH))
    one = 2 * ROWS * WIDTH * WIDTH
    assert program.count_flops(jax.make_jaxpr(layers)(x, ws)) == (LAYERS * one, 0, 0)
    grads = jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(x, ws)
    assert program.count_flops(grads) == (3 * LAYERS * one, 0, 0)


def test_what_nothing_needs_is_not_counted():
    """Of two products in each turn, one goes nowhere."""
    x, ws = jnp.zeros((ROWS, WIDTH)), jnp.zeros((LAYERS, WIDTH, WIDTH))

    def step(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ x.T), x, ws)[0].sum()

    one = 2 * ROWS * WIDTH * WIDTH
    assert program.count_flops(jax.make_jaxpr(step)(x, ws)) == (LAYERS * one, 0, 0)


def test_products_of_numbers_of_8_bits_are_counted_apart():
    x, w = jnp.zeros((ROWS, WIDTH), jnp.int8), jnp.zeros((WIDTH, WIDTH), jnp.int8)
    one = 2 * ROWS * WIDTH * WIDTH
    both = jax.make_jaxpr(lambda x, w: (x @ w, x.astype(jnp.float32) @ w.astype(jnp.float32)))(x, w)
    assert program.count_flops(both) == (2 * one, 0, one)


def test_products_with_batch_axes_are_attention_and_a_branch_counts_at_its_most():
    def step(q, k):
        scores = jnp.einsum("bth,bsh->bts", q, k)
        return jax.lax.cond(scores.sum() > 0, lambda s: (s @ s[0]).sum(), lambda s: 0.0, scores)

    q = jnp.zeros((3, 4, 5))
    flops = program.count_flops(jax.make_jaxpr(step)(q, q))
    assert flops == (2 * 3 * 4 * 4 * 4, 2 * 3 * 4 * 4 * 5, 0)


def test_a_function_of_each_device_counts_for_all_of_them():
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",), axis_types=(AxisType.Auto,))
    x, w = jnp.zeros((ROWS, WIDTH)), jnp.zeros((WIDTH, WIDTH))
    split = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(PartitionSpec("a"), PartitionSpec()),
        out_specs=PartitionSpec("a"),
    )  # fmt: skip
    assert program.count_flops(jax.make_jaxpr(split)(x, w)) == (2 * ROWS * WIDTH * WIDTH, 0, 0)


@pytest.fixture(scope="module")
def sharded_layers():
    """The compiled forward pass, weights split over four devices: each layer gathers its own."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("a",), axis_types=(AxisType.Auto,))

    def abstract(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    args = abstract((ROWS, WIDTH), "a"), abstract((LAYERS, WIDTH, WIDTH), None, "a")
    return program.count_traffic(jax.jit(layers).lower(*args).compile().as_text())


def test_collectives_in_a_scan_count_at_every_turn(sharded_layers):
    gathered = sharded_layers.collectives
    assert gathered["all-gather"] == LAYERS * WIDTH * WIDTH * 4
    assert gathered["all-reduce"] == 4  # the sum of the last layer
    assert sharded_layers.unknown_loops == {}


def test_bytes_count_a_layers_slice_of_the_stack_and_not_the_stack(sharded_layers):
    """Per layer: a quarter of the weights read and written, all of them written and read, and the
    activations of a quarter of the rows a few times."""
    weights, rows = WIDTH * WIDTH * 4, ROWS // 4 * WIDTH * 4
    assert LAYERS * 2 * weights <= sharded_layers.bytes <= LAYERS * (5 * weights + 8 * rows)


def test_a_loop_that_data_ends_counts_once_and_is_named():
    def step(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    compiled = jax.jit(step).lower(jnp.zeros((8, 8)), 3).compile()
    (turn,) = program.count_traffic(compiled.as_text()).unknown_loops.values()
    assert turn >= 2 * 8 * 8 * 4  # a matrix read, another one written


def test_of_a_condition_all_branches_count_or_the_least():
    def step(x, yes):
        return jax.lax.cond(yes, lambda x: (x @ x) @ x, lambda x: x, x)

    text = jax.jit(step).lower(jnp.zeros((64, 64)), True).compile().as_text()
    every, least = (program.count_traffic(text, branches=b).bytes for b in ("all", "least"))
    assert every - least >= 2 * 64 * 64 * 4


# As a TPU's compiler writes: the bound of a loop stands in its condition, an asynchronous gather in
# several computations, what is marked S(1) stays on the chip, and a kernel's metadata has lines.
TPU = """HloModule m

%condition (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%start (q: f32[2]) -> f32[8] {
  %q = f32[2]{0:T(256)} parameter(0)
  ROOT %g1 = f32[8]{0:T(256)S(1)} all-gather(%q), channel_id=3, dimensions={0}
}

%done (r: f32[2]) -> f32[8] {
  %r = f32[2]{0:T(256)} parameter(0)
  ROOT %g2 = f32[8]{0:T(256)S(1)} all-gather(%r), channel_id=3, dimensions={0}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8]{0:T(256)} get-tuple-element(%s), index=1
  %k = f32[8]{0:T(256)} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="kernel"}
  %f1 = f32[8]{0:T(256)S(1)} fusion(%k), kind=kCustom, calls=%start
  %f2 = f32[8]{0:T(256)} fusion(%f1), kind=kCustom, calls=%done
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%j, %f2)
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%a), condition=%condition, body=%body
}
"""


def test_the_text_of_a_tpus_compiler_is_understood():
    traffic = program.count_traffic(TPU)
    assert traffic.collectives == {"all-gather": 5 * 8 * 4}  # once a turn, not twice
    assert traffic.bytes == 5 * 4 * (8 * 4)  # %k in and out, in again, %f2 out; not %f1
    assert traffic.unknown_loops == {}
