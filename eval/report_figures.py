"""The figures of a report: SVG in the page, which follows its theme, and PNG for papers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmzoo_jax import figures

COLOURS = ("#41658a", "#b4470c", "#2f7d4f", "#8a4fa3", "#a38a00", "#0e7c86", "#b03a6b", "#5b6675",
           "#6b452e")  # fmt: skip
SIZE = 320  # of a radar
INK = "#1c2430"


def radar(
    series: Mapping[str, Sequence[float | None]], axes: Sequence[str]
) -> dict[str, Any] | None:
    """Polygons for an SVG of SIZE x SIZE, from 0 in the middle to 1 at the rim. None for fewer than
    three axes, or where a value is missing from all."""
    if len(axes) < 3:
        return None
    middle, reach = SIZE / 2, SIZE * 0.36

    def place(i: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return (
            round(middle + reach * value * math.cos(angle), 1),
            round(middle + reach * value * math.sin(angle), 1),
        )

    def path(values: Sequence[float]) -> str:
        points = (place(i, value) for i, value in enumerate(values))
        return "M" + " L".join(f"{x},{y}" for x, y in points) + " Z"

    whole = {name: values for name, values in series.items() if None not in values}
    if not whole:
        return None
    labels = []
    for i, axis in enumerate(axes):
        x, y = place(i, 1.14)
        anchor = "middle" if abs(x - middle) < 8 else "start" if x > middle else "end"
        labels.append((x, y, axis, anchor))
    return {
        "size": SIZE,
        "rings": [path([share] * len(axes)) for share in (0.25, 0.5, 0.75, 1.0)],
        "spokes": [place(i, 1.0) for i in range(len(axes))],
        "middle": middle,
        "labels": labels,
        "lines": [
            {"name": name, "path": path(values)}  # type: ignore[arg-type]  (no None in it)
            for name, values in whole.items()
        ],
    }


def draw(facts: Mapping[str, Any], out: Path) -> list[str]:
    """Writes matrix.png, bars.png and, for three aspects or more, radar.png; returns the names."""
    import matplotlib

    matplotlib.use("Agg")
    names = ["matrix.png", "bars.png"]
    _matrix(facts, out / names[0])
    _bars(facts, out / names[1])
    if facts["radar"]:
        _radar(facts, out / "radar.png")
        names.append("radar.png")
    return names


def _matrix(facts: Mapping[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    aspects, langs, models = facts["aspects"], facts["langs"], facts["models"]
    width, height = 1.4 + 0.95 * len(langs), 0.9 + 0.42 * len(aspects)
    figure, axes = plt.subplots(
        len(models), 1, figsize=(max(width, 4), height * len(models)), squeeze=False, dpi=120
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        cells = facts["matrix"][model]
        values = [
            [cells[a][x]["value"] if cells[a][x] else math.nan for x in langs] for a in aspects
        ]
        axis.imshow(values, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(langs)), langs)
        axis.set_yticks(range(len(aspects)), aspects)
        axis.set_title(model, color=INK, fontsize=10)
        for row, aspect in enumerate(aspects):
            for column, lang in enumerate(langs):
                if cell := cells[aspect][lang]:
                    text = f"{cell['value']:.2f}\n{cell['low']:.2f}-{cell['high']:.2f}"
                    dark = abs(cell["value"] - 0.5) > 0.33
                    axis.text(column, row, text, ha="center", va="center", fontsize=6.5,
                              color="white" if dark else INK)  # fmt: skip
    figures.save(figure, path)


def _bars(facts: Mapping[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    groups, models = facts["bars"], facts["models"]
    figure, axis = plt.subplots(figsize=(2 + 1.6 * len(groups), 3.6), dpi=120)
    wide = 0.8 / len(models)
    for k, model in enumerate(models):
        for i, (_, rows) in enumerate(groups):
            row = next((row for row in rows if row["model"] == model), None)
            if row is None:
                continue
            one, at = row["win_rate"], i + (k - (len(models) - 1) / 2) * wide
            error = [[one["value"] - one["low"]], [one["high"] - one["value"]]]
            label = model if i == 0 else None
            axis.bar(at, one["value"], wide * 0.92, yerr=error, capsize=2, label=label,
                     color=COLOURS[k % len(COLOURS)], ecolor=INK)  # fmt: skip
    axis.axhline(0.5, color=INK, linewidth=0.8, alpha=0.5)
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.set(ylim=(0, 1), ylabel="win rate, ties as half; 95 %")
    axis.legend(frameon=False, fontsize=8, ncols=min(len(models), 4), loc="upper center",
                bbox_to_anchor=(0.5, -0.1))  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    figures.save(figure, path)


def _radar(facts: Mapping[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    axes = facts["radar_axes"]
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    figure, axis = plt.subplots(figsize=(5, 5), dpi=120, subplot_kw={"projection": "polar"})
    axis.set_theta_offset(math.pi / 2)
    axis.set_theta_direction(-1)
    for k, (model, values) in enumerate(facts["radar_values"].items()):
        if None not in values:
            colour = COLOURS[k % len(COLOURS)]
            axis.plot([*angles, angles[0]], [*values, values[0]], color=colour, label=model)
            axis.fill(angles, values, color=colour, alpha=0.08)
    axis.set_xticks(angles, axes)
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    figures.save(figure, path)
