"""Attention over pages is attention over the rows that they hold, wherever the pages lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax.models import attention
from llmzoo_jax.models import paged_attention as paged
from llmzoo_jax.models.attention import cache_mask, plain_attention
from llmzoo_jax.models.paged_attention import PageView, init_pages, paged_attention, write_pages
from serving.steps import pair_up

B, K, G, H, S = 4, 2, 3, 8, 4
LENGTHS = (1, 7, 12, 18)
WIDTH = 3
compiled = jax.jit(paged_attention)


def rows(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, K, max(LENGTHS), H)).astype(np.float32) for _ in "kv"]


def tables(seed, shared=0):
    """Pages anywhere; rows 2 and 3 share ``shared`` of them."""
    free = np.random.default_rng(seed).permutation(np.arange(1, 40)).tolist()
    mine = [[free.pop() for _ in range(-(-n // S))] for n in LENGTHS]
    mine[3][:shared] = mine[2][:shared]
    return mine


def view(mine, positions, apart=False, width=WIDTH):
    table = np.zeros((B, 8), np.int32)
    for row, pages in zip(table, mine, strict=True):
        row[: len(pages)] = pages
    work = pair_up(mine, lines=20, width=width, apart=apart)
    arrays = map(jnp.asarray, (np.asarray(positions, np.int32), table, *work))
    return PageView(*arrays, one_page=True)


def filled(mine, k, v, dtype=jnp.float32, block=S):
    """Caches into which the rows were written, by blocks of whole pages and then token by token."""
    caches = tuple(init_pages(40, K, S, H, dtype) for _ in "kv")
    for row, length in enumerate(LENGTHS):
        for start in range(0, length - length % S, block):
            at = [mine[row]] + [[]] * (B - 1)
            positions = np.zeros((B, block), np.int32) + start + np.arange(block)
            new = [np.zeros((B, K, block, H), np.float32) for _ in "kv"]
            for x, part in zip((k, v), new, strict=True):
                part[0] = x[row, :, start : start + block]
            caches = write_pages(caches, map(jnp.asarray, new), view(at, positions))
    for offset in range(S):  # the rest of all rows, as decoding does
        starts = [n - n % S for n in LENGTHS]
        at = [
            mine[row] if starts[row] + offset < LENGTHS[row] else [] for row in range(B)
        ]  # others write to page 0
        positions = np.array([[n + offset] for n in starts])
        index = np.minimum(positions, max(LENGTHS) - 1)[:, None, :, None]
        new = [np.take_along_axis(x, index, axis=2) for x in (k, v)]
        caches = write_pages(caches, map(jnp.asarray, new), view(at, positions))
    return caches


@pytest.mark.parametrize("slopes", [None, "alibi"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_query_a_row_gives_what_all_scores_give(seed, apart, slopes):
    k, v = rows(seed)
    k[3, :, :8], v[3, :, :8] = k[2, :, :8], v[2, :, :8]
    mine = tables(seed, shared=2)
    caches = filled(mine, k, v)
    q = np.random.default_rng(9).normal(size=(B, K, G, 1, H)).astype(np.float32)
    positions = np.array(LENGTHS)[:, None] - 1
    if slopes:
        slopes = jnp.asarray(attention.alibi_slopes(K * G), jnp.float32).reshape(K, G)
    got = compiled(q, *caches, view(mine, positions, apart), slopes=slopes)
    keys = np.broadcast_to(np.arange(max(LENGTHS)), (B, max(LENGTHS)))
    want = plain_attention(q, k, v, cache_mask(positions), slopes=slopes, positions=keys)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("width", [WIDTH, paged.FEW + 1])  # a CPU takes few pages another way
def test_queries_of_whole_pages_see_what_stands_before_them(width):
    k, v = rows()
    mine = tables(3)
    caches = filled(mine, k, v)
    q = np.random.default_rng(8).normal(size=(B, K, G, S, H)).astype(np.float32)
    starts = np.array([0, 4, 8, 12])
    positions = starts[:, None] + np.arange(S)
    got = compiled(q, *caches, view(mine, positions, width=width))
    want = plain_attention(q, k, v, cache_mask(jnp.asarray(positions)))
    inside = positions < np.array(LENGTHS)[:, None]  # behind a row's end is nothing to compare
    for row in range(B):
        for t in range(S):
            if inside[row, t]:
                np.testing.assert_allclose(got[row, :, :, t], want[row, :, :, t], atol=2e-6)


def test_a_row_without_pages_gives_zeros():
    mine = tables(0)
    mine[1] = []
    caches = filled(tables(0), *rows())
    q = np.ones((B, K, G, 1, H), np.float32)
    got = np.asarray(compiled(q, *caches, view(mine, [[5]] * B)))
    assert not got[1].any()
    assert np.isfinite(got).all()


@pytest.mark.parametrize("block", [1, S // 2])
def test_parts_of_pages_make_whole_ones(block):
    k, v = rows()
    mine = tables(2)
    whole, parts = (filled(mine, k, v, block=tokens) for tokens in (S, block))
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(x[1:], y[1:])  # page 0 is nobody's


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize(
    ("tokens", "starts", "one_page"),
    [
        (1, [0, S + 1, 5, S - 1], True),
        (2, [2, 0, S, S + 2], True),
        (3, [0, S + 1, 5, S - 1], False),
        (S, [0, S, 0, S], True),
        (S, [1, S - 1, 0, S], False),  # as many as a page has, but in two of them
    ],
)
def test_accelerators_write_what_a_cpu_writes(tokens, starts, one_page, dtype):
    """Pages or tokens at once there, slices here; rows that have ended write to nobody's page."""
    rng = np.random.default_rng(0)
    whole = np.arange(1, 1 + 3 * B, dtype=np.int32).reshape(B, 3)
    table = np.where(np.arange(B)[:, None] == 2, 0, whole)
    positions = np.array(starts)[:, None] + np.arange(tokens)
    page = np.take_along_axis(table, positions // S, axis=1)
    offset = positions % S

    def some(shape, dtype):
        return jnp.asarray(rng.integers(0, 99, shape), dtype)

    old = (jax.tree.map(lambda x: some(x.shape, x.dtype), init_pages(14, K, S, H, dtype)),)
    new = jax.tree.map(lambda x: some((B, K, tokens, *x.shape[3:]), x.dtype), old)
    args = old, new, jnp.asarray(page), jnp.asarray(offset)
    here = paged._write_by_slices(*args, one_page=one_page)
    whole_pages = functools.partial(paged._write_whole_pages, one_page=one_page)
    for write in (whole_pages, paged._write_rows):
        for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(write(*args)), strict=True):
            np.testing.assert_array_equal(x[1:], y[1:])


def test_int8_pages_are_close():
    k, v = rows()
    mine = tables(1)
    q = np.random.default_rng(9).normal(size=(B, K, G, 1, H)).astype(np.float32)
    positions = np.array(LENGTHS)[:, None] - 1
    exact, rounded = (
        np.asarray(compiled(q, *filled(mine, k, v, dtype), view(mine, positions)))
        for dtype in (jnp.float32, jnp.int8)
    )
    assert 0 < np.abs(exact - rounded).max() < 0.05
