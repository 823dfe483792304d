"""OpenAI: ``{"messages": [{"role", "content"}, ...]}``.

Content is a string, or a list of text parts: ``{"type": "text", "text": ...}`` as OpenAI has it, or
``"value"`` as LLaMA-Factory has it, whose ``loss_weight`` of 0 or 1 says what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from data_pipelines.sources import Dropped, Unusable, convert, list_of, text_of
from llmzoo_jax.conversation import Conversation, Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def conversations(
    path: str, *, lang: str | Callable[[str], str], **about: str
) -> Iterator[Conversation | Dropped]:
    """See ``sources.convert``."""
    return convert(path, to_messages, lang=lang, **about)


def to_messages(record: dict[str, Any]) -> list[Message]:
    return [to_message(message) for message in list_of(record, "messages")]


def to_message(message: dict[str, Any]) -> Message:
    role = text_of(message, "role")
    if role not in ROLES:
        raise Unusable("unknown role", role)
    if message.get("tool_calls"):
        raise Unusable("unsupported content", "tool_calls")
    return Message(ROLES[role], _text(message), train=_train(message, ROLES[role]))


def _text(message: dict[str, Any]) -> str:
    if not isinstance(message.get("content"), list):
        return text_of(message, "content")
    for part in message["content"]:
        if text_of(part, "type") != "text":
            raise Unusable("unsupported content", f"a part of type {part['type']!r}")
    return "".join(text_of(p, "text" if "text" in p else "value") for p in message["content"])


def _train(message: dict[str, Any], role: str) -> bool | None:
    """None where the weight says what holds without it."""
    weight = message.get("loss_weight")
    if weight not in (None, 0, 1):
        raise Unusable("unsupported loss_weight", f"{weight}; only 0 and 1 are")
    return None if weight is None or bool(weight) == (role == "assistant") else bool(weight)
