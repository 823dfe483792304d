"""What speaks against one conversation, seen alone; and how it is recognised among others.

``examine`` is a pure function of a line, so any number of processes may share the lines out;
``clean.py`` puts together what they find.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import decontaminate, language, near_duplicates, spoilt_text
from data_pipelines.build import clean, content_hash
from data_pipelines.sources import Dropped
from llmzoo_jax.conversation import Conversation, ConversationError, Message, from_dict

# What is said of one conversation alone; --allow takes these names.
CHECKS = ("length", "lost character", "mojibake", "placeholder", "script", "language")


@dataclass(frozen=True)
class Rules:
    min_chars: int = 2  # of all turns together
    max_chars: int = 200_000
    near: float = 0.8  # Jaccard index of character n-grams; 0: exact duplicates only
    overlap: float = 0.8  # share of a question's n-grams in one turn
    allow: frozenset[str] = frozenset()  # of CHECKS: these drop nothing


class Line(NamedTuple):
    """A line of a file that is not blank."""

    file: int  # index of the file
    number: int  # from 1
    offset: int  # bytes
    raw: bytes


class Examined(NamedTuple):
    """What is known of a line, seen alone."""

    drop: Dropped | None
    digest: bytes = b""  # content hash, where it is not dropped
    keys: np.ndarray | None = None  # uint64[bands] of near_duplicates, where it has n-grams
    size: int = 0  # different n-grams


def read_line(raw: bytes, where: str) -> tuple[Conversation | None, Dropped | None]:
    """The conversation of a line, mended by ``build.clean``, and what is said of the rest of it."""
    try:
        conversation = _conversation(json.loads(raw), where)
    except ConversationError as error:
        return None, Dropped(where, "malformed", str(error))
    except ValueError as error:  # not UTF-8, or not JSON
        return None, Dropped(where, "not JSON", str(error))
    kept, note = clean(conversation)
    return kept, note and replace(note, where=where)


_STAND_IN = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]


def _conversation(record: Any, where: str) -> Conversation:
    """As ``from_dict``, but empty turns and the order of roles are left to ``build.clean``."""
    try:
        return from_dict(record, where=where)
    except ConversationError:
        turns = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not all(map(_is_turn, turns)):
            raise
    head = from_dict({**record, "messages": _STAND_IN}, where=where)
    return replace(head, messages=tuple(Message(**turn) for turn in turns))


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        and isinstance(turn.get("train"), bool | None)
        and turn.keys() <= {"role", "content", "train"}
    )


def problems(conversation: Conversation, rules: Rules) -> Iterator[tuple[str, str]]:
    """What speaks against a conversation, seen alone: (one of CHECKS, detail), ..."""
    texts = [message.content for message in conversation.messages]
    chars = sum(map(len, texts))
    if not rules.min_chars <= chars <= rules.max_chars:
        yield "length", f"{chars} characters, not {rules.min_chars} to {rules.max_chars}"
    if lost := sum(text.count("\ufffd") for text in texts):
        yield "lost character", f"{lost} times U+FFFD"
    if detail := next(filter(None, map(spoilt_text.mojibake, texts)), ""):
        yield "mojibake", detail
    if detail := next(filter(None, map(spoilt_text.placeholder, texts)), ""):
        yield "placeholder", detail
    if not {"script", "language"} <= rules.allow:
        # A system message or a tool's answer is often English where the conversation is not.
        turns = [m.content for m in conversation.messages if m.role in ("user", "assistant")]
        if wrong := language.mismatch(conversation.lang, turns):
            yield wrong.reason, wrong.detail


def ngrams(conversation: Conversation) -> np.ndarray:
    """Of what is said; a system message is often the same in a whole file."""
    texts = [message.content for message in conversation.messages if message.role != "system"]
    return near_duplicates.ngrams(near_duplicates.normalise("\n".join(texts)))


@dataclass(frozen=True)
class Examiner:
    """What lines are held against; the same for all of them."""

    names: tuple[str, ...]  # of the files
    heldout: tuple[bool, ...]  # questions of an evaluation may stand in these
    rules: Rules
    index: decontaminate.Index | None  # the questions


def examine(line: Line, by: Examiner) -> Examined:
    rules = by.rules
    where = f"{by.names[line.file]}:{line.number}"
    kept, drop = read_line(line.raw, where)
    if kept is None:
        return Examined(drop)
    for reason, detail in problems(kept, rules):
        if reason not in rules.allow:
            return Examined(Dropped(where, reason, detail))
    for message in kept.messages if by.index and not by.heldout[line.file] else ():
        if found := decontaminate.find(by.index, message.content, rules.overlap):
            return Examined(Dropped(where, "evaluation question", str(found)))
    hashes = ngrams(kept) if rules.near else ()
    keys = near_duplicates.band_keys(hashes, rules.near) if len(hashes) else None
    return Examined(None, content_hash(kept), keys, len(hashes))


# --- over processes -------------------------------------------------------------------------------

BATCH = 64  # lines that a process takes at once


def examine_all(
    lines: Iterable[Line], by: Examiner, *, workers: int
) -> Iterator[tuple[Line, Examined]]:
    """Every line with what is found, in order; by ``workers`` processes if that is more than 1."""
    if workers <= 1:
        yield from ((line, examine(line, by)) for line in lines)
        return
    lines = iter(lines)
    waiting: deque[tuple[list[Line], Any]] = deque()
    with multiprocessing.get_context("spawn").Pool(workers, _start, (by,)) as pool:
        while True:
            while len(waiting) < 4 * workers and (batch := list(itertools.islice(lines, BATCH))):
                waiting.append((batch, pool.apply_async(_examine_batch, (batch,))))
            if not waiting:
                return
            batch, result = waiting.popleft()
            yield from zip(batch, result.get(), strict=True)


def _start(by: Examiner) -> None:
    global _by
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    _by = by


def _examine_batch(batch: list[Line]) -> list[Examined]:
    return [examine(line, _by) for line in batch]
