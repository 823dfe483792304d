"""Attention: one contract, ``attend``, its implementations, and the key/value cache.

Letters: see ``layers.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmzoo_jax.errors import InputError
from llmzoo_jax.models import triton_attention
from llmzoo_jax.models.packed_attention import SAVED, packed_attention
from llmzoo_jax.models.paged_attention import PageView, paged_attention, write_pages
from llmzoo_jax.models.splash import MAX_POSITIONS, splash_attention


class KVCache(NamedTuple):
    """Keys and values, ``[L,BK,S,H]`` or a tuple of L arrays ``[BK,S,H]``: row b has the heads
    from b * K. Slot s holds the key of position s: rows of any length start at slot 0. To serve, a
    tuple of L ``paged_attention.Pages``."""

    k: Any
    v: Any


class Mask(NamedTuple):
    """Who sees whom: query t of a row sees the keys ``first[B,T]`` to ``last[B,T]``. ``last`` is
    None where it is t itself, which the compiler knows, so that later keys are not even computed.
    """

    first: jax.Array
    last: jax.Array | None = None


def packed_mask(segment_ids: jax.Array) -> Mask:
    """Causal attention inside each segment, a run of equal ``segment_ids[B,T]``. Padding is a
    segment too, so that no softmax is empty."""
    index = jnp.arange(segment_ids.shape[1])
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return Mask(jax.lax.cummax(jnp.where(begins, index, 0), axis=1))


def cache_mask(positions: jax.Array) -> Mask:
    """Queries at ``positions[B,T]`` see the slots up to their own position."""
    return Mask(jnp.zeros_like(positions), positions)


def slot_positions(cache: KVCache, batch: int) -> jax.Array:
    """The positions of all slots of a cache, int32 ``[B,S]``."""
    slots = jax.tree.leaves(cache)[0].shape[-2]
    return jnp.broadcast_to(jnp.arange(slots), (batch, slots))


def write_cache(
    cache: KVCache, k: jax.Array, v: jax.Array, mask: Mask | PageView, positions: jax.Array
) -> KVCache:
    """Puts ``k, v [B,K,T,H]`` of consecutive ``positions[B,T]`` into one layer's cache."""
    if isinstance(mask, PageView):
        return KVCache(*write_pages(cache, (k, v), mask))
    B, K, _, H = k.shape
    starts = positions[:, 0]
    if B > 32:  # a scatter; rows one by one would make the program too long

        def put(old, new):
            rows = jax.vmap(lambda row, new, start: _update(row, new, (0, start, 0)))
            return rows(old.reshape(B, K, -1, H), new, starts).reshape(old.shape)

        return KVCache(put(cache.k, k), put(cache.v, v))
    k_cache, v_cache = cache
    for row, start in enumerate(starts):  # in place; a CPU runs a scatter as a slow loop
        k_cache = _update(k_cache, k[row], (row * K, start, 0))
        v_cache = _update(v_cache, v[row], (row * K, start, 0))
    return KVCache(k_cache, v_cache)


def _update(old, new, starts):
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), starts)


class AttentionError(InputError):
    """An implementation can't serve a case; the message says why."""


class Implementation(NamedTuple):
    """``function(q[B,K,G,T,H], k[B,K,T,H], v, starts[B,T], slopes=[K,G] or None, positions=[B,T] or
    None) -> [B,K,G,T,H]``: causal attention of packed rows, as ``packed_attention`` has it."""

    function: Callable
    platform: str  # the only one it runs on; "" = any
    max_positions: int | None = None  # with ALiBi


def _all_scores(q, k, v, starts, *, slopes, positions):
    return plain_attention(q, k, v, Mask(starts), slopes=slopes, positions=positions)


IMPLEMENTATIONS = {
    "scores": Implementation(_all_scores, ""),
    "blocks": Implementation(packed_attention, ""),
    "splash": Implementation(splash_attention, "tpu", MAX_POSITIONS),
    "triton": Implementation(
        functools.partial(packed_attention, kernel=triton_attention.kernel()), "gpu"
    ),
}
BEST = {"cpu": "blocks", "tpu": "splash", "gpu": "triton"}


def choose(name: str, platform: str) -> str:
    """The implementation that ``compute.attention`` asks for on ``platform``; "auto" = the fastest.

    Raises AttentionError where it does not run there."""
    if name == "auto":
        return BEST.get(platform, "blocks")
    only = IMPLEMENTATIONS[name].platform
    if only and only != platform:
        raise AttentionError(
            f"compute.attention={name} is a kernel for {only.upper()}s and the devices are "
            f"{platform}; set compute.attention=auto (here: {choose('auto', platform)})"
        )
    return name


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | PageView,
    *,
    alibi_slopes: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention in float32, products in the dtype of ``q``.

    ``q[B,T,N,H]``, ``k, v[B,K,S,H]`` with N a multiple of K; ``alibi_slopes`` float32 ``[N]`` adds
    ``slope * key_position`` (``key_positions[B,S]``), which differs from ``slope * distance`` by a
    constant per query, so the softmax is the same (Press et al., 2022). Returns ``[B,T,N,H]``.
    ``implementation`` is a key of ``IMPLEMENTATIONS``, or "auto" for the default backend's best;
    with a cache there is one way, by all scores; with pages (``k, v`` are ``Pages``) another.
    """
    B, T, N, H = q.shape
    if isinstance(mask, PageView):
        K = k.values.shape[1]
    else:
        K = k.shape[1] if k.ndim == 4 else k.shape[0] // B
    q = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3)  # [B,K,G,T,H]
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(K, N // K)
    if isinstance(mask, PageView):
        y = paged_attention(q, k, v, mask, slopes=slopes)
    elif mask.last is not None:
        y = plain_attention(q, k, v, mask, slopes=slopes, positions=key_positions)
    else:
        if implementation == "auto":
            implementation = choose("auto", jax.default_backend())
        function, _, longest = IMPLEMENTATIONS[implementation]
        if slopes is not None and longest is not None and longest < T:
            raise AttentionError(
                f"compute.attention={implementation} holds ALiBi's positions up to {longest} and "
                f"the rows have {T}; set compute.attention=blocks"
            )
        y = function(q, k, v, mask.first, slopes=slopes, positions=key_positions)
    return jnp.moveaxis(y, 3, 1).reshape(B, T, N, H)


def plain_attention(q, k, v, mask: Mask, *, slopes=None, positions=None) -> jax.Array:
    """``q[B,K,G,T,H] -> [B,K,G,T,H]`` by way of all T x S scores; ``k, v`` are ``[B,K,S,H]`` or,
    as a cache holds them, ``[BK,S,H]``."""
    B, K, G, T, H = q.shape
    # Rows and heads as one batch axis M, R = G * T: as the cache is stored (see KVCache).
    k, v = (x.reshape(B * K, -1, H) for x in (k, v))  # [M,S,H]
    q = q.reshape(B * K, G * T, H)  # [M,R,H]
    scores = jnp.einsum("MRH,MSH->MRS", q, k, preferred_element_type=jnp.float32)
    scores = (scores * (1.0 / math.sqrt(H))).reshape(B, K, G, T, -1)
    if slopes is not None:
        scores = scores + slopes[:, :, None, None] * positions[:, None, None, None, :]
    key = jnp.arange(k.shape[1])
    last = jnp.arange(T) if mask.last is None else mask.last
    seen = (mask.first[..., None] <= key) & (key <= last[..., None])  # [B,T,S]
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B * K, G * T, -1)
    y = jnp.einsum("MRS,MSH->MRH", weights, v).reshape(B, K, G, T, H)
    return checkpoint_name(y, SAVED)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes of ALiBi for any number of heads: a geometric series for the nearest power of two
    below, and every other member of the next finer series for the rest (as HF's
    ``build_alibi_tensor``)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
