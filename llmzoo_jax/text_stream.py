"""Tokens that come one after another, as text that can be shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of the new tokens of one row, up to the first stop string.

    What ``feed`` and ``finish`` return, joined, is ``text``: whole characters, nothing that a stop
    string could still take back. ``before`` and ``after`` are what the chat format lets the model
    write around its answer, and belong to the text as little as special tokens do.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: Sequence[int],
        stops: tuple[str, ...],
        before: str = "",
        after: str = "",
    ):
        self.tokenizer, self.stops, self.before, self.after = tokenizer, stops, before, after
        self.ended_at: int | None = None  # tokens up to the end of the first stop string
        self.text = ""
        self._context = list(context)  # tokens before, on which the next ones' text may depend
        self._read = 0  # tokens whose text is in _raw
        self._raw = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """Takes all tokens so far, and gives the text that is new and certain."""
        if self.ended_at is not None:
            return ""
        group = list(tokens[self._read :])
        for n in range(len(group), 0, -1):
            piece = self._piece(group[:n])
            if not piece.endswith("\ufffd"):  # else it ends with part of a character
                self._take(group[:n], piece)
                break
        return self._show(self._raw[: len(self._raw) - self._held()])

    def finish(self, *, whole: bool) -> str:
        """The rest, when no more tokens come. ``whole``: the model ended its answer itself."""
        raw = self._raw
        if whole or self.ended_at is not None:
            raw = raw.removesuffix(self.after)
        return self._show(raw)

    def finds_stop(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens, of any row, have a stop string in their text."""
        text = self._decode(list(tokens))
        return any(stop in text for stop in self.stops)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _piece(self, group: list[int]) -> str:
        """The text that ``group`` adds to what was read. Where the context ends in the middle of a
        character, the whole character."""
        base = self._decode(self._context).rstrip("\ufffd")
        return self._decode(self._context + group)[len(base) :]

    def _take(self, group: list[int], piece: str) -> None:
        raw = self._raw + piece
        found = [at for stop in self.stops if (at := raw.find(stop)) >= 0]
        if found:
            count = next(n for n in range(1, len(group) + 1) if self._stops_within(group[:n]))
            self.ended_at = self._read + count
            raw = raw[: min(found)]
        self._context = group if piece else self._context + group
        self._read += len(group)
        self._raw = raw

    def _stops_within(self, group: list[int]) -> bool:
        text = self._raw + self._piece(group)
        return any(stop in text for stop in self.stops)

    def _held(self) -> int:
        """How many characters at the end may be the beginning of something that is no text."""
        if self.ended_at is not None:
            return 0 if not self.after else len(self.after)
        held = 0
        for end in (*self.stops, self.after):
            for n in range(min(len(end), len(self._raw)), held, -1):
                if self._raw.endswith(end[:n]):
                    held = n
                    break
        return held

    def _show(self, raw: str) -> str:
        if len(raw) < len(self.before) and self.before.startswith(raw):
            return ""
        new = raw.removeprefix(self.before)[len(self.text) :]
        self.text += new
        return new
