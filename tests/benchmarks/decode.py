"""Decoding speed: generate.generate against transformers on torch, the same weights, greedy.

    python -m tests.benchmarks.decode --family=llama --rounds=3 --out=decode-llama.json
    python -m tests.benchmarks.decode --beams=4 --batches=1     # beam search, on the engine

Makes a random model, then runs ours, torch, ours, torch, .. with it. Both continue the same
prompts by the same number of tokens, in float32 with a key/value cache; the first call of each
batch size (which compiles) is reported apart. The tokens of both sides are compared.

A token of batch 1 reads every weight once, so the machine's memory sets a ceiling, which is
measured too: how fast all cores together read an array that no cache holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import app, flags

from tests.benchmarks import sides

flags.adopt_module_key_flags(sides)  # so that --help tells them

BATCHES = flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
PROMPT = flags.DEFINE_integer("prompt", 32, "Tokens of each prompt.")
NEW = flags.DEFINE_integer("new", 128, "Tokens to decode for each prompt.")
BEAMS = flags.DEFINE_integer("beams", 0, "Beams of each prompt; 0: greedy.")
CALLS = flags.DEFINE_integer("calls", 3, "Timed calls in each round, for each batch size.")


def ours() -> Callable[[np.ndarray], list[list[int]]]:
    from llmzoo_jax import generate

    if BEAMS.value:
        return our_beams()
    model = generate.prepare(sides.our_model(sides.WORK.value)[1])
    sampling = generate.Sampling(max_new_tokens=NEW.value)

    def decode(prompts):
        rows = generate.generate(model, prompts.tolist(), sampling=sampling)
        return [row.tokens for row in rows]

    return decode


def our_beams() -> Callable[[np.ndarray], list[list[int]]]:
    import llmzoo_jax
    from serving.beam_search import BeamOptions
    from serving.offline import EngineModel
    from serving.runner import EngineOptions

    options = EngineOptions(context=512, max_batch=16, compile_at="first_use")
    model = dataclasses.replace(llmzoo_jax.load(sides.WORK.value), stop_ids=())
    engine, beams = EngineModel(model, options), BeamOptions(beams=BEAMS.value)

    def decode(prompts):
        rows = engine.beam_search(prompts.tolist(), beams, max_new_tokens=NEW.value)
        return [best.tokens for (best,) in rows]

    return decode


def torch() -> Callable[[np.ndarray], list[list[int]]]:
    import torch

    model = sides.torch_model(sides.WORK.value).eval()
    model.generation_config.eos_token_id = None  # every row decodes to the full length
    model.generation_config.pad_token_id = 0

    def decode(prompts):
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW.value,
                num_beams=BEAMS.value or 1,
            )
        return out[:, PROMPT.value :].tolist()

    return decode


def read_bandwidth(gigabytes: float = 0.5, times: int = 7) -> float:
    """Bytes a second that all cores read from memory; the best of ``times``."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(int(gigabytes * 2**28), np.float32), cores)
    best = math.inf
    with ThreadPoolExecutor(cores) as threads:
        for _ in range(times):
            start = time.perf_counter()
            list(threads.map(np.max, parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


def _embedding(folder: str) -> int:
    """Parameters of the input embedding, of which a token reads one row, where it is no head."""
    config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    tied = config.get("tie_word_embeddings", True)
    return 0 if tied else config["vocab_size"] * config["hidden_size"]


def run_side() -> dict:
    decode = {"ours": ours, "torch": torch}[sides.SIDE.value]()
    rng = np.random.default_rng(0)
    prompts = {B: rng.integers(4, 8192, (int(B), PROMPT.value)) for B in BATCHES.value}
    ready, first, tokens = sides.since_start(), {}, {}
    for B in BATCHES.value:
        start = time.perf_counter()
        tokens[B] = decode(prompts[B])
        first[B] = time.perf_counter() - start
    watch, timed = sides.stopwatch(), []
    for B in BATCHES.value:
        for _ in range(CALLS.value):
            again, time_ = watch(lambda B=B: decode(prompts[B]))
            assert again == tokens[B]
            timed.append(time_ | {"batch": B})
    first = {f"first_call_s_{B}": first[B] for B in BATCHES.value}
    return first | {"ready_s": ready, "timed": timed, "tokens": tokens}


def compare() -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = sides.write_model(folder)
        read = 4 * (size - _embedding(folder))
        bandwidth = read_bandwidth()
        rounds = sides.alternate("tests.benchmarks.decode", folder)
    rows, summary = [], {}
    for B in BATCHES.value:
        tokens = {r["side"]: r["tokens"][B] for r in rounds}
        same = np.equal(tokens["ours"], tokens["torch"])
        used = {side: sides.timed(rounds, side, batch=B) for side in sides.SIDES}
        speed = [
            int(B) * NEW.value / statistics.median(t["seconds"] for t in used[side])
            for side in sides.SIDES
        ]
        first = [sides.median(rounds, side, f"first_call_s_{B}") for side in sides.SIDES]
        summary[B] = {
            "tokens_per_s": speed,
            "ratio": speed[0] / speed[1],
            "first_call_s": first,
            "equal_tokens": float(same.mean()),
        }
        rows.append(
            [
                f"{sides.FAMILY.value}, batch {B}",
                *(f"{x:,.0f}" for x in speed),
                f"{speed[0] / speed[1]:.2f}",
                *(f"{x:.1f}" for x in first),
                " + ".join(str(len(used[side])) for side in sides.SIDES),
                f"{same.sum():,} of {same.size:,}",
            ]
        )
    head = ["decode", "ours, tok/s", "torch, tok/s", "ratio", "ours, first call, s"]
    print(f"\n{size:,} parameters; prompts of {PROMPT.value}, {NEW.value} new tokens, float32\n")
    print(sides.table([*head, "torch, first call, s", "timed", "equal tokens"], rows))
    print(
        f"\nThe machine reads {bandwidth / 1e9:.1f} GB/s, and a token of batch 1 "
        f"{read / 1e6:.0f} MB of weights: {bandwidth / read:.0f} tokens/s at most."
    )
    for result in rounds:
        del result["tokens"]
    flags_ = {flag.name: flag.value for flag in (sides.FAMILY, PROMPT, NEW, BEAMS)}
    flags_ |= {"bytes_a_token": read, "bytes_per_s": bandwidth}
    sides.write_result(flags_ | {"parameters": size, "summary": summary, "rounds": rounds})


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --NAME=VALUE")
    if sides.SIDE.value:
        print(json.dumps(run_side()))
    else:
        compare()


if __name__ == "__main__":
    app.run(main)
