"""BLOOM, the base of Phoenix (port of HF's ``modeling_bloom.py``; Le Scao et al., 2022).

ALiBi in place of position embeddings, a LayerNorm after the embedding, a fused query-key-value
projection with bias, a tied head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmzoo_jax.config import BloomConfig
from llmzoo_jax.models import layers
from llmzoo_jax.models.attention import (
    KVCache,
    Mask,
    alibi_slopes,
    attend,
    slot_positions,
    write_cache,
)
from llmzoo_jax.models.layers import Embedding, LayerNorm, Proj
from llmzoo_jax.models.paged_attention import PageView
from llmzoo_jax.sharding import constrain


class Attention(nnx.Module):
    def __init__(self, config: BloomConfig, rngs: nnx.Rngs):
        D, N, H = config.hidden_size, config.num_heads, config.head_dim
        init = {"bias": True, "std": config.init_std, "rngs": rngs}
        self.slopes = tuple(alibi_slopes(N))
        self.qkv = Proj((D,), (N, 3, H), axes=("embed", "heads", "qkv", "head"), **init)
        self.out = Proj((N, H), (D,), axes=("heads", "head", "embed"), **init)

    def __call__(self, x, kv, mask, positions, key_positions, implementation):
        q, k, v = jnp.moveaxis(self.qkv(x), 3, 0)  # each [B,T,N,H]
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B,N,T,H]
        if kv is not None:
            kv = write_cache(kv, k, v, mask, positions)
            k, v = kv
        slopes = jnp.array(self.slopes, jnp.float32)
        y = attend(
            q,
            k,
            v,
            mask,
            alibi_slopes=slopes,
            key_positions=key_positions,
            implementation=implementation,
        )
        return self.out(y), kv


class Block(nnx.Module):
    def __init__(self, config: BloomConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, 4 * config.hidden_size
        init = {"bias": True, "std": config.init_std, "rngs": rngs}
        self.residual_post_layernorm = config.residual_post_layernorm
        self.norm1 = LayerNorm(D, eps=config.layer_norm_eps)
        self.attention = Attention(config, rngs)
        self.norm2 = LayerNorm(D, eps=config.layer_norm_eps)
        self.up = Proj((D,), (F,), axes=("embed", "mlp"), **init)
        self.down = Proj((F,), (D,), axes=("mlp", "embed"), **init)

    def join(self, *, shards: int, panels: bool):
        """For decoding: see ``layers.Proj.transpose``. Query, key and value are one, head by head,
        so that each of any shards has its own."""
        for projection in (self.attention.qkv, self.attention.out, self.up, self.down):
            projection.transpose(shards=shards, panels=panels)

    def __call__(self, x, kv, mask, positions, key_positions, implementation):
        y = self.norm1(x)
        residual = y if self.residual_post_layernorm else x
        y, kv = self.attention(y, kv, mask, positions, key_positions, implementation)
        x = residual + y
        y = self.norm2(x)
        residual = y if self.residual_post_layernorm else x
        return residual + self.down(jax.nn.gelu(self.up(y), approximate=True)), kv


class Bloom(nnx.Module):
    """``hidden`` and ``logits`` are the whole interface; ``models/__init__.py`` documents it."""

    def __init__(self, config: BloomConfig, rngs: nnx.Rngs):
        V, D, std = config.vocab_size, config.hidden_size, config.init_std
        self.config = config
        self.embed = Embedding(V, D, std=std, rngs=rngs)
        self.embed_norm = LayerNorm(D, eps=config.layer_norm_eps)
        self.blocks = layers.stack(lambda r: Block(config, r), config.num_layers, rngs)
        self.norm = LayerNorm(D, eps=config.layer_norm_eps)
        self.head = None if config.tie_embeddings else Embedding(V, D, std=std, rngs=rngs)

    def hidden(
        self,
        tokens: jax.Array,
        mask: Mask | PageView,
        positions: jax.Array,
        *,
        kv_cache: KVCache | None = None,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        attention: str = "auto",
    ) -> tuple[jax.Array, KVCache | None]:
        key_positions = positions
        if kv_cache is not None and isinstance(mask, Mask):
            key_positions = slot_positions(kv_cache, len(tokens))
        x = self.embed_norm(self.embed(tokens, dtype))
        x = constrain(x, ("batch", "length", "act_embed"))
        inputs = (mask, positions, key_positions, attention)
        x, kv_cache = layers.run_blocks(self.blocks, x, inputs, kv_cache=kv_cache, remat=remat)
        return self.norm(x), kv_cache

    def logits(self, x: jax.Array) -> jax.Array:
        return (self.embed if self.head is None else self.head).logits(x)

    def head_table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).w[...]
