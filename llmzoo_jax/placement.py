"""Reads a Hugging Face folder as a model that decodes, each layer to its place at once: no device
ever holds more than its part, and the host one parameter."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmzoo_jax import hf, lora, models, sharding
from llmzoo_jax.config import LoraConfig, ModelConfig
from llmzoo_jax.generate import lay_out


def read(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: str,
    weights: str,
    mesh: Mesh | None,
    delta_of: str | Path | None = None,
) -> nnx.Module:
    """As ``generate.prepare`` makes it; ``weights`` is "dtype", or one of ``quantised.KINDS``, made
    as it is read. ``delta_of``: see ``hf.read_params``."""
    how = LoraConfig(quantise="none" if weights == "dtype" else weights, base_dtype=dtype)
    like = models.abstract(config)
    model = jax.eval_shape(functools.partial(lora.freeze, config=how), like)
    a_layer = jax.eval_shape(lambda blocks: jax.tree.map(lambda x: x[0], blocks), like.blocks)
    quantised = lora.TARGETS[config.family].values() if how.quantise != "none" else ()
    layout = _layout(like, mesh) | {f"blocks.{n}": s for n, s in _layout(a_layer, mesh).items()}

    def put(name: str, x: np.ndarray, dtype: Any) -> jax.Array:
        return jax.device_put(x.astype(dtype), layout[name])

    whole: dict[str, jax.Array] = {}
    layers: list[dict[str, jax.Array]] = [{} for _ in range(config.num_layers)]
    for name, array in hf.read_params(folder, config, delta_of=delta_of):
        path = name.removesuffix(".w")
        if not name.startswith("blocks."):
            whole[name] = put(name, array, jnp.dtype(dtype))
        elif path not in quantised:
            for layer, x in zip(layers, array, strict=True):
                layer[name] = put(name, x, jnp.dtype(dtype))
        else:
            quantise = _quantise(lora.module(like, path), how, array[0], mesh)
            for layer, x in zip(layers, array, strict=True):
                weight = quantise(put(name, x, np.float32))
                parts = sharding.named_leaves(weight)
                layer |= {f"{name}.{part}": y for part, y in parts.items()}
    names = [f"blocks.{name}" for name in sharding.named_leaves(model.blocks)]
    structure = jax.tree.structure(model.blocks)
    blocks = []
    while layers:  # each is let go as it is joined
        layer = layers.pop(0)
        blocks.append(jax.tree.unflatten(structure, [layer.pop(name) for name in names]))
        blocks[-1].join(shards=sharding.ways(mesh), panels=sharding.one_thread_a_device(mesh))
    model = jax.tree.map(lambda x: x, model)
    model.blocks = nnx.data(tuple(blocks))
    model = jax.tree_util.tree_map_with_path(
        lambda path, x: whole.get(sharding.path_name(path), x), model
    )
    return lay_out(model, mesh)


def _layout(tree: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Where each of the named leaves goes; None: the default device."""
    names = sharding.named_leaves(tree)
    if mesh is None:
        return dict.fromkeys(names)
    places = sharding.tree_shardings(tree, mesh, uneven="replicate")
    return dict(zip(names, jax.tree.leaves(places), strict=True))


def _quantise(proj: nnx.Module, how: LoraConfig, like: np.ndarray, mesh: Mesh | None):
    """The compiled function that quantises one layer's float32 weight of a projection."""

    def quantise(w):
        return jax.tree.map(lambda x: x[0], lora.quantise(proj, w[None], how))

    if mesh is None:
        return jax.jit(quantise)
    abstract = jax.eval_shape(quantise, like)
    layout = sharding.tree_shardings(abstract, mesh, uneven="replicate")
    return jax.jit(quantise, out_shardings=layout)
