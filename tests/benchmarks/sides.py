"""What the benchmarks share: the models, and two sides that take turns, each in its own process.

A process of its own keeps the thread pools of XLA and of torch apart, and compiles anew. Around
everything that is timed, the CPU time of the process and of the whole machine is read: what the
machine did beyond the process is foreign load. A measurement waits until there is none, and is
repeated where some came.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import transformers
from absl import flags

from tests.benchmarks.stopwatch import Stopwatch

SIDES = ("ours", "torch")

FAMILY = flags.DEFINE_enum("family", "llama", ["llama", "bloom"], "Which model: see --tiny.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Times that each side runs: A B A B.")
OUT = flags.DEFINE_string("out", None, "JSON file to write: every round, and the summary.")
TINY = flags.DEFINE_bool(
    "tiny", False, "A model of 2 layers of width 64, to try the program; else 8 layers of 512."
)
MAX_FOREIGN = flags.DEFINE_float(
    "max_foreign", 0.1, "A measurement during which others used more cores than this is no good."
)
PATIENCE = flags.DEFINE_float(
    "patience", 60, "Seconds that each process may wait for, or lose to, foreign load."
)
SIDE = flags.DEFINE_enum("side", None, SIDES, "Used by the program itself: run this side only.")
WORK = flags.DEFINE_string("work", None, "Used by the program itself: folder of model and data.")
STARTED = flags.DEFINE_float("started", None, "Used by the program itself: when it was started.")


def write_model(folder: str) -> int:
    """A random model in ``folder``, written by transformers; the number of its parameters."""
    import torch

    torch.manual_seed(0)
    width, layers, heads, vocab = (64, 2, 4, 8192) if TINY.value else (512, 8, 8, 8192)
    if FAMILY.value == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    else:
        config = transformers.BloomConfig(
            vocab_size=vocab, hidden_size=width, n_layer=layers, n_head=heads
        )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def torch_model(folder: str):
    import torch

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_model(folder: str):
    """(config, parameters)."""
    import jax.numpy as jnp

    from llmzoo_jax import hf

    config = hf.read_config(folder)
    return config, hf.load_params(folder, config, place=lambda name, x: jnp.asarray(x))


# --- rounds -------------------------------------------------------------------------------------


def alternate(module: str, folder: str, others: dict[str, list[str]] | None = None) -> list[dict]:
    """Runs the sides in turn; what each process reported, in that order. ``others`` are more sides
    by name, and the commands that run them."""
    commands = {
        side: [sys.executable, "-m", module, *sys.argv[1:], f"--side={side}"] for side in SIDES
    } | (others or {})
    rounds = []
    for number in range(ROUNDS.value):
        for side, command in commands.items():
            command = [*command, f"--work={folder}", f"--started={time.time()}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{module}: side {side!r} ended with exit status {done.returncode}")
            result = json.loads(done.stdout.splitlines()[-1])
            rounds.append(result | {"round": number, "side": side})
            print(f"round {number}, {side}: {_load(result['timed'])}", flush=True)
    return rounds


def _load(timed: list[dict]) -> str:
    parts = (
        f"{t['seconds']:.2f} s ({t['own_cores']:.2f} + {t['foreign_cores']:.2f} cores"
        f"{'' if t['quiet'] else ', NOT QUIET'})"
        for t in timed
    )
    return ", ".join(parts)


def since_start() -> float:
    """Seconds since the process of this side was started: imports and loading included."""
    return time.time() - STARTED.value


def stopwatch() -> Stopwatch:
    return Stopwatch(PATIENCE.value, MAX_FOREIGN.value)


# --- results ------------------------------------------------------------------------------------


def timed(rounds: list[dict], side: str, **what: Any) -> list[dict]:
    """The quiet measurements of a side that agree with ``what``; all where none was quiet."""
    mine = [t for r in rounds if r["side"] == side for t in r["timed"]]
    mine = [t for t in mine if all(t[key] == value for key, value in what.items())]
    return [t for t in mine if t["quiet"]] or mine


def median(rounds: list[dict], side: str, key: str) -> float:
    return statistics.median(r[key] for r in rounds if r["side"] == side)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(result: dict) -> None:
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
