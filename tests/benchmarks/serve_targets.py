"""The engine's programs, compiled for accelerators that are not here: do they fit, what is moved?

    python -m tests.benchmarks.serve_targets --target=v5e:2x4 --tensor=8 --family=bloom --batch=1,64
    python -m tests.benchmarks.serve_targets --target=h200:1 --family=llama --batch=1,64,256

(``jax[tpu]`` or ``jax[cuda13]``, JAX_PLATFORMS=cpu; v5e and v5p come by hosts of four: ``v5e:2x2``
and ``v5p:2x2x1`` are the smallest.) Prints a row of a table for the decoding step of each batch,
every row with --tokens tokens, and one for the largest call that fills pages; each compiled as the
engine would, with the whole model. The step is a greedy one: a sampled one reads logits more often.
The ceiling is that of memory bandwidth, if everything else were free.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from configs import chimera_7b, phoenix_7b
from llmzoo_jax import generate, lora, models, program, sharding, targets
from llmzoo_jax.config import LoraConfig, MeshConfig, ModelConfig
from llmzoo_jax.models.paged_attention import AXES
from serving import programs, steps
from serving.runner import EngineOptions

MODELS = {"bloom": phoenix_7b, "llama": chimera_7b}
TARGET = flags.DEFINE_string("target", None, "As for llmzoo_jax.plan.", required=True)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices of it that the model is split over.", 1)
FAMILY = flags.DEFINE_enum("family", "bloom", list(MODELS), "BLOOM-7b1 or LLaMA-7B.")
BATCH = flags.DEFINE_list("batch", ["1", "64", "256"], "Rows of a step.")
TOKENS = flags.DEFINE_integer("tokens", 512, "In the cache, of each row.", 1)
CONTEXT = flags.DEFINE_integer("context", 2048, "Of the engine.", 1)
KV_DTYPE = flags.DEFINE_enum("kv_dtype", "model", ["model", "int8"], "Of the cache.")
WEIGHTS = flags.DEFINE_enum("weights", "dtype", ["dtype", "int8", "nf4"], "As the server's.")
DTYPE = "bfloat16"
COLUMNS = (
    "memory GiB", "cache GiB", "temporaries MiB", "state not in place MiB", "GB moved", "GFLOP",
    "tokens/s at most", "collectives MiB", "compiled in s",
)  # fmt: skip


class Compiled(NamedTuple):
    """Bytes and FLOPs of one device."""

    memory: int
    temporaries: int
    cache: int
    copied: int  # of cache and counts: what is not updated in place
    moved: int  # by a step, or a call
    flops: int
    collectives: dict[str, int]
    seconds: float  # to compile


class Place(NamedTuple):
    """Where everything is: on a mesh, or one device."""

    mesh: Mesh | None
    everywhere: jax.sharding.Sharding

    def put(self, tree: Any, shardings: Any) -> Any:
        """Shapes with their shardings."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    def by(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.sharding.Sharding:
        if self.mesh is None:
            return self.everywhere
        return sharding.sharding_of(shape, axes, self.mesh, name="state", uneven="replicate")


def place(devices: list[jax.Device], ways: int) -> Place:
    if ways == 1:
        return Place(None, SingleDeviceSharding(devices[0]))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=ways), devices[:ways])
    return Place(mesh, NamedSharding(mesh, PartitionSpec()))


def abstract_model(config: ModelConfig, where: Place, weights: str) -> Any:
    """As ``placement.read`` lays it out."""

    def make(model):
        quantise = "none" if weights == "dtype" else weights
        model = lora.freeze(model, LoraConfig(quantise=quantise, base_dtype=DTYPE))
        return generate.unstacked(model, shards=sharding.ways(where.mesh))

    model = jax.eval_shape(make, models.abstract(config))
    if where.mesh is None:
        return where.put(model, jax.tree.map(lambda _: where.everywhere, model))
    shardings = sharding.tree_shardings(model, where.mesh, uneven="replicate")
    return jax.tree.map(
        lambda s, part: where.put(part, jax.tree.map(lambda _: s, part)), shardings, model
    )


def abstract_state(config: ModelConfig, o: EngineOptions, where: Place) -> steps.State:
    make = functools.partial(
        steps.init_state, config, num_pages=o.num_pages, page_size=o.page_size, slots=o.max_batch,
        kv_dtype=jnp.int8 if o.kv_dtype == "int8" else jnp.dtype(DTYPE), mesh=None,
    )  # fmt: skip
    state = jax.eval_shape(make)
    cache = jax.tree.map(lambda x: where.by(x.shape, AXES[: x.ndim]), state.cache)
    counts = jax.tree.map(lambda x: where.by(x.shape, steps.COUNTS), state[1:])
    return where.put(state, steps.State(cache, *counts))


def compile_one(
    name: tuple[Any, ...],
    config: ModelConfig,
    o: EngineOptions,
    where: Place,
    *,
    tokens: int,
    weights: str = "dtype",
) -> Compiled:
    """One of ``programs.names``; ``tokens`` are in the cache of each row."""
    leaves, treedef = jax.tree.flatten(abstract_model(config, where, weights))
    state = abstract_state(config, o, where)
    platform = where.everywhere.device_set.copy().pop().platform
    with sharding.use(where.mesh):
        lowered = programs.lower(
            name, o, config, leaves, state, treedef=treedef, dtype=DTYPE, platform=platform,
            everywhere=where.everywhere,
        )  # fmt: skip
        began = time.monotonic()
        compiled = lowered.compile()
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    parts = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    ways = where.everywhere.num_devices
    traffic = program.count_traffic(compiled.as_text(), branches="least")
    rows = 1 if name[0] in ("begin", "copy_page") else name[1]
    # The window of steps turns once; attention inside of it as often as there are pages.
    loops = sorted(traffic.unknown_loops.values())
    attention = loops[:-1] if name[0] == "decode" else loops
    pages = rows * -(-tokens // o.page_size)
    turn = programs.turn(state, platform, rows)
    more = -(-pages // turn) - 1
    return Compiled(
        memory=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        cache=cache // ways,
        copied=max(0, parts // ways - memory.alias_size_in_bytes),
        moved=traffic.bytes + more * sum(attention),
        flops=flops(name, config, o) // ways,
        collectives=traffic.collectives,
        seconds=seconds,
    )


def flops(name: Any, config: ModelConfig, o: EngineOptions) -> int:
    """Of products with weights, on all devices. Filling pages needs no logits."""
    kind, size = name[0], next(iter(name[1:]), 0)
    weights = models.num_params(models.abstract(config).blocks)
    head = config.vocab_size * config.hidden_size
    tokens, logits = {
        "decode": (size, size),
        "begin": (size, 1),
        "prefill": (size * o.page_size, 0),
        "copy_page": (0, 0),
    }[kind]
    return 2 * (tokens * weights + logits * head)


def jobs(platform: str) -> Iterator[tuple[Any, EngineOptions]]:
    for batch in map(int, BATCH.value):
        o = EngineOptions(
            max_batch=batch, context=CONTEXT.value, kv_dtype=KV_DTYPE.value,
            cache_tokens=max(batch * TOKENS.value, CONTEXT.value),
        )  # fmt: skip
        yield ("decode", batch), o
    yield ("prefill", programs.block_counts(o, platform)[-1], False), o


def main(_) -> None:
    config = MODELS[FAMILY.value].get_config().model
    target = targets.load(TARGET.value)
    where = place(target.devices, TENSOR.value)
    chip = targets.CHIPS[TARGET.value.partition(":")[0]]
    about = f"{TARGET.value.partition(':')[0]} x {TENSOR.value}, {FAMILY.value}"
    print("| | " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * len(COLUMNS))
    for name, o in jobs(target.devices[0].platform):
        what = f"{about}, {name[0]} {name[1]}"
        try:
            c = compile_one(name, config, o, where, tokens=TOKENS.value, weights=WEIGHTS.value)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"| {what} | does not fit {chip.memory / 2**30:.0f} GiB |", flush=True)
            continue
        done = name[1] * (1 if name[0] == "decode" else o.page_size)
        ceiling = done * chip.bandwidth / c.moved
        collectives = ", ".join(f"{k} {v / 2**20:.2f}" for k, v in sorted(c.collectives.items()))
        print(
            f"| {what} | {c.memory / 2**30:.1f} ({c.memory / chip.memory:.0%}) | "
            f"{c.cache / 2**30:.2f} | {c.temporaries / 2**20:.0f} | {c.copied / 2**20:.0f} | "
            f"{c.moved / 1e9:.2f} | {c.flops / 1e9:.0f} | {ceiling:,.0f} | {collectives or '-'} | "
            f"{c.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
