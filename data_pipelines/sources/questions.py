"""Benchmark questions: LLM Zoo's, Vicuna's 80, MT-bench's two turns.

``{"question_id" | "id", "text" | "query" | "turns", "category" | "label", "lang", "reference"}``,
of which id and text must be there. ``data_pipelines.build`` writes them to NAME.questions.jsonl.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from data_pipelines.sources import (
    Dropped,
    Question,
    Unusable,
    language_of,
    list_of,
    read_records,
    text_of,
)
from llmzoo_jax.errors import InputError


def conversations(
    path: str, *, benchmark: str, lang: str | None = None, parallel: int = 0, **about: str
) -> Iterator[Question | Dropped]:
    """The questions of a file, none of which is a conversation.

    ``benchmark`` is the first half of each ``question_id``. ``lang`` is that of records that name
    none; without it, it is what the file's name begins with, as in ``ar100.jsonl``. ``parallel``
    is the number of questions, where the ids of the second language go on from the first's.
    """
    for where, record in read_records(path):
        try:
            if isinstance(record, Unusable):
                raise record
            number = question_id(record)
            if parallel and isinstance(number, int):
                number = (number - 1) % parallel + 1
            yield Question(
                id=where,
                question_id=f"{benchmark}:{number}",
                turns=turns_of(record),
                reference=_strings(record.get("reference") or [], "reference"),
                category=str(record.get("category") or record.get("label") or ""),
                lang=language_of(record, "lang").get("lang") or lang or _named(path),
                **about,
            )
        except Unusable as error:
            yield Dropped(where, error.reason, error.detail)


def question_id(record: dict[str, Any]) -> int | str:
    number = record.get("question_id", record.get("id"))
    if not isinstance(number, int | str):
        raise Unusable("no id", f"{number!r:.80} is the question_id")
    return number


def turns_of(record: dict[str, Any]) -> tuple[str, ...]:
    if "turns" in record:
        return _strings(list_of(record, "turns"), "turns")
    return (text_of(record, "text" if "text" in record else "query"),)


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise Unusable("no text", f"{key!r} is {value!r:.80}, not a list of strings")
    return tuple(value)


def _named(path: str) -> str:
    match = re.match(r"([a-z]{2,3})[^a-z]", os.path.basename(path))
    if not match:
        raise InputError(f"{path}: the name does not begin with a language; give lang=")
    return match[1]
