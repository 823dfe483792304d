"""Worker processes make the batches that one process makes, also when some of them are killed."""

import functools
import itertools
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest

from llmzoo_jax.config import DataConfig, Source
from llmzoo_jax.data import mix
from llmzoo_jax.workers import WorkerDied, batches
from tests.test_exactly_once import records

BIG = 2_000_000  # bytes of a batch, many times what a pipe holds


def make(step: int) -> tuple[int, int, bytes]:
    return step, os.getpid(), bytes([step % 256]) * BIG


def refuse(step: int, bad: int) -> int:
    if step == bad:
        raise OSError(f"no file for {step}")
    return step


def test_batches_come_in_order_from_several_processes():
    made = list(batches(make, 3, 12, 2))
    assert [step for step, _, _ in made] == list(range(3, 12))
    pids = [pid for _, pid, _ in made]
    assert len(set(pids)) == 2 and pids[0] == pids[2] != os.getpid()
    assert all(data == bytes([step]) * BIG for step, _, data in made)


def test_an_error_in_a_worker_is_raised_here():
    made = batches(functools.partial(refuse, bad=5), 3, 12, 2)
    assert [next(made), next(made)] == [3, 4]
    with pytest.raises(OSError, match="no file for 5"):
        next(made)


def test_an_iteration_that_is_left_ends_its_workers():
    made = batches(make, 0, 1_000_000, 2)
    pids = {pid for _, pid, _ in itertools.islice(made, 4)}
    made.close()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_is_killed_in_the_middle_of_a_batch_is_noticed_and_named():
    made = batches(make, 0, 1_000_000, 2)
    (_, first, _), (_, second, _) = next(made), next(made)
    time.sleep(0.3)  # both wait in the middle of a batch that the pipe can't hold
    os.kill(second, signal.SIGKILL)
    since = time.monotonic()
    assert next(made)[:2] == (2, first)
    with pytest.raises(WorkerDied, match=rf"data worker {second} died \(SIGKILL\).* batch 3"):
        next(made)
    assert time.monotonic() - since < 5


def test_signals_to_the_group_of_a_terminal_leave_the_workers_alone():
    made = batches(make, 0, 1_000_000, 1)
    _, pid, _ = next(made)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert [step for step, _, _ in itertools.islice(made, 5)] == [1, 2, 3, 4, 5]
    made.close()


def test_kills_change_no_batch_and_threads_go_on_after_too_many(tiny_data):
    """The real data, of which the workers are killed again and again."""
    steps, found, lines, rng = 400, [], [], random.Random(0)
    expected = [tiny_data.batch(step) for step in range(steps)]
    for batch in tiny_data.iterate(0, steps, workers=2, restarts=2, report=lines.append):
        found.append(batch)
        if len(found) % 50 == 0 and children():
            os.kill(rng.choice(children()), signal.SIGKILL)
    assert len(found) == steps
    for one, two in zip(found, expected, strict=True):
        assert all(map(np.array_equal, one, two))
    assert len(lines) == 3 and "SIGKILL" in lines[0] and "new workers go on" in lines[1]
    assert "threads instead go on" in lines[2]
    assert not children()


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@pytest.fixture
def tiny_data():
    config = DataConfig(
        train=(Source(path="0"), Source(path="1", weight=0.5)), sequence_length=24, batch_size=8
    )
    lengths = np.random.default_rng(0).integers(2, 40, 60).tolist()
    return mix([records("0", lengths, 1), records("1", lengths, 10_000)], config, seed=5)
