"""Weights in panels, for decoding on a CPU of few cores: a product of few rows streams them.

Of rows ``[N,K]`` the CPU's product takes five at a time, all of K, and a core waits for memory and
computes in turns. A panel is read from its beginning to its end, while the core computes with it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WIDTH = 64  # of a panel; 32 are packed at every call of many rows, more are not streamed
MOST_PADDING = 1 / 16  # of N


def fit(w: jax.Array, shards: int) -> bool:
    """Whether panels of ``w[N,K]`` are worth it: of float32 (a CPU computes with bfloat16 in
    another way), and with little padding."""
    rows = w.shape[0] // shards
    return (
        w.dtype == jnp.float32 and w.shape[0] % shards == 0 and -rows % WIDTH <= MOST_PADDING * rows
    )


class Panels(nnx.Module):
    """``w[N,K]``, whose N is in ``shards`` equal parts, as ``values[n,K,WIDTH]``. Parts are padded
    with zeros to whole panels. ``axes`` are those of ``w``."""

    def __init__(self, w: jax.Array, axes: tuple[str, str], *, shards: int):
        rows, K = w.shape[0] // shards, w.shape[1]
        self.shards, self.rows = shards, rows
        w = jnp.pad(w.reshape(shards, rows, K), [(0, 0), (0, -rows % WIDTH), (0, 0)])
        self.values = nnx.Param(w.reshape(-1, WIDTH, K).swapaxes(1, 2), axes=(*axes, None))

    def matmul(self, x: jax.Array, *, out: Any = None) -> jax.Array:
        """``x[...,K] @ w.T``, in the dtype ``out``."""
        w = self.values[...].astype(x.dtype)
        n, K, _ = w.shape
        lead, x = x.shape[:-1], x.reshape(-1, K)
        rows = len(x)
        if rows % 64 == 0:  # whose places in the cache would collide
            x = jnp.pad(x, [(0, 1), (0, 0)])
        every = jnp.broadcast_to(x, (n, *x.shape))  # the product takes this in: nothing is written
        dimensions = ((2,), (1,)), ((0,), (0,))
        y = jax.lax.dot_general(every, w, dimensions, preferred_element_type=out)  # [n,rows,WIDTH]
        y = jax.lax.optimization_barrier(y)  # else XLA turns the product round
        y = y[:, :rows].swapaxes(0, 1).reshape(rows, self.shards, -1)
        return y[..., : self.rows].reshape(*lead, self.shards * self.rows)
