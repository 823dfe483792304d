"""Conversations, and how a chat format writes them as text. Standard library only.

A conversation is a line of JSON::

    {"id": "1", "lang": "zh", "kind": "conversation", "source": "...", "license": "...",
     "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

``read_jsonl`` checks it, ``render`` writes it as text, in training and in serving alike, and
``chat_template`` writes the same rules as a Hugging Face jinja template.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

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
    turn: int | None = None  # index of the message whose content this is; None: the format's text


# --- reading and writing ------------------------------------------------------------------------

# Which role may follow which; None is the beginning.
_AFTER = {
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
        turn = f"{at}turn {number} ({message.role})"
        if message.role not in ROLES:
            raise ConversationError(
                f"{at}turn {number}: unknown role {message.role!r}; use one of {', '.join(ROLES)}"
            )
        if not isinstance(message.content, str):
            kind = type(message.content).__name__
            raise ConversationError(f"{turn}: content must be a string, not {kind}")
        if not message.content.strip():
            raise ConversationError(f"{turn}: empty content: drop the turn, or the conversation")
        if any("\ud800" <= c <= "\udfff" for c in message.content):
            raise ConversationError(
                f"{turn}: content has half of a surrogate pair, which is no character; mend the"
                " JSON (an emoji is two \\uXXXX escapes)"
            )
        if message.train is not None and message.role != "assistant" and message.train:
            raise ConversationError(f"{turn}: only assistant turns are trained; remove its 'train'")
        if previous not in _AFTER[message.role]:
            raise ConversationError(f"{turn}: {_order(message.role, previous)}")
        previous = message.role
    turn = f"{at}turn {len(messages)} ({previous})"
    if generation_prompt:
        if previous not in ("user", "tool"):
            raise ConversationError(f"{turn}: the last message must be the user's (or a tool's)")
        return
    if previous != "assistant":
        raise ConversationError(
            f"{turn}: the conversation ends without an answer, so there is nothing to train after"
            " it; drop the last turn, or add the answer"
        )
    if not any(message.trained for message in messages):
        raise ConversationError(
            f"{at}no message is trained: every assistant turn has 'train': false; drop it"
        )


def _order(role: str, previous: str | None) -> str:
    if role == "system":
        return "a system message must be the first; merge it into the first, or drop it"
    if previous in (None, "system"):
        return f"the first turn must be the user's, not the {role}'s; drop it"
    if role == "tool":
        return f"a tool's answer must follow an assistant turn, not one of the {previous}"
    return f"a turn of the {role} after one of the {previous}; merge the two, or drop one"


def from_dict(record: dict[str, Any], *, where: str) -> Conversation:
    """A conversation from parsed JSON (its form is in the docstring of this module).

    Raises ConversationError, beginning with ``where``, for anything that is not in order.
    """
    record = _object(record, Conversation, where)
    messages = record.pop("messages", None)
    if not isinstance(messages, list | tuple):
        raise ConversationError(f"{where}: 'messages' must be a list of {{role, content}} objects")
    for key, value in record.items():
        if not isinstance(value, str):
            raise ConversationError(
                f"{where}: {key!r} must be a string, not {type(value).__name__}"
            )
    if record.get("kind", KINDS[-1]) not in KINDS:
        kind = record["kind"]
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
            hint = f"; did you mean {near[0]!r}?" if near else f"; it may have {', '.join(names)}"
            raise ConversationError(f"{where}: unknown key {key!r}{hint}")
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


# --- formats ------------------------------------------------------------------------------------


class Template(Protocol):
    """A checkpoint's own jinja template (``tokenizer.JinjaTemplate``)."""

    source: str

    def __call__(self, messages: Sequence[Message], generation_prompt: bool) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a conversation is written: data, so that a new format is a new row of ``FORMATS``.

    A turn is ``prefix + content + suffix``, a conversation is ``begin`` and its turns, with nothing
    between. Of an assistant turn, ``trained`` says which end of the prefix and which beginning of
    the suffix are targets of the loss beside the content, and ``prompt`` is the beginning of the
    prefix that is written for the model; what follows it, the model writes itself.
    """

    name: str
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "")
    trained: tuple[str, str] = ("", "")
    prompt: str = ""
    stop: tuple[str, ...] = ()  # what ends an assistant turn
    system: tuple[str, str] = ("", "")
    tool: tuple[str, str] | None = None  # None: the format has no such turns
    default_system: str = ""  # the system message of conversations that have none
    system_in_user: bool = False  # written inside the first user turn, before its content
    strip: bool = False  # contents lose the white space at both ends
    begin: str = ""  # BOS, where the tokenizer puts one first (set by tokenizer.resolve_format)
    special_tokens: tuple[str, ...] = ()  # each must be one token
    template: Template | None = None  # writes everything, instead of the fields above

    def __post_init__(self):
        before, after = self.assistant
        if not (
            before.startswith(self.prompt)
            and before.endswith(self.trained[0])
            and after.startswith(self.trained[1])
        ):
            raise ValueError(
                f"chat format {self.name}: 'prompt' or 'trained' is not in 'assistant'"
            )


def _header(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


def _im(role: str) -> tuple[str, str]:
    return f"<|im_start|>{role}\n", "<|im_end|>\n"


_FORMATS = (
    # LLM Zoo: llmzoo/datasets/datasets.py, `default_conversation`; the assistant's opening <s> is a
    # target of the loss.
    ChatFormat(
        name="phoenix",
        default_system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
        system=("", "\n\n"),
        user=("Human: <s>", "</s>"),
        assistant=("Assistant: <s>", "</s>"),
        prompt="Assistant: <s>",
        trained=("<s>", "</s>"),
        stop=("</s>",),
        special_tokens=("<s>", "</s>"),
    ),
    # Stanford Alpaca: train.py, `prompt_no_input`; nothing stands between "### Response:" and the
    # answer. It has one turn; further ones are set apart by an empty line.
    ChatFormat(
        name="alpaca",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:", "</s>\n\n"),
        prompt="### Response:",
        trained=("", "</s>"),
        stop=("</s>",),
        special_tokens=("</s>",),
    ),
    # FastChat: conversation.py, `vicuna_v1.1` (ADD_COLON_TWO, sep " ", sep2 "</s>").
    ChatFormat(
        name="vicuna",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        prompt="ASSISTANT:",
        trained=(" ", "</s>"),
        stop=("</s>",),
        special_tokens=("</s>",),
    ),
    # meta-llama/Llama-2-7b-chat-hf: its template; every user turn opens with BOS.
    ChatFormat(
        name="llama-2",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
        user=("<s>[INST] ", " [/INST]"),
        assistant=(" ", " </s>"),
        trained=(" ", " </s>"),
        stop=("</s>",),
        strip=True,
        special_tokens=("<s>", "</s>"),
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct: its template; BOS comes from the tokenizer.
    ChatFormat(
        name="llama-3",
        system=_header("system"),
        user=_header("user"),
        assistant=_header("assistant"),
        tool=_header("ipython"),
        prompt=_header("assistant")[0],
        trained=("", "<|eot_id|>"),
        stop=("<|eot_id|>",),
        strip=True,
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    ChatFormat(
        name="chatml",
        system=_im("system"),
        user=_im("user"),
        assistant=_im("assistant"),
        tool=_im("tool"),
        prompt=_im("assistant")[0],
        trained=("", "<|im_end|>"),
        stop=("<|im_end|>",),
        special_tokens=("<|im_start|>", "<|im_end|>"),
    ),
)
FORMATS: dict[str, ChatFormat] = {f.name: f for f in _FORMATS}


def render(
    messages: Sequence[Message], chat_format: ChatFormat, *, generation_prompt: bool = False
) -> list[Segment]:
    """Writes messages as text, in pieces that are wholly inside or wholly outside the loss.

    With ``generation_prompt`` the text ends where the model begins to speak; it is the beginning
    of what is written for the same messages and an answer.
    """
    f = chat_format
    if f.template is not None:
        return _render_template(messages, f, generation_prompt)
    pairs = {"user": f.user, "assistant": f.assistant, "tool": f.tool}
    segments = [Segment(f.begin, False)]
    first = 1 if messages and messages[0].role == "system" else 0
    system = ""  # what is written before the content of the first turn, or as a turn of its own
    if first or f.default_system:
        text = messages[0].content if first else f.default_system
        text = text.strip() if f.strip and not f.system_in_user else text
        system = f.system[0] + text + f.system[1]
        if not f.system_in_user:
            segments.append(Segment(f.system[0], False))
            segments.append(Segment(text, False, 0 if first else None))
            segments.append(Segment(f.system[1], False))
            system = ""
    for turn, message in enumerate(messages[first:], first):
        if pairs.get(message.role) is None:
            raise ConversationError(
                f"turn {turn + 1}: chat format {f.name} has no {message.role} turns here; use"
                " another --config.chat_format, or drop the conversation"
            )
        if system and message.role != "user":
            raise ConversationError(
                f"turn {turn + 1}: chat format {f.name} writes the system message inside the first"
                " user turn, so a user turn must follow it"
            )
        before, after = pairs[message.role]
        content, system = system + message.content, ""
        content = content.strip() if f.strip else content
        if message.role == "assistant":
            train, (head, tail) = message.trained, f.trained
            segments.append(Segment(before.removesuffix(head), False))
            segments.append(Segment(head, train))
            segments.append(Segment(content, train, turn))
            segments.append(Segment(tail, train))
            segments.append(Segment(after.removeprefix(tail), False))
        else:
            segments.append(Segment(before, False))
            segments.append(Segment(content, False, turn))
            segments.append(Segment(after, False))
    if generation_prompt:
        segments.append(Segment(f.prompt, False))
    return [segment for segment in segments if segment.text]


def _render_template(
    messages: Sequence[Message], f: ChatFormat, generation_prompt: bool
) -> list[Segment]:
    """Finds the assistant turns in the text of a template by rendering what comes before them."""
    whole = f.template(messages, generation_prompt)
    segments, done = [], 0

    def upto(text: str, train: bool, what: str) -> None:
        nonlocal done
        if not whole.startswith(text) or len(text) < done:
            raise ConversationError(
                f"the tokenizer's chat template writes {what} differently when more turns follow,"
                " so the text of training would not be the text of serving; use another chat format"
            )
        segments.append(Segment(whole[done : len(text)], train))
        done = len(text)

    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        upto(f.template(messages[:turn], True), False, f"the prompt before turn {turn + 1}")
        text = f.template(messages[: turn + 1], False)
        end = f.trained[1]
        # White space after the closing token belongs to no one: the model never has to write it.
        closed = text.rstrip() if end and text.rstrip().endswith(end.rstrip()) else text
        upto(closed, message.trained, f"turn {turn + 1} (assistant)")
    segments.append(Segment(whole[done:], False))
    return [segment for segment in segments if segment.text]


def chat_template(chat_format: ChatFormat) -> str:
    """The format as a Hugging Face jinja template, which writes the same text as ``render``."""
    f = chat_format
    if f.template is not None:
        return f.template.source
    # One line: apply_chat_template trims white space around blocks, and there is none to trim.
    content = "message['content'] | trim" if f.strip else "message['content']"
    system = "messages[0]['content']"
    if f.strip and not f.system_in_user:
        system += " | trim"
    out = "{{ " + _literal(f.begin) + " }}" if f.begin else ""
    out += "{% set turns = messages %}{% set system = '' %}"
    write = "{% set system = " + _literal(f.system[0]) + " + (SYSTEM) + " + _literal(f.system[1])
    out += "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    out += write.replace("SYSTEM", system) + " %}"
    if f.default_system:
        out += "{% else %}" + write.replace("SYSTEM", _literal(f.default_system)) + " %}"
    out += "{% endif %}"
    if not f.system_in_user:
        out += "{{ system }}"
    out += "{% for message in turns %}"
    for number, role in enumerate(("user", "assistant", "tool")):
        pair = {"user": f.user, "assistant": f.assistant, "tool": f.tool}[role]
        if pair is None:
            continue
        text = content
        test = f"message['role'] == '{role}'"
        if f.system_in_user:
            if role == "user":
                text = "((system if loop.first else '') + message['content'])"
                text += " | trim" if f.strip else ""
            else:
                test += " and not (loop.first and system)"
        out += "{% " + ("elif " if number else "if ") + test + " %}"
        out += "{{ " + f"{_literal(pair[0])} + ({text}) + {_literal(pair[1])}" + " }}"
    refusal = f"chat format {f.name} has no such turn here: "
    out += "{% else %}{{ raise_exception(" + _literal(refusal) + " + message['role']) }}{% endif %}"
    out += "{% endfor %}"
    if f.prompt:
        out += "{% if add_generation_prompt %}{{ " + _literal(f.prompt) + " }}{% endif %}"
    return out


def _literal(text: str) -> str:
    """``text`` as a jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
