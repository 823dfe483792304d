"""A profiler trace of some steps, on request: ``--profile=FIRST:LAST`` of the train command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llmzoo_jax.errors import InputError


class ProfileError(InputError):
    """The steps to be traced can't be; the message names the flag."""


class Trace:
    """Runs steps; those of ``spec`` (``FIRST:LAST``, both included) are traced into
    ``run_dir/profile``. An empty ``spec`` traces nothing.

    Raises ProfileError where they are not among the steps ``start + 1`` to ``total``.
    """

    def __init__(self, spec: str, run_dir: str | Path, *, start: int, total: int):
        self.folder = Path(run_dir) / "profile"
        self.first, self.last, self._on = 0, 0, False
        if not spec:
            return
        first, colon, last = spec.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal()):
            raise ProfileError(f"--profile={spec}: write FIRST:LAST, two steps, for example 11:13")
        self.first, self.last = int(first), int(last)
        if not start < self.first <= self.last <= total:
            raise ProfileError(
                f"--profile={spec}: this process does the steps {start + 1} to {total}"
            )

    def run(self, number: int, step: Callable, *args: Any) -> Any:
        """``step(*args)``, which is step ``number``."""
        if number == self.first:
            jax.profiler.start_trace(self.folder)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = step(*args)
        if number == self.last:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes the trace, if one is open: at its last step, or where the run stops before."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
