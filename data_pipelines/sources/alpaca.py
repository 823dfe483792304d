"""Alpaca: ``{"instruction", "input", "output"}``, and ``system`` and ``history`` where given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.sources import Dropped, Unusable, convert, text_of
from llmzoo_jax.conversation import Conversation, Message


def conversations(
    path: str, *, lang: str | Callable[[str], str], **about: str
) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``."""
    return convert(path, to_messages, lang=lang, **about)


def to_messages(record: dict[str, Any]) -> list[Message]:
    """The user's message is the instruction, a line break and the input, where there is one."""
    messages = []
    if record.get("system"):
        messages.append(Message("system", text_of(record, "system")))
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and list(map(type, pair)) == [str, str]):
            raise Unusable("no text", f"history has {pair!r:.80}, not [user, assistant]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    user = text_of(record, "instruction")
    if record.get("input"):
        user += "\n" + text_of(record, "input")
    return [*messages, Message("user", user), Message("assistant", text_of(record, "output"))]
