"""Where the time of a run went, whatever happened to its processes."""

import json

import pytest

from llmzoo_jax.goodput import TimeLog, goodput, read


def event(at, name, step, seconds=None):
    return {"at": at, "event": name, "step": step} | ({"seconds": seconds} if seconds else {})


ONE = [
    event(100, "start", 0),
    event(150, "steps", 10, 20),  # 30 s of start-up
    event(155, "evaluate", 10, 4),
    event(175, "steps", 20, 20),
    event(178, "save", 20, 3),
]


def test_a_run_without_a_fault():
    got = goodput(ONE, 200)
    assert (got.wall, got.useful, got.startup) == (100, 40, 30)
    assert (got.evaluate, got.save, got.lost, got.down, got.restarts) == (4, 3, 0, 0, 0)
    assert got.share == 0.4 and got.other == pytest.approx(100 - 40 - 30 - 4 - 3)


def test_steps_after_the_checkpoint_of_a_restart_are_lost_and_waiting_is_down_time():
    again = [event(300, "start", 15), event(340, "steps", 25, 16)]
    got = goodput([*ONE, *again], 340)
    assert got.lost == 10  # half of the steps 11 to 20
    assert got.useful == 20 + 10 + 16
    assert got.down == 300 - 178
    assert got.startup == 30 + 24
    assert (got.restarts, got.wall) == (1, 240)


def test_steps_lost_twice_are_counted_twice_and_parts_never_exceed_the_whole():
    events = list(ONE)
    for k in range(3):
        at = 300 + 100 * k
        events += [event(at, "start", 10), event(at + 40, "steps", 20, 20)]
    got = goodput(events, 540)
    assert got.lost == 3 * 20 and got.useful == 40 and got.restarts == 3
    parts = (got.useful, got.lost, got.startup, got.evaluate, got.save, got.down, got.other)
    assert sum(parts) == pytest.approx(got.wall)


def test_a_process_that_never_came_to_a_step_was_starting_up():
    got = goodput([event(0, "start", 0)], 50)
    assert (got.startup, got.useful, got.share) == (50, 0, 0)
    assert goodput([], 50).share == 0


def test_the_log_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    log = TimeLog(tmp_path, writes=True)
    log.start(0)
    log.spent("steps", 5, 1.5)
    with log.path.open("a") as file:
        file.write('{"at": 17000000, "event": "ste')  # the process is killed here
    again = TimeLog(tmp_path, writes=True)
    again.start(5)
    with again.timed("save", 5):
        pass
    assert [e["event"] for e in read(tmp_path)] == ["start", "steps", "start", "save"]
    assert again.share() > 0


def test_only_the_process_that_writes_writes(tmp_path):
    log = TimeLog(tmp_path, writes=False)
    log.start(0)
    log.spent("steps", 1, 0.5)
    assert not log.path.exists() and log.share() > 0


def test_a_line_is_whole_json(tmp_path):
    log = TimeLog(tmp_path, writes=True)
    log.start(3)
    assert json.loads(log.path.read_text())["step"] == 3
