"""The figures of a report, as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmzoo_jax import figures

MOST = 40  # bars in a chart; the rest are summed up as one
LOSS, REST, INK = "#b4470c", "#e8c3a8", "#1c2430"


def draw(report: dict[str, Any], out: Path) -> None:
    """Writes languages.png, fertility.png, groups.png and lengths.png."""
    import matplotlib

    matplotlib.use("Agg")
    _languages(report, out / "languages.png")
    _fertility(report, out / "fertility.png")
    _groups(report, out / "groups.png")
    _lengths(report, out / "lengths.png")


def _languages(report: dict[str, Any], path: Path) -> None:
    groups = _most(report["by"]["language"])
    figure, (left, right) = _axes(2, rows=len(groups))
    _tokens(left, groups, "tokens by language")
    right.barh(list(groups), [g["conversations"] for g in groups.values()], color="#41658a")
    _finish(right, "conversations by language", "conversations")
    figures.save(figure, path)


def _fertility(report: dict[str, Any], path: Path) -> None:
    groups = _most(report["by"]["language"], rest=False)
    groups = dict(sorted(groups.items(), key=lambda item: item[1]["tokens_a_byte"]))
    figure, axes = _axes(2, rows=len(groups))
    for axis, key, unit in zip(
        axes, ("tokens_a_character", "tokens_a_byte"), ("character", "byte of UTF-8"), strict=True
    ):
        bars = axis.barh(list(groups), [g[key] for g in groups.values()], color="#41658a")
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, color=INK)
        axis.margins(x=0.12)
        _finish(axis, f"tokens a {unit}: fewer is cheaper", f"tokens a {unit}", whole=False)
    figures.save(figure, path)


def _groups(report: dict[str, Any], path: Path) -> None:
    parts = [(name, _most(report["by"][name])) for name in ("kind", "source")]
    figure, axes = _axes(2, rows=max(len(groups) for _, groups in parts))
    for axis, (name, groups) in zip(axes, parts, strict=True):
        _tokens(axis, groups, f"tokens by {name}")
    figures.save(figure, path)


def _lengths(report: dict[str, Any], path: Path) -> None:
    bins = report["lengths"]["histogram"]
    figure, (axis,) = _axes(1, rows=14)
    names = [f"{b['to']:,}" for b in bins]
    bars = axis.bar(names, [b["conversations"] for b in bins], color="#41658a")
    axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8, color=INK)
    axis.margins(y=0.12)
    length = report["about"]["length"]
    inside = sum(b["to"] <= length + 1 for b in bins)
    if inside < len(bins):
        axis.axvline(inside - 0.5, color=LOSS, linewidth=1.5)
        axis.text(inside - 0.45, axis.get_ylim()[1], f" longer than a row of {length:,}",
                  color=LOSS, va="top", fontsize=9)  # fmt: skip
    axis.set(xlabel="tokens in a conversation, up to", ylabel="conversations")
    axis.set_title("length of conversations", color=INK)
    axis.tick_params(axis="x", labelrotation=45)
    _plain(axis, grid="y")
    figures.save(figure, path)


def _tokens(axis: Any, groups: dict[str, Any], title: str) -> None:
    loss = [g["loss_tokens"] for g in groups.values()]
    rest = [g["tokens"] - g["loss_tokens"] for g in groups.values()]
    places = range(len(groups))
    axis.barh(places, loss, color=LOSS)
    axis.barh(places, rest, left=loss, color=REST)
    axis.set_yticks(places, [_short(label) for label in groups])
    _finish(axis, title, "tokens; the dark part is in the loss")


def _most(groups: dict[str, Any], *, rest: bool = True) -> dict[str, Any]:
    """The MOST groups with the most tokens, and the sum of the others."""
    named = {label or "(none given)": g for label, g in groups.items()}
    shown = dict(list(named.items())[:MOST])
    others = list(named.values())[MOST:]
    if others and rest:
        keys = ("tokens", "loss_tokens", "conversations")
        shown[f"{len(others)} others"] = {key: sum(g[key] for g in others) for key in keys}
    return shown


def _short(label: str, most: int = 34) -> str:
    return label if len(label) <= most else f"{label[: most - 12]}…{label[-11:]}"


def _axes(count: int, *, rows: int) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    size = (6.2 * count if count > 1 else 8, 1.4 + 0.24 * max(rows, 5))
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, dpi=120)
    return figure, axes[0]


def _finish(axis: Any, title: str, unit: str, *, whole: bool = True) -> None:
    from matplotlib.ticker import EngFormatter

    axis.invert_yaxis()
    axis.set_xlabel(unit)
    axis.set_title(title, color=INK)
    axis.tick_params(axis="y", labelsize=9)
    if whole:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _plain(axis, grid="x")


def _plain(axis: Any, *, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, axis=grid)
    axis.set_axisbelow(True)
