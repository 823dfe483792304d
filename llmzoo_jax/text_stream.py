"""Tokens that come one after another, as text that can be shown at once."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from llmzoo_jax.byte_tokens import token_bytes


class TextStream:
    """The text of the new tokens of one row, up to the first stop string.

    What ``feed`` and ``finish`` return, joined, is ``text``, however the tokens are cut into calls:
    whole characters, nothing that a stop string could still take back. ``before`` and ``after`` are
    what the chat format lets the model write around its answer, and belong to the text as little as
    special tokens do (unless ``special``). ``keep_stop`` leaves the stop string in the text; stop
    strings are looked for after the first ``min_tokens`` tokens. The cost of a token does not
    depend on how many came before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: Sequence[int] = (),
        stops: Sequence[str] = (),
        before: str = "",
        after: str = "",
        *,
        special: bool = False,
        keep_stop: bool = False,
        min_tokens: int = 0,
    ):
        self.stops = tuple(stops)
        self.count = 0  # tokens taken, up to the one that completes a stop string
        self.stopped_by: str | None = None
        self._bytes = token_bytes(tokenizer, len(tokenizer))
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._special, self._keep_stop, self._min_tokens = special, keep_stop, min_tokens
        self._after = after
        self._shown: list[str] = []
        self._held = ""  # whole characters that are not certain yet
        behind = b"".join(map(self.piece, context))
        self._utf8.decode(behind)  # it may end in the middle of a character
        # What may begin the text and is none of it. After other text, it goes on as it is.
        self._leading = [" "] * (self._bytes.strips and not behind) + [before] * bool(before)

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def feed(self, tokens: Sequence[int]) -> str:
        """Takes the next tokens, and gives the text that is new and certain."""
        pieces = []
        for token in tokens:
            if self.stopped_by is not None:
                break
            self.count += 1
            if text := self._utf8.decode(self.piece(token)):
                pieces.append(self._take(text))
        return self._show("".join(pieces))

    def finish(self, *, whole: bool) -> str:
        """The rest, when no more tokens come. ``whole``: the model ended its answer itself. Part of
        a character is dropped."""
        rest, self._held = self._held, ""
        if self._leading:  # all of it is the beginning of what is no text
            return ""
        if whole or self.stopped_by is not None:
            rest = rest.removesuffix(self._after)
        return self._show(rest)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for a special token, or one that the tokenizer lacks."""
        if token >= len(self._bytes.text) or (token in self._bytes.special and not self._special):
            return b""
        return self._bytes.text[token]

    def _take(self, text: str) -> str:
        """Appends ``text`` to what is held, and takes from it what is certain."""
        self._held += text
        while self._leading:
            if self._held.startswith(self._leading[0]):
                self._held = self._held.removeprefix(self._leading.pop(0))
            elif self._leading[0].startswith(self._held):
                return ""
            else:
                del self._leading[0]
        ends = self.stops if self.count > self._min_tokens else ()
        found = [(at, stop) for stop in ends if (at := self._held.find(stop)) >= 0]
        if found:  # no stop string begins before what is held
            at, self.stopped_by = min(found, key=lambda pair: pair[0])
            self._held = self._held[: at + len(self.stopped_by) * self._keep_stop]
            return ""
        keep = len(self._held) - max(_overlap(self._held, end) for end in (*ends, self._after))
        certain, self._held = self._held[:keep], self._held[keep:]
        return certain

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``end``."""
    start = max(0, len(text) - len(end))
    return next((len(text) - i for i in range(start, len(text)) if end.startswith(text[i:])), 0)
