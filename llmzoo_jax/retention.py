"""Which checkpoints of a run stay: the newest, and those of the lowest held-out loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmzoo_jax import manifest


@dataclass(frozen=True)
class Retention:
    """The rule, as Orbax asks for it (``PreservationPolicy``)."""

    directory: Path
    newest: int | None  # None: all
    best: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [info.step for info in checkpoints]  # ascending; the last is not written yet
        losses = heldout_losses(self.directory, steps)
        losses |= {info.step: info.metrics["heldout_loss"] for info in checkpoints if info.metrics}
        newest = steps if self.newest is None else steps[-self.newest :]
        best = sorted(losses, key=losses.get)[: self.best]
        return [step in {*newest, *best} for step in steps]


def heldout_losses(directory: Path, steps: Iterable[int]) -> dict[int, float]:
    """The held-out loss of those checkpoints for which it was measured."""
    manifests = {step: manifest.read(Path(directory) / str(step)) for step in steps}
    losses = {step: made["heldout_loss"] for step, made in manifests.items() if made}
    return {step: loss for step, loss in losses.items() if loss is not None}
