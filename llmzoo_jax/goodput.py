"""Goodput: the share of wall time, since a run first started, that went into steps it still has.

A run appends events to ``run_dir/time.jsonl``, which nothing is ever taken from, so that kills and
restarts stay in it:

    {"at": unix seconds, "event": "start", "step": 40}         a process begins after step 40
    {"at": .., "event": "steps", "step": 60, "seconds": 12.5}  steps 41 to 60 took 12.5 s
    {"at": .., "event": "save", "step": 60, "seconds": 3}      so did something else, or "evaluate"

Everything that is in none of these is start-up (reading data, compiling, restoring) up to the first
steps, and down time from the last event of a process to the start of the next.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went; seconds."""

    wall: float
    useful: float  # steps that count
    lost: float  # steps that were computed again after a restart
    startup: float  # reading, compiling, restoring
    evaluate: float
    save: float
    down: float  # between a process and the next
    restarts: int

    @property
    def share(self) -> float:
        return self.useful / self.wall if self.wall > 0 else 0.0

    @property
    def other(self) -> float:
        """Between events: logging, plots."""
        known = self.useful + self.lost + self.startup + self.evaluate + self.save + self.down
        return max(0.0, self.wall - known)


def goodput(events: Sequence[dict[str, Any]], now: float) -> Goodput:
    """The account of a run up to ``now``, unix seconds."""
    kept: list[tuple[int, int, float]] = []  # (after step, up to step, seconds)
    lost = startup = down = 0.0
    spent = {"evaluate": 0.0, "save": 0.0}
    step, starts, last, starting = 0, 0, None, None
    for event in events:
        if event["event"] == "start":
            starts += 1
            down += max(0.0, event["at"] - last) if last is not None else 0.0
            step, starting = event["step"], event["at"]
            kept, again = _up_to(kept, step)
            lost += again
        else:
            if starting is not None:
                startup += max(0.0, event["at"] - event["seconds"] - starting)
                starting = None
            if event["event"] == "steps":
                kept.append((step, event["step"], event["seconds"]))
                step = event["step"]
            else:
                spent[event["event"]] += event["seconds"]
        last = event["at"]
    if starting is not None:
        startup += max(0.0, now - starting)
    return Goodput(
        wall=max(0.0, now - events[0]["at"]) if events else 0.0,
        useful=sum(seconds for _, _, seconds in kept),
        lost=lost,
        startup=startup,
        down=down,
        restarts=max(0, starts - 1),
        **spent,
    )


def _up_to(
    kept: Iterable[tuple[int, int, float]], step: int
) -> tuple[list[tuple[int, int, float]], float]:
    """What of ``kept`` belongs to steps up to ``step``, and the seconds that do not."""
    left, lost = [], 0.0
    for after, until, seconds in kept:
        part = min(1.0, max(0.0, (step - after) / (until - after)))
        if part:
            left.append((after, min(until, step), seconds * part))
        lost += seconds * (1 - part)
    return left, lost


class TimeLog:
    """Writes the events of this process, each at once; only if it is the one that ``writes``."""

    def __init__(self, run_dir: str | Path, *, writes: bool):
        self.path = Path(run_dir) / "time.jsonl"
        self._started, self._writes = time.time(), writes
        self._events = read(run_dir)
        if self.path.is_file() and not self.path.read_text("utf-8").endswith("\n"):
            self._append("\n")  # a kill cut the last line off

    def start(self, step: int) -> None:
        """This process goes on after ``step``; it began when this object was made."""
        self._write(self._started, "start", step)

    def spent(self, event: str, step: int, seconds: float) -> None:
        self._write(time.time(), event, step, seconds=seconds)

    @contextlib.contextmanager
    def timed(self, event: str, step: int) -> Iterator[None]:
        since = time.monotonic()
        yield
        self.spent(event, step, time.monotonic() - since)

    def share(self) -> float:
        """The goodput of the run so far."""
        return goodput(self._events, time.time()).share

    def _write(self, at: float, event: str, step: int, **more: Any) -> None:
        record = {"at": at, "event": event, "step": step, **more}
        self._events.append(record)
        self._append(json.dumps(record) + "\n")

    def _append(self, text: str) -> None:
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run, without a line that a kill cut off."""
    path = Path(run_dir) / "time.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
