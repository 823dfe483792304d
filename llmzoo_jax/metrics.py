"""What a run writes for people: metrics.jsonl, TensorBoard, loss.png, lines on the console.

Of several processes the first does all of it; the others call the same functions.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from llmzoo_jax import figures
from llmzoo_jax.errors import InputError
from llmzoo_jax.tensorboard import EventFile

COLOURS = {"training": "#9aa5b1", "held out": "#c2410c"}


def writes() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


class MetricsError(InputError):
    """A file of metrics can't be written; the message names it."""


@contextlib.contextmanager
def _named(path: Path):
    try:
        yield
    except OSError as error:
        raise MetricsError(
            f"{path}: can't be written: {error}. Make room, or mend what is wrong, and run the "
            "same command again; it goes on at the newest checkpoint"
        ) from error


class MetricsLog:
    """Appends records ``{"step": ..., name: number}`` to metrics.jsonl and TensorBoard.

    A run that resumes at ``start_step`` first takes back what was written after it, so that each
    step stands there once.
    """

    def __init__(self, run_dir: str | Path, *, start_step: int):
        self.path = Path(run_dir) / "metrics.jsonl"
        if not writes():
            return
        with _named(self.path):
            self._keep_up_to(start_step)
            self._file = self.path.open("ab", buffering=0)  # a failed write leaves nothing to flush
        folder = Path(run_dir) / "tensorboard"
        with _named(folder):
            self._board = EventFile(folder, start_step=start_step + 1, say=say)

    def _keep_up_to(self, step: int) -> None:
        if not self.path.is_file():
            return
        records = [r for r in read(self.path.parent) if r["step"] <= step]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(part, self.path)

    def write(self, step: int, **values: Any) -> None:
        if not writes():
            return
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        with _named(self.path):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._board.write(step, _scalars(values))

    def close(self) -> None:
        if not writes():
            return
        self._file.close()
        self._board.close()


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """``{"loss": 1.0, "by_language": {"fr": 2.0}}`` as TensorBoard's tags."""
    scalars = {}
    for name, value in values.items():
        if isinstance(value, dict):
            scalars |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            scalars[name] = value
    return scalars


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl. A last line that was cut off by a kill is left out."""
    records = []
    for line in (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def say(text: str) -> None:
    """A line on the console, above a progress bar if there is one."""
    if writes():
        tqdm.write(text)


def by_language(
    losses: np.ndarray, mask: np.ndarray, language: np.ndarray, names: list[str]
) -> dict[str, tuple[float, int]]:
    """``{language: (sum of losses, loss tokens)}`` of a batch ``[B,T]``; language -1 is padding."""
    index = language[mask]
    sums = np.bincount(index, losses[mask].astype(np.float64), minlength=len(names))
    counts = np.bincount(index, minlength=len(names))
    return {name: (float(sums[i]), int(counts[i])) for i, name in enumerate(names) if counts[i]}


def plot(run_dir: str | Path, *, title: str) -> Path | None:
    """Draws loss.png from metrics.jsonl: training and held-out loss by step, and the newest of both
    by language. None where there is nothing to draw yet."""
    if not writes():
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read(run_dir)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    languages = {
        label: newest[-1]
        for label, key in (("training", "loss_by_language"), ("held out", "heldout_by_language"))
        if (newest := [r[key] for r in records if r.get(key)])
    }
    if not train:
        return None
    figure, axes = plt.subplots(
        1, 2 if languages else 1, figsize=(11 if languages else 6.5, 4.2), squeeze=False, dpi=120
    )
    left = axes[0, 0]
    left.plot(*zip(*train, strict=True), label="training", color=COLOURS["training"], linewidth=1.3)
    if held:
        left.plot(
            *zip(*held, strict=True),
            "o-",
            label="held out",
            color=COLOURS["held out"],
            markersize=4,
        )
    left.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    left.grid(alpha=0.25)
    if languages:
        right = axes[0, 1]
        first = languages.get("held out") or languages["training"]
        names = sorted(set().union(*languages.values()), key=lambda name: -first.get(name, 0.0))
        height = 0.8 / len(languages)
        for i, (label, losses) in enumerate(languages.items()):
            places = [n + (i - (len(languages) - 1) / 2) * height for n in range(len(names))]
            values = [losses.get(name, 0.0) for name in names]
            right.barh(places, values, height, label=label, color=COLOURS[label])
        right.set_yticks(range(len(names)), names)
        right.set(xlabel="loss (nats a token)", title="by language")
        right.legend(frameon=False, loc="lower right")
        right.tick_params(axis="y", labelsize=8)
        right.grid(alpha=0.25, axis="x")
    path = Path(run_dir) / "loss.png"
    with _named(path):
        figures.save(figure, path)
    return path
