"""Attention over a key/value cache in pages, for serving: memory follows the tokens in use.

A page holds the keys (or values) of ``S`` consecutive positions. The work is a list of (row, page)
pairs, taken W at a turn with a running softmax, so that time follows the tokens in use, too: a
short row costs the same beside a long one as alone. Letters: see ``layers.py``; P pages, M pages a
row may have, R = G * T queries of a row that share a key/value head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmzoo_jax.sharding import per_device


class Pages(NamedTuple):
    """``values[P,K,S,H]``; where they are int8, ``scale`` is float32 ``[P,K*S]`` (a TPU would turn
    all of ``[P,K,S]``, as rows of S fill a quarter of its own). bfloat16 is held as its bits,
    uint16: to change or take a part of a bfloat16 array, XLA's CPU backend makes all of it float32.
    Page 0 belongs to nobody: rows that are not in use write there."""

    values: jax.Array
    scale: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageView:
    """Where the rows of a batch find their pages. Stands where other caches have a ``Mask``.

    ``positions[B,T]`` are those of the queries, consecutive. ``tables[B,M]`` has the pages of each
    row in order. The work: row ``rows[i]`` has at positions from ``indices[i] * S`` what is in page
    ``pages[i]``; each is int32 ``[.,W]``, and the first ``turns`` lines count. A pair that fills a
    line has the row B. ``one_page``: the T places of a row are in the same page.
    """

    positions: jax.Array
    tables: jax.Array
    rows: jax.Array
    pages: jax.Array
    indices: jax.Array
    turns: jax.Array
    one_page: bool = dataclasses.field(default=False, metadata={"static": True})


AXES = (None, "kv_heads", None, None)  # of pages; the devices of a mesh have them by heads
FEW = 16  # pages


def _view_axes(view: PageView) -> PageView:
    return PageView(*[(None, None)] * 5, (), one_page=view.one_page)


def init_pages(
    num_pages: int, kv_heads: int, page_size: int, head_dim: int, dtype: Any, *, device: Any = None
) -> Pages:
    """``device``: one, or a sharding."""
    shape = (num_pages, kv_heads, page_size, head_dim)
    held = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    scale = None
    if dtype == jnp.int8:
        scale = jnp.zeros((num_pages, kv_heads * page_size), jnp.float32, device=device)
    return Pages(jnp.zeros(shape, held, device=device), scale)


def _axes_of(pages: Pages) -> Pages:
    return Pages(AXES, None if pages.scale is None else AXES[:2])


def write_pages(
    pages: Sequence[Pages], new: Sequence[jax.Array], view: PageView
) -> tuple[Pages, ...]:
    """Puts each of ``new[B,K,T,H]`` (keys, values) at ``view.positions`` of the rows, in those of
    ``pages`` that belong to it."""
    pages, new = tuple(pages), tuple(new)
    axes = tuple(map(_axes_of, pages))
    inputs = (axes, tuple(AXES for _ in new), _view_axes(view))
    return per_device(_write, inputs=inputs, outputs=axes, undivided="error")(pages, new, view)


def _write(pages: tuple[Pages, ...], new: tuple[jax.Array, ...], view: PageView):
    S = pages[0].values.shape[2]
    page = jnp.take_along_axis(view.tables, view.positions // S, axis=1)  # [B,T]
    offset = view.positions % S
    new = tuple(map(_hold, pages, new))
    by_slices, whole = (
        functools.partial(write, one_page=view.one_page)
        for write in (_write_by_slices, _write_whole_pages)
    )
    return jax.lax.platform_dependent(
        pages, new, page, offset, cpu=by_slices, tpu=whole, default=_write_rows
    )


def _hold(pages: Pages, new: jax.Array) -> Pages:
    """``new[B,K,T,H]`` as ``pages`` hold it."""
    scale = None
    if pages.scale is not None:
        scale = jnp.abs(new).max(-1).astype(jnp.float32) / 127.0  # [B,K,T]
        new = jnp.round(new / jnp.where(scale == 0.0, 1.0, scale)[..., None])
    held = pages.values.dtype
    if held == jnp.uint16:
        new = jax.lax.bitcast_convert_type(new.astype(jnp.bfloat16), held)
    return Pages(new.astype(held), scale)


def _write_by_slices(pages, new, page: jax.Array, offset: jax.Array, *, one_page: bool):
    """In place; a CPU runs a scatter slower."""
    B, T = page.shape
    size = T if one_page else 1
    K, S = pages[0].values.shape[1:3]
    update = jax.lax.dynamic_update_slice

    def put(i, pages):
        row, t = (i, 0) if size == T else (i // T, i % T)
        start = (page[row, t], 0, offset[row, t])

        def put_one(old, new):
            part = jax.lax.dynamic_slice_in_dim(new[row], t, size, axis=1)[None]  # [1,K,size,..]
            if old.ndim > 2:
                return update(old, part, (*start, 0))
            whole = jax.lax.dynamic_slice_in_dim(old, start[0], 1).reshape(1, K, S)
            return update(old, update(whole, part, (0, *start[1:])).reshape(1, K * S), start[:2])

        return jax.tree.map(put_one, pages, new)

    return jax.lax.fori_loop(0, B * T // size, put, pages)


def _write_rows(pages, new, page: jax.Array, offset: jax.Array):
    """One scatter, by one index: by those of page and offset the compiler would turn the whole
    cache, which has the heads between them."""
    K, S = pages[0].values.shape[1:3]
    row = (page[:, None] * K + jnp.arange(K)[:, None]) * S + offset[:, None]  # [B,K,T]

    def put(old, new):
        flat = old.reshape(-1, *old.shape[3:]).at[row].set(new, mode="promise_in_bounds")
        return flat.reshape(old.shape)

    return jax.tree.map(put, pages, new)


def _write_whole_pages(pages, new, page: jax.Array, offset: jax.Array, *, one_page: bool):
    """A scatter of pages with their new tokens: a TPU has no small rows, and would turn the whole
    cache for those."""
    K, S = pages[0].values.shape[1:3]
    T = page.shape[1]
    if len(page) == 1:  # of one page the compiler makes a slice, and turns the whole cache again
        page, offset = (jnp.concatenate([x, jnp.zeros_like(x)]) for x in (page, offset))
        new = jax.tree.map(lambda x: jnp.concatenate([x, x]), new)

    def put(old, new):  # [P,K,S,H] or [P,K*S], [B,K,T,..]
        row = (len(page), *old.shape[1:])
        if one_page and T == S:
            return old.at[page[:, 0]].set(new.reshape(row))
        for t in range(T):
            here = jnp.arange(S) == offset[:, t, None]  # [B,S]
            here = here.reshape(len(page), 1, S, *[1] * (new.ndim - 3))
            part = old[page[:, t]].reshape(len(page), K, S, *new.shape[3:])
            part = jnp.where(here, new[:, :, t : t + 1], part)
            old = old.at[page[:, t]].set(part.reshape(row))
        return old

    return jax.tree.map(put, pages, new)


def paged_attention(
    q: jax.Array, k: Pages, v: Pages, view: PageView, *, slopes: jax.Array | None = None
) -> jax.Array:
    """Softmax attention in float32 of ``q[B,K,G,T,H]`` over the pages of its rows, up to each
    query's own position; ``slopes[K,G]`` are ALiBi's. Returns ``[B,K,G,T,H]``, zero for a row
    without pages."""
    queries = (None, *AXES[1:], None)
    run = per_device(
        _attention,
        inputs=(
            queries,
            _axes_of(k),
            _axes_of(v),
            _view_axes(view),
            None if slopes is None else AXES[1:3],
        ),
        outputs=queries,
        undivided="error",
    )
    return run(q, k, v, view, slopes)


def _attention(
    q: jax.Array, k: Pages, v: Pages, view: PageView, slopes: jax.Array | None
) -> jax.Array:
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
        keys = _take(k, page, q.dtype, T)  # [W,K,S,H]
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
        # Zero where nothing is seen, since a row's first page has something that all of it see.
        weights = jnp.exp(scores - _rows(new_highest, row)[..., None])
        values = _take(v, page, q.dtype, T)
        part = jnp.einsum(
            "WKRS,WKSH->WKRH",
            weights.astype(values.dtype),
            values,
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


def _take(pages: Pages, page: jax.Array, dtype: Any, queries: int) -> jax.Array:
    """``[W,K,S,H]``. As rows of two axes, which a CPU gathers twice as fast as those of four; a TPU
    lays those out in another way, and so would copy the whole cache. For many queries a CPU copies
    few pages one by one: a gather it splits over threads, and waits for those of other devices."""

    def flat(values):
        shape = (len(page), *values.shape[1:])
        if queries == 1 or len(page) > FEW:
            taken = values.reshape(len(values), -1).at[page].get(mode="promise_in_bounds")
            return taken.reshape(shape)

        def put(i, taken):
            one = jax.lax.dynamic_slice_in_dim(values, page[i], 1)
            return jax.lax.dynamic_update_slice_in_dim(taken, one, i, 0)

        return jax.lax.fori_loop(0, len(page), put, jnp.zeros(shape, values.dtype))

    def whole(values):
        return values.at[page].get(mode="promise_in_bounds")

    taken = jax.lax.platform_dependent(pages.values, cpu=flat, default=whole)
    if taken.dtype == jnp.uint16:
        taken = jax.lax.bitcast_convert_type(taken, jnp.bfloat16)
    if pages.scale is None:
        return taken
    scale = whole(pages.scale).reshape(*taken.shape[:-1], 1)
    return taken.astype(dtype) * scale.astype(dtype)
