"""The kernel of ``packed_attention`` for GPUs, in Pallas on Triton (FlashAttention-2; Dao, 2023).

The same blocks, the same sums: a program takes a block of queries over the keys of its segments
(forward, and the gradient of q), or a block of keys over the queries of its segments (the gradients
of k and v). ALiBi is ``slope * key_position``, computed inside. cuDNN's kernels would need the
number of segments of a row at compile time, and a bias of T x T for ALiBi.

Letters: see ``packed_attention.py``; N = K * G query heads. Scores are in units of log2.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmzoo_jax.models.packed_attention import HIDDEN, Kernel, Rows

LOG2_E = math.log2(math.e)
# Queries and keys of a block, forward and backward: both divide packed_attention.BLOCK.
FORWARD = (128, 64)
BACKWARD = (64, 64)
WARPS, STAGES = 8, 2


def kernel(*, interpret: bool = False) -> Kernel:
    """For ``packed_attention``; ``interpret`` runs the kernels as plain JAX, on any backend."""
    return Kernel(
        functools.partial(_forward, interpret=interpret),
        functools.partial(_backward, interpret=interpret),
        undivided="error",
    )


# --- kernels: refs of one row (and head); `at` picks a block ------------------------------------


def _scores(q, k, row, query, key, *, scale):
    """float32 ``[Q,J]``; ``row`` is (starts, slope, positions), where the
    outer two are refs, and ``query, key`` are slices of a row."""
    starts, slope, positions = row
    scores = plgpu.dot(q, k.T) * (scale * LOG2_E)
    if slope is not None:
        scores += slope * LOG2_E * positions[key][None, :]
    q_index, k_index = (x.start + jnp.arange(x.size) for x in (query, key))
    seen = (starts[query][:, None] <= k_index[None, :]) & (k_index[None, :] <= q_index[:, None])
    return jnp.where(seen, scores, HIDDEN)


def _forward_kernel(q_ref, k_ref, v_ref, starts_ref, *refs, scale, alibi):
    slope_ref, positions, out_ref, log_sum_ref = refs if alibi else (None, None, *refs)
    Q, H = q_ref.shape
    J = min(FORWARD[1], Q)
    i = pl.program_id(0)
    row = (starts_ref, slope_ref[0] if alibi else None, positions)
    q, query = q_ref[...], pl.ds(i * Q, Q)

    def keys(j, carry):
        top, total, y = carry  # [Q], [Q], [Q,H]
        key = pl.ds(j * J, J)
        scores = _scores(q, k_ref[key, :], row, query, key, scale=scale)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        y = y * shrink[:, None] + plgpu.dot(weights.astype(v_ref.dtype), v_ref[key, :])
        return new_top, total * shrink + weights.sum(1), y

    carry = (jnp.full(Q, -jnp.inf), jnp.zeros(Q), jnp.zeros((Q, H)))
    first, after = lax.div(starts_ref[i * Q], J), (i + 1) * (Q // J)
    top, total, y = lax.fori_loop(first, after, keys, carry)
    out_ref[...] = (y / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = (top + jnp.log2(total)) * (1.0 / LOG2_E)


def _dq_kernel(
    q_ref, k_ref, v_ref, starts_ref, dy_ref, log_sum_ref, inner_ref, *refs, scale, alibi
):
    slope_ref, positions, dq_ref = refs if alibi else (None, None, *refs)
    Q, H = q_ref.shape
    J = min(BACKWARD[1], Q)
    i = pl.program_id(0)
    row = (starts_ref, slope_ref[0] if alibi else None, positions)
    q, query = q_ref[...], pl.ds(i * Q, Q)
    dy, log_sum, inner = dy_ref[...], log_sum_ref[...] * LOG2_E, inner_ref[...]

    def keys(j, dq):
        key = pl.ds(j * J, J)
        k, v = k_ref[key, :], v_ref[key, :]
        weights = jnp.exp2(_scores(q, k, row, query, key, scale=scale) - log_sum[:, None])
        d_scores = weights * (plgpu.dot(dy, v.T) - inner[:, None])
        return dq + plgpu.dot(d_scores.astype(k.dtype), k)

    first, after = lax.div(starts_ref[i * Q], J), (i + 1) * (Q // J)
    dq = lax.fori_loop(first, after, keys, jnp.zeros((Q, H)))
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref, k_ref, v_ref, starts_ref, ends_ref, dy_ref, log_sum_ref, inner_ref, *refs, scale, alibi
):
    """One block of keys and the G query heads that share them."""
    slope_ref, positions, dk_ref, dv_ref = refs if alibi else (None, None, *refs)
    J, H = k_ref.shape
    G, Q = q_ref.shape[0], min(BACKWARD[0], J)
    j = pl.program_id(0)
    k, v, key = k_ref[...], v_ref[...], pl.ds(j * J, J)

    def head(g, carry):
        row = (starts_ref, slope_ref[g] if alibi else None, positions)

        def queries(i, carry):
            dk, dv = carry
            query = pl.ds(i * Q, Q)
            q, dy = q_ref[g, query, :], dy_ref[g, query, :]
            log_sum, inner = log_sum_ref[g, query] * LOG2_E, inner_ref[g, query]
            weights = jnp.exp2(_scores(q, k, row, query, key, scale=scale) - log_sum[:, None])
            d_scores = weights * (plgpu.dot(dy, v.T) - inner[:, None])
            dv += plgpu.dot(weights.astype(dy.dtype).T, dy)
            dk += plgpu.dot(d_scores.astype(q.dtype).T, q)
            return dk, dv

        after = lax.div(ends_ref[j * J + J - 1], Q) + 1
        return lax.fori_loop(j * (J // Q), after, queries, carry)

    dk, dv = lax.fori_loop(0, G, head, (jnp.zeros((J, H)), jnp.zeros((J, H))))
    dk_ref[...] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


# --- calls --------------------------------------------------------------------------------------


def _forward(rows: Rows, slopes, *, interpret):
    B, K, G, T, H = rows.q.shape
    N, Q = K * G, min(FORWARD[0], T)
    q, k, v = _heads(rows)  # [B,N,T,W], [B,K,T,W]: W is a power of two
    W = q.shape[-1]
    out, log_sum = _call(
        _forward_kernel,
        rows,
        slopes,
        grid=(T // Q, N, B),
        inputs=[(q, _block(Q, W)), (k, _whole_kv(T, W, G)), (v, _whole_kv(T, W, G))],
        row_inputs=[rows.starts],
        heads=1,
        outputs=[((B, N, T, W), q.dtype, _block(Q, W)), ((B, N, T), jnp.float32, _block(Q))],
        interpret=interpret,
    )
    return out[..., :H].reshape(B, K, G, T, H), log_sum.reshape(B, K, G, T)


def _backward(rows: Rows, slopes, d_out, log_sum, inner, *, interpret):
    B, K, G, T, H = rows.q.shape
    N, Q, J = K * G, *(min(size, T) for size in BACKWARD)
    q, k, v = _heads(rows)
    W = q.shape[-1]
    dy = _wide(d_out, W).reshape(q.shape)
    log_sum, inner = (x.reshape(B, N, T) for x in (log_sum, inner))
    (dq,) = _call(
        _dq_kernel,
        rows,
        slopes,
        grid=(T // Q, N, B),
        inputs=[(q, _block(Q, W)), (k, _whole_kv(T, W, G)), (v, _whole_kv(T, W, G))],
        row_inputs=[rows.starts],
        more_inputs=[(dy, _block(Q, W)), (log_sum, _block(Q)), (inner, _block(Q))],
        heads=1,
        outputs=[((B, N, T, W), q.dtype, _block(Q, W))],
        interpret=interpret,
    )
    dk, dv = _call(
        _dkv_kernel,
        rows,
        slopes,
        grid=(T // J, K, B),
        inputs=[(q, _group(G, T, W)), (k, _block(J, W)), (v, _block(J, W))],
        row_inputs=[rows.starts, _ends(rows.starts)],
        more_inputs=[(dy, _group(G, T, W)), (log_sum, _group(G, T)), (inner, _group(G, T))],
        heads=G,
        outputs=[((B, K, T, W), k.dtype, _block(J, W)), ((B, K, T, W), v.dtype, _block(J, W))],
        interpret=interpret,
    )
    return dq[..., :H].reshape(rows.q.shape), dk[..., :H], dv[..., :H]


def _call(
    body, rows, slopes, *, grid, inputs, row_inputs, heads, outputs, interpret, more_inputs=()
):
    """A ``pallas_call`` with a grid of (block, head, row); ALiBi's inputs come last, if any."""
    T = rows.starts.shape[1]
    a_row = pl.BlockSpec((None, T), lambda i, n, b: (b, 0))
    inputs = [*inputs, *((x, a_row) for x in row_inputs), *more_inputs]
    if slopes is not None:
        inputs.append((slopes.reshape(-1), pl.BlockSpec((heads,), lambda i, n, b: (n,))))
        inputs.append((rows.positions, a_row))
    arrays, specs = zip(*inputs, strict=True)
    shapes, dtypes, out_specs = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(body, scale=1.0 / math.sqrt(rows.q.shape[-1]), alibi=slopes is not None),
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=body.__name__.strip("_"),
    )(*arrays)


def _heads(rows: Rows):
    """q ``[B,N,T,W]``, k and v ``[B,K,T,W]``: Triton's blocks are powers of two, of 16 at least."""
    B, K, G, T, H = rows.q.shape
    W = max(16, pl.next_power_of_2(H))
    return _wide(rows.q, W).reshape(B, K * G, T, W), _wide(rows.k, W), _wide(rows.v, W)


def _wide(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _block(*sizes: int) -> pl.BlockSpec:
    """Block i of head n of row b."""
    return pl.BlockSpec((None, None, *sizes), lambda i, n, b: (b, n, i, 0)[: 2 + len(sizes)])


def _whole_kv(T: int, W: int, G: int) -> pl.BlockSpec:
    """All keys or values that query head n sees."""
    return pl.BlockSpec((None, None, T, W), lambda i, n, b: (b, lax.div(n, G), 0, 0))


def _group(G: int, *sizes: int) -> pl.BlockSpec:
    """All of the G query heads of key head k."""
    return pl.BlockSpec((None, G, *sizes), lambda j, k, b: (b, k, 0, 0)[: 2 + len(sizes)])


def _ends(starts: jax.Array) -> jax.Array:
    """The last query that sees each key, int32 ``[B,T]``: the one before the next segment."""
    T = starts.shape[1]
    index = jnp.arange(T)
    begins = jnp.where(starts == index, index, T)
    following = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    return lax.cummin(following, axis=1, reverse=True) - 1
