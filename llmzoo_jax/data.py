"""Training and held-out batches from files of conversations. Grain and NumPy.

JSON Lines --tokenise--> records (ArrayRecord, cached by content) --packing.plan--> rows
--mixture--> ``TrainData.batch(step)``. Which records share a row is fixed by the plan, and which
row comes when by the seed, so the state of the whole pipeline is one integer: the step. Hosts and
worker processes share out what it gives; none of them changes it.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from llmzoo_jax.config import DataConfig, Source
from llmzoo_jax.packing import Batch, PackingError, Plan, empty_rows, fill_rows, plan
from llmzoo_jax.tokenise import DataError, Records, tokenise_all
from llmzoo_jax.workers import WorkerDied
from llmzoo_jax.workers import batches as made_by_workers

Rows = slice | np.ndarray  # rows of a global batch

# --- records -> rows ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Files of one weight, packed together: a row may hold conversations of several of them."""

    weight: float
    files: tuple[Records, ...]
    starts: tuple[int, ...]  # of each file: the number of its first record in the plan
    plan: Plan

    def fill(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Batch[len(rows), T]."""

        def example(record: int) -> tuple[np.ndarray, np.ndarray]:
            file, number = _locate(self.files, self.starts, record)
            return file[number]

        return fill_rows(self.plan, rows, example)

    def language(self, row: int, segment_ids: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """int32[T], the number in ``names`` of the language of each position; of padding -1."""
        return np.array([-1, *map(names.index, self.languages(row))], np.int32)[segment_ids]

    def languages(self, row: int) -> list[str]:
        """The language of each segment of a row."""
        spans = self.plan.spans[self.plan.row_starts[row] : self.plan.row_starts[row + 1]]
        located = [_locate(self.files, self.starts, record) for record, _, _ in spans.tolist()]
        return [file.languages[file.lang[record]] for file, record in located]


def _locate(files: Sequence[Records], starts: Sequence[int], record: int) -> tuple[Records, int]:
    """The file that a record of a plan is in, and its number there."""
    number = bisect.bisect_right(starts, record) - 1
    return files[number], record - starts[number]


def _pack(files: Sequence[Records], weight: float, data: DataConfig) -> Part:
    if data.batch_size < 1:
        raise DataError(f"data.batch_size must be 1 or more, not {data.batch_size}")
    starts = tuple(itertools.accumulate((len(file) for file in files[:-1]), initial=0))
    lengths = np.concatenate([file.lengths for file in files])
    try:
        packed = plan(lengths, sequence_length=data.sequence_length, overlong=data.overlong)
    except PackingError as error:
        file, record = _locate(files, starts, error.record)
        raise DataError(f"{file.where(record)}: {error.message}") from error
    return Part(weight, tuple(files), starts, packed)


def _read(sources: Sequence[Source], data: DataConfig, tokenizer, chat_format) -> list[Records]:
    """Raises DataError where there are sources, and no conversation is in ``data.languages``."""
    files = tokenise_all(
        [source.path for source in sources],
        tokenizer=tokenizer,
        chat_format=chat_format,
        languages=data.languages,
        cache_dir=data.cache_dir,
    )
    if files and not any(map(len, files)):
        left_out = sum((Counter(file.left_out) for file in files), Counter())
        raise DataError(
            f"no conversation is in the languages {', '.join(data.languages)}; "
            f"{', '.join(file.path for file in files)} have {_counts(left_out)}"
        )
    return files


def _describe_file(file: Records, data: DataConfig) -> str:
    """A line for the console: what is in a file, and what of it is not trained on as it is."""
    keep = data.sequence_length + 1  # tokens of a record that fit into a row
    overlong = np.flatnonzero(file.lengths > keep)
    tokens, loss_tokens = int(file.lengths.sum()) - len(file), int(file.loss_tokens.sum())
    notes = []
    if len(overlong) and data.overlong == "split":
        notes.append(f"{len(overlong):,} longer than a row, split")
    if len(overlong) and data.overlong == "truncate":
        lost = int(file.lengths[overlong].sum()) - keep * len(overlong)
        tokens -= lost
        loss_tokens -= sum(int(file[record][1][keep:].sum()) for record in overlong.tolist())
        notes.append(f"{len(overlong):,} longer than a row, truncated, {lost:,} tokens lost")
    if file.left_out:
        notes.append(f"left out by language: {_counts(file.left_out)}")
    head = f"{file.path}: {len(file):,} conversations, {tokens:,} tokens"
    return "; ".join([f"{head}, {loss_tokens:,} in the loss", *notes])


def _describe_rows(part: Part) -> str:
    report = part.plan.report
    return f"{report.rows:,} rows of {part.plan.sequence_length:,}, {report.efficiency:.1%} full"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in sorted(counts.items()))


def _languages(files: Sequence[Records]) -> list[str]:
    return sorted({name for file in files for name in file.languages})


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

    def batch(self, step: int, rows: Rows = slice(None)) -> Batch:
        """The global batch of ``step`` (from 0), [B, T], or those ``rows`` of it."""
        if step < 0:
            raise ValueError(f"step must be 0 or more, not {step}")
        return self._batches(rows)[step]

    def iterate(
        self,
        start: int,
        stop: int,
        rows: Rows = slice(None),
        *,
        workers: int = 0,
        restarts: int = 0,
        report: Callable[[str], None] = print,
    ) -> Iterator[Batch]:
        """``batch(start), .., batch(stop - 1)``, made ahead of time.

        That is done by threads or, where ``workers`` is not 0, by so many processes; the batches
        are the same. Where a process dies, it is reported, and new ones go on with its batch; after
        so many ``restarts``, threads do. Close an iteration that is left early.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"need 0 <= start <= stop, not {start} and {stop}")
        while workers and start < stop:
            try:
                for batch in made_by_workers(
                    functools.partial(self.batch, rows=rows), start, stop, workers
                ):
                    yield batch
                    start += 1
            except WorkerDied as error:
                workers = workers if restarts else 0
                restarts -= 1
                report(f"{error}; {'new workers' if workers else 'threads instead'} go on with it")
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
        iterator = iter(self._batches(rows)[start:stop].to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def language(self, step: int, batch: Batch, rows: Rows = slice(None)) -> np.ndarray:
        """int32[B, T], the number in ``languages`` of each position of ``batch(step, rows)``, which
        is ``batch``; of padding -1."""
        picks = self.picks.batch(self.batch_size)[step][rows]
        return np.stack([
            self.parts[part].language(row, ids, self.languages)
            for (part, row), ids in zip(picks.tolist(), batch.segment_ids, strict=True)
        ])  # fmt: skip

    def rows_of(self, host: int, hosts: int) -> slice:
        """The rows of every global batch that are for ``host`` (from 0) of ``hosts``.

        Raises DataError where hosts cannot have equally many.
        """
        if not 0 <= host < hosts:
            raise ValueError(f"need 0 <= host < hosts, not {host} and {hosts}")
        if self.batch_size % hosts:
            raise DataError(
                f"data.batch_size {self.batch_size} can't be shared equally by {hosts} hosts"
            )
        share = self.batch_size // hosts
        return slice(host * share, (host + 1) * share)

    def _batches(self, rows: Rows) -> grain.MapDataset:
        return self.picks.batch(self.batch_size).map(lambda picks: self._fill(picks[rows]))

    def _fill(self, picks: np.ndarray) -> Batch:
        batch = empty_rows(len(picks), self.parts[0].plan.sequence_length)
        for number, part in enumerate(self.parts):
            here = picks[:, 0] == number
            for whole, filled in zip(batch, part.fill(picks[here, 1]), strict=True):
                whole[here] = filled
        return batch


def train_data(data: DataConfig, *, tokenizer, chat_format, seed: int) -> TrainData:
    """The training mixture. An epoch holds ``weight`` passes over each source.

    With weights of 1 every pair comes exactly once an epoch; with 0.5 the rows of that source come
    once in two epochs. Each epoch has another order. Raises DataError, ConversationError.
    """
    if not data.train:
        raise DataError("data.train names no source of conversations")
    for source in data.train:
        if not 0 < source.weight < float("inf"):
            raise DataError(f"{source.path}: weight must be more than 0, not {source.weight}")
    return mix(_read(data.train, data, tokenizer, chat_format), data, seed=seed)


def mix(files: Sequence[Records], data: DataConfig, *, seed: int) -> TrainData:
    """The mixture of tokenised files, one for each of ``data.train``; see ``train_data``."""
    by_weight: dict[float, list[Records]] = {}
    for source, file in zip(data.train, files, strict=True):
        if len(file):
            by_weight.setdefault(source.weight, []).append(file)
    parts = [_pack(group, weight, data) for weight, group in by_weight.items()]
    per_epoch = [max(1, round(part.weight * part.plan.rows)) for part in parts]
    rows = sum(per_epoch)
    lines = [_describe_file(file, data) for file in files]
    lines += [f"weight {part.weight:g}: {_describe_rows(part)}" for part in parts]
    lines.append(f"an epoch: {rows:,} rows, {rows / data.batch_size:,.1f} batches")
    return TrainData(
        rows_per_epoch=rows,
        languages=_languages(files),
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
    report: str  # a line a source, for the console
    batch_size: int
    part: Part | None  # None: there are no held-out sources

    def batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches [B, T] and int32[B, T], the index in ``languages`` of every position.

        The language of padding is -1. The last batch is filled up with empty rows.
        """
        if self.part is None:
            return
        plan, size = self.part.plan, self.batch_size
        for start in range(0, plan.rows, size):
            rows = range(start, min(start + size, plan.rows))
            batch = empty_rows(size, plan.sequence_length)
            language = np.full(batch.tokens.shape, -1, np.int32)
            for whole, filled in zip(batch, self.part.fill(rows), strict=True):
                whole[: len(rows)] = filled
            for b, row in enumerate(rows):
                language[b] = self.part.language(row, batch.segment_ids[b], self.languages)
            yield batch, language


def heldout_batches(data: DataConfig, *, tokenizer, chat_format) -> HeldoutData:
    """The held-out conversations, whatever their weight. Raises DataError, ConversationError."""
    files = _read(data.heldout, data, tokenizer, chat_format)
    part = _pack([file for file in files if len(file)], 1.0, data) if files else None
    lines = [_describe_file(file, data) for file in files]
    return HeldoutData(
        languages=_languages(files),
        report="\n".join([*lines, _describe_rows(part)]) if part else "no held-out data",
        batch_size=data.batch_size,
        part=part,
    )
