"""A chat in the terminal, with a model or an endpoint that has OpenAI's API.

    python -m serving.chat --model=runs/quickstart-phoenix/export
    python -m serving.chat --url=http://localhost:8000/v1 --api_key_env=MY_KEY

Write a message and press Enter; Alt-Enter, or a backslash at the end of a line, continues it on the
next one. !help lists the commands. Ctrl-C stops an answer. Lines from a pipe are messages, too:

    printf 'Hello\\nAnd you?\\n' | python -m serving.chat --model=runs/quickstart-phoenix/export
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

import llmzoo_jax
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, Message, check_messages, read_jsonl, write_jsonl
from llmzoo_jax.errors import InputError
from serving import terminal
from serving.chat_backends import Answer, Backend, ContextFull, Endpoint, Local
from serving.terminal import Screen

if TYPE_CHECKING:
    from llmzoo_jax.inference import Model

COMMANDS = (
    "!reset begins anew, !help lists commands, !exit or Ctrl-D leaves, Ctrl-C stops an answer"
)
HELP = """\
!reset       begins anew
!regen       answers the last message again, with the next seed
!remove      forgets the last message and its answer
!save FILE   writes the conversation: a line of JSON, or Markdown if FILE ends in .md
!load FILE   goes on with the first conversation of a file that was saved as JSON
!exit        leaves, as Ctrl-D does
Alt-Enter, or a backslash at the end of a line, continues a message on the next line."""


@dataclass
class Chat:
    """``messages``: what was said, after the system message, if there is one; ``attempt``: how
    often the last question was answered before."""

    backend: Backend
    screen: Screen
    messages: list[Message]
    stats: bool = False
    attempt: int = 0


def chat(talk: Chat, read: Callable[[], str]) -> None:
    """Reads messages and commands, and prints answers, until ``read`` raises EOFError."""
    opening = list(talk.messages)
    interrupted = False  # Ctrl-C stops an answer, or a line; a second one leaves
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            print("(Ctrl-C again leaves)")
            continue
        interrupted = False
        if line == "!exit":
            return
        try:
            if line == "!reset":
                talk.messages = list(opening)
                print("(a new conversation)")
            elif line == "!regen":
                interrupted = regenerate(talk)
            elif is_command(line):
                print(command(talk, line))
            elif line:
                talk.attempt = 0
                interrupted = ask(talk, talk.messages, line)
        except (InputError, OSError) as error:  # say, a special token in the message
            print(f"({terminal.printable(str(error))})")


def ask(talk: Chat, history: list[Message], question: str) -> bool:
    """Prints the answer to ``question`` after ``history``; returns whether Ctrl-C stopped it.

    Then ``talk.messages`` has them all; without any answer it stays as it is. Where the context is
    full, the oldest exchanges are forgotten; ContextFull if the question alone is too long.
    """
    messages = [*history, Message("user", question)]
    text, stopped = None, False
    while text is None:
        try:
            text, stopped = answer(talk, messages)
        except ContextFull:
            starts = questions(messages)
            if len(starts) < 2:
                raise
            messages = messages[: starts[0]] + messages[starts[1] :]
            print("(too long for the model's context: the oldest exchange forgotten; "
                  "!reset begins anew)")  # fmt: skip
    if text.strip():
        talk.messages = [*messages, Message("assistant", text)]
    return stopped


def regenerate(talk: Chat) -> bool:
    """As ``ask``, the last question again. Its answer stays where no other one comes."""
    starts = questions(talk.messages)
    if not starts:
        raise InputError("nothing was said yet")
    talk.attempt += 1
    return ask(talk, talk.messages[: starts[-1]], talk.messages[starts[-1]].content)


def questions(messages: list[Message]) -> list[int]:
    return [at for at, message in enumerate(messages) if message.role == "user"]


def answer(talk: Chat, messages: list[Message]) -> tuple[str, bool]:
    """Prints the answer as it comes; returns it, and whether Ctrl-C stopped it."""
    pieces: list[str] = []
    times = [time.monotonic()]  # of the question, and of each piece
    note = None  # nothing to show: an error before any text
    stopped = False
    talk.screen.begin()
    try:
        with remembered_ctrl_c(talk.backend.interrupt) as check:

            def show(text: str) -> None:
                if text:
                    pieces.append(text)
                    times.append(time.monotonic())
                    talk.screen.show(text)
                check()

            result = talk.backend.answer(messages, show, attempt=talk.attempt)
        note = f" (cut at {result.tokens} tokens)" if result.cut else ""
        note += f" ({figures(result, times)})" if talk.stats else ""
    except KeyboardInterrupt:
        note, stopped = " (stopped)", True
    except InputError as error:
        if not pieces:
            raise
        note = f" ({terminal.printable(str(error))})"
    finally:
        empty = not "".join(pieces).strip()
        talk.screen.end("(no answer)" if empty and note == "" else note)
    return "".join(pieces), stopped


def figures(result: Answer, times: list[float]) -> str:
    """How long the answer is, and how fast it came."""
    if len(times) < 2:
        return "0 tokens"
    wait, rest = times[1] - times[0], times[-1] - times[1]
    parts = ["tokens not counted" if result.tokens is None else f"{result.tokens} tokens"]
    parts.append(f"{wait:.2f} s to the first")
    if result.tokens and rest > 0:
        parts.append(f"{result.tokens / (times[-1] - times[0]):.1f} tokens/s")
    return ", ".join(parts)


@contextlib.contextmanager
def remembered_ctrl_c(interrupt: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed in the block; then
    ``interrupt`` is called, too. Raised anywhere, it could end up in a callback of a library, which
    makes an error of its own of it."""
    pressed = False

    def remember(number, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one acts at once
        interrupt()

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    except InputError:
        check()  # the connection that it ended, say
        raise
    finally:
        signal.signal(signal.SIGINT, before)


# --- commands -----------------------------------------------------------------------------------


def is_command(line: str) -> bool:
    """A message may begin with "!", too, but is not such a word alone."""
    name, _, argument = line.partition(" ")
    return name in ("!save", "!load") or (not argument and name[:1] == "!" and name[1:].isalpha())


def command(talk: Chat, line: str) -> str:
    """Does what a command says; returns what to print."""
    name, _, path = line.partition(" ")
    path = path.strip()
    if name == "!help":
        return HELP
    if name == "!remove":
        if not (starts := questions(talk.messages)):
            raise InputError("nothing was said yet")
        talk.messages = talk.messages[: starts[-1]]
        return "(the last message and its answer are forgotten)"
    if name in ("!save", "!load") and not path:
        return f"(which file? {name} FILE)"
    if name == "!save":
        save(Path(path).expanduser(), talk.messages)
        return f"(saved in {path})"
    if name == "!load":
        talk.messages = list(next(read_jsonl(Path(path).expanduser())).messages)
        return as_text(talk.messages)
    return f"(unknown command {line}; {COMMANDS})"


def save(path: Path, messages: list[Message]) -> None:
    """A conversation in the project's own form, or as Markdown."""
    check_messages(messages)
    if path.suffix == ".md":
        path.write_text("".join(f"**{m.role}**\n\n{m.content}\n\n" for m in messages), "utf-8")
    else:
        write_jsonl(path, [Conversation(messages=tuple(messages), source="serving.chat")])


def as_text(messages: list[Message]) -> str:
    names = {"user": "you", "assistant": "model"}
    return "\n".join(
        f"{names.get(m.role, m.role)}: {terminal.printable(m.content)}" for m in messages
    )


# --- the command --------------------------------------------------------------------------------


def local() -> tuple[Local, str]:
    """The model of the flags, and what to say of it."""
    model = llmzoo_jax.load(MODEL.value, dtype=DTYPE.value, base=BASE.value)
    model.prompt([Message("user", "Hello")])  # raises where the model has no chat format
    context = CONTEXT.value or model.context or 2048
    if model.context and context > model.context:
        raise InputError(f"--context={context}: the model has {model.context} positions")
    most = min(MAX_NEW_TOKENS.value, context // 2)
    given = {flag.name: flag.value for flag in SAMPLING if flag.value is not None}
    backend = Local(model, context=context, max_new_tokens=most, **given)
    return backend, header(model, context, most)


def header(model: Model, context: int, max_new_tokens: int) -> str:
    import jax  # here: --help and --url need not wait for it

    size = sum(x.size for x in jax.tree.leaves(model.params))
    return (
        f"{model.path}: {model.config.family}, {size:,} parameters, {model.dtype}, chat format "
        f"{model.format.name}\ncontext {context:,} tokens, answers up to {max_new_tokens:,}"
    )


def remote() -> tuple[Endpoint, str]:
    for flag in (CONTEXT, DTYPE, BASE):
        if flag.present:
            raise InputError(f"--{flag.name} is for a model folder: an endpoint has its own")
    variable = API_KEY_ENV.value
    if variable and not os.environ.get(variable):
        raise InputError(f"--api_key_env={variable}: this environment variable is not set")
    given = {flag.name: flag.value for flag in SAMPLING if flag.value is not None}
    backend = Endpoint(
        URL.value, name=MODEL.value or "", api_key=os.environ.get(variable, ""),
        count=STATS.value, max_tokens=MAX_NEW_TOKENS.value, **given,
    )  # fmt: skip
    most = f"answers up to {MAX_NEW_TOKENS.value:,} tokens"
    return backend, f"{backend.name} at {backend.url}\n{most}"


def main(_) -> None:
    if not (MODEL.value or URL.value):
        raise InputError("give --model=FOLDER, or the --url of an endpoint")
    backend, title = remote() if URL.value else local()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
    at_terminal = sys.stdin.isatty()
    remember = lambda message: None  # noqa: E731
    if at_terminal:
        # A script that starts this in the background has Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        remember = terminal.start_editing(
            Path(HISTORY.value).expanduser() if HISTORY.value else None
        )
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")

    def read() -> str:
        message = terminal.read_message(terminal.ask_terminal if at_terminal else terminal.ask_pipe)
        if message.strip():
            remember(message)
        return message

    print(f"{title}\n{COMMANDS}\n", flush=True)
    opening = [Message("system", SYSTEM.value)] if SYSTEM.value else []
    chat(Chat(backend, terminal.screen(markdown=MARKDOWN.value), opening, STATS.value), read)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string(
        "model", None, "Hugging Face folder or run folder; with --url the model's name there, or "
        "nothing for the first that it lists.",
    )  # fmt: skip
    BASE = flags.DEFINE_string(
        "base", None, "Hugging Face folder to whose weights those of --model are differences; or, "
        "of an adapter, the base.",
    )  # fmt: skip
    URL = flags.DEFINE_string("url", "", "An endpoint with OpenAI's API: http://localhost:8000/v1.")
    API_KEY_ENV = flags.DEFINE_string(
        "api_key_env", "", "Environment variable that has the API key, if any."
    )
    SYSTEM = flags.DEFINE_string("system", "", "System message; empty: the chat format's own.")
    SAMPLING = (
        flags.DEFINE_float(
            "temperature", None, "0: always the likeliest token. Not given: 0; an endpoint's own.",
        ),
        flags.DEFINE_float("top_p", None, "Sample from the likeliest tokens of this probability."),
        flags.DEFINE_integer("top_k", None, "Sample from so many likeliest tokens; 0: all."),
        flags.DEFINE_integer("seed", None, "The same seed and messages give the same answers."),
    )  # fmt: skip
    MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "An answer's length.", 1)
    CONTEXT = flags.DEFINE_integer(
        "context", 0, "Tokens of a conversation; 0: the model's positions, for BLOOM 2048.", 0
    )
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.")
    STATS = flags.DEFINE_bool("stats", False, "Say after each answer how long and fast it was.")
    MARKDOWN = flags.DEFINE_bool(
        "markdown", True, "Draw answers as Markdown, where the output is a terminal."
    )
    HISTORY = flags.DEFINE_string(
        "history", str(terminal.history_file()), "File of the lines that arrow keys go back to; "
        "empty: none.",
    )  # fmt: skip
    cli.run(main)
