"""What a checkpoint costs: training steps with a save in the background, and without.

    python -m tests.benchmarks.saves --rounds=4 --out=saves.json

A random model (--family, --tiny: see --help), float32, AdamW. Windows of --every steps without and
with a save at their beginning take turns; the state is donated, as in training. A window ends when
its save is on the disk. What a save costs is the seconds that it blocks, and those that the steps
behind it take longer. The share of training time is told for several ``save_every``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from llmzoo_jax.packing import Batch
from tests.benchmarks import sides

flags.adopt_module_key_flags(sides)

EVERY = flags.DEFINE_integer("every", 6, "Steps of a window.")
LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row (T).")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows of the batch.")
SAVE_EVERY = (50, 100, 500)  # the last is the config's default


def measure(folder: Path) -> dict:
    import jax

    from llmzoo_jax import checkpoint, manifest, optim, sharding
    from llmzoo_jax import step as steps
    from llmzoo_jax.config import ComputeConfig, MeshConfig, OptimConfig

    mesh = sharding.make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    config = OptimConfig()
    tx = optim.make_optimizer(config, 1000)
    model_config, params = sides.our_model(str(folder))
    state = steps.start_state(params, tx)
    shardings = sharding.tree_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    compute = steps.resolve(ComputeConfig(), mesh)
    train_step = steps.jit_train_step(tx, compute, config.accumulation, shardings)
    batch = random_batch(model_config.vocab_size)
    watch = sides.Stopwatch()

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = train_step(state, batch)
            jax.block_until_ready(metrics)

    windows = {"without": [], "with": []}
    with checkpoint.open_manager(folder / "run", keep=1) as manager:
        run(1)
        checkpoint.save(manager, state)  # compiles the checksums
        checkpoint.wait(manager)
        blocked, checksums = [], []

        def window(saves: bool) -> None:
            since = time.perf_counter()
            if saves:
                checkpoint.save(manager, state)
                blocked.append(time.perf_counter() - since)
            run(EVERY.value)
            checkpoint.wait(manager)

        for _ in range(sides.ROUNDS.value):
            for kind, done in windows.items():
                done.append(watch(lambda kind=kind: window(kind == "with"))[1])
            since = time.perf_counter()
            manifest.make(checkpoint.named(state))
            checksums.append(time.perf_counter() - since)

    def of_a_save(number: Callable[[dict], float]) -> float:
        """The median of a number of the windows with one, less that of those without."""
        with_, without = (map(number, windows[kind]) for kind in ("with", "without"))
        return statistics.median(with_) - statistics.median(without)

    cost = of_a_save(lambda window: window["seconds"])
    one = statistics.median(window["seconds"] for window in windows["without"]) / EVERY.value
    return {
        "megabytes": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
        "seconds_a_step": one,
        "blocked_s": statistics.median(blocked),
        "checksums_s": statistics.median(checksums),
        "cost_s": cost,
        "cost_cpu_s": of_a_save(lambda window: window["seconds"] * window["own_cores"]),
        "share": {every: cost / (every * one) for every in SAVE_EVERY},
        "quiet": all(w["quiet"] for done in windows.values() for w in done),
        "windows": windows,
    }


def random_batch(vocab: int) -> Batch:
    B, T = BATCH_SIZE.value, LENGTH.value
    tokens = np.random.default_rng(0).integers(4, vocab, (B, T + 1)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((B, T), bool),
        segment_ids=np.ones((B, T), np.int32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
    )


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --NAME=VALUE")
    with tempfile.TemporaryDirectory() as name:
        size = sides.write_model(name)
        result = measure(Path(name)) | {"parameters": size}
    print(f"\n{size:,} parameters, a checkpoint of {result['megabytes']:,.0f} MB, quiet: ", end="")
    print(f"{result['quiet']}\n")
    rows = [
        ["a step", f"{result['seconds_a_step']:.2f} s"],
        ["a save blocks", f"{result['blocked_s']:.2f} s"],
        ["of it checksums", f"{result['checksums_s']:.2f} s"],
        ["a save costs, in all", f"{result['cost_s']:.2f} s"],
        ["of the CPU", f"{result['cost_cpu_s']:.2f} s"],
    ]
    rows += [[f"save_every={n}: share", f"{share:.2%}"] for n, share in result["share"].items()]
    print(sides.table(["", "median"], rows))
    sides.write_result(result)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    app.run(main)
