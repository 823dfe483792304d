"""What a draft model brings: the engine with and without one, by how often the draft is right.

    python -m tests.benchmarks.speculate --family=llama --depths=0,0.01,0.03 --out=speculate.json

Makes a random model; its first layer alone is the draft, and what the other layers add is scaled by
each of --depths, so that the draft is right always (0) or less and less often. Answers are
compared: where a random model's 8,192 tokens are about equally likely, rounding decides some draws.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile

import jax
import numpy as np
from absl import app, flags

from llmzoo_jax import generate, models
from llmzoo_jax.inference import Model
from llmzoo_jax.sharding import named_leaves
from serving.offline import on_engine
from tests.benchmarks import sides

flags.adopt_module_key_flags(sides)

DEPTHS = flags.DEFINE_list("depths", ["0", "0.01", "0.03"], "How much the draft lacks.")
ROWS = flags.DEFINE_list("rows", ["1", "4"], "Requests at a time.")
GUESSES = flags.DEFINE_integer("guesses", 4, "Tokens that are guessed at a time.")
NEW = flags.DEFINE_integer("new", 128, "Tokens of each answer.")
CALLS = flags.DEFINE_integer("calls", 3, "Timed calls of each kind.")

SAMPLING = {"greedy": {}, "sampled": {"temperature": 1.0, "seed": 1}}


def model(config, leaves) -> Model:
    tree = jax.tree.structure(models.abstract(config))
    params = generate.prepare(jax.tree.unflatten(tree, list(leaves.values())))
    return Model("random", config, None, None, params, (), "float32")


def pair(folder: str, depth: float) -> tuple[Model, Model]:
    """(target, draft)."""
    config, params = sides.our_model(folder)
    leaves = named_leaves(params)
    adds = ("blocks.attention.out.", "blocks.down.")
    deep = {
        name: x.at[1:].multiply(depth) if name.startswith(adds) else x for name, x in leaves.items()
    }
    flat = {name: x[:1] if name.startswith("blocks.") else x for name, x in leaves.items()}
    return model(config, deep), model(dataclasses.replace(config, num_layers=1), flat)


def measure(watch, target: Model, draft: Model | None) -> dict[tuple[str, int], dict]:
    """By sampling and rows: seconds of each call, tokens, and the share of guesses that were
    right."""
    prompts = np.random.default_rng(0).integers(4, 8192, (max(map(int, ROWS.value)), 32)).tolist()
    options = {"draft": draft, "speculate": GUESSES.value} if draft else {}
    results = {}
    with on_engine(target, max_batch=len(prompts), context=256, **options) as fast:
        for mode, sampling in SAMPLING.items():
            for rows in map(int, ROWS.value):
                asked = {"prompts": prompts[:rows], "max_new_tokens": NEW.value, **sampling}
                fast.generate(**asked)  # so that each timed call finds the prompts
                before = fast._engine.stats()
                timed = [watch(lambda asked=asked: fast.generate(**asked))
                         for _ in range(CALLS.value)]  # fmt: skip
                after = fast._engine.stats()
                guessed = after.guessed_tokens - before.guessed_tokens
                results[mode, rows] = {
                    "seconds": [time["seconds"] for _, time in timed],
                    "quiet": [time["quiet"] for _, time in timed],
                    "right": (after.right_tokens - before.right_tokens) / max(1, guessed),
                    "tokens": [row.tokens for row in timed[0][0]],
                }
    return results


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --NAME=VALUE")
    watch, lines, written = sides.stopwatch(), [], []
    with tempfile.TemporaryDirectory() as folder:
        size = sides.write_model(folder)
        for depth in map(float, DEPTHS.value):
            target, draft = pair(folder, depth)
            without, with_ = (measure(watch, target, one) for one in (None, draft))
            for (mode, rows), plain in without.items():
                fast = with_[mode, rows]
                same = sum(map(list.__eq__, fast["tokens"], plain["tokens"]))
                speed = [rows * NEW.value / statistics.median(x["seconds"]) for x in (plain, fast)]
                quiet = sum(plain["quiet"] + fast["quiet"])
                lines.append([
                    mode, str(rows), f"{fast['right']:.0%}", *(f"{x:,.0f}" for x in speed),
                    f"{speed[1] / speed[0]:.2f}", f"{same} of {rows}",
                    f"{quiet} of {2 * CALLS.value}",
                ])  # fmt: skip
                about = {
                    "depth": depth,
                    "mode": mode,
                    "rows": rows,
                    "right": fast["right"],
                    "same": same,
                }
                written.append(about | {"tokens_per_s": speed, "quiet": quiet})
                print(about, speed, flush=True)
    print(f"\n{size:,} parameters, {GUESSES.value} guesses at a time, {NEW.value} new tokens\n")
    head = ["", "requests at a time", "guesses right", "without, tok/s", "with a draft, tok/s"]
    print(sides.table([*head, "ratio", "same answers", "quiet calls"], lines))
    sides.write_result({"parameters": size, "guesses": GUESSES.value, "measured": written})


if __name__ == "__main__":
    app.run(main)
