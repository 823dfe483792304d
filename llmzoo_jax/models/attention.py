"""Attention: one contract, ``attend``, and the key/value cache. Letters: see ``layers.py``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values, ``[L,B,S,K,H]`` or a tuple of L arrays ``[B,S,K,H]``. Slot s holds the key
    of position s: rows of any length start at slot 0."""

    k: Any
    v: Any


class Mask(NamedTuple):
    """Who sees whom: query ``[B,T]``, key ``[B,S]``. A query sees the keys of its own segment
    that are not after it. ``order`` is what "after" compares: the index in the row for packed
    rows, the position for a cache."""

    query_segments: jax.Array
    key_segments: jax.Array
    query_order: jax.Array
    key_order: jax.Array

    def allowed(self) -> jax.Array:
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return same & (self.query_order[:, :, None] >= self.key_order[:, None, :])  # [B,T,S]


def packed_mask(segment_ids: jax.Array) -> Mask:
    """Causal attention inside each segment of ``segment_ids[B,T]``; padding (0) sees padding,
    so that no softmax is empty."""
    order = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return Mask(segment_ids, segment_ids, order, order)


def cache_mask(positions: jax.Array, num_slots: int) -> Mask:
    """Queries at ``positions[B,T]`` see the slots up to their own position."""
    slots = jnp.broadcast_to(jnp.arange(num_slots), (positions.shape[0], num_slots))
    return Mask(jnp.zeros_like(positions), jnp.zeros_like(slots), positions, slots)


def write_cache(cache: KVCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> KVCache:
    """Puts ``k, v [B,T,K,H]`` of consecutive ``positions[B,T]`` into one layer's cache."""

    def put(row, new, start):
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start, 0, 0))

    put = jax.vmap(put)
    return KVCache(put(cache.k, k, positions[:, 0]), put(cache.v, v, positions[:, 0]))


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

    ``q[B,T,N,H]``, ``k, v[B,S,K,H]`` with N a multiple of K; ``alibi_slopes`` float32 ``[N]`` adds
    ``slope * key_position`` (``key_positions[B,S]``), which differs from ``slope * distance`` by a
    constant per query, so the softmax is the same (Press et al., 2022). Returns ``[B,T,N,H]``.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = scores * (1.0 / math.sqrt(H))
    if alibi_slopes is not None:
        slopes = alibi_slopes.reshape(K, N // K, 1, 1)
        scores += slopes * key_positions[:, None, None, None, :].astype(jnp.float32)
    allowed = mask.allowed()[:, None, None]  # [B,1,1,T,S]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)  # [B,K,G,T,S]
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of ALiBi for any number of heads: a geometric series for the nearest power of two
    below, and every other member of the next finer series for the rest (as HF's
    ``build_alibi_tensor``)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
