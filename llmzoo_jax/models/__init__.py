"""The model families. A new one is a file in this folder and a row in ``FAMILIES``.

Every family is an ``nnx.Module``, used as a plain pytree, with three methods:

- ``hidden(tokens[B,T], mask, positions[B,T], *, kv_cache, dtype, remat, attention)`` gives
  ``x[B,T,D]`` after the final norm, and the new cache (None without one);
- ``logits(x[...,D])`` gives float32 ``[...,V]``;
- ``head_table()`` gives the ``[V,D]`` of which logits are the products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmzoo_jax.config import BloomConfig, LlamaConfig, ModelConfig
from llmzoo_jax.models.attention import KVCache, cache_mask, packed_mask
from llmzoo_jax.models.bloom import Bloom
from llmzoo_jax.models.layers import unstack
from llmzoo_jax.models.llama import Llama

FAMILIES: dict[type, type[nnx.Module]] = {BloomConfig: Bloom, LlamaConfig: Llama}

__all__ = [
    "FAMILIES",
    "KVCache",
    "abstract",
    "cache_mask",
    "init",
    "init_cache",
    "kv_heads",
    "logits",
    "num_params",
    "packed_mask",
    "unstack",
]


def init(config: ModelConfig, key: jax.Array) -> nnx.Module:
    """A random model; under ``jax.jit`` with ``out_shardings`` no device holds it whole."""
    return FAMILIES[type(config)](config, nnx.Rngs(params=key))


def abstract(config: ModelConfig) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def num_params(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(model))


def kv_heads(config: ModelConfig) -> int:
    return config.num_kv_heads if isinstance(config, LlamaConfig) else config.num_heads


def init_cache(config: ModelConfig, batch: int, slots: int, *, dtype, unrolled: bool) -> KVCache:
    """An empty cache for ``batch`` rows of up to ``slots`` tokens; ``unrolled`` as the blocks."""
    shape = (batch * kv_heads(config), slots, config.head_dim)
    if not unrolled:
        return KVCache(*(jnp.zeros((config.num_layers, *shape), dtype) for _ in range(2)))
    return KVCache(
        *(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for _ in range(2))
    )


def logits(model: nnx.Module, tokens: jax.Array, **kwargs) -> jax.Array:
    """float32 ``[B,T,V]`` for whole rows ``tokens[B,T]``, one segment each, right-padded or not."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, _ = model.hidden(tokens, packed_mask(jnp.ones_like(tokens)), positions, **kwargs)
    return model.logits(x)
