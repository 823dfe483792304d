"""Which conversations hold a question that a model is later judged with.

A question is found where a message holds most of its character n-grams (so Chinese and Thai need
no words), or, if it is too short for that, where a message is that question and nothing else.

Translated twins: the files that one ``--questions`` pattern names are one set, in which the same id
is the same question in another language (MGSM: the same row). To have seen a question in Thai helps
with the English one, so give all language versions, also those that are not judged: a match with
any of them is a match with the id. What this cannot see is a translation into a
language of which the set has no file, and a paraphrase.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.near_duplicates import ngrams, normalise
from llmzoo_jax.errors import InputError

ID_KEYS = ("question_id", "id")
TEXT_KEYS = ("text", "query", "question", "prompt", "instruction", "turns")

# A character of these scripts says more than a letter does, so fewer make an n-gram.
_DENSE = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")
NGRAM = {True: 5, False: 8}  # characters, by density: about two words
FEWEST = 8  # n-grams: a question with fewer must be equal to a whole message


@dataclass(frozen=True)
class Question:
    set: str  # the pattern that named the file
    id: str
    version: str  # the file, and the language where the record names it
    text: str


@dataclass(frozen=True)
class Found:
    question: Question
    overlap: float  # the share of its n-grams that one message has
    twins: tuple[str, ...]  # other versions of the set that have this id

    def __str__(self) -> str:
        q = self.question
        detail = f"question {q.id} of {q.version}, {self.overlap:.0%} of its n-grams"
        return f"{detail}; twins: {', '.join(self.twins)}" if self.twins else detail


def read_questions(pattern: str) -> list[Question]:
    """The questions of the files that ``pattern`` names, in which the same id is the same one.

    JSON Lines or a JSON list of objects, with an id under one of ID_KEYS (else the number of the
    record counts), perhaps ``lang``, and the text, or a list of texts, under one of TEXT_KEYS (so
    are the NAME.questions.jsonl of data_pipelines.build); or .tsv with the
    question in the first column. Raises InputError for anything else.
    """
    files = sorted(glob.glob(pattern))
    if not files:
        raise InputError(f"--questions={pattern}: there is no such file")
    found = [
        Question(pattern, id, f"{os.path.basename(file)} {lang}".rstrip(), text)
        for file in files
        for id, lang, text in (_tsv(file) if file.endswith(".tsv") else _json(file))
        if normalise(text)
    ]
    if not found:
        raise InputError(f"--questions={pattern}: there is no question in {files[0]}")
    return found


def _tsv(file: str) -> Iterator[tuple[str, str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
            if row:
                yield str(number), "", row[0]


def _json(file: str) -> Iterator[tuple[str, str, str]]:
    with open(file, encoding="utf-8-sig") as stream:
        text = stream.read()
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:  # split("\n"): a JSON string may hold U+2028, at which splitlines() cuts
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: neither JSON Lines nor a JSON list: {error}") from error
    for number, record in enumerate(records, 1):
        texts = None
        if isinstance(record, dict):
            texts = next((record[key] for key in TEXT_KEYS if record.get(key)), None)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{file}: record {number} has no question; its text must be a string, or a list of"
                f" strings, under one of {', '.join(TEXT_KEYS)}"
            )
        id = next((record[key] for key in ID_KEYS if key in record), number)
        yield from ((str(id), str(record.get("lang") or ""), text) for text in texts)


@dataclass(frozen=True)
class Table:
    """The n-grams of the questions of one density, sorted by hash."""

    n: int  # characters an n-gram
    hashes: np.ndarray  # uint64[k], sorted; an n-gram of two questions stands there twice
    owners: np.ndarray  # int64[k]: number of the question
    sizes: np.ndarray  # int64[questions]: n-grams of each question, 0 for those of other tables


@dataclass(frozen=True)
class Index:
    """Questions, ready to be looked for in texts."""

    questions: tuple[Question, ...]
    versions: dict[tuple[str, str], set[str]]  # by set and id
    short: dict[str, int]  # normalised text of a short question -> its number
    tables: tuple[Table, ...]


def build_index(questions: Sequence[Question]) -> Index:
    versions = defaultdict(set)
    short: dict[str, int] = {}
    ngrams_of: dict[int, dict[int, np.ndarray]] = {n: {} for n in NGRAM.values()}
    for number, question in enumerate(questions):
        versions[question.set, question.id].add(question.version)
        text = normalise(question.text)
        n = NGRAM[len(_DENSE.findall(text)) > len(text) / 2]
        hashes = ngrams(text, n)
        if len(text) < n or len(hashes) < FEWEST:
            short.setdefault(text, number)
        else:
            ngrams_of[n][number] = hashes
    tables = []
    for n, by_number in ngrams_of.items():
        if not by_number:
            continue
        sizes = np.zeros(len(questions), np.int64)
        sizes[list(by_number)] = [len(hashes) for hashes in by_number.values()]
        hashes = np.concatenate(list(by_number.values()))
        owners = np.repeat(list(by_number), sizes[list(by_number)])
        order = np.argsort(hashes, kind="stable")
        tables.append(Table(n, hashes[order], owners[order], sizes))
    return Index(tuple(questions), dict(versions), short, tuple(tables))


def find(index: Index, text: str, overlap: float) -> Found | None:
    """The question of which a message ``text`` has most, if it is ``overlap`` or more of it."""
    text = normalise(text)
    share, number = (1.0, index.short[text]) if text in index.short else (0.0, 0)
    for table in index.tables:
        hashes = ngrams(text, table.n)
        first = np.searchsorted(table.hashes, hashes)
        hit = table.hashes[np.minimum(first, len(table.hashes) - 1)] == hashes
        if not hit.any():
            continue
        last = np.searchsorted(table.hashes, hashes[hit], side="right")
        rows = np.concatenate([np.arange(a, b) for a, b in zip(first[hit], last, strict=True)])
        counts = np.bincount(table.owners[rows], minlength=len(table.sizes))
        shares = counts / np.maximum(table.sizes, 1)
        best = int(shares.argmax())  # of equal ones the first
        if shares[best] > share:
            share, number = float(shares[best]), best
    if not share or share < overlap:
        return None
    question = index.questions[number]
    twins = index.versions[question.set, question.id] - {question.version}
    return Found(question, share, tuple(sorted(twins)))
