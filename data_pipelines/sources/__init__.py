"""Raw files -> conversations and questions: one file a format, each with ``conversations(path)``.

A format is one function, record -> messages, that raises ``Unusable`` where a record cannot be
read; ``records.py`` reads the records, whatever the container. Text is passed on as it is; what
it is worth is judged later, by ``data_pipelines.build``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipelines.sources.records import Unusable as Unusable  # re-exported
from data_pipelines.sources.records import read_records as read_records
from llmzoo_jax.conversation import Conversation, Message


@dataclass(frozen=True)
class Dropped:
    """A record that did not become a conversation."""

    where: str  # file:number, or the id of the conversation
    reason: str  # few and short: they are counted
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record of a benchmark: models are judged with it, and must not be trained on it."""

    id: str  # file:number
    question_id: str  # SET:NUMBER, equal for the translations of one question
    turns: tuple[str, ...]  # what the user says, turn by turn
    reference: tuple[str, ...] = ()  # the right answers, turn by turn, where the benchmark has them
    category: str = ""
    lang: str = "und"  # these as in a Conversation
    kind: str = "conversation"
    source: str = ""
    license: str = ""


_TAG = re.compile("[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*")

Item = Conversation | Question | Dropped


def convert(
    records: str | Iterable[tuple[str, Any]],
    to_messages: Callable[[dict[str, Any]], list[Message]],
    *,
    lang: str | Callable[[str], str],
    own: Callable[[dict[str, Any]], dict[str, str]] = lambda record: {},
    **about: str,
) -> Iterator[Conversation | Dropped]:
    """The conversations of a file, or of records with their ids.

    ``lang`` is BCP-47, or a function of the conversation's text. ``about`` is kind, source and
    license of every conversation; what ``own`` finds of these, and of lang, in a record goes
    before.
    """
    for where, record in read_records(records) if isinstance(records, str) else records:
        if isinstance(record, Unusable):
            yield Dropped(where, record.reason, record.detail)
            continue
        try:
            messages = tuple(to_messages(record))
            fields = about | own(record)
        except Unusable as error:
            yield Dropped(where, error.reason, error.detail)
            continue
        if "lang" not in fields:
            text = "\n".join(message.content for message in messages)
            fields["lang"] = lang if isinstance(lang, str) else lang(text)
        yield Conversation(messages=messages, id=where, **fields)


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


def language_of(record: dict[str, Any], *keys: str) -> dict[str, str]:
    """``{"lang": ...}`` of the first of ``keys`` that has a value, else ``{}``: for ``own``.

    Raises Unusable where the value is no BCP-47 tag.
    """
    tag = next((record[key] for key in keys if record.get(key)), None)
    if tag is None:
        return {}
    if not (isinstance(tag, str) and _TAG.fullmatch(tag)):
        raise Unusable("unknown language", f"{tag!r:.80} is no BCP-47 tag, as en or zh-Hant")
    return {"lang": tag}


def zh_or_en(text: str) -> str:
    """``lang`` for files that mix Chinese and English: Chinese where a Han character is in it."""
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"
