"""ShareGPT and FastChat: ``{"conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``.

Glaive's tool calls too: ``function_call`` is the assistant's, ``observation`` the tool's answer,
and ``tools``, the JSON list of what can be called, becomes the system message. Of a record with
``chosen`` and ``rejected`` answers, the chosen one is the last turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.sources import Dropped, Unusable, convert, list_of, text_of
from llmzoo_jax.conversation import Conversation, Message

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def conversations(
    path: str, *, lang: str | Callable[[str], str], **about: str
) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``."""
    return convert(path, to_messages, lang=lang, **about)


def to_messages(record: dict[str, Any]) -> list[Message]:
    turns = list_of(record, "conversations")
    if record.get("chosen"):  # a table has a column for it in every row
        turns = [*turns, record["chosen"]]
    messages = [to_message(turn) for turn in turns]
    if record.get("tools") and text_of(record, "tools").strip() not in ("", "[]"):
        messages.insert(0, Message("system", f"You can call these tools: {record['tools']}"))
    return messages


def to_message(turn: dict[str, Any]) -> Message:
    role = text_of(turn, "from")
    if role.lower() not in ROLES:
        raise Unusable("unknown role", role)
    return Message(ROLES[role.lower()], text_of(turn, "value"))
