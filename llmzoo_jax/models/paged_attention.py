"""Attention over a key/value cache in pages, for serving: memory follows the tokens in use.

A page holds the keys (or values) of ``S`` consecutive positions. The work is a list of (row, page)
pairs, taken W at a turn with a running softmax, so that time follows the tokens in use, too: a
short row costs the same beside a long one as alone. Letters: see ``layers.py``; P pages, M pages a
row may have, R = G * T queries of a row that share a key/value head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Pages(NamedTuple):
    """``values[P,K,S,H]``; where they are int8, ``scale`` is float32 ``[P,K,S]``. Page 0 belongs to
    nobody: rows that are not in use write there."""

    values: jax.Array
    scale: jax.Array | None = None


class PageView(NamedTuple):
    """Where the rows of a batch find their pages. Stands where other caches have a ``Mask``.

    ``positions[B,T]`` are those of the queries, consecutive; T is S with the first one at the start
    of a page, or anything else, which is written token by token. ``tables[B,M]`` has the pages of
    each row in order. The work: row ``rows[i]`` has at positions from ``indices[i] * S`` what is in
    page ``pages[i]``; each is int32 ``[.,W]``, and the first ``turns`` lines count. A pair that
    fills a line has the row B.
    """

    positions: jax.Array
    tables: jax.Array
    rows: jax.Array
    pages: jax.Array
    indices: jax.Array
    turns: jax.Array


def init_pages(num_pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> Pages:
    shape = (num_pages, kv_heads, page_size, head_dim)
    scale = jnp.zeros(shape[:-1], jnp.float32) if dtype == jnp.int8 else None
    return Pages(jnp.zeros(shape, dtype), scale)


def write_pages(pages: Pages, new: jax.Array, view: PageView) -> Pages:
    """Puts ``new[B,K,T,H]`` at ``view.positions`` of the rows."""
    S, T = pages.values.shape[2], new.shape[2]
    page = jnp.take_along_axis(view.tables, view.positions // S, axis=1)  # [B,T]
    offset = view.positions % S
    scale = None
    if pages.scale is not None:
        scale = jnp.abs(new).max(-1).astype(jnp.float32) / 127.0  # [B,K,T]
        new = jnp.round(new / jnp.where(scale == 0.0, 1.0, scale)[..., None])
    new = new.astype(pages.values.dtype)
    if jax.default_backend() != "cpu":
        at = (page, slice(None), offset)  # the axis of the slice comes behind [B,T]
        values = pages.values.at[at].set(jnp.swapaxes(new, 1, 2))
        return Pages(values, scale if scale is None else pages.scale.at[at].set(scale.mT))

    def put(i, pages):  # in place; a CPU runs a scatter slower
        row, t = (i, 0) if T in (1, S) else (i // T, i % T)
        size = T if T in (1, S) else 1
        start = (page[row, t], 0, offset[row, t])
        part = jax.lax.dynamic_slice_in_dim(new[row], t, size, axis=1)  # [K,size,H]
        values = jax.lax.dynamic_update_slice(pages.values, part[None], (*start, 0))
        if scale is None:
            return Pages(values)
        part = jax.lax.dynamic_slice_in_dim(scale[row], t, size, axis=1)
        return Pages(values, jax.lax.dynamic_update_slice(pages.scale, part[None], start))

    return jax.lax.fori_loop(0, len(new) * (1 if T in (1, S) else T), put, pages)


def paged_attention(
    q: jax.Array, k: Pages, v: Pages, view: PageView, *, slopes: jax.Array | None = None
) -> jax.Array:
    """Softmax attention in float32 of ``q[B,K,G,T,H]`` over the pages of its rows, up to each
    query's own position; ``slopes[K,G]`` are ALiBi's. Returns ``[B,K,G,T,H]``, zero for a row
    without pages."""
    B, K, G, T, H = q.shape
    S = k.values.shape[2]
    q = q.reshape(B, K, G * T, H) * (1.0 / math.sqrt(H))  # [B,K,R,H]
    last = jnp.tile(view.positions, (1, G))  # [B,R]
    if slopes is not None:
        slopes = jnp.repeat(slopes, T, axis=1)[:, :, None]  # [K,R,1]
    lowest = jnp.finfo(jnp.float32).min

    def turn(i, running):
        highest, total, y = running  # [B,K,R], [B,K,R], [B,K,R,H]
        row, page, index = (x[i] for x in (view.rows, view.pages, view.indices))  # [W]
        mine = row == jnp.arange(B)[:, None]  # [B,W]
        keys = _take(k, page, q.dtype)  # [W,K,S,H]
        scores = jnp.einsum(
            "WKRH,WKSH->WKRS", _rows(q, row), keys, preferred_element_type=jnp.float32
        )
        position = index[:, None] * S + jnp.arange(S)  # [W,S]
        if slopes is not None:
            # The distance to the query, so that a near key's bias is exact in any dtype.
            distance = position[:, None, :] - _rows(last, row)[..., None]  # [W,R,S]
            scores = scores + slopes * distance[:, None]
        seen = (row < B)[:, None, None] & (position[:, None] <= _rows(last, row)[..., None])
        scores = jnp.where(seen[:, None], scores, lowest)
        top = jnp.where(mine[:, :, None, None], scores.max(-1), lowest).max(1)  # [B,K,R]
        new_highest = jnp.maximum(highest, top)
        weights = jnp.exp(scores - _rows(new_highest, row)[..., None])
        weights = jnp.where(seen[:, None], weights, 0.0)
        part = jnp.einsum(
            "WKRS,WKSH->WKRH",
            weights.astype(v.values.dtype if v.scale is None else q.dtype),
            _take(v, page, q.dtype),
            preferred_element_type=jnp.float32,
        )
        kept = jnp.exp(highest - new_highest)
        mine = mine.astype(jnp.float32)
        total = total * kept + jnp.einsum("BW,WKR->BKR", mine, weights.sum(-1))
        y = y * kept[..., None] + jnp.einsum("BW,WKRH->BKRH", mine, part)
        return new_highest, total, y

    zeros = jnp.zeros(q.shape[:-1], jnp.float32)
    start = (jnp.full_like(zeros, lowest), zeros, jnp.zeros(q.shape, jnp.float32))
    _, total, y = jax.lax.fori_loop(0, view.turns, turn, start)
    y = y / jnp.where(total == 0.0, 1.0, total)[..., None]
    return y.astype(q.dtype).reshape(B, K, G, T, H)


def _rows(x: jax.Array, row: jax.Array) -> jax.Array:
    return x.at[row].get(mode="clip")


def _take(pages: Pages, page: jax.Array, dtype: Any) -> jax.Array:
    """``[W,K,S,H]``. As rows of two axes, which a CPU gathers twice as fast as those of four."""
    P, *shape = pages.values.shape
    taken = pages.values.reshape(P, -1).at[page].get(mode="promise_in_bounds")
    taken = taken.reshape(len(page), *shape)
    if pages.scale is None:
        return taken
    scale = pages.scale.at[page].get(mode="promise_in_bounds")[..., None]
    return taken.astype(dtype) * scale.astype(dtype)
