"""Attention: one contract, ``attend``, and the key/value cache. Letters: see ``layers.py``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "saved"  # what remat="dots" keeps for the backward pass


class KVCache(NamedTuple):
    """Keys and values, ``[L,B,K,S,H]`` or a tuple of L arrays ``[B,K,S,H]``. Slot s holds the key
    of position s: rows of any length start at slot 0."""

    k: Any
    v: Any


class Mask(NamedTuple):
    """Who sees whom: a query sees the keys of its own segment that are not after it.

    ``query_order[B,T]`` and ``key_order[B,S]`` are what "after" compares; None stands for the
    index in the row, which the compiler knows, so that later keys are not even computed.
    """

    query_segments: jax.Array  # [B,T]
    key_segments: jax.Array  # [B,S]
    query_order: jax.Array | None = None
    key_order: jax.Array | None = None


def packed_mask(segment_ids: jax.Array) -> Mask:
    """Causal attention inside each segment of ``segment_ids[B,T]``; padding (0) sees padding,
    so that no softmax is empty."""
    return Mask(segment_ids, segment_ids)


def cache_mask(positions: jax.Array, num_slots: int) -> Mask:
    """Queries at ``positions[B,T]`` see the slots up to their own position."""
    slots = jnp.broadcast_to(jnp.arange(num_slots), (positions.shape[0], num_slots))
    return Mask(jnp.zeros_like(positions), jnp.zeros_like(slots), positions, slots)


def write_cache(cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
    """Puts ``k, v [B,K,T,H]`` of consecutive ``positions[B,T]`` into one layer's cache."""

    starts = positions[:, 0]
    if len(starts) > 32:  # a scatter; rows one by one would make the program too long
        put = jax.vmap(lambda row, new, start: _update(row, new, (0, start, 0)))
        return KVCache(put(cache.k, k, starts), put(cache.v, v, starts))
    k_cache, v_cache = cache
    for row, start in enumerate(starts):  # in place; a CPU runs a scatter as a slow loop
        k_cache = _update(k_cache, k[row : row + 1], (row, 0, start, 0))
        v_cache = _update(v_cache, v[row : row + 1], (row, 0, start, 0))
    return KVCache(k_cache, v_cache)


def _update(old, new, starts):
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), starts)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    alibi_slopes: jax.Array | None = None,
    key_positions: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in float32, products in the dtype of ``q``.

    ``q[B,T,N,H]``, ``k, v[B,K,S,H]`` with N a multiple of K; ``alibi_slopes`` float32 ``[N]`` adds
    ``slope * key_position`` (``key_positions[B,S]``), which differs from ``slope * distance`` by a
    constant per query, so the softmax is the same (Press et al., 2022). Returns ``[B,T,N,H]``.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)  # [B,K,G,T,H]
    bias = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(K, N // K, 1, 1)
        bias = slopes * key_positions[:, None, None, None, :].astype(jnp.float32)  # [B,K,G,1,S]
    if mask.query_order is None:
        y = _causal(q, k, v, mask.query_segments, bias)
    else:
        same = mask.query_segments[:, :, None] == mask.key_segments[:, None, :]
        after = mask.query_order[:, :, None] >= mask.key_order[:, None, :]
        y = _softmax_attention(q, k, v, same & after, bias)
    return checkpoint_name(jnp.moveaxis(y, 3, 1).reshape(B, T, N, H), SAVED)


def _causal(q, k, v, segments, bias):
    """Chunks of queries, each against the keys up to its own end: a little over half the work of
    all T x T scores, in pieces that stay in the cache (3x faster on a CPU at T = 512)."""
    T = q.shape[3]
    chunk = max(64, T // 4)
    if T % chunk:
        chunk = T
    pieces = []
    for start in range(0, T, chunk):
        stop = start + chunk
        same = segments[:, start:stop, None] == segments[:, None, :stop]
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        pieces.append(
            _softmax_attention(
                q[:, :, :, start:stop],
                k[:, :, :stop],
                v[:, :, :stop],
                same & causal,
                None if bias is None else bias[..., :stop],
            )
        )
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=3)


def _softmax_attention(q, k, v, allowed, bias):
    """``q[B,K,G,T,H], k, v[B,K,S,H], allowed[B,T,S], bias[B,K,G,1,S] -> [B,K,G,T,H]``."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * (1.0 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of ALiBi for any number of heads: a geometric series for the nearest power of two
    below, and every other member of the next finer series for the rest (as HF's
    ``build_alibi_tensor``)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
