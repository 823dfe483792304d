"""Packing: which records share a row of T positions, and the rows as arrays. NumPy only.

A record of n tokens gives n - 1 pairs (token, next token). Targets are shifted before records are
cut and packed, so no pair is lost at a cut and none joins two records. A plan depends on lengths
alone: it is made once, and any row of it can be filled at any time, in any order, on any host.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from llmzoo_jax.errors import InputError


class PackingError(InputError):
    """A record cannot be packed: ``record`` is its index."""

    def __init__(self, record: int, message: str):
        super().__init__(f"record {record} {message}")
        self.record, self.message = record, message


class Batch(NamedTuple):
    """Rows of packed pairs; all arrays are [B, T]. Padding is 0 (False) in every one of them."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the token after tokens
    loss_mask: np.ndarray  # bool, whether the target counts in the loss
    segment_ids: np.ndarray  # int32, 0 = padding, 1.. within a row; attention stays inside
    positions: np.ndarray  # int32, from 0 in each segment


@dataclass(frozen=True)
class PackingReport:
    """What became of the records; ``pairs + lost`` is the number of pairs there were."""

    records: int
    rows: int
    pairs: int  # kept
    lost: int  # pairs cut off by truncation
    overlong: int  # records of more than T pairs: each is split or truncated
    split: int
    truncated: int
    efficiency: float  # pairs / (rows * T)


@dataclass(frozen=True, eq=False)
class Plan:
    """Row r holds ``spans[row_starts[r]:row_starts[r + 1]]`` as segments 1, 2, .. in that order."""

    spans: np.ndarray  # int32[n, 3]: record, start, stop (in pairs of the record)
    row_starts: np.ndarray  # int64[rows + 1]
    sequence_length: int  # T
    report: PackingReport

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    sequence_length: int,
    overlong: Literal["split", "truncate", "error"],
) -> Plan:
    """Packs records of ``lengths`` tokens each into rows of ``sequence_length`` pairs.

    Best fit decreasing: long pieces first, each into the fullest row that still takes it. The same
    lengths give the same plan; rows are in the order of the first record in them. A record of more
    than T pairs is split into pieces (no pair is lost), cut on the right, or an error.

    Raises PackingError where a record has no pair, or is overlong and that is an error; ValueError
    where there are no records.
    """
    pairs = np.asarray(lengths, np.int64) - 1
    if pairs.ndim != 1 or not len(pairs):
        raise InputError("packing: there are no records to pack")
    if sequence_length < 1:
        raise InputError(f"packing: sequence_length must be 1 or more, not {sequence_length}")
    if pairs.min() < 1:
        record = int(pairs.argmin())
        raise PackingError(record, f"has {pairs[record] + 1} tokens, and it takes 2 to make a pair")
    is_long = pairs > sequence_length
    if overlong == "error" and is_long.any():
        record = int(is_long.argmax())
        raise PackingError(
            record,
            f"has {pairs[record] + 1} tokens, more than fit into sequence_length="
            f"{sequence_length}; raise that, or set overlong to split or truncate",
        )
    kept = np.minimum(pairs, sequence_length) if overlong == "truncate" else pairs
    spans = _pieces(kept, sequence_length)
    row_of = _best_fit_decreasing(spans[:, 2] - spans[:, 1], sequence_length)

    # Spans are in record order, so a row's first span names it, and a stable sort keeps the rest.
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    row_of = rank[row_of]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return Plan(
        spans=spans[np.argsort(row_of, kind="stable")],
        row_starts=row_starts.astype(np.int64),
        sequence_length=sequence_length,
        report=PackingReport(
            records=len(pairs),
            rows=len(first),
            pairs=int(kept.sum()),
            lost=int((pairs - kept).sum()),
            overlong=int(is_long.sum()),
            split=int(is_long.sum()) if overlong == "split" else 0,
            truncated=int(is_long.sum()) if overlong == "truncate" else 0,
            efficiency=float(kept.sum() / (len(first) * sequence_length)),
        ),
    )


def _pieces(pairs: np.ndarray, size: int) -> np.ndarray:
    """Cuts records of ``pairs`` int64[n] into int32[m, 3] spans of at most ``size`` pairs."""
    count = -(-pairs // size)
    record = np.repeat(np.arange(len(pairs)), count)
    nth = np.arange(len(record)) - np.repeat(np.cumsum(count) - count, count)
    start = nth * size
    stop = np.minimum(start + size, pairs[record])
    return np.stack([record, start, stop], axis=1).astype(np.int32)


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """int64[n] rows for pieces of ``sizes``. The work is n log(capacity), whatever the rows."""
    row_of = np.empty(len(sizes), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    spaces: list[int] = []  # the free spaces that open rows have, ascending
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect.bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del spaces[at]
        else:
            space, row = capacity, rows
            rows += 1
        row_of[piece] = row
        space -= size
        if space and not open_rows[space]:
            bisect.insort(spaces, space)
        open_rows[space].append(row)
    return row_of


def empty_rows(rows: int, sequence_length: int) -> Batch:
    """``rows`` rows of nothing but padding."""
    shape = (rows, sequence_length)
    return Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )


def fill_rows(
    plan: Plan,
    rows: Sequence[int] | np.ndarray,
    examples: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> Batch:
    """The ``rows`` of the plan, in that order, as a Batch[len(rows), T].

    ``examples(record)`` gives the record's tokens int32[n] and loss mask bool[n].
    """
    batch = empty_rows(len(rows), plan.sequence_length)
    for b, row in enumerate(rows):
        at = 0
        spans = plan.spans[plan.row_starts[row] : plan.row_starts[row + 1]].tolist()
        for segment, (record, start, stop) in enumerate(spans, 1):
            tokens, loss_mask = examples(record)
            here = slice(at, at + stop - start)
            batch.tokens[b, here] = tokens[start:stop]
            batch.targets[b, here] = tokens[start + 1 : stop + 1]
            batch.loss_mask[b, here] = loss_mask[start + 1 : stop + 1]
            batch.segment_ids[b, here] = segment
            batch.positions[b, here] = np.arange(stop - start)
            at = here.stop
    return batch
