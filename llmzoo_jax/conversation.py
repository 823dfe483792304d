"""Conversations, and how a chat format writes them as text. Standard library only.

A conversation is a line of JSON::

    {"id": "1", "lang": "zh", "kind": "conversation", "source": "...", "license": "...",
     "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

``read_jsonl`` checks it, ``render`` writes it as text in a format of ``chat_formats.py``, in
training and in serving alike, and ``chat_template`` gives the same rules as a jinja template.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llmzoo_jax.chat_formats import FORMATS as FORMATS  # re-exported
from llmzoo_jax.chat_formats import ChatFormat as ChatFormat
from llmzoo_jax.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

KINDS = (
    "multilingual_instruction",  # post-translated
    "language_specific_instruction",  # post-answered
    "user_centered_instruction",  # role, instruction, input
    "chat_instruction",  # user, instruction, conversation
    "conversation",  # shared by users
)


class ConversationError(InputError):
    """A conversation is malformed; the message names the file, line or record and the turn."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    train: bool | None = None  # None: assistant messages are trained, others are not

    @property
    def trained(self) -> bool:
        return self.role == "assistant" and self.train is not False


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


# --- reading and writing ------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
_AFTER = {  # the roles that each role may follow; None is the beginning
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_messages(
    messages: Sequence[Message], *, where: str = "", generation_prompt: bool = False
) -> None:
    """Raises ConversationError unless the messages are something a format can write.

    With ``generation_prompt`` the model speaks next, so the last message is the user's or a
    tool's; without, they are a conversation to train on and the last is the assistant's.
    """
    at = f"{where}: " if where else ""
    if not messages:
        raise ConversationError(f"{at}empty conversation: give it messages, or drop it")
    previous = None
    for number, message in enumerate(messages, 1):
        if problem := _problem(message, previous):
            raise ConversationError(f"{at}turn {number} ({message.role}): {problem}")
        previous = message.role
    at += f"turn {len(messages)} ({previous}): "
    if generation_prompt and previous not in ("user", "tool"):
        raise ConversationError(f"{at}the last message must be the user's, or a tool's")
    if not generation_prompt and previous != "assistant":
        raise ConversationError(
            f"{at}the conversation ends without an answer, so nothing is trained after this turn;"
            " drop it, or add the answer"
        )
    if not generation_prompt and not any(message.trained for message in messages):
        raise ConversationError(
            f"{at}no turn is trained, as every assistant turn has 'train': false; drop the"
            " conversation"
        )


def _problem(message: Message, previous: str | None) -> str | None:
    """What is wrong with a message after one of the role ``previous``, or None."""
    role, content = message.role, message.content
    if role not in ROLES:
        return f"unknown role {role!r}; use one of {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"content must be a string, not {type(content).__name__}"
    if not content.strip():
        return "empty content; drop the turn, or the conversation"
    if _SURROGATE.search(content):
        return "the text has half of a surrogate pair, which is no character; mend its \\u escapes"
    if role != "assistant" and message.train:
        return "only assistant turns can be trained; remove its 'train'"
    if previous in _AFTER[role]:
        return None
    if role == "system":
        return "a system message must be the first; drop it, or merge it into the first"
    if previous in (None, "system"):
        return f"the first turn must be the user's, not the {role}'s; drop it"
    return f"the {role}'s turn follows the {previous}'s; merge the two, or drop one"


def from_dict(record: dict[str, Any], *, where: str) -> Conversation:
    """A conversation from parsed JSON (its form is in the docstring of this module).

    Raises ConversationError, beginning with ``where``, for anything that is not in order.
    """
    record = _object(record, Conversation, where)
    if not isinstance(messages := record.pop("messages", []), list | tuple):
        raise ConversationError(f"{where}: 'messages' must be a list of {{role, content}} objects")
    for key, value in record.items():
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ConversationError(f"{where}: {key!r} must be a string, not {kind}")
    if (kind := record.get("kind", KINDS[-1])) not in KINDS:
        raise ConversationError(f"{where}: unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    turns = []
    for number, message in enumerate(messages, 1):
        message = _object(message, Message, f"{where}: turn {number}")
        for key in ("role", "content"):
            if key not in message:
                raise ConversationError(f"{where}: turn {number} has no {key!r}")
        if not isinstance(message.get("train"), bool | None):
            raise ConversationError(f"{where}: turn {number}: 'train' must be true or false")
        turns.append(Message(**message))
    check_messages(turns, where=where)
    return Conversation(messages=tuple(turns), **record)


def _object(value: Any, kind: type, where: str) -> dict[str, Any]:
    """A copy of ``value``, which must be a dict with no keys but the fields of ``kind``."""
    if not isinstance(value, dict):
        raise ConversationError(f"{where}: expected an object, not {type(value).__name__}")
    names = [f.name for f in fields(kind)]
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise ConversationError(f"{where}: unknown key {key!r}; {hint}")
    return dict(value)


def to_dict(conversation: Conversation) -> dict[str, Any]:
    """The inverse of ``from_dict``; ``train`` is written only where it is set."""
    c = conversation
    head = {"id": c.id, "lang": c.lang, "kind": c.kind, "source": c.source, "license": c.license}
    messages = [
        {"role": m.role, "content": m.content} | ({} if m.train is None else {"train": m.train})
        for m in c.messages
    ]
    return head | {"messages": messages}


def read_jsonl(path: str | os.PathLike) -> Iterator[Conversation]:
    """The conversations of a JSON Lines file, one at a time; blank lines are skipped.

    Raises ConversationError that begins with ``path:line``, and for a file that is missing or has
    no conversation.
    """
    empty = True
    try:
        file = open(path, "rb")  # noqa: SIM115  (closed below; a missing file is its own error)
    except OSError as error:
        raise ConversationError(
            f"{path}: {error.strerror}; give the path of a JSON Lines file of conversations"
        ) from error
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise ConversationError(
                    f"{where}: not UTF-8 at byte {error.start + 1}; convert the file to UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise ConversationError(
                    f"{where}: not JSON: {error.msg} (line {number}, column {error.colno}); each"
                    " line must be one whole object"
                ) from error
            empty = False
            yield from_dict(record, where=where)
    if empty:
        raise ConversationError(f"{path}: no conversation in this file")


def in_languages(lang: str, languages: Sequence[str]) -> bool:
    """Whether a language (BCP-47) is one of ``languages``; "zh" takes "zh-Hant" too."""
    lang = lang.lower()
    return any(lang == x.lower() or lang.startswith(x.lower() + "-") for x in languages)


def write_jsonl(path: str | os.PathLike, conversations: Iterable[Conversation]) -> int:
    """Writes the whole file or, if anything fails, nothing; returns the number of conversations."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for conversation in conversations:
                file.write(json.dumps(to_dict(conversation), ensure_ascii=False) + "\n")
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


# --- text ------------------------------------------------------------------------------------


def render(
    messages: Sequence[Message], chat_format: ChatFormat, *, generation_prompt: bool = False
) -> list[Segment]:
    """Writes messages as text, in pieces that are wholly inside or wholly outside the loss.

    With ``generation_prompt`` the text ends where the model begins to speak, and is the beginning
    of what is written for the same messages and an answer. Raises ConversationError where the
    format has no such turn.
    """
    f = chat_format
    if f.template is not None:
        return f.template(messages, generation_prompt)
    segments = [Segment(f.begin, False)]
    turns = list(messages)
    given = bool(turns) and turns[0].role == "system"
    system = turns.pop(0).content if given else f.default_system
    if given or system:
        system = system.strip() if f.strip and not f.system_in_user else system
        system = f.system[0] + system + f.system[1]
    if not f.system_in_user:
        segments.append(Segment(system, False))
        system = ""
    for message in turns:
        pair = getattr(f, message.role) if message.role in ("user", "assistant", "tool") else None
        if pair is None or (system and message.role != "user"):
            raise ConversationError(
                f"chat format {f.name} cannot write a turn of the {message.role} here; use another"
                " chat format, or drop the conversation"
            )
        content, system = system + message.content, ""
        content = content.strip() if f.strip else content
        before, after = pair
        if message.role == "assistant":
            before, after = before.removesuffix(f.trained[0]), after.removeprefix(f.trained[1])
            content = f.trained[0] + content + f.trained[1]
        segments.append(Segment(before, False))
        segments.append(Segment(content, message.trained))
        segments.append(Segment(after, False))
    if generation_prompt:
        segments.append(Segment(f.prompt, False))
    return [segment for segment in segments if segment.text]


# Filled in by `chat_template`; on one line, as apply_chat_template trims space around blocks.
_SYSTEM = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = <before> + (messages[0]['content']<strip>) + <after> %}"
    "{% else %}{% set turns = messages %}{% set system = <default> %}{% endif %}"
)
_TURN = (
    "if message['role'] == '<role>'<unless> %}{{ <before> + (<content><strip>) + <after> }}{% el"
)
_OTHER = "se %}{{ raise_exception(<refusal> + message['role'] + ' here') }}{% endif %}"


def chat_template(chat_format: ChatFormat) -> str:
    """The format as a Hugging Face jinja template, which writes the same text as ``render``."""
    f = chat_format
    if f.template is not None:
        return f.template.source

    def fill(text: str, pair: tuple[str, str] = ("", ""), **values: str) -> str:
        values |= {"before": _literal(pair[0]), "after": _literal(pair[1])}
        return re.sub("<([a-z]+)>", lambda match: values[match[1]], text)

    strip = " | trim" if f.strip else ""
    default = f.default_system and f.system[0] + f.default_system + f.system[1]
    out = "{{ " + _literal(f.begin) + " }}" if f.begin else ""
    out += fill(
        _SYSTEM, f.system, strip="" if f.system_in_user else strip, default=_literal(default)
    )
    out += "" if f.system_in_user else "{{ system }}"
    out += "{% for message in turns %}{% "
    for role, pair in (("user", f.user), ("assistant", f.assistant), ("tool", f.tool)):
        content, unless = "message['content']", ""
        if f.system_in_user and role == "user":
            content = "((system if loop.first else '') + message['content'])"
        elif f.system_in_user:
            unless = " and not (loop.first and system)"
        if pair is not None:
            out += fill(_TURN, pair, role=role, content=content, unless=unless, strip=strip)
    out += fill(_OTHER, refusal=_literal(f"chat format {f.name} cannot write a turn of the "))
    out += "{% endfor %}"
    if f.prompt:
        out += "{% if add_generation_prompt %}{{ " + _literal(f.prompt) + " }}{% endif %}"
    return out


def _literal(text: str) -> str:
    """``text`` as a jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
