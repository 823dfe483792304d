"""LLaMA 1, 2 and 3, the base of Chimera (port of HF's ``modeling_llama.py``; Touvron et al., 2023).

Rotary positions, RMSNorm, SwiGLU, grouped-query attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmzoo_jax.config import LlamaConfig
from llmzoo_jax.models import layers
from llmzoo_jax.models.attention import KVCache, Mask, attend, write_cache
from llmzoo_jax.models.layers import Embedding, Joint, Proj, RMSNorm
from llmzoo_jax.models.paged_attention import PageView
from llmzoo_jax.sharding import constrain


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        init = {"bias": config.attention_bias, "std": config.init_std, "rngs": rngs}
        self.q = Proj((D,), (N, H), axes=("embed", "heads", "head"), **init)
        self.k = Proj((D,), (K, H), axes=("embed", "kv_heads", "head"), **init)
        self.v = Proj((D,), (K, H), axes=("embed", "kv_heads", "head"), **init)
        self.out = Proj((N, H), (D,), axes=("heads", "head", "embed"), **init)

        self.qkv = None

    def join(self, *, shards: int, panels: bool):
        if not isinstance(self.q.w, nnx.Param):
            return
        self.qkv = nnx.data(Joint(self.q, self.k, self.v, shards=shards, panels=panels))
        del self.q, self.k, self.v
        self.out.transpose(shards=shards, panels=panels)

    def __call__(self, x, kv, mask, positions, rope, implementation):
        q, k, v = self.qkv(x) if self.qkv else (self.q(x), self.k(x), self.v(x))
        q = layers.apply_rope(q, rope)  # [B,T,N,H]
        k = layers.apply_rope(k, rope)  # [B,T,K,H]
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)  # [B,K,T,H]
        if kv is not None:
            kv = write_cache(kv, k, v, mask, positions)
            k, v = kv
        return self.out(attend(q, k, v, mask, implementation=implementation)), kv


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        init = {"bias": config.mlp_bias, "std": config.init_std, "rngs": rngs}
        self.norm1 = RMSNorm(D, eps=config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.norm2 = RMSNorm(D, eps=config.rms_norm_eps)
        self.gate = Proj((D,), (F,), axes=("embed", "mlp"), **init)
        self.up = Proj((D,), (F,), axes=("embed", "mlp"), **init)
        self.down = Proj((F,), (D,), axes=("mlp", "embed"), **init)

        self.gate_up = None

    def join(self, *, shards: int, panels: bool):
        """For decoding: see ``layers.Joint`` and ``layers.Proj.transpose``. Quantised weights stay
        as they are."""
        self.attention.join(shards=shards, panels=panels)
        if not isinstance(self.gate.w, nnx.Param):
            return
        self.gate_up = nnx.data(Joint(self.gate, self.up, shards=shards, panels=panels))
        del self.gate, self.up
        self.down.transpose(shards=shards, panels=panels)

    def __call__(self, x, kv, mask, positions, rope, implementation):
        y, kv = self.attention(self.norm1(x), kv, mask, positions, rope, implementation)
        x = x + y
        y = self.norm2(x)
        gate, up = self.gate_up(y) if self.gate_up else (self.gate(y), self.up(y))
        return x + self.down(jax.nn.silu(gate) * up), kv


class Llama(nnx.Module):
    """``hidden`` and ``logits`` are the whole interface; ``models/__init__.py`` documents it."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        V, D, std = config.vocab_size, config.hidden_size, config.init_std
        self.config = config
        self.embed = Embedding(V, D, std=std, rngs=rngs)
        self.blocks = layers.stack(lambda r: Block(config, r), config.num_layers, rngs)
        self.norm = RMSNorm(D, eps=config.rms_norm_eps)
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
        rope = layers.rope_angles(self.config.rope, self.config.head_dim, positions)
        x = constrain(self.embed(tokens, dtype), ("batch", "length", "act_embed"))
        inputs = (mask, positions, rope, attention)
        x, kv_cache = layers.run_blocks(self.blocks, x, inputs, kv_cache=kv_cache, remat=remat)
        return self.norm(x), kv_cache

    def logits(self, x: jax.Array) -> jax.Array:
        return (self.embed if self.head is None else self.head).logits(x)

    def head_table(self) -> jax.Array:
        return (self.embed if self.head is None else self.head).w[...]
