"""Packed attention on TPUs: JAX's splash attention kernel, with ALiBi in extra features.

Splash attention (``jax.experimental.pallas.ops.tpu.splash_attention``) takes segment ids, but no
bias. ALiBi adds ``slope * key_position`` to a score, which is a product of features: the queries of
a head have the slope, the keys their position. Each is cut into parts that bfloat16 holds exactly,
so the kernel, whose products are exact and whose sums are float32, adds what float32 would.
Letters: see ``layers.py``.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from llmzoo_jax.models.packed_attention import AXES, SAVED, Rows, axes_of, padded
from llmzoo_jax.sharding import per_device

LANES = 128  # the width of a TPU's registers: lengths are multiples of it, and so are wide heads
BLOCKS = (512, 256, 128)  # of queries and of keys: the first that divides the length
MAX_POSITIONS = 2**16  # what two parts of a position hold exactly in bfloat16


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    *,
    slopes: jax.Array | None = None,
    positions: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As ``packed_attention``; ``interpret`` runs the kernels as plain JAX, on any backend."""
    T = q.shape[3]
    rows = padded(Rows(q, k, v, starts, positions), LANES)
    run = per_device(
        functools.partial(_rows, interpret=interpret),
        inputs=(axes_of(rows), None if slopes is None else ("kv_heads", None)),
        outputs=AXES.q,
        undivided="error",
    )
    return run(rows, slopes)[..., :T, :]


def _rows(rows: Rows, slopes, *, interpret: bool) -> jax.Array:
    B, K, G, T, H = rows.q.shape
    q, k = rows.q * (1.0 / math.sqrt(H)), rows.k  # the kernel does not scale
    if slopes is not None:
        q, k = _with_alibi(q, k, slopes, rows.positions)
    attend = _kernel(K * G, T, interpret)
    y = jax.vmap(lambda q, k, v, ids: attend(q, k, v, segment_ids=ids))(
        q.reshape(B, K * G, T, -1),
        k,
        rows.v,
        # A segment's first key serves as its id.
        splash_attention_kernel.SegmentIds(rows.starts, rows.starts),
    )
    return y.reshape(rows.q.shape)


def _kernel(heads: int, length: int, interpret: bool):
    size = next(size for size in BLOCKS if length % size == 0)
    mask = splash_attention_mask.CausalMask((length, length))
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )


def _with_alibi(q, k, slopes, positions):
    """``q[B,K,G,T,H], k[B,K,T,H]`` with features whose products add ``slope * position``.

    Three parts of a slope hold a float32, two of a position any below ``MAX_POSITIONS``: six
    products. The width is brought to a multiple of ``LANES``."""
    parts, rest = [], slopes
    for _ in range(3):  # reduce_precision is bfloat16's rounding, which the compiler keeps
        parts.append(lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    low = positions % 256
    slope = jnp.repeat(jnp.stack(parts, -1), 2, axis=-1)  # [K,G,6]
    position = jnp.tile(jnp.stack([positions - low, low], -1), 3)  # [B,T,6]
    width = q.shape[-1] + slope.shape[-1]
    zeros = [(0, -width % LANES)]

    def joined(x, features):
        features = jnp.broadcast_to(features, (*x.shape[:-1], features.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([x, features], axis=-1)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + zeros)

    return joined(q, slope[:, :, None, :]), joined(k, position[:, None])
