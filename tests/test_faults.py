"""Whatever happens to a run, the same command again gives what an undisturbed run gives, bit for
bit: real processes, real kills, real full disks.

Packed and mixed data (two weights), accumulated, in bfloat16. All runs share a compile cache.
"""

import os
import random
import shutil
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
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "RUN_DIR": str(run_dir),
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
        {k: v for k, v in record.items() if not k.endswith("_per_s") and k != "goodput"}
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
        said, steps = "", rng.randint(1, 3)
        while process.poll() is None and said.count("\nstep ") < steps:
            said = console(run_dir)
        while moment == "save" and process.poll() is None and half_written(run_dir) == before:
            pass
        time.sleep(rng.uniform(0, 0.01 if moment == "save" else 0.2))
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
    assert any(hits)  # where a machine is so fast that a kill comes too late, others do not
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_runs_killed_at_random_end_as_an_undisturbed_one(seed, folder, undisturbed, tmp_path):
    """Five kills or more that met a run in the act: 30 in all. A machine may be so fast that a kill
    comes too late; then another run is killed, too."""
    rng, hits = random.Random(100 + seed), 0
    for number in range(4):
        run_dir = tmp_path / f"run{number}"
        moments = rng.sample(["any", "step", "step", "save", "save"], 5)
        hits += kill_again_and_again(folder, run_dir, moments, 10 * seed + number).count(True)
        assert_same(run_dir, undisturbed)
        if hits >= 5:
            return
    raise AssertionError(f"{hits} kills of 20 met a run in the act")


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "moment", "code"),
    [
        pytest.param("SIGINT", "evaluation", 130, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "save", 0, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "compile", 0, marks=pytest.mark.slow),
        pytest.param("SIGINT", "compile", 130, marks=pytest.mark.slow),
        pytest.param("SIGTERM", "evaluation", 0, marks=pytest.mark.slow),
        pytest.param("SIGINT", "save", 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_any_moment_saves_and_the_run_goes_on(
    number, moment, code, folder, undisturbed, tmp_path
):
    at = {"compile": 1, "evaluation": 9, "save": 7}[moment]  # the step that is done after it
    said = run(folder, tmp_path / "run", what=f"{number}-in-{moment}", code=code)
    assert f"{number}: saved step {at} of {STEPS}" in said
    assert steps_of(tmp_path / "run")[-1] == at
    assert f"resuming {tmp_path / 'run'} at step {at}" in run(folder, tmp_path / "run")
    assert_same(tmp_path / "run", undisturbed)


# --- disks --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB: a few checkpoints of 1.3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system of 8 MB needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before_it_whole(
    folder, undisturbed, small_disk
):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    said = run(folder, run_dir, "--config.eval_every=99", what="full-disk-in-save", code=1)
    assert f"error: {run_dir}/checkpoints: a checkpoint was not saved" in said
    assert "same command again" in said
    assert steps_of(run_dir) == [3]
    checkpoint.restore_params(run_dir, BLOOM)
    (run_dir / "filler").unlink()  # room is made
    assert f"resuming {run_dir} at step 3" in run(folder, run_dir)
    assert_same(run_dir, undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_when_metrics_are_written_stops_the_run_with_the_file_s_name(
    folder, undisturbed, small_disk
):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    rarely = ("--config.save_every=99", "--config.eval_every=99")
    said = run(folder, run_dir, *rarely, what="full-disk-in-metrics", code=1)
    assert f"error: {run_dir}/metrics.jsonl: can't be written" in said
    (run_dir / "filler").unlink()
    run(folder, run_dir)
    assert_same(run_dir, undisturbed)


def test_a_damaged_newest_checkpoint_is_moved_away_and_the_run_goes_back_to_the_one_before(
    folder, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    data = max((run_dir / f"checkpoints/{STEPS}").rglob("d/*"), key=lambda p: p.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)  # cut off half-way
    said = run(folder, run_dir)
    assert f"checkpoints/{STEPS} is damaged" in said
    assert f"It was moved to {run_dir}/damaged/{STEPS}; the run goes back to step 21" in said
    assert (run_dir / "damaged" / str(STEPS) / data.relative_to(data.parents[3])).is_file()
    assert_same(run_dir, undisturbed)


# --- another mesh, dead workers, spikes ---------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_eight_devices_goes_on_on_one(folder, undisturbed, tmp_path):
    run(folder, tmp_path / "run", "--config.optim.accumulation=1", what="SIGTERM-in-save",
        devices=8)  # fmt: skip
    said = run(folder, tmp_path / "run", "--config.optim.accumulation=1")
    assert "at step 7" in said and "mesh replica=1, fsdp=1, tensor=1" in said
    ours, theirs = (
        [r["loss"] for r in records(path) if "loss" in r]
        for path in (tmp_path / "run", undisturbed)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)  # of bfloat16, in another order


@pytest.mark.slow
def test_a_data_worker_that_is_killed_is_named_and_changes_nothing(folder, undisturbed, tmp_path):
    process = start(folder, tmp_path / "run", "--config.data.workers=2")
    while process.poll() is None and "\nstep 1/" not in console(tmp_path / "run"):
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    said = console(tmp_path / "run")
    assert f"data worker {workers[0]} died (SIGKILL)" in said and "new workers go on" in said
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_resumed_run_skips_the_spikes_that_an_undisturbed_one_skips(folder, tmp_path):
    strict = [f"--config.optim.{x}" for x in ("spike_factor=1", "spike_window=3", "max_skipped=99")]
    said = run(folder, tmp_path / "whole", *strict)
    assert "was skipped: loss" in said and "over 1.0 x the median" in said
    assert 2 < records(tmp_path / "whole")[-2]["skipped"] < STEPS
    run(folder, tmp_path / "run", *strict, what="SIGTERM-in-save")
    run(folder, tmp_path / "run", *strict)
    assert_same(tmp_path / "run", tmp_path / "whole")
