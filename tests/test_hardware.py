"""A hardware file changes where and how a config runs, never what it trains; its flags exist."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmzoo_jax import checkpoint, config, distributed
from llmzoo_jax.config import ConfigError, Hardware
from tests.tiny_runs import BLOOM

QUICKSTART = "configs/quickstart.py"
TARGETS = [
    "cpu.py",
    "gpu.py:h100-1", "gpu.py:h200-1", "gpu.py:h100-8", "gpu.py:h200-8", "gpu.py:h100-8x4",
    "gpu.py:h200-8x16-t8",
    "tpu.py:v4-8", "tpu.py:v4-4096", "tpu.py:v5e-8", "tpu.py:v5e-256", "tpu.py:v5e-256x2",
    "tpu.py:v5p-8", "tpu.py:v5p-12288", "tpu.py:v6e-8", "tpu.py:v6e-256x4-t4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


def load(target: str, *overrides: str):
    return config.load(QUICKSTART, overrides, f"configs/hardware/{target}")


def write(folder: Path, hardware: str) -> str:
    path = folder / "mine.py"
    path.write_text(
        "from llmzoo_jax.config import Hardware\n"
        f"def get_hardware(target='any'):\n    return {hardware}\n"
    )
    return str(path)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_changes_mesh_and_memory_alone(target):
    plain, laid = config.load(QUICKSTART), load(target)
    keys = config.differences(config.to_dict(laid), config.to_dict(plain))
    assert laid.hardware.name
    assert all(key.startswith((*config.HARDWARE_KEYS, "hardware.")) for key in keys)


def test_sizes_and_slices_become_mesh_and_memory():
    pod = load("tpu.py:v5e-256x2-t4")
    assert (pod.mesh.replica, pod.mesh.fsdp, pod.mesh.tensor) == (2, -1, 4)
    assert pod.compute.dtype == "bfloat16" and pod.compute.remat == "full"
    assert pod.compute.loss_chunk == 1024 * 512
    assert load("tpu.py:v5p-128").compute.loss_chunk == 4096 * 64  # two cores a chip
    hosts = load("gpu.py:h100-8x4")
    assert (hosts.mesh.replica, hosts.mesh.fsdp, hosts.mesh.tensor) == (4, -1, 1)
    assert not load("gpu.py:h200-1").hardware.xla_flags


def test_the_command_line_wins_over_the_target():
    assert load("gpu.py:h100-8x4", "mesh.replica=1", "compute.remat=full").mesh.replica == 1


@pytest.mark.parametrize(
    "target", ["gpu.py:a100-8", "tpu.py:v5-8", "tpu.py:v5e-512", "tpu.py:v4-9", "tpu.py:v9p-8"]
)
def test_a_target_that_is_not_there_points_to_the_ones_that_are(target):
    with pytest.raises(ConfigError, match="its docstring has the commands"):
        load(target)


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        ("Hardware(settings=('mesh.tensro=2',))", r"mesh\.tensro.*did you mean 'mesh\.tensor'"),
        ("Hardware(settings=('mesh.tensor=two',))", r"mesh\.tensor=two: expected int"),
        ("Hardware(settings=('seed=2',))", r"seed=2: a target may set mesh\., compute\."),
        ("{}", r"get_hardware\(\) must return a Hardware, not dict"),
    ],
)
def test_a_wrong_setting_names_file_and_key(hardware, message, tmp_path):
    path = write(tmp_path, hardware)
    with pytest.raises(ConfigError, match=message) as error:
        config.load(QUICKSTART, (), path)
    assert path in str(error.value)


def test_a_missing_file_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"--hardware: no file .*did you mean 'configs/hardware"):
        load("gpus.py")


def test_the_run_folder_tells_the_hardware_and_may_move_to_another(tmp_path):
    first = dataclasses.replace(load("gpu.py:h100-8"), run_dir=str(tmp_path / "run"))
    checkpoint.claim(first, BLOOM)
    assert checkpoint.read_config(tmp_path / "run")["hardware"]["name"] == "h100-8"
    # Another mesh, remat and loss_chunk, and the same dtype.
    moved = dataclasses.replace(load("tpu.py:v5e-16"), run_dir=str(tmp_path / "run"))
    checkpoint.claim(moved, BLOOM)


# --- flags and environment ----------------------------------------------------------------------


def test_flags_join_what_the_user_has_set_and_never_replace_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=mine --xla_b=2")
    monkeypatch.setenv("MEMORY", "mine")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.delenv("OTHER", raising=False)
    distributed.set_environment(
        Hardware(
            xla_flags=("--xla_a=ours", "--xla_c=3"),
            libtpu_flags=("--xla_tpu_d=4",),
            environment=("MEMORY=ours", "OTHER=a=b"),
        )
    )
    assert os.environ["XLA_FLAGS"] == "--xla_c=3 --xla_a=mine --xla_b=2"
    assert os.environ["LIBTPU_INIT_ARGS"] == "--xla_tpu_d=4"
    assert os.environ["MEMORY"] == "mine" and os.environ["OTHER"] == "a=b"
    monkeypatch.delenv("OTHER")
    monkeypatch.delenv("LIBTPU_INIT_ARGS")


def start_backend(flags: str) -> subprocess.CompletedProcess:
    """JAX in a fresh process, whose flags are set as train.main sets them: after the import."""
    code = f"import jax, os; os.environ['XLA_FLAGS'] = {flags!r}; print(jax.devices())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_installed_jaxlib_knows_every_xla_flag():
    """XLA ends the process at a flag that it does not know, GPU flags in a CPU process too."""
    flags = {flag for target in TARGETS for flag in load(target).hardware.xla_flags}
    assert len(flags) >= 10
    good = start_backend(" ".join(sorted(flags)))
    assert good.returncode == 0 and "CpuDevice" in good.stdout, good.stderr
    assert start_backend("--xla_gpu_no_such_flag=1").returncode != 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu]'"
)
def test_the_installed_libtpu_knows_every_flag():
    library = Path(importlib.util.find_spec("libtpu").origin).with_name("libtpu.so").read_bytes()
    known = set(re.findall(rb"xla_[a-z0-9_]+", library))
    for target in TARGETS:
        for flag in load(target).hardware.libtpu_flags:
            assert flag.removeprefix("--").partition("=")[0].encode() in known, flag


def test_libtpu_fuses_collectives_on_v5e_alone():
    """libtpu 0.0.52 refuses to compile with them for the others."""
    for target in TARGETS:
        fused = "async_collective_fusion" in json.dumps(load(target).hardware.libtpu_flags)
        assert fused == target.startswith("tpu.py:v5e"), target
