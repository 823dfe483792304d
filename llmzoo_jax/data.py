"""Training and held-out batches from files of conversations. Grain and NumPy.

JSON Lines --tokenise--> records (ArrayRecord, cached by content) --packing.plan--> rows
--mixture--> ``TrainData.batch(step)``. Which records share a row is fixed by the plan, and which
row comes when by the seed, so the state of the whole pipeline is one integer: the step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from llmzoo_jax.config import DataConfig, Source
from llmzoo_jax.conversation import Conversation, read_jsonl
from llmzoo_jax.packing import Batch, PackingError, Plan, empty_rows, fill_rows, plan
from llmzoo_jax.tokenizer import encode, fingerprint

CACHE_VERSION = 1  # of the layout of a cache folder; raise it with any change of tokenise()


class DataError(ValueError):
    """A data file or its share of the mixture is unusable; the message names it."""


# --- conversations -> records -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Records:
    """The tokenised conversations of one file, in the order of the file."""

    path: str  # the conversations
    lengths: np.ndarray  # int32[n], tokens
    loss_tokens: np.ndarray  # int32[n], tokens that are targets of the loss
    lang: np.ndarray  # int32[n], index into languages
    lines: np.ndarray  # int64[n], line in the file, from 1
    languages: tuple[str, ...]  # sorted
    left_out: dict[str, int]  # conversations by language that the language filter left out
    records: Sequence[bytes]  # see _to_bytes

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32[n] and loss mask bool[n] of a record."""
        data, n = self.records[record], int(self.lengths[record])
        return np.frombuffer(data, "<i4", n), np.frombuffer(data, bool, n, offset=4 * n)

    def where(self, record: int) -> str:
        return f"{self.path}:{self.lines[record]}"


def _to_bytes(tokens: np.ndarray, loss_mask: np.ndarray) -> bytes:
    return tokens.astype("<i4").tobytes() + loss_mask.astype(bool).tobytes()


def tokenise(
    path: str, *, tokenizer, chat_format, languages: Sequence[str] = (), cache_dir: str
) -> Records:
    """Reads a file of conversations (JSON Lines) and encodes each of them; once.

    The result is kept in ``cache_dir/KEY``, where KEY depends on the bytes of the file, on the
    tokenizer, the chat format and the languages; later calls only load it. ``languages`` keeps
    conversations in these (BCP-47; "zh" takes "zh-Hant" too), and the others are counted.

    Raises ConversationError with file and line where a conversation is malformed or there is none,
    DataError where the file is missing.
    """
    if not os.path.isfile(path):
        raise DataError(f"no data file {path!r}")
    key = _cache_key(path, fingerprint(tokenizer, chat_format), languages)
    folder = os.path.join(cache_dir, key)
    if not os.path.isdir(folder):
        os.makedirs(cache_dir, exist_ok=True)
        # Built beside its final place and renamed: a killed run leaves no half of a cache, and of
        # two processes that do this at once one wins and both results are the same.
        building = tempfile.mkdtemp(prefix=f"{key}.", dir=cache_dir)
        try:
            _tokenise_into(building, path, tokenizer, chat_format, languages)
            try:
                os.rename(building, folder)
            except OSError:
                if not os.path.isdir(folder):
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _load(path, folder)


def _cache_key(path: str, encoding: str, languages: Sequence[str]) -> str:
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    parts = (str(CACHE_VERSION), content, encoding, *sorted(languages))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _tokenise_into(folder: str, path: str, tokenizer, chat_format, languages) -> None:
    columns: list[tuple[int, int, str, int]] = []  # length, loss tokens, language, line
    left_out: Counter[str] = Counter()
    writer = ArrayRecordWriter(os.path.join(folder, "records.array_record"), "group_size:1")
    try:
        for line, item in _numbered(path):
            if languages and not _matches(item.lang, languages):
                left_out[item.lang] += 1
                continue
            where = f"{path}:{line}"
            example = encode(item, tokenizer=tokenizer, chat_format=chat_format, where=where)
            writer.write(_to_bytes(example.tokens, example.loss_mask))
            loss_tokens = int(example.loss_mask[1:].sum())  # the first token is no target
            columns.append((len(example.tokens), loss_tokens, item.lang, line))
    finally:
        writer.close()
    lengths, loss_tokens, lang, lines = zip(*columns, strict=True) if columns else ((),) * 4
    names = sorted(set(lang))
    np.savez(
        os.path.join(folder, "index.npz"),
        lengths=np.array(lengths, np.int32),
        loss_tokens=np.array(loss_tokens, np.int32),
        lang=np.array([names.index(x) for x in lang], np.int32),
        lines=np.array(lines, np.int64),
        languages=np.array(names, str),
        left_out_languages=np.array(sorted(left_out), str),
        left_out_counts=np.array([left_out[x] for x in sorted(left_out)], np.int64),
    )


def _numbered(path: str) -> Iterator[tuple[int, Conversation]]:
    """(line, conversation), with a progress bar where it takes long."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        lines = (number for number, line in enumerate(file, 1) if line.strip())
        title = f"tokenising {os.path.basename(path)}"
        bar = tqdm(read_jsonl(path), desc=title, unit=" conversations", delay=2)
        for item in bar:
            yield next(lines), item


def _matches(lang: str, languages: Sequence[str]) -> bool:
    lang = lang.lower()
    return any(lang == x.lower() or lang.startswith(x.lower() + "-") for x in languages)


def _load(path: str, folder: str) -> Records:
    with np.load(os.path.join(folder, "index.npz")) as index:
        names = index["left_out_languages"].tolist()
        left_out = dict(zip(names, index["left_out_counts"].tolist(), strict=True))
        arrays = {name: index[name] for name in ("lengths", "loss_tokens", "lang", "lines")}
        languages = tuple(index["languages"].tolist())
    file = os.path.join(folder, "records.array_record")
    return Records(
        path=path,
        languages=languages,
        left_out=left_out,
        records=grain.sources.ArrayRecordDataSource(file) if len(arrays["lengths"]) else (),
        **arrays,
    )


# --- records -> rows ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """One source, packed."""

    source: Source
    records: Records
    plan: Plan

    def fill(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return fill_rows(self.plan, rows, self.records.__getitem__)

    def loss_tokens(self) -> int:
        """Targets of the loss in the plan: all of them, but for those cut off by truncation."""
        total = int(self.records.loss_tokens.sum())
        if self.plan.report.truncated:
            keep = self.plan.sequence_length + 1
            for record in np.flatnonzero(self.records.lengths > keep):
                total -= int(self.records[record][1][keep:].sum())
        return total


def _pack(sources: Sequence[Source], data: DataConfig, tokenizer, chat_format) -> list[Part]:
    """Packs each source; those without a conversation in ``data.languages`` are left out."""
    parts = []
    left_out: Counter[str] = Counter()
    for source in sources:
        if not source.weight > 0:
            raise DataError(f"{source.path}: weight must be more than 0, not {source.weight}")
        records = tokenise(
            source.path,
            tokenizer=tokenizer,
            chat_format=chat_format,
            languages=data.languages,
            cache_dir=data.cache_dir,
        )
        left_out.update(records.left_out)
        if not len(records):
            continue
        try:
            packed = plan(
                records.lengths, sequence_length=data.sequence_length, overlong=data.overlong
            )
        except PackingError as error:
            raise DataError(f"{records.where(error.record)}: {error.message}") from error
        parts.append(Part(source, records, packed))
    if sources and not parts:
        raise DataError(
            f"no conversation is in the languages {', '.join(data.languages)}; the files "
            f"{', '.join(s.path for s in sources)} have {_counts(left_out)}"
        )
    return parts


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))


def _languages(parts: Sequence[Part]) -> list[str]:
    return sorted({name for part in parts for name in part.records.languages})


def _describe(part: Part, per_epoch: int | None = None) -> str:
    report = part.plan.report
    text = (
        f"{part.source.path}: {report.records:,} conversations, {report.rows:,} rows of "
        f"{part.plan.sequence_length:,}, {report.efficiency:.1%} full; {report.pairs:,} tokens, "
        f"{part.loss_tokens():,} in the loss"
    )
    if per_epoch is not None and per_epoch != report.rows:
        text += f"; {per_epoch:,} rows an epoch ({part.source.weight:g} passes)"
    if report.split:
        text += f"; {report.split:,} longer than a row, split"
    if report.truncated:
        text += f"; {report.truncated:,} longer than a row, {report.lost:,} tokens cut off"
    if silent := int((part.records.loss_tokens == 0).sum()):
        text += f"; {silent:,} conversations have no token in the loss"
    if part.records.left_out:
        text += f"; left out by language: {_counts(part.records.left_out)}"
    return text


# --- training -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrainData:
    """The global batches of a run, by step; they depend on the config and the seed alone."""

    rows_per_epoch: int
    languages: list[str]
    report: str  # a line a source, for the console
    batch_size: int
    parts: list[Part]
    picks: grain.MapDataset  # int64[2]: part, row of its plan

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The global batch of ``step`` (from 0), [B, T], or those ``rows`` of it."""
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        return self._batches(rows)[step]

    def iterate(self, start: int, stop: int, rows: slice = slice(None)) -> Iterator[Batch]:
        """``batch(start), .., batch(stop - 1)``, made ahead of time in threads."""
        if not 0 <= start <= stop:
            raise ValueError(f"need 0 <= start <= stop, not {start} and {stop}")
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        iterator = iter(self._batches(rows)[start:stop].to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def _batches(self, rows: slice) -> grain.MapDataset:
        return self.picks.batch(self.batch_size).map(lambda picks: self._fill(picks[rows]))

    def _fill(self, picks: np.ndarray) -> Batch:
        batch = empty_rows(len(picks), self.parts[0].plan.sequence_length)
        for number, part in enumerate(self.parts):
            here = picks[:, 0] == number
            for whole, filled in zip(batch, part.fill(picks[here, 1]), strict=True):
                whole[here] = filled
        return batch


def train_data(data: DataConfig, *, tokenizer, chat_format, seed: int) -> TrainData:
    """The training mixture. An epoch holds ``weight`` passes over the rows of each source.

    With weights of 1 every row comes exactly once an epoch; with weight 0.5 every row of that
    source comes once in two epochs. Every epoch has another order. Raises DataError,
    ConversationError.
    """
    if not data.train:
        raise DataError("data.train names no source of conversations")
    parts = _pack(data.train, data, tokenizer, chat_format)
    per_epoch = [max(1, round(part.source.weight * part.plan.rows)) for part in parts]
    rows = sum(per_epoch)
    lines = [_describe(part, n) for part, n in zip(parts, per_epoch, strict=True)]
    lines.append(f"an epoch: {rows:,} rows, {rows / data.batch_size:,.1f} batches")
    return TrainData(
        rows_per_epoch=rows,
        languages=_languages(parts),
        report="\n".join(lines),
        batch_size=data.batch_size,
        parts=parts,
        picks=_mixture([part.plan.rows for part in parts], per_epoch, seed),
    )


def _mixture(rows: Sequence[int], per_epoch: Sequence[int], seed: int) -> grain.MapDataset:
    """An endless MapDataset of int64[2]: part, row of the part.

    Each part has an endless stream of its rows, shuffled anew for each pass. An epoch takes the
    next ``per_epoch[part]`` of each and shuffles these slots. ``MapDataset.mix`` cannot do this: it
    rounds weights to hundredths of the smallest, so passes would drift apart.
    """
    streams = [_shuffled(n, seed, stream) for stream, n in enumerate(rows, 1)]
    ends = np.cumsum(per_epoch)
    total = int(ends[-1])

    def pick(index: int, slot: int) -> np.ndarray:
        part = int(np.searchsorted(ends, slot, side="right"))
        within = slot - int(ends[part]) + per_epoch[part]
        return np.array([part, streams[part][index // total * per_epoch[part] + within]])

    return _shuffled(total, seed, 0).map_with_index(pick)


def _shuffled(n: int, seed: int, stream: int) -> grain.MapDataset:
    # Grain shuffles epoch e with seed + e, so streams need seeds that are far apart, not adjacent.
    far = np.random.SeedSequence([seed, stream]).generate_state(1)[0]
    return grain.MapDataset.range(n).seed(int(far)).shuffle().repeat()


# --- held-out -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeldoutData:
    """Held-out conversations: every pair exactly once, in a fixed order."""

    languages: list[str]
    report: str
    batch_size: int
    parts: list[Part]

    def batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches [B, T] and int32[B, T], the language of every position (-1 in padding).

        The last batch is filled up with empty rows.
        """
        rows = [(part, row) for part in self.parts for row in range(part.plan.rows)]
        for start in range(0, len(rows), self.batch_size):
            batch = empty_rows(self.batch_size, self.parts[0].plan.sequence_length)
            language = np.full(batch.tokens.shape, -1, np.int32)
            for b, (part, row) in enumerate(rows[start : start + self.batch_size]):
                for whole, filled in zip(batch, part.fill([row]), strict=True):
                    whole[b] = filled[0]
                of_segment = np.array([-1, *self._languages_of(part, row)], np.int32)
                language[b] = of_segment[batch.segment_ids[b]]
            yield batch, language

    def _languages_of(self, part: Part, row: int) -> list[int]:
        spans = part.plan.spans[part.plan.row_starts[row] : part.plan.row_starts[row + 1]]
        names = part.records.languages
        return [self.languages.index(names[part.records.lang[record]]) for record, _, _ in spans]


def heldout_batches(data: DataConfig, *, tokenizer, chat_format) -> HeldoutData:
    """The held-out conversations of the config. Raises DataError, ConversationError."""
    parts = _pack(data.heldout, data, tokenizer, chat_format)
    return HeldoutData(
        languages=_languages(parts),
        report="\n".join(map(_describe, parts)) or "no held-out data",
        batch_size=data.batch_size,
        parts=parts,
    )
