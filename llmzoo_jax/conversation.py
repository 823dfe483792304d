"""Conversations, and how a chat format writes them as text. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

KINDS = (
    "multilingual_instruction",  # post-translated
    "language_specific_instruction",  # post-answered
    "user_centered_instruction",  # role, instruction, input
    "chat_instruction",  # user, instruction, conversation
    "conversation",  # shared by users
)


class ConversationError(ValueError):
    """A conversation is malformed; the message names the file, line or record and the turn."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    train: bool | None = None  # None: assistant messages are trained, others are not


@dataclass(frozen=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]
    id: str = ""
    lang: str = "und"  # BCP-47
    kind: str = "conversation"  # one of KINDS
    source: str = ""
    license: str = ""


@dataclass(frozen=True)
class Segment:
    """A piece of rendered text, and whether its tokens are targets of the loss."""

    text: str
    train: bool
