"""Questions to ask models, from any file of a benchmark.

LLM Zoo's (``question_id``, ``text``; or ``id``, ``query``), MultilingualSIFT's, MT-bench's
(``turns``), what ``data_pipelines.build`` writes, or a file of one's own: a line of JSON a
question, of which an id and a text must be there. A record without ``lang`` is in that of its
file's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipelines.sources import language_of, read_records
from data_pipelines.sources.multilingual_sift import LANGUAGES
from data_pipelines.sources.questions import question_id, turns_of
from data_pipelines.sources.records import Unusable
from llmzoo_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Question:
    question_id: int | str
    turns: tuple[str, ...]  # what the user says, turn by turn
    lang: str = "und"
    category: str = ""
    reference: tuple[str, ...] = ()
    where: str = ""  # file:line

    @property
    def key(self) -> tuple[str, str]:
        """Of one question in one language; translations share their id in most benchmarks."""
        return self.lang, str(self.question_id)

    @property
    def text(self) -> str:
        return "\n\n".join(self.turns)


def read_questions(paths: Sequence[str], *, lang: str = "") -> list[Question]:
    """All questions of the files. ``lang`` is that of records that name none.

    Raises InputError, with file and line, for what is no question, and for a second one with the
    same id and language.
    """
    found: dict[tuple[str, str], Question] = {}
    for path in paths:
        for where, record in read_records(path):
            where = os.path.join(os.path.dirname(path), where)
            try:
                if isinstance(record, Unusable):
                    raise record
                number = question_id(record)
                reference = record.get("reference") or []
                question = Question(
                    question_id=number,
                    turns=turns_of(record),
                    lang=language_of(record, "lang").get("lang") or lang or language_of_name(path),
                    category=str(record.get("category") or record.get("label") or ""),
                    reference=(reference,) if isinstance(reference, str) else tuple(reference),
                    where=where,
                )
            except Unusable as error:
                raise InputError(f"{where}: not a question: {error}") from error
            if question.key in found:
                raise InputError(
                    f"{where}: question {question.question_id} ({question.lang}) is in"
                    f" {found[question.key].where}, too; give each question an id of its own"
                )
            found[question.key] = question
    if not found:
        raise InputError(f"{', '.join(paths)}: there is no question in it")
    return list(found.values())


def language_of_name(path: str) -> str:
    """The language that a file's name begins or ends with: ar100.jsonl, questions_Arabic.jsonl,
    questions-en.jsonl; else "und"."""
    stem = os.path.basename(path).partition(".")[0]
    if match := re.match(r"([a-z]{2,3})(?=[^a-z]|$)", stem):
        return match[1]
    last = re.split("[-_]", stem)[-1].lower()
    return LANGUAGES.get(last, last if re.fullmatch("[a-z]{2}", last) else "und")
