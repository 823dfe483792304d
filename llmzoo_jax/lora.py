"""LoRA: low-rank adapters beside frozen projections (Hu et al., 2021), and QLoRA's frozen base.

The adapters of a model are a dict ``{"blocks.attention.q": Adapter}``, stacked over the layers as
the blocks are. They are a pytree of their own: the parameters that are trained, and all that
gradients, optimiser and checkpoints hold. ``attach`` hangs them into the base for a forward pass.
"""

from __future__ import annotations

import difflib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmzoo_jax import models
from llmzoo_jax.config import LoraConfig, ModelConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.models import quantised
from llmzoo_jax.models.layers import Proj, matmul
from llmzoo_jax.models.packed_attention import SAVED

# Every projection of a layer: its name in HF's modules, which is what PEFT users know -> ours.
TARGETS: dict[str, dict[str, str]] = {
    "bloom": {
        "query_key_value": "blocks.attention.qkv",
        "dense": "blocks.attention.out",
        "dense_h_to_4h": "blocks.up",
        "dense_4h_to_h": "blocks.down",
    },
    "llama": {
        "q_proj": "blocks.attention.q",
        "k_proj": "blocks.attention.k",
        "v_proj": "blocks.attention.v",
        "o_proj": "blocks.attention.out",
        "gate_proj": "blocks.gate",
        "up_proj": "blocks.up",
        "down_proj": "blocks.down",
    },
}
DEFAULT_TARGETS = {  # LLM Zoo's
    "bloom": ("query_key_value",),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
}

Adapters = dict[str, "Adapter"]


class LoraError(InputError):
    """Adapters can't be made as the config asks; the message names the key."""


class Adapter(nnx.Module):
    """What is added to a projection: ``alpha / rank * dropout(x) @ lora_a @ lora_b``.

    float32 ``lora_a[*inputs,R]``, uniform as torch initialises a linear layer, and
    ``lora_b[R,*outputs]``, zero: at first, nothing is added (PEFT's defaults). ``keys[B]`` are the
    randomness of dropout, one a row; None: no dropout.
    """

    def __init__(self, like: Proj, config: LoraConfig, key: jax.Array):
        n, shape, axes = like.num_inputs, like.w.shape, like.w.get_metadata()["axes"]
        inputs, outputs = shape[-len(axes) :][:n], shape[-len(axes) :][n:]
        bound = 1.0 / math.sqrt(math.prod(inputs))
        a = jax.random.uniform(key, (*inputs, config.rank), minval=-bound, maxval=bound)
        self.lora_a = nnx.Param(a, axes=(*axes[:n], "rank"))
        self.lora_b = nnx.Param(jnp.zeros((config.rank, *outputs)), axes=("rank", *axes[n:]))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.keys = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``x[...,K] -> [...,N]``, K and N the products of the sizes of inputs and outputs."""
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        if self.keys is not None:
            keep = 1.0 - self.dropout
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(self.keys)
            x = jnp.where(kept, x / keep, 0.0)
        y = checkpoint_name(matmul(x, a.reshape(-1, a.shape[-1])), SAVED)  # [...,R]
        return matmul(y, b.reshape(b.shape[0], -1)) * self.scale

    def delta(self) -> jax.Array:
        """What it adds to the weight, ``[*inputs,*outputs]``."""
        return self.scale * jnp.tensordot(self.lora_a[...], self.lora_b[...], axes=1)


def targets(config: LoraConfig, model: ModelConfig) -> tuple[str, ...]:
    """HF's names of the projections that get adapters, in the order of TARGETS. Raises LoraError
    for a config that can't be followed."""
    known = TARGETS[model.family]
    for name in config.targets:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LoraError(
                f"lora.targets: {model.family} has no projection {name!r}{hint} "
                f"(it has {', '.join(known)})"
            )
    if config.rank < 1:
        raise LoraError(f"lora.rank must be 1 or more, not {config.rank}")
    if not 0.0 <= config.dropout < 1.0:
        raise LoraError(f"lora.dropout must be in [0, 1), not {config.dropout}")
    if config.alpha <= 0.0:
        raise LoraError(f"lora.alpha must be more than 0, not {config.alpha}")
    chosen = config.targets or DEFAULT_TARGETS[model.family]
    return tuple(name for name in known if name in chosen)


def init(config: LoraConfig, model: ModelConfig, key: jax.Array) -> Adapters:
    """New adapters. What one begins with does not depend on which others there are."""
    base = models.abstract(model)
    adapters = {}
    for number, (name, path) in enumerate(TARGETS[model.family].items()):
        if name in targets(config, model):
            make = functools.partial(Adapter, module(base, path), config)
            keys = jax.random.split(jax.random.fold_in(key, number), model.num_layers)
            adapters[path] = jax.vmap(make)(keys)
    return adapters


def init_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 0)


def dropout_key(seed: int, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def abstract(config: LoraConfig, model: ModelConfig) -> Adapters:
    """The adapters with shapes in place of arrays."""
    return jax.eval_shape(lambda: init(config, model, jax.random.key(0)))


def attach(base: nnx.Module | None, params: Any, keys: jax.Array | None = None) -> nnx.Module:
    """The model that computes: ``base`` with the adapters ``params``, or ``params`` itself where
    there is no base. No array is copied. With ``keys[B]``, one a row, the adapters drop out."""
    if base is None:
        return params
    model = jax.tree.map(lambda x: x, base)  # other modules, the same arrays
    paths = list(TARGETS[base.config.family].values())
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    for path, adapter in params.items():
        if keys is not None and adapter.dropout:
            adapter = jax.tree.map(lambda x: x, adapter)
            layers = jnp.arange(adapter.lora_a.shape[0])
            own = fold(keys, paths.index(path))
            adapter.keys = nnx.data(jax.vmap(lambda layer, own=own: fold(own, layer))(layers))
        module(model, path).lora = nnx.data(adapter)
    return model


def freeze(model: nnx.Module, config: LoraConfig) -> nnx.Module:
    """A float32 model as the base of a run: in ``base_dtype``, the projections quantised."""
    base = jax.tree.map(lambda x: x.astype(config.base_dtype), model)
    if config.quantise != "none":
        for path in TARGETS[model.config.family].values():
            proj = module(model, path)
            module(base, path).w = nnx.data(quantise(proj, proj.w[...], config))
    return base


def quantise(like: Proj, w: jax.Array, config: LoraConfig) -> nnx.Module:
    """The stacked weight ``w[L,*inputs,*outputs]`` of a projection, quantised."""
    kind, axes = quantised.KINDS[config.quantise], like.w.get_metadata()["axes"]
    return jax.vmap(lambda w: kind(w, num_inputs=like.num_inputs, axes=axes))(w)


def merge(base: nnx.Module, adapters: Adapters) -> nnx.Module:
    """A float32 model as any other: the base, made dense, with what the adapters add to it."""
    model = jax.tree.map(lambda x: x, base)
    for path in TARGETS[base.config.family].values():
        proj = module(model, path)
        if isinstance(proj.w, nnx.Param):
            w, axes = proj.w[...].astype(jnp.float32), proj.w.get_metadata()["axes"]
        else:
            w = jax.vmap(lambda w: w.dense(jnp.float32))(proj.w)
            axes = proj.w.codes.get_metadata()["axes"]
        if path in adapters:
            w = w + jax.vmap(Adapter.delta)(adapters[path])
        proj.w = nnx.Param(w, axes=axes)
    return jax.tree.map(lambda x: x.astype(jnp.float32), model)


def module(model: nnx.Module, path: str) -> Any:
    """``model.blocks.up`` for "blocks.up"."""
    return functools.reduce(getattr, path.split("."), model)
