"""Raw files -> conversations: one file a format, each with ``conversations(path, ...)``.

A format is one function, record -> messages, that raises ``Unusable`` where a record cannot be
read. Text is passed on as it is; what it is worth is judged later, by ``data_pipelines.build``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from llmzoo_jax.conversation import Conversation, Message
from llmzoo_jax.errors import InputError


@dataclass(frozen=True)
class Dropped:
    """A record that did not become a conversation."""

    where: str  # file:number, or the id of the conversation
    reason: str  # few and short: they are counted
    detail: str = ""


class Unusable(InputError):
    """A record cannot be read: the reason is counted, the detail is for people."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def convert(
    path: str,
    to_messages: Callable[[dict[str, Any]], list[Message]],
    *,
    lang: str | Callable[[str], str],
    **about: str,
) -> Iterator[Conversation | Dropped]:
    """The conversations of a file; each has the id ``file:number``, with numbers from 1.

    ``lang`` is BCP-47, or a function of the conversation's text. ``about`` is kind, source and
    license of every conversation.
    """
    for where, record in read_records(path):
        if isinstance(record, Unusable):
            yield Dropped(where, record.reason, record.detail)
            continue
        try:
            messages = tuple(to_messages(record))
        except Unusable as error:
            yield Dropped(where, error.reason, error.detail)
            continue
        text = "\n".join(message.content for message in messages)
        tag = lang if isinstance(lang, str) else lang(text)
        yield Conversation(messages=messages, id=where, lang=tag, **about)


def read_records(path: str) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """``file:number`` and the object, of a JSON list or of JSON Lines (whatever the file's name).

    Numbers are those of lines in JSON Lines, of records in a list. Raises InputError where the file
    is not UTF-8, or a list is broken.
    """
    name = os.path.basename(path)
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()[:1]
        file.seek(0)
        if start == "[":
            items = enumerate(_whole(file), 1)
        else:
            items = ((n, _json_or_error(line)) for n, line in enumerate(file, 1) if line.strip())
        for number, item in items:
            if not isinstance(item, dict | Unusable):
                item = Unusable("not an object", f"{item!r:.80}")
            yield f"{name}:{number}", item


def _whole(file: TextIO) -> Any:
    try:
        return json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{file.name}: not JSON: {error}") from error


def _json_or_error(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Unusable("not JSON", str(error))


def text_of(record: Any, key: str) -> str:
    """The string ``record[key]``. Raises Unusable where it is missing or no string."""
    if not isinstance(record, dict):
        raise Unusable("not an object", f"{record!r:.80}")
    if not isinstance(record.get(key), str):
        raise Unusable("no text", f"{key!r} is {type(record.get(key)).__name__}, not a string")
    return record[key]


def list_of(record: dict[str, Any], key: str) -> list[Any]:
    """The list ``record[key]``. Raises Unusable where it is missing, empty or no list."""
    if not isinstance(record.get(key), list) or not record[key]:
        raise Unusable("no turns", f"{key!r} is {record.get(key)!r:.80}, not a list of turns")
    return record[key]


def zh_or_en(text: str) -> str:
    """``lang`` for files that mix Chinese and English: Chinese where a Han character is in it."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
