"""Several LoRA adapters over one base: each row of a batch with its own, or none.

Each projection gets the matrices of all adapters, stacked; slot 0 adds nothing. A new adapter is
written into a slot, so nothing is compiled again when one is loaded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmzoo_jax import lora, models, peft_format
from llmzoo_jax.config import ModelConfig
from llmzoo_jax.errors import InputError

# The projections that a prepared model has as one (``layers.Joint``), in the order of its outputs.
JOINED = {"attention.qkv": ("attention.q", "attention.k", "attention.v"), "gate_up": ("gate", "up")}


class Slots(nnx.Module):
    """What each row's adapter adds: ``x[B,T,K] -> [B,T,N]``. ``a[n,K,R]`` and ``b[n,R,N]`` of n
    slots, the scale in ``b``; ``rows[B]``, the slot of each row, is set where the model is called.
    """

    def __init__(self, n: int, inputs: int, outputs: int, rank: int, dtype: Any):
        self.a = nnx.Param(jnp.zeros((n, inputs, rank), dtype))
        self.b = nnx.Param(jnp.zeros((n, rank, outputs), dtype))
        self.rows = None

    def __call__(self, x: jax.Array) -> jax.Array:
        def add(x):
            a, b = self.a[...][self.rows], self.b[...][self.rows]  # [B,K,R], [B,R,N]
            return jnp.einsum("BTR,BRN->BTN", jnp.einsum("BTK,BKR->BTR", x, a), b)

        nothing = jnp.zeros((*x.shape[:-1], self.b.shape[-1]), x.dtype)
        return jax.lax.cond((self.rows > 0).any(), add, lambda x: nothing, x)


class Place(NamedTuple):
    """Where the parts of a projection's adapters are: of each part, its path, K and N."""

    path: str  # in a block of the model that computes
    parts: tuple[tuple[str, int, int], ...]


class Loaded:
    """Which adapter is in which of the slots 1 to ``places``."""

    def __init__(self, places: int):
        self.places = places
        self._found: dict[str | None, tuple[int, Hashable]] = {None: (0, ("adapter", 0))}
        self._loads = 0

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self._found if name is not None)

    def check(self, name: str | None) -> None:
        if name not in self._found:
            raise InputError(f"there is no adapter {name!r}")

    def find(self, name: str | None) -> tuple[int, Hashable]:
        """Its slot, and what tells its keys and values from those of other adapters."""
        self.check(name)
        return self._found[name]

    def free_slot(self, name: str, busy: set[int]) -> int:
        """For a new adapter; ``busy`` are slots of requests that still run."""
        if name in self._found:
            raise InputError(f"there is an adapter {name!r} already; unload it first")
        free = set(range(1, self.places + 1)) - busy - {slot for slot, _ in self._found.values()}
        if not free:
            raise InputError(
                f"all {self.places} places for adapters are taken (--max_adapters); unload one"
            )
        return min(free)

    def add(self, name: str, slot: int) -> None:
        self._loads += 1
        self._found[name] = slot, ("adapter", self._loads)

    def remove(self, name: str) -> None:
        self.check(name)
        del self._found[name]


def attach(model: nnx.Module, *, adapters: int, rank: int, dtype: str) -> nnx.Module:
    """The prepared ``model`` with empty slots at every projection; no array of it is copied."""
    model = jax.tree.map(lambda x: x, model)
    for place in _places(model):
        inputs, outputs = place.parts[0][1], sum(n for _, _, n in place.parts)
        for block in model.blocks:
            slots = Slots(adapters + 1, inputs, outputs, rank * len(place.parts), jnp.dtype(dtype))
            lora.module(block, place.path).lora = nnx.data(slots)
    return model


def select(model: nnx.Module, rows: jax.Array) -> None:
    """Tells a model with slots, inside a compiled function, which slot each row has."""
    for place in _places(model):
        for block in model.blocks:
            if (slots := lora.module(block, place.path).lora) is not None:
                slots.rows = nnx.data(rows)


def read(folder: str | Path, config: ModelConfig, *, rank: int) -> lora.Adapters:
    """The adapters of a PEFT folder. Raises InputError where their rank is above ``rank``."""
    theirs = peft_format.read_config(folder, config)
    if theirs.rank > rank:
        raise InputError(
            f"{folder}: its rank is {theirs.rank}; the server has room for --max_lora_rank={rank}"
        )
    return peft_format.load(folder, theirs, config)


def put(model: nnx.Module, slot: int, adapters: lora.Adapters) -> nnx.Module:
    """The model with ``adapters`` in a slot, in place of what was there."""
    model = jax.tree.map(lambda x: x, model)
    for place in _places(model):
        for layer, block in enumerate(model.blocks):
            slots = lora.module(block, place.path).lora
            a, b = np.zeros(slots.a.shape[1:], np.float32), np.zeros(slots.b.shape[1:], np.float32)
            room = a.shape[1] // len(place.parts)
            column = 0
            for part, (path, inputs, outputs) in enumerate(place.parts):
                if (adapter := adapters.get(f"blocks.{path}")) is not None:
                    rank = adapter.lora_b.shape[1]
                    at = slice(part * room, part * room + rank)
                    a[:, at] = np.asarray(adapter.lora_a[layer]).reshape(inputs, rank)
                    b[at, column : column + outputs] = adapter.scale * np.asarray(
                        adapter.lora_b[layer]
                    ).reshape(rank, outputs)
                column += outputs
            slots.a = nnx.Param(_with(slots.a[...], slot, a))
            slots.b = nnx.Param(_with(slots.b[...], slot, b))
    return model


def _with(x: jax.Array, slot: int, new: np.ndarray) -> jax.Array:
    """``x`` with ``new`` in a slot; by way of the host, where nothing is compiled."""
    whole = np.array(x)
    whole[slot] = new
    return jnp.asarray(whole)


def _places(model: nnx.Module) -> list[Place]:
    sizes = dict(_sizes(model.config))
    places = []
    for joint, paths in JOINED.items():
        if set(paths) <= set(sizes) and lora.module(model.blocks[0], joint) is not None:
            places.append(Place(joint, tuple((path, *sizes.pop(path)) for path in paths)))
    return places + [Place(path, ((path, *size),)) for path, size in sizes.items()]


@functools.cache
def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Of each projection of a block: K and N."""
    like, sizes = models.abstract(config), {}
    for path in lora.TARGETS[config.family].values():
        projection = lora.module(like, path)
        shape, n = projection.w.shape[1:], projection.num_inputs
        sizes[path.removeprefix("blocks.")] = math.prod(shape[:n]), math.prod(shape[n:])
    return sizes
