"""Answers drawn in a terminal, and messages read from one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import regex
from rich.console import Console, Group
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from serving.terminal_markdown import Markdown, split_finished

LABEL = "model: "
REMEMBERED = 1000  # lines of the history file
_LABEL = Text(LABEL, style="bold")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without control characters: a model must not move the cursor, or set the title. What joins
    letters or sets their direction stays."""
    return _CONTROL.sub("", text)


class Screen(Protocol):
    """Draws one answer after another."""

    def begin(self) -> None: ...
    def show(self, text: str) -> None: ...
    def end(self, note: str | None) -> None:
        """``note`` comes after the text. None: there was no answer, and none is shown."""


class Plain:
    """The text as it comes, in whole graphemes: the last one is shown when the next one begins."""

    def begin(self) -> None:
        self.label, self.held = LABEL, ""

    def show(self, text: str) -> None:
        self.held += printable(text)
        *whole, last = regex.findall(r"\X", self.held) or [""]
        self._print("".join(whole))
        self.held = last

    def end(self, note: str | None) -> None:
        self._print(self.held)
        if note is not None:
            print(self.label + note, flush=True)

    def _print(self, text: str) -> None:
        if text:
            print(self.label + text, end="", flush=True)
            self.label = ""


class Drawn:
    """The answer as Markdown. Blocks that are whole are printed; the last one, which may change
    with what comes, is drawn again a few times a second."""

    def __init__(self, console: Console):
        self.console = console

    def begin(self) -> None:
        self.rest, self.any, self.split_at = "", False, 0.0
        self.lock = threading.Lock()
        self.live = Live(
            console=self.console, get_renderable=self._last_block, refresh_per_second=12,
            transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.live.start()

    def show(self, text: str) -> None:
        with self.lock:
            self.rest += printable(text)
        if time.monotonic() > self.split_at + 0.1:  # not at each token of a long block
            self.split_at = time.monotonic()
            finished, rest = split_finished(self.rest)
            if finished:
                with self.lock:
                    self.rest = rest
                self._print(Markdown(finished))

    def end(self, note: str | None) -> None:
        with self.lock:
            last, self.rest = self.rest, ""
        self.live.stop()
        if last.strip():
            self._print(Markdown(last))
        if note is not None:
            if note.strip() or not self.any:
                self._print(Text(note.strip(), style="dim"))
            self.console.print()

    def _print(self, block: Any) -> None:
        """With an empty line between two blocks."""
        self.console.print("" if self.any else _LABEL)
        self.console.print(block)
        self.any = True

    def _last_block(self) -> Any:
        """Its last lines, if it is higher than the terminal: a Live can redraw no more."""
        with self.lock:
            text = self.rest
        if not text.strip():
            return Group(*[_LABEL] * (not self.any), Text("…", style="dim"))
        lines = self.console.render_lines(Markdown(text), pad=False)
        lines = lines[-max(1, self.console.height - 3) :]
        drawn = Segments(itertools.chain.from_iterable([*line, Segment.line()] for line in lines))
        return Group("" if self.any else _LABEL, drawn)


def screen(*, markdown: bool) -> Screen:
    """Plain where the output is no terminal, or one that can't move its cursor."""
    console = Console(highlight=False)
    can_draw = console.is_terminal and not console.is_dumb_terminal
    return Drawn(console) if markdown and can_draw else Plain()


# --- reading ------------------------------------------------------------------------------------


def read_message(ask: Callable[[str], str]) -> str:
    """A message: a line, and the next one while it ends with a backslash."""
    lines = [ask("you: ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(ask("...: "))
    return "\n".join(lines)


def ask_terminal(prompt: str) -> str:
    try:
        return input(prompt)
    except EOFError:
        print()
        raise


def ask_pipe(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    if line.strip():
        print(f"{prompt}{line.strip()}")
    return line.rstrip("\r\n")


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llmzoo_jax" / "chat_history"


def start_editing(path: Path | None) -> Callable[[str], None]:
    """Arrow keys, Alt-Enter for a new line, and the lines of ``path`` to go back to. Returns what
    adds a message to them; the file is for its owner only, a JSON string a line."""
    try:
        import readline
    except ImportError:  # Windows: its console has a history of its own
        return lambda message: None
    readline.set_auto_history(False)
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')
        readline.parse_and_bind("set enable-bracketed-paste on")
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_text("utf-8").splitlines()[-REMEMBERED:]:
                with contextlib.suppress(ValueError):  # cut off when the machine went down
                    readline.add_history(json.loads(line))

    def add(message: str) -> None:
        readline.add_history(message)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with open(opened, "a", encoding="utf-8") as file:
                file.write(json.dumps(message, ensure_ascii=False) + "\n")

    return add
