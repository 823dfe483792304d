"""A JSON list as a stream: the values one at a time, in memory for one chunk or one value.

``json.JSONDecoder.raw_decode`` reads each value from a window of the file. What is cut off at the
end of the window fails there; then the window grows, and the value is read again from its start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from llmzoo_jax.errors import InputError

CHUNK = 1 << 20  # characters
# An error this near to the end of the window may come from the cut: "-Infinity" and "\ud83d\ude00"
# are the longest things that fail at their beginning when they are not whole. Strings are longer,
# and have a message of their own.
NEAR_END = 16
_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls white space, which is less than str.strip
_decode = json.JSONDecoder().raw_decode


def values(file: TextIO, *, name: str, chunk: int = CHUNK) -> Iterator[Any]:
    """The values of the list in ``file``, which is at its beginning.

    Raises InputError, with ``name``, the number of the record and the characters before it, where
    ``json.load`` would raise.
    """
    window = _Window(file, name, chunk)
    if window.next_character() != "[":
        raise window.error("a list begins with [")
    window.at += 1
    if window.next_character() != "]":
        yield window.value()
        while (mark := window.next_character()) == ",":
            window.at += 1
            yield window.value()
        if mark != "]":
            raise window.error("the list ends here" if not mark else "expected , or ]")
    window.at += 1
    if window.next_character():
        raise window.error("there is more after the end of the list")


class _Window:
    """The part of a file that is held, and where in it the reader is."""

    def __init__(self, file: TextIO, name: str, chunk: int):
        self.file, self.name, self.chunk = file, name, chunk
        self.text, self.at = "", 0
        self.before = 0  # characters of the file before ``text``
        self.whole = False  # ``text`` reaches to the end of the file
        self.number = 0  # of the value that was read last

    def grow(self) -> None:
        """Forgets what was read, and reads on: as much as is held, so that a value of n characters
        is tried log(n) times, and costs O(n)."""
        rest = self.text[self.at :]
        more = self.file.read(max(self.chunk, len(rest)))
        self.before += self.at
        self.text, self.at, self.whole = rest + more, 0, not more

    def next_character(self) -> str:
        """The next one that is no white space, or "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.whole:
                return self.text[self.at : self.at + 1]
            self.grow()

    def value(self) -> Any:
        self.number += 1
        self.next_character()
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                if self.whole or not (cut or error.pos > len(self.text) - NEAR_END):
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:  # a number or a nesting out of bounds
                raise self.error(str(error)) from error
            else:
                # A number may go on behind the window: 1 of 12, or of 1e+5.
                if self.whole or end < len(self.text) - NEAR_END:
                    self.at = end
                    return value
            self.grow()

    def error(self, problem: str, at: int | None = None) -> InputError:
        where = self.before + (self.at if at is None else at)
        return InputError(
            f"{self.name}: not JSON: record {max(self.number, 1)}, character {where}: {problem};"
            " mend the file, or write it as JSON Lines, of which broken lines are only counted"
        )
