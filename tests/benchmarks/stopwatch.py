"""Times functions while nobody else uses the machine. Standard library only: every side has it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stopwatch:
    """Times functions while nobody else uses the machine, as far as its patience goes."""

    def __init__(self, patience: float, max_foreign: float):
        """``patience`` in seconds; others may use ``max_foreign`` cores."""
        self.patience, self.max_foreign = patience, max_foreign

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, dict]:
        """What the function returned, and seconds, cores of its own, and cores that others used.

        Under foreign load the function is called again: its time was no good.
        """
        while True:
            while self.patience > 0 and not self._measure(lambda: time.sleep(1))[1]["quiet"]:
                self.patience -= 1
            result, timed = self._measure(function)
            if timed["quiet"] or self.patience <= 0:
                return result, timed
            self.patience -= timed["seconds"]

    def _measure(self, function: Callable[[], Any]) -> tuple[Any, dict]:
        wall, own, busy = time.perf_counter(), time.process_time(), _machine_seconds()
        result = function()
        wall = time.perf_counter() - wall
        own, busy = time.process_time() - own, _machine_seconds() - busy
        foreign = max(0.0, (busy - own) / wall)
        timed = {"seconds": wall, "own_cores": own / wall, "foreign_cores": foreign}
        return result, timed | {"quiet": foreign <= self.max_foreign}


def _machine_seconds() -> float:
    """CPU seconds that all processes have used, stolen ones included."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
