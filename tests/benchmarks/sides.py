"""What the benchmarks share: the models, and two sides that take turns, each in its own process.

A process of its own keeps the thread pools of XLA and of torch apart, and compiles anew. While a
side is timed, the CPU time of this process and of the whole machine is counted: what the machine
did beyond this process is foreign load, and a round that saw much of it is run again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from absl import flags

SIDES = ("ours", "torch")

FAMILY = flags.DEFINE_enum("family", "llama", ["llama", "bloom"], "Which model: see --tiny.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Times that each side runs: A B A B.")
OUT = flags.DEFINE_string("out", None, "JSON file to write: every round, and the summary.")
TINY = flags.DEFINE_bool(
    "tiny", False, "A model of 2 layers of width 64, to try the program; else 8 layers of 512."
)
MAX_FOREIGN = flags.DEFINE_float(
    "max_foreign", 0.1, "A round in which other programs used more cores than this runs again."
)
RETRIES = flags.DEFINE_integer("retries", 2, "How many rounds may run again, in all.")
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


def alternate(module: str, folder: str) -> list[dict]:
    """Runs the sides in turn; what each process reported, in that order."""
    rounds, retries = [], RETRIES.value
    for number in range(ROUNDS.value):
        for side in SIDES:
            while True:
                result = _run(module, side, folder) | {"round": number, "side": side}
                result["kept"] = result["foreign_cores"] <= MAX_FOREIGN.value
                rounds.append(result)
                print(_line(result), flush=True)
                if result["kept"] or not retries:
                    break
                retries -= 1
    return rounds


def _run(module: str, side: str, folder: str) -> dict:
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    command += [f"--side={side}", f"--work={folder}", f"--started={time.time()}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{module}: side {side!r} ended with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _line(result: dict) -> str:
    note = "" if result["kept"] else "; LEFT OUT"
    return (
        f"round {result['round']}, {result['side']}: timed {result['wall_s']:.1f} s, "
        f"{result['own_cores']:.2f} cores of its own, {result['foreign_cores']:.2f} foreign{note}"
    )


def since_start() -> float:
    """Seconds since the process of this side was started: imports and loading included."""
    return time.time() - STARTED.value


@contextmanager
def load_watch() -> Iterator[dict]:
    """Fills a dict with seconds, cores used by this process, and cores used by others."""
    load: dict = {}
    wall, own, busy = time.perf_counter(), time.process_time(), _machine_seconds()
    yield load
    wall = time.perf_counter() - wall
    own, busy = time.process_time() - own, _machine_seconds() - busy
    load["wall_s"] = wall
    load["own_cores"] = own / wall
    load["foreign_cores"] = max(0.0, (busy - own) / wall)


def _machine_seconds() -> float:
    """CPU seconds that all processes have used, stolen ones included."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


# --- results ------------------------------------------------------------------------------------


def kept(rounds: list[dict], side: str) -> list[dict]:
    """The rounds of a side without foreign load; all of them where there is none."""
    mine = [r for r in rounds if r["side"] == side]
    return [r for r in mine if r["kept"]] or mine


def median(rounds: list[dict], side: str, key: str) -> float:
    return statistics.median(r[key] for r in kept(rounds, side))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_result(result: dict) -> None:
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
