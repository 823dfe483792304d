"""Markdown for terminals: lines broken between graphemes, in any script; blocks that are whole."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import regex
import rich.markdown
from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# HTML is shown as it is written: it would be left out otherwise.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
_NOT_FIRST = set(
    "、。，．：；？！）］｝」』】〉》〕…ー々ゝヽぁぃぅぇぉっゃゅょァィゥェォッャュョ%‰℃,.:;?!)]}’”"
)
_NOT_LAST = set("（［｛「『【〈《〔([{‘“")


class _Paragraph(rich.markdown.Paragraph):
    """Leaves the direction of a line to the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield from wrap(self.text, options.max_width)


class Markdown(rich.markdown.Markdown):
    elements = rich.markdown.Markdown.elements | {"paragraph_open": _Paragraph}

    def __init__(self, text: str):
        super().__init__("")
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # a model means the lines that it writes
                    child.type = "hardbreak"


def split_finished(text: str) -> tuple[str, str]:
    """(the blocks that no further text can change, the rest)."""
    lines = text.split("\n")
    tokens = _PARSER.parse("\n".join(lines[:-1]))  # the last line may become anything
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
    start = max(starts, default=0)
    return "\n".join(lines[:start]), "\n".join(lines[start:])


def wrap(text: Text, width: int) -> Iterator[Text]:
    """``text`` in lines of ``width`` cells at most, and never within a grapheme."""
    for line in text.split("\n", allow_blank=True):
        ends = list(_line_ends(line.plain, max(1, width)))
        for one in line.divide(ends) if ends else [line]:
            one.rstrip()
            yield one


def _line_ends(text: str, width: int) -> Iterator[int]:
    """Where lines end: after a space, beside a wide letter; where there is no such place on a line,
    after the last grapheme that fits."""
    start = used = 0  # of this line: its first character, its cells so far
    best = best_used = 0  # the last good place to end it
    at, before = 0, ""
    for grapheme in regex.findall(r"\X", text):
        if at > start and _may_break(before, grapheme):
            best, best_used = at, used
        cells = cell_len(grapheme)
        if used + cells > width and not grapheme.isspace() and at > start:
            end, end_used = (best, best_used) if best > start else (at, used)
            yield end
            start, used = end, used - end_used
        at, used, before = at + len(grapheme), used + cells, grapheme


def _may_break(before: str, after: str) -> bool:
    if before.isspace() and before != "\u00a0":
        return not after.isspace()
    wide = _is_wide(before) or _is_wide(after)
    return wide and after not in _NOT_FIRST and before not in _NOT_LAST and not after.isspace()


def _is_wide(grapheme: str) -> bool:
    return unicodedata.east_asian_width(grapheme[0]) in "WF"
