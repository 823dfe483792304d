"""Causal attention within the segments of packed rows, block by block, with its own gradient.

As FlashAttention (Dao et al., 2022; Dao, 2023): a block of queries goes over blocks of keys, from
the one in which the first of its segments begins to its own, with a running softmax; the backward
pass computes the weights again from the logarithm of their sum. No [T,T] array exists and other
segments cost nothing. What is here is plain JAX for every backend, and keeps a block in the cache
of a CPU; ``triton_attention.py`` has the same as a kernel for GPUs.

Letters: see ``layers.py``; Q queries and J keys of a block, both ``BLOCK``; R = G * Q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from llmzoo_jax.sharding import per_device

BLOCK = 128
SAVED = "saved"  # the name of what remat="dots" keeps for the backward pass
HIDDEN = -1e30  # the score of a key that is not seen; finite, so that a block of them gives no NaN


class Rows(NamedTuple):
    """Rows, or one of them without the axis B. ``positions`` are ALiBi's, or None."""

    q: jax.Array  # [B,K,G,T,H]
    k: jax.Array  # [B,K,T,H]
    v: jax.Array  # [B,K,T,H]
    starts: jax.Array  # int32[B,T], the first key that a query sees; the last is its own
    positions: jax.Array | None  # float32[B,T], of the keys


class Kernel(NamedTuple):
    """A way to compute it. ``forward(rows, slopes)`` gives the output ``[B,K,G,T,H]`` and the log
    of the sum of exp(scores), float32 ``[B,K,G,T]``; ``backward(rows, slopes, d_out, log_sum,
    inner)`` the gradients of q, k and v, where ``inner[B,K,G,T]`` is ``d_out * out`` summed over H.
    """

    forward: Callable
    backward: Callable
    # Rows or heads that the mesh does not divide: computed as one, which the compiler splits as it
    # can, or refused.
    undivided: Literal["whole", "error"]


AXES = Rows(
    q=("batch", "kv_heads", None, None, None),
    k=("batch", "kv_heads", None, None),
    v=("batch", "kv_heads", None, None),
    starts=("batch", None),
    positions=("batch", None),
)


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    *,
    slopes: jax.Array | None = None,
    positions: jax.Array | None = None,
    kernel: Kernel | None = None,
) -> jax.Array:
    """``q[B,K,G,T,H], k, v[B,K,T,H] -> [B,K,G,T,H]``; query t sees the keys from ``starts[B,T]`` to
    t. With ``slopes`` ``[K,G]`` and the keys' ``positions[B,T]``, ALiBi is added to the scores.
    Scores and softmax in float32, products in the dtype of ``q``. ``kernel`` gets whole blocks;
    None is plain JAX."""
    T = q.shape[3]
    rows = padded(Rows(q, k, v, starts, positions), BLOCK if kernel else min(BLOCK, T))
    return _attention(BLOCKS if kernel is None else kernel, rows, slopes)[..., :T, :]


def padded(rows: Rows, multiple: int) -> Rows:
    """Rows of a length that ``multiple`` divides: added queries see themselves alone, and nobody
    sees added keys."""
    B, T = rows.starts.shape
    more = -T % multiple
    q, k, v, starts, positions = rows
    if more:
        added = jnp.broadcast_to(jnp.arange(T, T + more), (B, more))
        starts = jnp.concatenate([starts, added], axis=1)
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) for x in (q, k, v))
        if positions is not None:
            positions = jnp.pad(positions, [(0, 0), (0, more)])
    if positions is not None:
        positions = positions.astype(jnp.float32)
    return Rows(q, k, v, starts, positions)


def axes_of(rows: Rows) -> Rows:
    """The logical axes of ``rows``."""
    return AXES if rows.positions is not None else AXES._replace(positions=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel: Kernel, rows: Rows, slopes: jax.Array | None) -> jax.Array:
    return _forward(kernel, rows, slopes)[0]


def _forward(kernel: Kernel, rows: Rows, slopes):
    run = per_device(
        kernel.forward,
        inputs=(axes_of(rows), None if slopes is None else ("kv_heads", None)),
        outputs=(AXES.q, AXES.q[:-1]),
        undivided=kernel.undivided,
    )
    out, log_sum = (checkpoint_name(x, SAVED) for x in run(rows, slopes))
    return out, (rows, slopes, out, log_sum)


def _backward(kernel: Kernel, saved, d_out):
    rows, slopes, out, log_sum = saved
    # The softmax's gradient is w * (dw - sum(w * dw)), and that sum is d_out . out.
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [B,K,G,T]
    run = per_device(
        kernel.backward,
        inputs=(
            axes_of(rows),
            None if slopes is None else ("kv_heads", None),
            *(AXES.q, AXES.q[:-1], AXES.q[:-1]),
        ),
        outputs=(AXES.q, AXES.k, AXES.v),
        undivided=kernel.undivided,
    )
    dq, dk, dv = run(rows, slopes, d_out, log_sum, inner)
    return Rows(dq, dk, dv, None, None), None


_attention.defvjp(_forward, _backward)


# --- in plain JAX: row by row, block by block ---------------------------------------------------


def _forward_rows(rows: Rows, slopes):
    return lax.map(lambda row: _forward_row(row, slopes), rows)


def _backward_rows(rows: Rows, slopes, d_out, log_sum, inner):
    return lax.map(lambda x: _backward_row(*x, slopes), (rows, d_out, log_sum, inner))


BLOCKS = Kernel(_forward_rows, _backward_rows, undivided="whole")


def _forward_row(row: Rows, slopes) -> tuple[jax.Array, jax.Array]:
    """(output ``[K,G,T,H]``, log of the sum of exp(scores) ``[K,G,T]``)."""
    K, G, T, H = row.q.shape
    size = min(BLOCK, T)

    def queries(i, outputs):
        def keys(j, carry):
            top, total, y = carry  # [K,R], [K,R], [K,R,H]
            scores = _scores(row, slopes, i, j)  # [K,R,J]
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            v = _block(row.v, j, axis=1)
            more = _product("KRJ,KJH->KRH", weights.astype(v.dtype), v)
            return new_top, total * shrink + weights.sum(-1), y * shrink[..., None] + more

        R = G * size
        carry = (jnp.full((K, R), -jnp.inf), jnp.zeros((K, R)), jnp.zeros((K, R, H)))
        top, total, y = lax.fori_loop(_first_block(row, i), i + 1, keys, carry)
        y = (y / total[..., None]).astype(row.q.dtype).reshape(K, G, size, H)
        log_sum = (top + jnp.log(total)).reshape(K, G, size)
        return _put(outputs[0], y, i, axis=2), _put(outputs[1], log_sum, i, axis=2)

    outputs = (jnp.zeros((K, G, T, H), row.q.dtype), jnp.zeros((K, G, T)))
    return lax.fori_loop(0, T // size, queries, outputs)


def _backward_row(row: Rows, d_out, log_sum, inner, slopes):
    """Gradients of q, k and v."""
    K, G, T, H = row.q.shape
    size = min(BLOCK, T)
    dtype, scale = row.q.dtype, 1.0 / math.sqrt(H)

    def flat(x, i):  # block i of x[K,G,T,..] -> [K,R,..]
        x = _block(x, i, axis=2)
        return x.reshape(K, G * size, *x.shape[3:])

    def queries(i, gradients):
        q, dy, log_sum_i, inner_i = (flat(x, i) for x in (row.q, d_out, log_sum, inner))

        def keys(j, carry):
            dq, dk, dv = carry
            k, v = _block(row.k, j, axis=1), _block(row.v, j, axis=1)
            weights = jnp.exp(_scores(row, slopes, i, j) - log_sum_i[..., None])  # [K,R,J]
            d_weights = _product("KRH,KJH->KRJ", dy, v)
            d_scores = weights * (d_weights - inner_i[..., None]) * scale
            weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
            dq = dq + _product("KRJ,KJH->KRH", d_scores, k)
            dk = _add(dk, _product("KRH,KRJ->KHJ", q, d_scores), j, axis=2)
            dv = _add(dv, _product("KRH,KRJ->KHJ", dy, weights), j, axis=2)
            return dq, dk, dv

        dq, dk, dv = gradients
        carry = (jnp.zeros((K, G * size, H)), dk, dv)
        dq_i, dk, dv = lax.fori_loop(_first_block(row, i), i + 1, keys, carry)
        return _put(dq, dq_i.reshape(K, G, size, H), i, axis=2), dk, dv

    # dk and dv are summed as [K,H,T]: products that give them so are faster on a CPU.
    gradients = jnp.zeros(row.q.shape), jnp.zeros((K, H, T)), jnp.zeros((K, H, T))
    dq, dk, dv = lax.fori_loop(0, T // size, queries, gradients)
    return tuple(x.astype(dtype) for x in (dq, jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)))


def _first_block(row: Rows, i) -> jax.Array:
    """The first block of keys that a query of block i sees."""
    return _block(row.starts, i, axis=0).min() // min(BLOCK, len(row.starts))


def _scores(row: Rows, slopes, i, j) -> jax.Array:
    """Scores of the queries of block i and the keys of block j, float32 ``[K,R,J]``."""
    q, k = _block(row.q, i, axis=2), _block(row.k, j, axis=1)
    K, G, size, H = q.shape
    scores = _product("KRH,KJH->KRJ", q.reshape(K, G * size, H), k) * (1.0 / math.sqrt(H))
    scores = scores.reshape(K, G, size, size)
    if slopes is not None:
        scores = scores + slopes[:, :, None, None] * _block(row.positions, j, axis=0)
    key = j * size + jnp.arange(size)
    query = i * size + jnp.arange(size)[:, None]
    seen = (_block(row.starts, i, axis=0)[:, None] <= key) & (key <= query)  # [Q,J]
    return jnp.where(seen, scores, HIDDEN).reshape(K, G * size, size)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _block(x: jax.Array, i, *, axis: int) -> jax.Array:
    size = min(BLOCK, x.shape[axis])
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x: jax.Array, block: jax.Array, i, *, axis: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, block, i * block.shape[axis], axis)


def _add(x: jax.Array, block: jax.Array, i, *, axis: int) -> jax.Array:
    return _put(x, _block(x, i, axis=axis) + block, i, axis=axis)
