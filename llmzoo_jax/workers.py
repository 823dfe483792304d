"""Batches made by worker processes, some of which may die.

Each worker has a pipe of its own, of which this process holds the reading end alone: a worker that
is killed, even half-way through a batch, ends its pipe, and that is noticed at once. A batch
depends on its step alone, so new workers go on where the old ones were.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerDied(Exception):
    """A worker ended before its work did; ``step`` is the batch that it owes."""

    def __init__(self, step: int, pid: int, exitcode: int | None):
        name = signal.Signals(-exitcode).name if (exitcode or 0) < 0 else f"exit code {exitcode}"
        super().__init__(f"data worker {pid} died ({name}) before it had made batch {step}")
        self.step = step


def batches(make: Callable[[int], Any], start: int, stop: int, workers: int) -> Iterator[Any]:
    """``make(start), .., make(stop - 1)``, made ahead of time by so many processes.

    Raises WorkerDied, and what ``make`` raises. Close an iteration that is left early.
    """
    with contextlib.ExitStack() as stack:
        code = cloudpickle.dumps(make)
        started = [
            stack.enter_context(_worker(code, range(start + i, stop, workers)))
            for i in range(min(workers, stop - start))
        ]
        for step in range(start, stop):
            process, pipe = started[(step - start) % len(started)]
            try:
                batch = pipe.recv()
            except (EOFError, OSError) as error:  # at the beginning of a batch, or within
                process.join()
                raise WorkerDied(step, process.pid, process.exitcode) from error
            if isinstance(batch, Exception):
                raise batch
            yield batch


@contextlib.contextmanager
def _worker(code: bytes, steps: range) -> Iterator[tuple[multiprocessing.Process, Connection]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads' locks
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(code, steps, theirs), daemon=True)
    # A worker inherits the blocked signals: Ctrl-C reaches the whole group of a terminal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    try:
        yield process, ours
    finally:
        ours.close()
        process.kill()
        process.join()


def _work(code: bytes, steps: range, pipe: Connection) -> None:
    try:
        make = cloudpickle.loads(code)
        for step in steps:
            pipe.send(make(step))
    except BrokenPipeError:
        pass  # nobody wants more
    except Exception as error:
        pipe.send(error)
    # Not through the exit of a Python that has imported much: it takes a while.
    os._exit(0)
