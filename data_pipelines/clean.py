"""Clean files of conversations; every drop has a reason and can be read.

    python -m data_pipelines.clean --data='cache/real/*.train.jsonl' \\
        --heldout='cache/real/*.heldout.jsonl' --out=cache/clean \\
        --questions='../shared/data/mgsm/mgsm/mgsm_*.tsv'

writes the files to --out under their names, and dropped.jsonl: a line for each conversation that
was dropped or trimmed, with where it stood, the reason, a detail, and the conversation itself. The
table says how many of each file. Running it again writes the same files again.

Of conversations that are the same, or nearly, the first is kept, over all files. Held-out files
come first, so a training conversation that is near a held-out one leaves the training data. The
files are read twice, so that memory holds signatures and not texts.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import decontaminate, language, near_duplicates, spoilt_text
from data_pipelines.build import clean, content_hash
from data_pipelines.sources import Dropped
from llmzoo_jax import cli
from llmzoo_jax.conversation import (
    Conversation,
    ConversationError,
    Message,
    from_dict,
    write_jsonl,
)
from llmzoo_jax.errors import InputError

# What is said of one conversation alone; --allow takes these names.
CHECKS = ("length", "lost character", "mojibake", "placeholder", "script", "language")


@dataclass(frozen=True)
class Rules:
    min_chars: int = 2  # of all turns together
    max_chars: int = 200_000
    near: float = 0.8  # Jaccard index of character n-grams; 0: exact duplicates only
    overlap: float = 0.8  # share of a question's n-grams in one turn
    allow: frozenset[str] = frozenset()  # of CHECKS: these drop nothing


@dataclass
class File:
    """A file, and what became of its conversations."""

    path: str
    heldout: bool
    read: int = 0
    kept: int = 0
    trimmed: int = 0  # of those kept
    dropped: Counter[str] = field(default_factory=Counter)  # by reason

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


# --- one line -------------------------------------------------------------------------------------


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


# --- all files ------------------------------------------------------------------------------------


@dataclass
class Signatures:
    """What is remembered of each text, 200 bytes or so: keys of near_duplicates, and its place."""

    keys: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("L"))
    files: array = field(default_factory=lambda: array("L"))
    offsets: array = field(default_factory=lambda: array("Q"))
    lines: array = field(default_factory=lambda: array("L"))


def clean_files(
    files: Sequence[File], out: str, rules: Rules, index: decontaminate.Index | None = None
) -> None:
    """Cleans ``files`` into the folder ``out`` and counts in them; held-out ones stand first."""
    drops: dict[tuple[int, int], Dropped] = {}  # (file, offset of the line) -> why
    seen: dict[bytes, str] = {}  # content hash -> where
    signatures = Signatures()
    with _bar(files, "checking") as bar:
        for number, file in enumerate(files):
            for line, offset, raw in lines(file.path):
                file.read += 1
                where = f"{file.name}:{line}"
                kept, drop = read_line(raw, where)
                if kept:
                    drop = judge(kept, where, rules, seen, None if file.heldout else index)
                if drop:
                    drops[number, offset] = drop
                elif rules.near:
                    remember(signatures, kept, rules, number, offset, line)
                bar.update(len(raw))
    for number, offset, drop in near(signatures, files, rules):
        drops[number, offset] = drop
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "dropped.jsonl")
    # backslashreplace: half of a surrogate pair is written as JSON writes it.
    notes = open(f"{path}.tmp", "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with notes, _bar(files, "writing") as bar:
        for number, file in enumerate(files):
            target = os.path.join(out, file.name)
            if not write_jsonl(target, _sorted_out(file, number, drops, notes, bar)):
                os.remove(target)  # a file without a conversation is none
            if file.read != file.kept + file.dropped.total():
                raise InputError(f"{file.path}: it changed while it was read; run this again")
    os.replace(f"{path}.tmp", path)


def lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield number, offset, raw
            offset += len(raw)


def judge(
    conversation: Conversation,
    where: str,
    rules: Rules,
    seen: dict[bytes, str],
    index: decontaminate.Index | None,
) -> Dropped | None:
    """Why a conversation is dropped, near duplicates aside; ``seen`` gains it if it is not."""
    for reason, detail in problems(conversation, rules):
        if reason not in rules.allow:
            return Dropped(where, reason, detail)
    for message in conversation.messages if index else ():
        if found := decontaminate.find(index, message.content, rules.overlap):
            return Dropped(where, "evaluation question", str(found))
    digest = content_hash(conversation)
    if digest in seen:
        return Dropped(where, "duplicate", f"of {seen[digest]}")
    seen[digest] = where
    return None


def _ngrams(conversation: Conversation) -> np.ndarray:
    """Of what is said; a system message is often the same in a whole file."""
    texts = [message.content for message in conversation.messages if message.role != "system"]
    return near_duplicates.ngrams(near_duplicates.normalise("\n".join(texts)))


def remember(
    signatures: Signatures,
    conversation: Conversation,
    rules: Rules,
    file: int,
    offset: int,
    line: int,
) -> None:
    hashes = _ngrams(conversation)
    if not len(hashes):  # punctuation or emoji alone
        return
    signatures.keys.frombytes(near_duplicates.band_keys(hashes, rules.near).tobytes())
    signatures.sizes.append(len(hashes))
    signatures.files.append(file)
    signatures.offsets.append(offset)
    signatures.lines.append(line)


def near(
    signatures: Signatures, files: Sequence[File], rules: Rules
) -> Iterator[tuple[int, int, Dropped]]:
    """File, offset and reason of each conversation that is near an earlier one."""
    if not signatures.sizes:
        return

    @functools.lru_cache(maxsize=512)
    def ngrams_of(text: int) -> np.ndarray:
        with open(files[signatures.files[text]].path, "rb") as file:
            file.seek(signatures.offsets[text])
            conversation, _ = read_line(file.readline(), "")
        return _ngrams(conversation)

    def where(text: int) -> str:
        return f"{files[signatures.files[text]].name}:{signatures.lines[text]}"

    sizes = np.array(signatures.sizes)
    keys = np.frombuffer(signatures.keys, np.uint64).reshape(len(sizes), -1)
    for match in tqdm(
        near_duplicates.find(keys, sizes, ngrams_of, rules.near),
        desc="near duplicates",
        unit="found",
        disable=None,
    ):
        detail = f"of {where(match.of)}, Jaccard index {match.jaccard:.2f}"
        place = signatures.files[match.record], signatures.offsets[match.record]
        yield *place, Dropped(where(match.record), "near duplicate", detail)


def _sorted_out(file, number, drops, notes, bar) -> Iterator[Conversation]:
    """The conversations of a file that are kept; the others, and what was trimmed, go to notes."""
    for line, offset, raw in lines(file.path):
        bar.update(len(raw))
        conversation, note = read_line(raw, f"{file.name}:{line}")
        drop = drops.get((number, offset))
        if drop or note:
            try:
                original = json.loads(raw)
            except ValueError:
                original = raw.decode("utf-8", "backslashreplace")
            record = {**asdict(drop or note), "conversation": original}
            notes.write(json.dumps(record, ensure_ascii=False) + "\n")
        if drop:
            file.dropped[drop.reason] += 1
            continue
        file.kept += 1
        file.trimmed += note is not None
        yield conversation


def _bar(files: Sequence[File], what: str) -> tqdm:
    total = sum(os.path.getsize(file.path) for file in files)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


# --- the command ----------------------------------------------------------------------------------


def find_files(data: Sequence[str], heldout: Sequence[str], out: str) -> list[File]:
    """The files that the patterns name, held-out ones first. Raises InputError."""
    files = []
    for flag, patterns in (("heldout", heldout), ("data", data)):
        for pattern in patterns:
            if not (paths := sorted(glob.glob(pattern))):
                raise InputError(f"--{flag}={pattern}: there is no such file")
            files += [File(path, flag == "heldout") for path in paths]
    if not data:
        raise InputError("--data: give the JSON Lines file of conversations to clean")
    counts = Counter(file.name for file in files)
    for file in files:
        if counts[file.name] > 1:
            raise InputError(f"{file.path}: two files are called {file.name}; --out can have one")
        if os.path.realpath(os.path.dirname(file.path)) == os.path.realpath(out):
            raise InputError(f"--out={out}: {file.name} is in it; give another folder")
        if not file.heldout and file.name.endswith(".heldout.jsonl"):
            raise InputError(f"--data={file.path}: give held-out files with --heldout")
    return files


def table(files: Sequence[File]) -> str:
    """A line a file and their sum: read, kept, trimmed, and a column for each reason."""
    total = File("all", False)
    for file in files:
        total.read, total.kept = total.read + file.read, total.kept + file.kept
        total.trimmed += file.trimmed
        total.dropped += file.dropped
    reasons = [reason for reason, _ in total.dropped.most_common()]
    rows = [("file", "read", "kept", "trimmed", *reasons)]
    for file in (*files, total):
        counts = (file.read, file.kept, file.trimmed, *(file.dropped[r] for r in reasons))
        rows.append((file.name, *(f"{n:,}" if n else "-" for n in counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def main(_: list[str]) -> None:
    args = flags.FLAGS
    start = time.monotonic()
    files = find_files(args.data, args.heldout, args.out)
    rules = Rules(args.min_chars, args.max_chars, args.near, args.overlap, frozenset(args.allow))
    questions = [q for pattern in args.questions for q in decontaminate.read_questions(pattern)]
    clean_files(files, args.out, rules, decontaminate.build_index(questions) if questions else None)
    read = sum(file.read for file in files)
    seconds = time.monotonic() - start
    print(table(files))
    print(f"\n{read:,} conversations in {seconds:.1f} s, {read / seconds:,.0f} a second")
    print(f"written to {args.out}; every drop, with its reason, is in dropped.jsonl")


if __name__ == "__main__":
    flags.DEFINE_multi_string("data", [], "training file, or a pattern in quotes; may be repeated")
    flags.DEFINE_multi_string("heldout", [], "held-out file or pattern; it excludes from --data")
    flags.DEFINE_string("out", "cache/clean", "folder to write to")
    flags.DEFINE_multi_string(
        "questions",
        [],
        "evaluation questions: .jsonl, .json or .tsv. Files of one pattern are language versions of"
        " each other, in which the same id is the same question; may be repeated",
    )
    flags.DEFINE_float(
        "near", Rules.near, "Jaccard index from which two are near; 0: exact only", 0, 1
    )
    flags.DEFINE_float("overlap", Rules.overlap, "share of a question that is too much", 0.01, 1)
    flags.DEFINE_integer("min_chars", Rules.min_chars, "fewest characters of a conversation")
    flags.DEFINE_integer("max_chars", Rules.max_chars, "most characters of a conversation")
    flags.DEFINE_multi_enum("allow", [], CHECKS, "a reason that shall drop nothing")
    cli.run(main)
