"""The layers that the families share.

Letters of every einsum and shape comment in this folder:

    B  batch                N  query heads            D  model (hidden) width
    T  query length         K  key/value heads        F  MLP width
    S  key/value length     G  query heads a KV head  V  vocabulary
    L  layers               H  head width             C  q, k, v of a fused projection

Parameters are float32 and cast to the activations' dtype where they are used. Every parameter
names its logical axes (``sharding.RULES``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmzoo_jax.config import RopeConfig
from llmzoo_jax.models.attention import KVCache
from llmzoo_jax.models.packed_attention import SAVED
from llmzoo_jax.models.panels import Panels, fit
from llmzoo_jax.sharding import constrain


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x[...,K] @ w[K,N]``. Its own gradient gives the product of ``dw`` the longer side as rows:
    autodiff's choice takes up to twice as long on a CPU, and more for weights of three axes."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """``dw[K,N]`` of ``x[...,K] @ w`` from ``dy[...,N]``."""
    lead = tuple(range(x.ndim - 1))
    if x.shape[-1] <= dy.shape[-1]:
        return jax.lax.dot_general(x, dy, ((lead, lead), ((), ())))
    return jax.lax.dot_general(dy, x, ((lead, lead), ((), ()))).T


def _matmul_backward(saved, dy):  # dy[...,N]
    x, w = saved
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, weight_gradient(x, dy)


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _matmul_backward)


FEW_ROWS = 512  # beyond, packing the weight no longer counts, and turning the result does


def matmul_transposed(x: jax.Array, w: jax.Array, *, out: Any = None) -> jax.Array:
    """``x[...,K] @ w[N,K].T``, in the dtype ``out``. For few rows a CPU gets the weight as the
    first operand: XLA packs all of the second one at every call, which takes up to half the time.
    """

    def plain(x, w):
        dimensions = ((x.ndim - 1,), (1,)), ((), ())
        return jax.lax.dot_general(x, w, dimensions, preferred_element_type=out)

    def weight_first(x, w):
        if x.size == x.shape[-1] and w.dtype == jnp.bfloat16:
            # One row twice: for one alone XLA makes all of the weight float32.
            return weight_first(jnp.stack([x, x]), w)[0]
        dimensions = ((1,), (x.ndim - 1,)), ((), ())
        y = jax.lax.dot_general(w, x, dimensions, preferred_element_type=out)  # [N,...]
        # Without the barrier XLA makes of both the product with ``x`` first.
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)

    if math.prod(x.shape[:-1]) > FEW_ROWS:
        return plain(x, w)
    return jax.lax.platform_dependent(x, w, cpu=weight_first, default=plain)


def decoding_weight(
    w: jax.Array, axes: tuple[str, str], *, shards: int, panels: bool
) -> nnx.Param | Panels:
    """``w[N,K]`` as ``decoding_product`` takes it; N is in ``shards`` equal parts."""
    if panels and fit(w, shards):
        return Panels(w, axes, shards=shards)
    return nnx.Param(w, axes=axes)


def decoding_product(x: jax.Array, w: nnx.Param | Panels, *, out: Any = None) -> jax.Array:
    """``x[...,K] -> [...,N]``, in the dtype ``out``."""
    if isinstance(w, Panels):
        return w.matmul(x, out=out)
    return matmul_transposed(x, w[...].astype(x.dtype), out=out)


class Proj(nnx.Module):
    """A linear map of the axes ``inputs`` to ``outputs``, both given by their sizes: from
    ``x[...,*inputs]`` to ``[...,*outputs]``. ``w[*inputs,*outputs]`` is normal(0, std), ``b`` zero.

    Where all of it is frozen, ``w`` may be a weight of ``quantised.py``, and ``lora`` an adapter
    (``llmzoo_jax.lora``) whose output is added.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        *,
        axes: Sequence[str],
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        shape = (*inputs, *outputs)
        self.num_inputs = len(inputs)
        # Of K and N, the products of the sizes: only the first of each is ever split.
        self.flat_axes = axes[0], axes[len(inputs)]
        self.w = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=tuple(axes))
        self.b = nnx.Param(jnp.zeros(outputs), axes=tuple(axes[len(inputs) :])) if bias else None
        self.outputs = tuple(outputs)
        self.lora = None
        self.transposed = False

    def transpose(self, *, shards: int, panels: bool) -> None:
        """For decoding: ``w`` with inputs last, see ``decoding_weight``."""
        if isinstance(self.w, nnx.Param):
            w = self.w[...].reshape(-1, math.prod(self.outputs)).T
            w = decoding_weight(w, self.flat_axes[::-1], shards=shards, panels=panels)
            self.w = nnx.data(w)
            self.transposed = True

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], -1)
        if self.transposed:
            y = decoding_product(x, self.w)
        elif isinstance(self.w, nnx.Param):
            y = matmul(x, self.w[...].astype(x.dtype).reshape(x.shape[-1], -1))
        else:
            y = self.w.matmul(x)
        if self.lora is not None:
            y = y + self.lora(x)
        y = checkpoint_name(y, SAVED).reshape(*y.shape[:-1], *self.outputs)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class Joint(nnx.Module):
    """Projections of one input as a single product, for decoding: a CPU reads one large weight
    faster than several small ones. ``w`` is a ``decoding_weight``. Gives their outputs in order.
    The rows of ``w`` are in ``shards`` equal parts, each with its share of every projection, so
    that a device which holds one part computes its own heads from it.
    """

    def __init__(self, *projections: Proj, shards: int, panels: bool):
        n = projections[0].num_inputs
        inputs = projections[0].w.shape[:n]
        self.num_inputs = n
        self.shards = shards
        self.outputs = tuple(tuple(p.w.shape[n:]) for p in projections)
        K, N = projections[0].flat_axes
        flat = [p.w[...].reshape(math.prod(inputs), -1).T for p in projections]
        w = by_shard(jnp, flat, shards)
        self.w = nnx.data(decoding_weight(w, (N, K), shards=shards, panels=panels))
        self.b = None
        if projections[0].b is not None:
            flat = [p.b[...].ravel() for p in projections]
            self.b = nnx.data(nnx.Param(by_shard(jnp, flat, shards), axes=(N,)))
        self.lora = None

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        x = x.reshape(*x.shape[: x.ndim - self.num_inputs], -1)
        y = decoding_product(x, self.w)
        if self.lora is not None:
            y = y + self.lora(x)
        if self.b is not None:
            y = y + self.b[...].astype(x.dtype)
        y = y.reshape(*y.shape[:-1], self.shards, -1)
        ends = list(itertools.accumulate(math.prod(o) // self.shards for o in self.outputs))
        parts = jnp.split(y, ends[:-1], axis=-1)
        return [
            part.reshape(*part.shape[:-2], *shape)
            for part, shape in zip(parts, self.outputs, strict=True)
        ]


def by_shard(xp: Any, parts: Sequence[Any], shards: int) -> Any:
    """``parts[N_i,..]``, arrays of the NumPy-like ``xp``, as the rows of a ``Joint``."""
    split = [part.reshape(shards, -1, *part.shape[1:]) for part in parts]
    return xp.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])


class Embedding(nnx.Module):
    """A table ``[V, D]``: looked up on the way in, multiplied with on the way out."""

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float, rngs: nnx.Rngs):
        shape = (vocab_size, hidden_size)
        self.w = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Rows of a table that is split over D would be gathered by every device in full.
        table = self.w[...].astype(dtype)
        table = constrain(table, ("vocab", "act_embed"), uneven="replicate")
        return table[tokens]  # [B,T,D]

    def join(self, *, shards: int, panels: bool) -> None:
        """For decoding, where the table is not looked up: see ``decoding_weight``."""
        w = decoding_weight(self.w[...], ("vocab", "embed"), shards=shards, panels=panels)
        self.w = nnx.data(w)

    def logits(self, x: jax.Array) -> jax.Array:
        """``[..., D] -> float32 [..., V]``; products in the dtype of ``x``, sums in float32."""
        return decoding_product(x, self.w, out=jnp.float32)


class LayerNorm(nnx.Module):
    """Mean and variance in float32, as ``torch.nn.LayerNorm``."""

    def __init__(self, size: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square norm (Zhang and Sennrich, 2019); squares in float32, as HF's LLaMA."""

    def __init__(self, size: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Rope(NamedTuple):
    """Rotary positions (Su et al., 2021), float32 ``[B,T,1,H/2]``."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(config: RopeConfig, head_dim: int) -> jax.Array:
    """Angular speeds, float32 ``[H/2]``. ``llama3`` as in HF's ``modeling_rope_utils.py``:
    long waves are slowed down by ``factor``, short ones kept, those between interpolated."""
    speed = config.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if config.scaling == "default":
        return speed
    if config.scaling == "linear":
        return speed / config.factor
    wavelength = 2 * jnp.pi / speed
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = (config.original_max_positions / wavelength - low) / (high - low)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * speed / config.factor + smooth * speed


def rope_angles(config: RopeConfig, head_dim: int, positions: jax.Array) -> Rope:
    """For ``positions[B,T]``; computed once a model, not once a layer."""
    angle = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(config, head_dim)

    def rotation(angle):
        return Rope(jnp.cos(angle), jnp.sin(angle))

    def apart(angle):
        # XLA's CPU backend takes a cosine for cheap, and would compute it again in each layer and
        # for each head; across a branch it does not move it.
        return jax.lax.cond(angle[0, 0, 0, 0] >= 0, rotation, lambda x: Rope(x, x), angle)

    return jax.lax.platform_dependent(angle, cpu=apart, default=rotation)


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the pairs ``(i, i + H/2)`` of ``x[B,T,N,H]``."""
    cos, sin = rope.cos.astype(x.dtype), rope.sin.astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# --- the stack of layers ------------------------------------------------------------------------


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs):
    """``num_layers`` blocks as one, each parameter with an axis L in front."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: make_block(nnx.Rngs(params=key)))(keys)


def unstack(blocks: nnx.Module, *, shards: int, panels: bool) -> tuple[nnx.Module, ...]:
    """Stacked blocks -> one block a layer, joined (see ``Joint``, ``decoding_weight``). Decoding is
    faster so: a scan copies each layer's cache, and on a CPU its weights, out of the stack at every
    step."""
    num_layers = jax.tree.leaves(blocks)[0].shape[0]
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(num_layers))
    for block in layers:
        block.join(shards=shards, panels=panels)
    return layers


def run_blocks(
    blocks: Any,
    x: jax.Array,
    block_inputs: tuple[Any, ...],
    *,
    kv_cache: KVCache | None,
    remat: str,
) -> tuple[jax.Array, KVCache | None]:
    """Applies the blocks to ``x[B,T,D]``; ``block(x, kv_of_layer, *block_inputs)`` gives
    ``(x, kv_of_layer)``. ``blocks`` is stacked (one ``lax.scan``) or a tuple (unrolled).

    ``remat`` says what the backward pass computes again: "full" each layer, "dots" all but the
    projections and the attention's output, "offload" as "dots", but what is kept waits in the
    host's memory, "none" nothing."""

    def body(x, block_and_kv):
        block, kv = block_and_kv
        x, kv = block(x, kv, *block_inputs)
        return constrain(x, ("batch", "length", "act_embed")), kv

    if remat == "full":
        body = jax.checkpoint(body)
    elif remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(SAVED)
        body = jax.checkpoint(body, policy=policy)
    elif remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[SAVED],
            offload_src="device",
            offload_dst="pinned_host",
        )
        body = jax.checkpoint(body, policy=policy)
    if not isinstance(blocks, tuple):
        return jax.lax.scan(body, x, (blocks, kv_cache))
    layers, body = [], jax.jit(body)  # traced once, of whatever layer
    for i, block in enumerate(blocks):
        x, kv = body(
            x, (block, None if kv_cache is None else KVCache(kv_cache.k[i], kv_cache.v[i]))
        )
        layers.append(kv)
    if kv_cache is None:
        return x, None
    return x, KVCache(tuple(kv.k for kv in layers), tuple(kv.v for kv in layers))
