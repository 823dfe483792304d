"""Texts as vectors: the mean of the last hidden states."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmzoo_jax import models, sharding


def embed(model: nnx.Module, prompts: Sequence[Sequence[int]], *, dtype: str) -> np.ndarray:
    """float32 ``[B,D]``, each of length 1, of lists of token ids. Lengths are padded to few sizes,
    so that little is compiled."""
    vectors = []
    for prompt in prompts:
        tokens = np.zeros(_size(len(prompt)), np.int32)
        tokens[: len(prompt)] = prompt
        vectors.append(_embed(model, tokens, len(prompt), dtype=dtype))
    return np.stack(vectors)


def warm_up(model: nnx.Module, longest: int, *, dtype: str) -> None:
    """Compiles what ``embed`` needs for up to ``longest`` tokens."""
    embed(model, [[0] * n for n in sorted({_size(n) for n in range(1, longest + 1)})], dtype=dtype)


def _size(length: int) -> int:
    """32, 128, 512 ..."""
    size = 32
    while size < length:
        size *= 4
    return size


@functools.partial(sharding.jit, static_argnames=("dtype",))
def _embed(model, tokens, length, *, dtype: str) -> jax.Array:
    """``tokens[T]``, padded on the right, of which ``length`` count -> ``[D]``."""
    positions = jnp.arange(tokens.shape[0])
    real = positions < length
    mask = models.packed_mask(real.astype(jnp.int32)[None])
    x, _ = model.hidden(tokens[None], mask, positions[None], dtype=jnp.dtype(dtype))  # [1,T,D]
    mean = jnp.where(real[:, None], x[0].astype(jnp.float32), 0).sum(0) / length  # [D]
    return mean / jnp.linalg.norm(mean)
