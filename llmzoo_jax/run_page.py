"""report.html of a run folder: what a run is, how far it is, and where its time went.

One file that loads nothing from elsewhere, made at the same moments as loss.png of what stands in
the run folder alone: config.json, metrics.jsonl, time.jsonl, data.txt, checkpoints.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmzoo_jax import checkpoint, metrics
from llmzoo_jax import config as configs
from llmzoo_jax.config import Config
from llmzoo_jax.goodput import Goodput, goodput
from llmzoo_jax.goodput import read as read_events

POINTS = 400  # of a line, at most; of more, neighbours are averaged
NEWEST = 10  # lines of metrics.jsonl of which a language's training loss is the mean
WIDTH, HEIGHT = 640, 220  # of a figure, and its margins
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 26

Series = Sequence[tuple[float, float]]


def write(run_dir: str | Path) -> None:
    """Writes loss.png and report.html, if this process writes and there is something to show."""
    if metrics.writes() and metrics.plot(run_dir, title=Path(run_dir).name):
        checkpoint.write_text(Path(run_dir) / "report.html", page(run_dir, now=time.time()))


def page(run_dir: str | Path, *, now: float) -> str:
    import jinja2

    template = Path(__file__).with_name("run_page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(facts(run_dir, now=now))


def facts(run_dir: str | Path, *, now: float) -> dict[str, Any]:
    """Everything that the page shows."""
    run_dir = Path(run_dir)
    config, records = checkpoint.read_config(run_dir), metrics.read(run_dir)
    steps = [r for r in records if "loss" in r]
    heldout = [r for r in records if "heldout_loss" in r]
    events = read_events(run_dir)
    account = goodput(events, events[-1]["at"] if events else now)
    notes = run_dir / "data.txt"
    return {
        "name": run_dir.name,
        "run_dir": str(run_dir),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        "model": config["model"],
        "last": steps[-1] if steps else {},
        "heldout": heldout[-1] if heldout else {},
        "best": min(heldout, key=lambda r: r["heldout_loss"]) if heldout else {},
        "attention": _attention(steps, heldout, account),
        "loss": chart(
            {"training": _series(steps, "loss"), "held out": _series(heldout, "heldout_loss")}
        ),
        "figures": {
            title: chart(lines)
            for title, lines in {
                "tokens a second": {
                    "all": _series(steps, "tokens_per_s"),
                    "in the loss": _series(steps, "loss_tokens_per_s"),
                },
                "model FLOP utilisation": {"MFU": _series(steps, "mfu")},
                "gradient norm": {"before clipping": _series(steps, "grad_norm")},
                "learning rate": {"learning rate": _series(steps, "learning_rate")},
            }.items()
            if any(lines.values())
        },
        "languages": _languages(steps, heldout),
        "time": account,
        "spent": _spent(account),
        "checkpoints": _checkpoints(run_dir, heldout),
        "data": notes.read_text(encoding="utf-8") if notes.is_file() else "",
        "changed": _changed(config),
        "config": configs.flatten(config),
    }


def _series(records: Sequence[Mapping[str, Any]], key: str) -> Series:
    return [(r["step"], r[key]) for r in records if key in r]


def _attention(
    steps: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]], account: Goodput
) -> list[str]:
    found = []
    if steps and steps[-1].get("skipped"):
        found.append(f"{steps[-1]['skipped']:,} steps were skipped: not finite, or a spike")
    if account.restarts:
        found.append(
            f"{account.restarts} restart{'s' * (account.restarts > 1)}; steps of "
            f"{duration(account.lost)} were computed again"
        )
    if heldout:
        best = min(heldout, key=lambda r: r["heldout_loss"])
        if heldout[-1]["heldout_loss"] > 1.01 * best["heldout_loss"]:
            found.append(
                f"the held-out loss was lowest at step {best['step']:,} "
                f"({best['heldout_loss']:.4f}) and has risen since"
            )
    return found


def _languages(
    steps: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The losses of each language, the highest first; None where it has none."""
    kinds = {
        "training": (steps, "loss_by_language", NEWEST),
        "held_out": (heldout, "heldout_by_language", 1),
    }
    rows: dict[str, dict[str, Any]] = {}
    for kind, (records, key, count) in kinds.items():
        for name in sorted({name for r in records for name in r.get(key, ())}):
            newest = [r[key][name] for r in records if name in r.get(key, ())][-count:]
            row = rows.setdefault(name, {"name": name} | dict.fromkeys(kinds))
            row[kind] = sum(newest) / len(newest)
    return sorted(rows.values(), key=lambda row: -(row["held_out"] or row["training"]))


def _spent(account: Goodput) -> list[dict[str, Any]]:
    parts = {
        "useful steps": account.useful,
        "steps computed again": account.lost,
        "start-up and compiling": account.startup,
        "evaluation": account.evaluate,
        "saving": account.save,
        "down": account.down,
        "other": account.other,
    }
    wall = account.wall or 1.0
    return [
        {"what": what, "time": duration(seconds), "share": seconds / wall}
        for what, seconds in parts.items()
        if seconds
    ]


def duration(seconds: float) -> str:
    """``95 -> "1 min 35 s"``, with the two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for name, size in units:
        if left >= size or parts:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def _checkpoints(run_dir: Path, heldout: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    losses = {r["step"]: r["heldout_loss"] for r in heldout}
    folders = [f for f in (run_dir / "checkpoints").glob("*") if f.name.isdecimal()]
    return [
        {"step": int(folder.name), "size": _size(folder), "loss": losses.get(int(folder.name))}
        for folder in sorted(folders, key=lambda f: int(f.name))
    ]


def _size(folder: Path) -> int:
    return sum(os.stat(p).st_size for p in folder.rglob("*") if p.is_file())


def _changed(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{key: (value, default)}`` of what was set in this run, without the model."""
    defaults = configs.to_dict(Config(run_dir="", tokenizer="", data=configs.DataConfig(train=())))
    mine = {key: config.get(key) for key in defaults} | {"model": None}
    return configs.differences(mine, defaults | {"model": None})


# --- figures ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines in an SVG of WIDTH x HEIGHT; ticks are (place, text)."""

    lines: list[dict[str, Any]]  # name, path, dots: (x, y, text)
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    text: str  # for those who can't see it


def chart(series: Mapping[str, Series]) -> Chart | None:
    """None where there is nothing to draw. A line of few points has dots."""
    from matplotlib.ticker import MaxNLocator

    series = {name: _thinned(points) for name, points in series.items() if points}
    if not series:
        return None
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_values = MaxNLocator(6, integer=True).tick_values(min(xs), max(xs))
    y_values = MaxNLocator(4).tick_values(*_range(min(ys), max(ys)))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_values[0], y_values[-1]

    def place(x, y):
        return (
            round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    lines = []
    for name, points in series.items():
        placed = [place(x, y) for x, y in points]
        dots = [(*at, f"step {x:,.0f}: {y:.5g}") for at, (x, y) in zip(placed, points, strict=True)]
        path = "M" + " L".join(f"{x},{y}" for x, y in placed)
        lines.append({"name": name, "path": path, "dots": dots if len(dots) <= 40 else []})
    last = ", ".join(f"{name} {points[-1][1]:.5g}" for name, points in series.items())
    return Chart(
        lines=lines,
        x_ticks=[(place(x, 0)[0], f"{x:,.0f}") for x in x_values if x_low <= x <= x_high],
        y_ticks=[(place(0, y)[1], _number(y)) for y in y_values],
        text=f"steps {x_low:,.0f} to {x_high:,.0f}; at the end {last}",
    )


def _range(low: float, high: float) -> tuple[float, float]:
    """From 0 where that costs less than half of the height."""
    low = 0.0 if 0 <= low < 0.5 * high else low
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _number(y: float) -> str:
    if abs(y) >= 1000:
        return f"{y / 1000:,.4g}k"
    return f"{y:.3g}"


def _thinned(points: Series) -> Series:
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]
