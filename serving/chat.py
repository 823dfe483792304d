"""A chat with a model in the terminal.

    python -m serving.chat --model=runs/quickstart-phoenix/export

Write a message and press Enter. !reset begins anew, !exit or Ctrl-D leaves, Ctrl-C stops an answer.
Lines from a pipe are messages, too:

    printf 'Hello\\nAnd you?\\n' | python -m serving.chat --model=runs/quickstart-phoenix/export
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

import llmzoo_jax
from llmzoo_jax import cli
from llmzoo_jax.conversation import Message
from llmzoo_jax.errors import InputError

if TYPE_CHECKING:
    from llmzoo_jax.inference import Model

COMMANDS = "!reset begins anew, !exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(
    model: Model,
    read_line: Callable[[], str],
    *,
    system: str = "",
    context: int,
    max_new_tokens: int,
    **sampling: Any,
) -> None:
    """Reads messages with ``read_line`` and prints answers, until it raises EOFError.

    A conversation has ``context`` tokens at most, and room for ``max_new_tokens`` is kept in them;
    ``sampling`` are the other options of ``Model.chat``.
    """
    opening = [Message("system", system)] if system else []
    history = list(opening)
    interrupted = False  # Ctrl-C stops an answer, or a line; a second one leaves
    while True:
        try:
            line = read_line().strip()
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
        if line == "!reset":
            history = list(opening)
            print("(a new conversation)")
        elif line.startswith("!") and line[1:].isalpha():
            print(f"(unknown command {line}; {COMMANDS})")
        elif line:
            try:
                history = fit(model, [*history, Message("user", line)], context - max_new_tokens)
            except InputError as error:  # say, a special token in the message
                print(f"({error})")
                continue
            history, interrupted = answer(model, history, max_new_tokens, sampling)


def answer(
    model: Model, history: list[Message], max_new_tokens: int, sampling: dict[str, Any]
) -> tuple[list[Message], bool]:
    """Prints the answer as it comes; returns the history with it, and whether Ctrl-C stopped it.
    What was said until then stays in the history, a question without any answer does not."""
    pieces: list[str] = []

    print("model: ", end="", flush=True)
    try:
        with remembered_ctrl_c() as check:

            def show(text: str) -> None:
                pieces.append(text)
                print(text, end="", flush=True)
                check()

            result = model.chat(history, max_new_tokens=max_new_tokens, on_text=show, **sampling)
        end = f" (cut at {max_new_tokens} tokens)" if result.finish_reason == "length" else ""
    except KeyboardInterrupt:
        end = " (stopped)"
    text = "".join(pieces)
    print(end or ("" if text.strip() else "(no answer)"))
    history = [*history, Message("assistant", text)] if text.strip() else history[:-1]
    return history, end == " (stopped)"


@contextlib.contextmanager
def remembered_ctrl_c() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if Ctrl-C was pressed in the block. Raised
    anywhere, it could end up in a callback of a library, which makes an error of its own of it."""
    pressed = False

    def remember(number, frame):
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one acts at once

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def fit(model: Model, history: Sequence[Message], room: int) -> list[Message]:
    """``history`` without the oldest exchanges, so that its prompt has ``room`` tokens at most;
    says so if any had to go. Raises InputError where the last message alone is too long."""
    history, forgotten = list(history), 0
    first = 1 if history[0].role == "system" else 0
    while (length := len(model.prompt(history))) > room:
        if len(history) <= first + 1:
            raise InputError(
                f"this message makes a prompt of {length:,} tokens, and there is room for {room:,};"
                " write a shorter one, or start with a smaller --max_new_tokens"
            )
        del history[first : first + 2]
        forgotten += 1
    if forgotten:
        what = "exchange" if forgotten == 1 else f"{forgotten} exchanges"
        print(
            f"(too long for the model's context: the oldest {what} forgotten; !reset begins anew)"
        )
    return history


# --- the command --------------------------------------------------------------------------------


def header(model: Model, context: int, max_new_tokens: int) -> str:
    import jax  # here: --help need not wait for it

    size = sum(x.size for x in jax.tree.leaves(model.params))
    return (
        f"{model.path}: {model.config.family}, {size:,} parameters, {model.dtype}, chat format "
        f"{model.format.name}\ncontext {context:,} tokens, answers up to {max_new_tokens:,}\n"
        f"{COMMANDS}\n"
    )


def read_terminal() -> str:
    try:
        return input("you: ")
    except EOFError:
        print()
        raise


def read_pipe() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    if line.strip():
        print(f"you: {line.strip()}")
    return line


def main(_) -> None:
    model = llmzoo_jax.load(MODEL.value, dtype=DTYPE.value)
    model.prompt([Message("user", "Hello")])  # raises where the model has no chat format
    context = CONTEXT.value or model.context or 2048
    if model.context and context > model.context:
        raise InputError(f"--context={context}: the model has {model.context} positions")
    most = min(MAX_NEW_TOKENS.value, context // 2)
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
    if sys.stdin.isatty():
        # A script that starts this in the background has Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (arrow keys and history in input)
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print(header(model, context, most), flush=True)
    chat(
        model,
        read_terminal if sys.stdin.isatty() else read_pipe,
        system=SYSTEM.value,
        context=context,
        max_new_tokens=most,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        top_k=TOP_K.value,
        seed=SEED.value,
    )


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or run folder.", required=True)
    SYSTEM = flags.DEFINE_string("system", "", "System message; empty: the chat format's own.")
    TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token.")
    TOP_P = flags.DEFINE_float(
        "top_p", 1.0, "Sample from the likeliest tokens of this probability."
    )
    TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from so many likeliest tokens; 0: all.")
    MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "An answer's length.", 1)
    CONTEXT = flags.DEFINE_integer(
        "context", 0, "Tokens of a conversation; 0: the model's positions, for BLOOM 2048.", 0
    )
    SEED = flags.DEFINE_integer("seed", 0, "The same seed and messages give the same answers.")
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.")
    cli.run(main)
