"""Several processes as one run: they start together, share out rows, wait, and stop together.

JAX is multi-controller: each process runs this same program over the devices of its host, and every
array spans them all. What only one of them may do (write files, tokenise) is process 0's, and
what they must do at the same step is agreed on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # the key-value store, as Orbax takes it
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmzoo_jax.config import Hardware
from llmzoo_jax.errors import InputError

Result = TypeVar("Result")
DAY = 24 * 3600 * 1000  # milliseconds; whoever dies earlier is missed by the heartbeat


class DistributedError(InputError):
    """Processes can't be one run; the message says what to set."""


# --- start --------------------------------------------------------------------------------------


def set_environment(hardware: Hardware) -> None:
    """Sets what the target needs in the environment. Whatever the user has set already stays.

    Must run before JAX starts a device.
    """
    for text in hardware.environment:
        name, _, value = text.partition("=")
        os.environ.setdefault(name, value)
    for name, flags in (
        ("XLA_FLAGS", hardware.xla_flags),
        ("LIBTPU_INIT_ARGS", hardware.libtpu_flags),
    ):
        theirs = os.environ.get(name, "").split()
        taken = {flag.partition("=")[0] for flag in theirs}
        ours = [flag for flag in flags if flag.partition("=")[0] not in taken]
        if ours:
            os.environ[name] = " ".join(ours + theirs)


def detected(environment: Mapping[str, str]) -> bool:
    """Whether variables say that this process is one of several that JAX can find: Slurm's (by
    ``srun``), Open MPI's, and those of TPU slices on Kubernetes."""
    several = lambda name: int(environment.get(name) or 1) > 1  # noqa: E731
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return (
        ("SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"))
        or ("OMPI_MCA_orte_hnp_uri" in environment and several("OMPI_COMM_WORLD_SIZE"))
        or several("MEGASCALE_NUM_SLICES")
        or "," in hosts
    )


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes, if there are any: those that the arguments name (or, where they
    are None, JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID), those that
    ``detected`` sees, or, for ``coordinator="auto"``, those that JAX finds by asking around.

    Raises DistributedError where only half of it is named.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _given(num_processes, "JAX_NUM_PROCESSES")
    process_id = _given(process_id, "JAX_PROCESS_ID")
    if coordinator and coordinator != "auto":
        if num_processes is None or process_id is None:
            raise DistributedError(
                f"--coordinator={coordinator} needs --num_processes and --process_id"
            )
        if not 0 <= process_id < num_processes:
            raise DistributedError(
                f"--process_id={process_id} must be from 0 to --num_processes={num_processes} - 1"
            )
        if num_processes > 1:
            jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=[])
    elif num_processes is not None or process_id is not None:
        raise DistributedError("--num_processes and --process_id need --coordinator=HOST:PORT")
    elif coordinator or detected(os.environ):
        jax.distributed.initialize(local_device_ids=_all_devices(os.environ))
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise DistributedError(
            f"this host is one of {jax.process_count()} of a TPU slice; start the same command on "
            "all of them, with --coordinator=auto"
        )
    if jax.distributed.is_initialized():
        # JAX's notice of a preemption takes SIGTERM; here ``agreement`` is for that, and Ctrl-C.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _given(number: int | None, variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if number is None and text:
        if not text.isdecimal():
            raise DistributedError(f"{variable}={text}: expected a number")
        return int(text)
    return number


def _all_devices(environment: Mapping[str, str]) -> list[int] | None:
    """For one process a node, [], which is all devices: under Slurm JAX would take one alone."""
    tasks, nodes = (environment.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    alone = tasks is not None and tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in environment
    return [] if alone else None


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """``start``, and an end that does not hang: a process that fails leaves without waiting for
    the others, which its launcher, or else JAX's heartbeat, ends."""
    start(coordinator, num_processes, process_id)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if isinstance(error, InputError | OSError):
            print(f"error (process {jax.process_index()}): {error}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- one after the other ------------------------------------------------------------------------

_calls = itertools.count()  # the same in every process: they make the same calls


def in_turn(function: Callable[[], Result]) -> Result:
    """``function()`` in process 0, and then in the others, which so find the files that it left.

    Where it raises an InputError in process 0, the others exit with 1 and leave the message to it.
    """
    if jax.process_count() == 1:
        return function()
    key = f"llmzoo_jax/in_turn/{next(_calls)}"
    store = jax_distributed.global_state.client
    if jax.process_index():
        if store.blocking_key_value_get(key, DAY) != "done":
            sys.exit(1)
        return function()
    try:
        result = function()
    except (InputError, OSError):
        store.key_value_set(key, "failed")
        raise
    store.key_value_set(key, "done")
    return result


# --- rows ---------------------------------------------------------------------------------------


def local_rows(sharding: NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """The rows of a batch ``[B,T]`` that the devices of this process hold a part of, sorted.

    Processes that share rows, along a tensor or sequence axis, each get them.
    """
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[0])[rows] for rows, _ in indices]))


def put(batch: Any, *, sharding: NamedSharding, shape: tuple[int, int]) -> Any:
    """A pytree of arrays ``[B,T]`` over all devices, of this process's ``local_rows`` ``[b,T]`` or,
    where every process has them, of all rows."""
    rows = local_rows(sharding, shape)

    def one(x: np.ndarray) -> jax.Array:
        have = np.arange(shape[0]) if len(x) == shape[0] else rows

        def part(index: tuple[slice, slice]) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            start = int(np.searchsorted(have, first))
            return x[start : start + last - first, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)


def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, over all devices; each copies its own part alone."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


# --- at the same step ---------------------------------------------------------------------------


def agreement(mesh: Mesh) -> Callable[[int], int | jax.Array]:
    """A function that every process calls at every step with a number; its result, as an ``int``,
    is the largest number of all: the same at the same step, whoever was asked to stop.

    It is a reduction on the devices. Called before a step is begun and read after, it waits for the
    step before, so no device idles, and a host is one step ahead at most. One process gets its own.
    """
    if jax.process_count() == 1:
        return lambda number: number
    shape = (mesh.size,)
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agree(number: int) -> jax.Array:
        mine = np.array([number], np.int32)
        return largest(jax.make_array_from_callback(shape, one_each, lambda _: mine))

    return agree
