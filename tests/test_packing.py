"""Packing: every pair once, nothing overlaps, and a plan is a function of the lengths."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmzoo_jax.packing import PackingError, fill_rows, plan

settings.register_profile("no deadline", deadline=None)  # the machine may be busy
settings.load_profile("no deadline")

lengths_and_size = st.tuples(
    st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 24)
)


def spans_by_row(packed):
    return [packed.spans[a:b].tolist() for a, b in itertools.pairwise(packed.row_starts)]


def examples(lengths):
    """Tokens that say which record and place they are from; a mask that is odd places."""

    def example(record):
        places = np.arange(lengths[record])
        return (record * 1000 + places + 1).astype(np.int32), places % 2 == 1

    return example


@given(lengths_and_size)
def test_split_keeps_every_pair_exactly_once(case):
    lengths, size = case
    packed = plan(lengths, sequence_length=size, overlong="split")
    pairs = Counter(
        (record, pair)
        for record, start, stop in packed.spans.tolist()
        for pair in range(start, stop)
    )
    assert pairs == Counter((r, pair) for r, n in enumerate(lengths) for pair in range(n - 1))
    assert packed.report.pairs == sum(lengths) - len(lengths)
    assert packed.report.lost == packed.report.truncated == 0
    assert packed.report.split == packed.report.overlong == sum(n - 1 > size for n in lengths)


@given(lengths_and_size)
def test_truncate_keeps_the_left_part_and_counts_the_rest(case):
    lengths, size = case
    packed = plan(lengths, sequence_length=size, overlong="truncate")
    kept = sorted(packed.spans.tolist())
    assert kept == [[r, 0, min(n - 1, size)] for r, n in enumerate(lengths)]
    assert packed.report.lost == sum(max(0, n - 1 - size) for n in lengths)
    assert packed.report.truncated == packed.report.overlong == sum(n - 1 > size for n in lengths)
    assert packed.report.split == 0


@given(lengths_and_size, st.sampled_from(["split", "truncate"]))
def test_rows_are_full_enough_in_order_and_counted(case, overlong):
    lengths, size = case
    packed = plan(lengths, sequence_length=size, overlong=overlong)
    rows = spans_by_row(packed)
    used = [sum(stop - start for _, start, stop in row) for row in rows]
    assert all(0 < n <= size for n in used)
    assert rows == sorted(sorted(row) for row in rows)  # by first record, and inside a row
    assert packed.rows == packed.report.rows == len(rows)
    assert packed.report.efficiency == pytest.approx(sum(used) / (len(rows) * size))
    # Best fit opens a row only where no other takes the piece: no two rows could be one.
    assert len(used) < 2 or sum(sorted(used)[:2]) > size
    assert packed.spans.dtype == np.int32 and packed.row_starts.dtype == np.int64


@given(lengths_and_size)
def test_the_same_lengths_give_the_same_plan(case):
    lengths, size = case
    one, two = (
        plan(x, sequence_length=size, overlong="split") for x in (lengths, np.array(lengths))
    )
    np.testing.assert_array_equal(one.spans, two.spans)
    np.testing.assert_array_equal(one.row_starts, two.row_starts)
    assert one.report == two.report


@given(lengths_and_size, st.sampled_from(["split", "truncate"]))
def test_rows_hold_shifted_pairs_in_contiguous_segments(case, overlong):
    lengths, size = case
    packed = plan(lengths, sequence_length=size, overlong=overlong)
    example = examples(lengths)
    batch = fill_rows(packed, range(packed.rows), example)
    assert [x.shape for x in batch] == [(packed.rows, size)] * 5
    assert [x.dtype for x in batch] == [np.int32, np.int32, bool, np.int32, np.int32]
    for b, row in enumerate(spans_by_row(packed)):
        expected = [[], [], [], [], []]
        for segment, (record, start, stop) in enumerate(row, 1):
            tokens, mask = example(record)
            expected[0] += tokens[start:stop].tolist()
            expected[1] += tokens[start + 1 : stop + 1].tolist()
            expected[2] += mask[start + 1 : stop + 1].tolist()
            expected[3] += [segment] * (stop - start)
            expected[4] += list(range(stop - start))
        padding = [0] * (size - len(expected[0]))
        assert [x[b].tolist() for x in batch] == [x + padding for x in expected]


def test_rows_can_be_filled_in_any_order():
    lengths = [5, 9, 3, 30, 2, 7]
    packed = plan(lengths, sequence_length=8, overlong="split")
    whole = fill_rows(packed, range(packed.rows), examples(lengths))
    some = fill_rows(packed, np.array([2, 0]), examples(lengths))
    for a, b in zip(whole, some, strict=True):
        np.testing.assert_array_equal(a[[2, 0]], b)


def test_overlong_is_an_error_where_asked():
    plan([9, 5], sequence_length=8, overlong="error")  # 9 tokens are 8 pairs, and fit
    with pytest.raises(PackingError, match=r"record 1 has 10 tokens, more than .*=8"):
        plan([9, 10], sequence_length=8, overlong="error")


def test_records_without_a_pair_and_no_records_are_errors():
    with pytest.raises(PackingError, match="record 2 has 1 tokens"):
        plan([9, 5, 1], sequence_length=8, overlong="split")
    with pytest.raises(ValueError, match="no records"):
        plan([], sequence_length=8, overlong="split")
    with pytest.raises(ValueError, match="sequence_length must be"):
        plan([3], sequence_length=0, overlong="split")


def test_a_hundred_thousand_records_are_planned_in_seconds():
    lengths = np.random.default_rng(0).lognormal(6, 1, 100_000).clip(2, 20_000).astype(int)
    start = time.perf_counter()
    packed = plan(lengths, sequence_length=2048, overlong="split")
    assert time.perf_counter() - start < 2
    assert packed.report.efficiency > 0.99
