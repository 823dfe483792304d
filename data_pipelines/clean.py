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
from dataclasses import asdict, dataclass, field

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import decontaminate, near_duplicates
from data_pipelines.examine import (
    CHECKS,
    Examined,
    Examiner,
    Line,
    Rules,
    examine_all,
    ngrams,
    read_line,
)
from data_pipelines.sources import Dropped
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, write_jsonl
from llmzoo_jax.errors import InputError


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
    files: Sequence[File],
    out: str,
    rules: Rules,
    index: decontaminate.Index | None = None,
    *,
    workers: int = 1,
) -> None:
    """Cleans ``files`` into the folder ``out`` and counts in them; held-out ones stand first.

    ``workers`` processes look at the lines; what is written is the same for any number of them.
    """
    drops: dict[tuple[int, int], Dropped] = {}  # (file, offset of the line) -> why
    seen: dict[bytes, str] = {}  # content hash -> where
    signatures = Signatures()
    names, heldout = zip(*((file.name, file.heldout) for file in files), strict=True)
    examiner = Examiner(names, heldout, rules, index)
    with _bar(files, "checking") as bar:
        for line, found in examine_all(_all_lines(files), examiner, workers=workers):
            file, drop = files[line.file], found.drop
            where = f"{file.name}:{line.number}"
            file.read += 1
            if not drop and found.digest in seen:
                drop = Dropped(where, "duplicate", f"of {seen[found.digest]}")
            if drop:
                drops[line.file, line.offset] = drop
            else:
                seen[found.digest] = where
                remember(signatures, line, found)
            bar.update(len(line.raw))
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


def remember(signatures: Signatures, line: Line, found: Examined) -> None:
    if found.keys is None:  # punctuation or emoji alone, or near duplicates are not asked for
        return
    signatures.keys.frombytes(found.keys.tobytes())
    signatures.sizes.append(found.size)
    signatures.files.append(line.file)
    signatures.offsets.append(line.offset)
    signatures.lines.append(line.number)


def _all_lines(files: Sequence[File]) -> Iterator[Line]:
    for number, file in enumerate(files):
        yield from _lines(file.path, number)


def _lines(path: str, number: int) -> Iterator[Line]:
    offset = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield Line(number, line, offset, raw)
            offset += len(raw)


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
        return ngrams(conversation)

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
    for _, line, offset, raw in _lines(file.path, number):
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
    size = sum(os.path.getsize(file.path) for file in files)
    workers = args.workers or min(os.cpu_count() or 1, size // (8 << 20))
    index = decontaminate.build_index(questions) if questions else None
    clean_files(files, args.out, rules, index, workers=workers)
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
    flags.DEFINE_integer("workers", 0, "processes; 0: one for each core, if there is much to do", 0)
    cli.run(main)
