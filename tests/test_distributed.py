"""Real processes, joined by jax.distributed over loopback, train as one does with their devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmzoo_jax import distributed, metrics, sharding
from llmzoo_jax.config import MeshConfig
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.distributed import DistributedError
from tests.tiny_tokenizers import SENTENCES, conversation, tiny

STEPS = 4
CONFIG = """
from llmzoo_jax.config import *

def get_config():
    folder = {folder!r}
    return Config(
        run_dir=folder + "/run",
        tokenizer=folder + "/tokenizer",
        model=BloomConfig(
            vocab_size=640, hidden_size=32, num_layers=1, num_heads=8, layer_norm_eps=1e-2,
            residual_post_layernorm=False, tie_embeddings=True, init_std=0.05,
        ),
        data=DataConfig(
            train=(Source(path=folder + "/train.jsonl"),),
            heldout=(Source(path=folder + "/heldout.jsonl"),),
            sequence_length=64, batch_size=16, cache_dir=folder + "/cache",
        ),
        optim=OptimConfig(learning_rate=1e-2, steps={steps}, accumulation=2),
        log_every=1, eval_every=2, save_every=2,
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, a tokenizer, and two files of conversations in two languages."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny("bpe").save_pretrained(folder / "tokenizer")
    pairs = [conversation(a, b, lang="xx"[: i % 2] + "fr") for i, a in enumerate(SENTENCES)
             for b in SENTENCES]  # fmt: skip
    write_jsonl(folder / "train.jsonl", pairs)
    write_jsonl(folder / "heldout.jsonl", pairs[::9])
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder), steps=STEPS))
    return folder


def run_of(folder: Path, name: str, sizes: tuple[int, ...], **more) -> dict:
    """A run called ``name`` on a mesh, as the worker takes it."""
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(sharding.AXES, sizes, strict=True)]
    return {
        "config": str(folder / "config.py"),
        "overrides": [f"run_dir={folder / name}", *mesh],
        **more,
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_in(
    processes: int, devices: int, folder: Path, runs: list[dict]
) -> list[list[int | None]]:
    """Trains the runs in ``processes`` fresh ones of ``devices`` devices each. How each run ended,
    by process: None at its end, or the exit code."""
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    logs = [folder / f"process{i}.log" for i in range(processes)]
    started = []
    for i, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.distributed_worker", path, str(processes), str(i)]
        with log.open("w") as out:
            started.append(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        codes = [process.wait(timeout=420) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    text = [log.read_text() for log in logs]
    assert codes == [0] * processes, "\n".join(text)
    for number, words in enumerate(text):  # only the first one speaks
        assert ("held-out loss" in words) == (number == 0)
    return [
        [json.loads(line)["exit"] for line in words.splitlines() if line.startswith('{"exit"')]
        for words in text
    ]


def losses(run_dir: Path) -> dict[str, dict]:
    """Training and held-out losses by step, the latter by language too."""
    records = metrics.read(run_dir)
    return {
        "train": {r["step"]: r["loss"] for r in records if "loss" in r},
        "heldout": {r["step"]: r["heldout_loss"] for r in records if "heldout_loss" in r},
        "languages": {
            f"{r['step']} {name}": loss
            for r in records
            for name, loss in r.get("heldout_by_language", {}).items()
        },
        "tokens": {r["step"]: r["packing"] for r in records if "packing" in r},
    }


def assert_equal_losses(ours: Path, theirs: Path, tolerance: float) -> None:
    """``tolerance`` is that of the training losses; the held-out ones are means of many."""
    a, b = losses(ours), losses(theirs)
    assert sorted(a["train"]) == list(range(1, STEPS + 1)) and len(a["languages"]) == 4
    for kind in a:
        assert a[kind].keys() == b[kind].keys()
        worst = max(abs(a[kind][key] - b[kind][key]) for key in a[kind])
        print(f"{ours.name} {kind}: {worst:.1e}")
        assert worst <= (tolerance if kind == "train" else 1e-6), (kind, a[kind], b[kind])


# --- two processes ------------------------------------------------------------------------------

TWO = {"fsdp": (1, 2, 1, 1), "tensor": (1, 1, 2, 1)}


@pytest.fixture(scope="module")
def two(folder) -> list[list[int | None]]:
    """Two processes of one device train on each mesh, and on the first the second process gets
    SIGTERM after its first step. Then one process of two devices goes on with that run, and trains
    all of them from the start."""
    runs = [run_of(folder, f"two-{name}", sizes) for name, sizes in TWO.items()]
    ends = train_in(2, 1, folder, [runs[0] | {"signal": [1, 1]}, *runs[1:]])
    (folder / "process0.log").rename(folder / "two.log")
    alone = [run_of(folder, f"one-{name}", sizes) for name, sizes in TWO.items()]
    train_in(1, 2, folder, [runs[0], *alone])
    return ends


def test_sigterm_at_one_process_stops_both_at_one_step_with_one_checkpoint(two, folder):
    assert two == [[0, None]] * 2
    assert f"SIGTERM: saved step 2 of {STEPS}" in (folder / "two.log").read_text()


def test_two_processes_with_shared_rows_train_to_the_losses_of_one(two, folder):
    """With two parts a sum has one order only: bitwise."""
    assert_equal_losses(folder / "two-tensor", folder / "one-tensor", 0.0)


def test_one_process_goes_on_where_two_stopped_with_the_losses_of_an_undisturbed_run(two, folder):
    assert " at step 2" in (folder / "process0.log").read_text()
    assert_equal_losses(folder / "two-fsdp", folder / "one-fsdp", 0.0)


# --- four processes -----------------------------------------------------------------------------

FOUR = [
    (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (1, 2, 2, 2),
]  # fmt: skip


@pytest.mark.slow
def test_two_processes_with_a_part_of_each_row_train_to_the_losses_of_one(folder):
    for name, processes, devices in (("two", 2, 1), ("one", 1, 2)):
        runs = [run_of(folder, f"{name}-sequence", (1, 1, 1, 2))]
        assert train_in(processes, devices, folder, runs) == [[None]] * processes
    assert_equal_losses(folder / "two-sequence", folder / "one-sequence", 0.0)


@pytest.mark.slow
def test_four_processes_train_to_the_losses_of_one(folder):
    """Of two devices each, on meshes of which each axis lies within and across processes."""
    names = ["".join(map(str, mesh)) for mesh in FOUR]
    for kind, processes, devices in (("four", 4, 2), ("eight", 1, 8)):
        runs = [run_of(folder, f"{kind}-{n}", mesh) for n, mesh in zip(names, FOUR, strict=True)]
        assert train_in(processes, devices, folder, runs) == [[None] * len(runs)] * processes
    for name in names:
        assert_equal_losses(folder / f"four-{name}", folder / f"eight-{name}", 1e-6)


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(folder):
    stopped = [run_of(folder, "grown", (1, 2, 1, 1), signal=[0, 1])]
    assert train_in(2, 1, folder, stopped) == [[0], [0]]
    assert train_in(4, 1, folder, [run_of(folder, "grown", (2, 1, 2, 1))]) == [[None]] * 4
    undisturbed = [run_of(folder, "undisturbed", (1, 2, 1, 1))]
    train_in(2, 1, folder, undisturbed)
    assert_equal_losses(folder / "grown", folder / "undisturbed", 1e-6)


@pytest.mark.slow
def test_two_processes_train_adapters_on_an_int8_base_to_the_losses_of_one(folder):
    """One of them is stopped, and both go on; the base is read again by each."""
    from llmzoo_jax import config, hf
    from tests.parity import random_model

    model = config.load(str(folder / "config.py")).model
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(hf.config_to_hf(model, dtype="float32")))
    weights = random_model(model, seed=2, scale=0.1)
    hf.save_params(base, weights, model, dtype="float32", max_shard_bytes=10**9)
    keys = [f"init_from={base}", "lora.rank=4", "lora.quantise=int8", "lora.dropout=0.1"]

    def run(name: str, **more) -> list[dict]:
        one = run_of(folder, name, (1, 2, 1, 1), **more)
        return [one | {"overrides": one["overrides"] + keys}]

    assert train_in(2, 1, folder, run("two-lora", signal=[1, 1])) == [[0], [0]]
    assert train_in(2, 1, folder, run("two-lora")) == [[None]] * 2
    assert train_in(1, 2, folder, run("one-lora")) == [[None]]
    assert_equal_losses(folder / "two-lora", folder / "one-lora", 0.0)


# --- rows, flags --------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2), (2, 1, 1, 4)], ids=str)
def test_a_batch_is_the_same_from_local_rows_and_from_all_rows(sizes):
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
    layout, shape = sharding.batch_sharding(mesh, (8, 4)), (8, 4)
    batch = np.arange(32).reshape(shape)
    placed = distributed.put(batch, sharding=layout, shape=shape)
    np.testing.assert_array_equal(placed, batch)
    assert placed.sharding == layout
    np.testing.assert_array_equal(distributed.local_rows(layout, shape), np.arange(8))


class SomeDevices:
    """The sharding of a process that has only some of the devices."""

    def __init__(self, layout, devices):
        self.layout, self.devices = layout, devices

    def addressable_devices_indices_map(self, shape):
        return {
            device: index
            for device, index in self.layout.devices_indices_map(shape).items()
            if device in self.devices
        }


@pytest.mark.parametrize(
    ("sizes", "process", "rows"),
    [
        ((1, 8, 1, 1), [2, 3], [2, 3]),  # of rows of its own
        ((1, 2, 4, 1), [2, 3], [0, 1, 2, 3]),  # the tensor axis spans processes: rows are shared
        ((1, 1, 2, 4), [6, 7], range(8)),  # so does the sequence axis
        ((2, 2, 2, 1), [0, 7], [0, 1, 6, 7]),  # a torus may give a host rows that are apart
    ],
    ids=str,
)
def test_a_process_makes_the_rows_that_its_devices_hold_a_part_of(sizes, process, rows):
    mesh = sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))))
    layout = SomeDevices(
        sharding.batch_sharding(mesh, (8, 4)), [mesh.devices.flat[i] for i in process]
    )
    assert distributed.local_rows(layout, (8, 4)).tolist() == list(rows)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("h:1", None, 0), {}, r"--coordinator=h:1 needs --num_processes and --process_id"),
        (("h:1", 2, 2), {}, r"--process_id=2 must be from 0 to --num_processes=2 - 1"),
        ((None, 2, None), {}, r"need --coordinator=HOST:PORT"),
        ((None, None, None), {"JAX_PROCESS_ID": "x"}, r"JAX_PROCESS_ID=x: expected a number"),
    ],
    ids=str,
)
def test_half_of_what_joins_processes_is_an_error(arguments, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=message):
        distributed.start(*arguments)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM | {"SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # a batch script's, not srun's
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
    ids=str,
)
def test_one_process_stays_alone_and_several_are_seen(environment, several):
    assert distributed.detected(environment) == several


def test_slurm_with_one_task_a_node_keeps_all_its_devices():
    one = SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    assert distributed._all_devices(one) == []
    assert distributed._all_devices(one | {"JAX_LOCAL_DEVICE_IDS": "3"}) is None
    assert distributed._all_devices(one | {"SLURM_NTASKS": "16"}) is None
