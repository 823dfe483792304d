"""Whatever happens to a run, the same command again gives what an undisturbed run gives, bit for
bit: real processes, real kills, real full disks.

Packed and mixed data (two weights), accumulated, in bfloat16. All runs share a compile cache.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmzoo_jax import checkpoint, manifest, metrics
from llmzoo_jax.conversation import write_jsonl
from tests.tiny_runs import BLOOM
from tests.tiny_tokenizers import SENTENCES, conversation, tiny

STEPS = 24
CONFIG = """
from llmzoo_jax.config import ComputeConfig, Config, DataConfig, OptimConfig, Source
from tests.tiny_runs import BLOOM

def get_config():
    return Config(
        run_dir="", tokenizer="{folder}/tokenizer", model=BLOOM,
        data=DataConfig(
            train=(Source(path="{folder}/a.jsonl"), Source(path="{folder}/b.jsonl", weight=0.5)),
            heldout=(Source(path="{folder}/heldout.jsonl"),),
            sequence_length=64, batch_size=8, cache_dir="{folder}/cache",
        ),
        optim=OptimConfig(learning_rate=1e-2, steps={steps}, accumulation=2, weight_decay=0.1),
        compute=ComputeConfig(dtype="bfloat16", loss_chunk=256),
        log_every=1, eval_every=8, save_every=3, keep_checkpoints=2,
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny("bpe").save_pretrained(folder / "tokenizer")
    pairs = [conversation(a, b, lang="fr") for a in SENTENCES for b in SENTENCES]
    write_jsonl(folder / "a.jsonl", pairs)
    write_jsonl(folder / "b.jsonl", [conversation(f"b {a}", a, lang="en") for a in SENTENCES])
    write_jsonl(folder / "heldout.jsonl", pairs[::9])
    (folder / "config.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    return folder


def start(folder: Path, run_dir: Path, *options: str, what: str = "nothing", devices: int = 1):
    """The command, started; its console is in ``run_dir.log``."""
    command = [sys.executable, "-u", "-m", "tests.faulty_train", what]
    command += [f"--config={folder}/config.py", f"--config.run_dir={run_dir}", *options]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = os.environ | cache | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "RUN_DIR": str(run_dir),
    }  # fmt: skip
    with open(f"{run_dir}.log", "w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=Path(__file__).parent.parent
        )


def console(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()


def run(folder: Path, run_dir: Path, *options: str, code: int = 0, **more) -> str:
    """Runs the command to its end; what it has said."""
    found = start(folder, run_dir, *options, **more).wait(timeout=200)
    said = console(run_dir)
    assert found == code, said
    assert "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(folder, run_dir)
    return run_dir


def records(run_dir: Path) -> list[dict]:
    """metrics.jsonl, without what depends on time."""
    return [
        {key: value for key, value in record.items() if not key.endswith("_per_s")}
        for record in metrics.read(run_dir)
    ]


def saved(run_dir: Path, step: int = STEPS) -> dict:
    """The manifest of a checkpoint: checksums of parameters, optimiser and step."""
    return manifest.read(run_dir / "checkpoints" / str(step))


def assert_same(run_dir: Path, other: Path) -> None:
    assert records(run_dir) == records(other)
    assert saved(run_dir) == saved(other) is not None
    weights = [jax.tree.leaves(checkpoint.restore_params(path, BLOOM)) for path in (run_dir, other)]
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (run_dir / "checkpoints").glob("*[0-9]"))


# --- kills --------------------------------------------------------------------------------------


def half_written(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def kill(process: subprocess.Popen, run_dir: Path, moment: str, rng: random.Random) -> bool:
    """Kills a run at a moment; whether it was still running, and, in a save, saving."""
    before = half_written(run_dir)
    if moment == "any":  # imports, tokenising, compiling, restoring, a few steps
        time.sleep(rng.uniform(0, 8))
    else:
        said, steps = "", rng.randint(1, 5)
        while process.poll() is None and said.count("\nstep ") < steps:
            said = console(run_dir)
        while moment == "save" and process.poll() is None and half_written(run_dir) == before:
            pass
        time.sleep(rng.uniform(0, 0.02 if moment == "save" else 0.3))
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running and (moment != "save" or bool(half_written(run_dir)))


def kill_again_and_again(folder: Path, run_dir: Path, moments: list[str], seed: int) -> list[bool]:
    rng, hits = random.Random(seed), []
    for moment in moments:
        process = start(folder, run_dir)
        hits.append(kill(process, run_dir, moment, rng))
        assert "Traceback" not in console(run_dir)
    said = run(folder, run_dir)
    assert not half_written(run_dir)  # what kills have left is cleared away
    assert "damaged" not in said
    return hits


def test_a_run_killed_three_times_once_in_a_save_ends_as_an_undisturbed_one(
    folder, undisturbed, tmp_path
):
    hits = kill_again_and_again(folder, tmp_path / "run", ["step", "save", "step"], seed=1)
    assert hits[1] and hits.count(True) >= 2
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_at_random_ends_as_an_undisturbed_one(seed, folder, undisturbed, tmp_path):
    """6 runs of 5 kills each, of which 25 or more must have met a run in the act."""
    moments = random.Random(100 + seed).sample(["any", "step", "step", "save", "save"], 5)
    hits = kill_again_and_again(folder, tmp_path / "run", moments, seed)
    assert hits.count(True) >= 4
    assert_same(tmp_path / "run", undisturbed)
