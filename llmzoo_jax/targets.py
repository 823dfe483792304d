"""Accelerators that are not here: devices to compile for, and what they hold.

A target is ``CHIP:TOPOLOGY``: ``v5e:16x16`` and ``v5p:4x4x4`` are TPU slices, ``h200:8`` is a host
of eight GPUs and ``h200:4x8`` four such hosts, ``cpu:8`` eight fake CPU devices.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from llmzoo_jax.errors import InputError


class TargetError(InputError):
    """A target that is not known, or can't be compiled for here; the message says what to do."""


class Chip(NamedTuple):
    platform: str  # of JAX: "tpu" or "gpu"
    memory: int  # bytes a device
    cores: int  # streaming multiprocessors of a GPU
    shared_memory: int  # bytes a block of a GPU may take
    bandwidth: int  # bytes/s of the memory
    capability: str  # compute capability of a GPU


def _tpu(memory: float, bandwidth: int) -> Chip:
    return Chip("tpu", int(memory * 2**30), 0, 0, bandwidth * 10**9, "")


# Google Cloud's pages of each TPU; NVIDIA's data sheets.
CHIPS = {
    "v4": _tpu(32, 1228),
    "v5e": _tpu(16, 819),
    "v5p": _tpu(95, 2765),
    "v6e": _tpu(32, 1640),
    "tpu7x": _tpu(96, 3690),  # a chip is two devices
    "a100": Chip("gpu", 80 * 10**9, 108, 166912, 2039 * 10**9, "8.0"),
    "h100": Chip("gpu", 80 * 10**9, 132, 232448, 3350 * 10**9, "9.0"),
    "h200": Chip("gpu", 141 * 10**9, 132, 232448, 4800 * 10**9, "9.0"),
}


class Target(NamedTuple):
    name: str
    devices: list[jax.Device]  # to compile for; nothing can run on them, but on a CPU's
    memory: int | None  # bytes a device; None where it is the machine's own


def load(name: str, *, slices: int = 1) -> Target:
    """The devices of a target such as ``v5e:16x16``, or of ``slices`` such slices.

    Raises TargetError for an unknown name, a plugin that is not installed, or a topology that the
    chip does not have."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in {"cpu", *CHIPS}:
        raise TargetError(
            f"--target={name}: write CHIP:TOPOLOGY, as v5e:16x16, h200:8, h200:4x8 or cpu:8; chips "
            f"are cpu, {', '.join(CHIPS)}"
        )
    chip, topology = match[1], match[2]
    if chip == "cpu":
        return Target(name, _cpu(name, topology), None)
    load_devices = _tpu_devices if CHIPS[chip].platform == "tpu" else _gpu_devices
    try:
        devices = load_devices(chip, topology, slices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise TargetError(f"--target={name}: {str(error).splitlines()[0]}") from error
    return Target(name, devices, CHIPS[chip].memory)


def _cpu(name: str, topology: str) -> list[jax.Device]:
    try:
        count = int(topology)
    except ValueError as error:
        raise TargetError(f"--target={name}: write cpu:NUMBER") from error
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TargetError(f"--target={name}: this process has {len(devices)} CPU devices")
    return devices[:count]


def _tpu_devices(chip: str, topology: str, slices: int) -> list[jax.Device]:
    _require("libtpu", f"pip install 'jax[tpu]=={jax.__version__}'")
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # else it asks for a metadata server, minutes long
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else its lock file admits one process
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }.items():
        os.environ.setdefault(key, value)
    more = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(f"{chip}:{topology}", platform="tpu", **more).devices


def _gpu_devices(chip: str, topology: str, slices: int) -> list[jax.Device]:
    _require("jax_plugins.xla_cuda13", f"pip install 'jax[cuda13]=={jax.__version__}'")
    sizes = [int(n) for n in topology.split("x")]
    if len(sizes) > 2:
        raise ValueError("write HOSTSxGPUS, or GPUS")
    hosts, gpus = ([1] * (2 - len(sizes))) + sizes
    return topologies.get_topology_desc(
        chip,
        platform="cuda",
        topology=f"{slices}x{hosts}x{gpus}",
        target_config=_gpu_description(chip, CHIPS[chip]),
    ).devices


def _gpu_description(name: str, chip: Chip) -> str:
    """XLA's GpuTargetConfigProto as text, as XLA would read it from the card."""
    major, minor = chip.capability.split(".")
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {name.upper()}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {chip.cores}
          device_memory_size: {chip.memory}
          memory_bandwidth: {chip.bandwidth}
          shared_memory_per_block_optin: {chip.shared_memory}
          shared_memory_per_block: 49152
          shared_memory_per_core: 233472
          l2_cache_size: 52428800
          clock_rate_ghz: 1.98
          fpus_per_core: 128
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          threads_per_warp: 32
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}"""


def _require(module: str, command: str) -> None:
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise TargetError(
            f"compiling for this target needs {module}, which is not installed: {command} (in an "
            "environment of its own, and with JAX_PLATFORMS=cpu); no device is needed"
        )
