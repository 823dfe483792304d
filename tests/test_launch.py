"""The scripts in launch/ start what they say, in real processes where this machine can."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmzoo_jax import metrics
from tests import test_distributed

SCRIPTS = ("common", "local", "quickstart", "slurm", "test", "tpu_vm")
folder = test_distributed.folder  # a config and what it needs

# Both set what Slurm sets for the processes of a step, which JAX reads.
FAKE_WORKERS = """
pids=()
for i in 0 1; do
  SLURM_JOB_ID=$RANDOM_JOB SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$i \\
    SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 "${command[@]}" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
FAKE_SRUN = (
    '#!/usr/bin/env bash\n[[ $1 = --kill-on-bad-exit=1 ]]\ncommand=("${@:2}")' + FAKE_WORKERS
)
FAKE_GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$HOME/gcloud.log"
for argument in "$@"; do
  case $argument in --command=*) command=(bash -c "${argument#--command=}") ;; esac
done
[ -n "${command:-}" ] || exit 0
cd "$HOME"
""" + FAKE_WORKERS  # fmt: skip


def bash(repository: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A script of launch/ with its arguments, run in the repository."""
    return subprocess.run(
        ["bash", f"launch/{command[0]}.sh", *command[1:]],
        cwd=repository,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


def tool(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in metrics.read(run_dir) if "loss" in r}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_bash(script, repository):
    assert subprocess.run(["bash", "-n", f"launch/{script}.sh"], cwd=repository).returncode == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (a Debian package)")
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script, repository):
    run = subprocess.run(
        ["shellcheck", "--severity=warning", "-x", f"launch/{script}.sh"],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_this_list_of_scripts_is_whole(repository):
    assert sorted(p.stem for p in (repository / "launch").glob("*.sh")) == sorted(SCRIPTS)


# --- one machine --------------------------------------------------------------------------------


@pytest.mark.slow
def test_local_processes_train_and_an_error_ends_them_all_at_once(folder, repository):
    config = [f"--config={folder}/config.py", f"--config.run_dir={folder}/local"]
    flags = [*config, "--config.optim.steps=2", "--config.eval_every=0"]
    good = bash(repository, "local", "2", *flags)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "2 processes along fsdp" in good.stdout
    assert good.stdout.count("done: ") == 1
    assert sorted(losses(folder / "local")) == [1, 2]
    since = time.monotonic()
    bad = bash(repository, "local", "2", *flags, "--config.seed=7")
    assert bad.returncode == 1
    assert bad.stderr.count("belongs to another config") == 1
    assert "Traceback" not in bad.stderr
    assert time.monotonic() - since < 60  # not the minutes after which JAX would miss a process


@pytest.mark.slow
def test_local_processes_all_stop_at_a_signal(folder, repository):
    flags = [f"--config={folder}/config.py", f"--config.run_dir={folder}/stopped"]
    process = subprocess.Popen(
        ["bash", "launch/local.sh", "2", *flags, "--config.optim.steps=100000"],
        cwd=repository,
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    saved = max(int(p.name) for p in (folder / "stopped" / "checkpoints").iterdir())
    assert saved == max(losses(folder / "stopped")) >= 3


@pytest.mark.parametrize("arguments", [[], ["--config=x"], ["0"]])
def test_local_says_how_it_is_used(arguments, repository):
    run = bash(repository, "local", *arguments)
    assert run.returncode == 2 and "usage: " in run.stderr


# --- Slurm --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slurm_starts_processes_that_find_each_other(folder, repository, tmp_path):
    tool(tmp_path / "srun", FAKE_SRUN)
    run = bash(
        repository,
        "slurm",
        f"--config={folder}/config.py",
        f"--config.run_dir={folder}/slurm",
        SLURM_SUBMIT_DIR=str(repository),
        RANDOM_JOB=str(os.getpid()),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 processes along fsdp" in run.stdout
    assert sorted(losses(folder / "slurm")) == [1, 2, 3, 4]


def test_slurm_without_sbatch_says_so(repository):
    run = bash(repository, "slurm", "--config=x", SLURM_SUBMIT_DIR="")
    assert run.returncode != 0 and "start this with sbatch" in run.stderr


# --- TPU VM -------------------------------------------------------------------------------------

TPU = {"NAME": "mine", "ZONE": "us-west4-a", "TYPE": "v5litepod-16"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create"], "tpu-vm create mine --zone=us-west4-a --accelerator-type=v5litepod-16 "
                     "--version=v2-alpha-tpuv5-lite"),
        (["setup"], "tpu-vm scp"),
        (["run", "--config=a b.py"], "--worker=all"),
        (["stop"], "pkill"),
        (["delete"], "tpu-vm delete mine --zone=us-west4-a --quiet"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_dry_run_prints_the_commands_and_starts_none(arguments, said, repository, tmp_path):
    tool(tmp_path / "gcloud", FAKE_GCLOUD)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    run = bash(repository, "tpu_vm", *arguments, **TPU, **path, DRY_RUN="1")
    assert run.returncode == 0, run.stderr
    assert said in run.stdout
    assert not (tmp_path / "gcloud.log").exists()


@pytest.mark.parametrize("command", ["create", "delete"])
def test_what_costs_or_destroys_asks_first(command, repository, tmp_path):
    tool(tmp_path / "gcloud", FAKE_GCLOUD)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    refused = bash(repository, "tpu_vm", command, **TPU, **path)  # there is nobody to answer
    assert refused.returncode != 0 and not (tmp_path / "gcloud.log").exists()
    agreed = bash(repository, "tpu_vm", command, **TPU, **path, YES="1")
    assert agreed.returncode == 0 and command in (tmp_path / "gcloud.log").read_text()


@pytest.mark.slow
def test_a_tpu_run_starts_on_all_hosts(folder, repository, tmp_path):
    """Up to JAX's own way of finding TPU hosts: the stand-in for gcloud has Slurm's variables."""
    tool(tmp_path / "gcloud", FAKE_GCLOUD)
    tool(
        tmp_path / "llmzoo_jax/.venv/bin/python",
        f'#!/usr/bin/env bash\nPYTHONPATH={repository} exec {sys.executable} "$@"\n',
    )
    run = bash(
        repository,
        "tpu_vm",
        "run",
        f"--config={folder}/config.py",
        f"--config.run_dir={folder}/tpu run",
        **TPU,
        HOME=str(tmp_path),
        RANDOM_JOB=str(os.getpid()),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 processes along fsdp" in run.stdout
    assert sorted(losses(folder / "tpu run")) == [1, 2, 3, 4]
