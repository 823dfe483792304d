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
from jax.sharding import Mesh

from llmzoo_jax import lora, models, peft_format, sharding
from llmzoo_jax.config import ModelConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.models.layers import by_shard

# The projections that a prepared model has as one (``layers.Joint``), in the order of its outputs.
JOINED = {"attention.qkv": ("attention.q", "attention.k", "attention.v"), "gate_up": ("gate", "up")}


class Slots(nnx.Module):
    """What each row's adapter adds: ``x[B,T,K] -> [B,T,N]``. ``a[n,K,R]`` and ``b[n,R,N]`` of n
    slots, the scale in ``b``; ``rows[B]``, the slot of each row, is set where the model is called.
    """

    def __init__(self, n: int, place: Place, rank: int, dtype: Any, mesh: Mesh | None):
        def zeros(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            where = mesh and sharding.sharding_of(shape, axes, mesh, name=f"{place.path}.{name}")
            return nnx.Param(jnp.zeros(shape, dtype, device=where), axes=axes)

        K, N = place.axes
        outputs = sum(part.outputs for part in place.parts)
        self.a = zeros("a", (n, place.parts[0].inputs, rank), (None, K, None))
        self.b = zeros("b", (n, rank, outputs), (None, None, N))
        self.rows = None

    def __call__(self, x: jax.Array) -> jax.Array:
        def add(x):
            a, b = self.a[...][self.rows], self.b[...][self.rows]  # [B,K,R], [B,R,N]
            return jnp.einsum("BTR,BRN->BTN", jnp.einsum("BTK,BKR->BTR", x, a), b)

        nothing = jnp.zeros((*x.shape[:-1], self.b.shape[-1]), x.dtype)
        return jax.lax.cond((self.rows > 0).any(), add, lambda x: nothing, x)


class Part(NamedTuple):
    path: str  # of a projection, in a block of the model as it is stored
    inputs: int  # K
    outputs: int  # N


class Place(NamedTuple):
    """Where adapters are, and of which projections: several where these are one (``Joint``)."""

    path: str  # in a block of the model that computes
    parts: tuple[Part, ...]
    axes: tuple[str, str]  # logical ones of K and N
    shards: int  # as the Joint has its outputs


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


def attach(
    model: nnx.Module, *, adapters: int, rank: int, dtype: str, mesh: Mesh | None
) -> nnx.Module:
    """The prepared ``model`` with empty slots at every projection; no array of it is copied."""
    model = jax.tree.map(lambda x: x, model)
    for place in _places(model):
        for block in model.blocks:
            slots = Slots(adapters + 1, place, rank * len(place.parts), jnp.dtype(dtype), mesh)
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
            a = np.zeros(slots.a.shape[1:], np.float32)
            room = a.shape[1] // len(place.parts)
            rows = []  # of b's transpose: the outputs of each part, from its own ranks alone
            for number, part in enumerate(place.parts):
                rows.append(np.zeros((part.outputs, a.shape[1]), np.float32))
                if (adapter := adapters.get(f"blocks.{part.path}")) is not None:
                    rank = adapter.lora_b.shape[1]
                    at = slice(number * room, number * room + rank)
                    a[:, at] = np.asarray(adapter.lora_a[layer]).reshape(part.inputs, rank)
                    b = adapter.scale * np.asarray(adapter.lora_b[layer])
                    rows[-1][:, at] = b.reshape(rank, part.outputs).T
            slots.a = _with(slots.a, slot, a)
            slots.b = _with(slots.b, slot, by_shard(np, rows, place.shards).T)
    return model


def _with(x: nnx.Param, slot: int, new: np.ndarray) -> nnx.Param:
    """``x`` with ``new`` in a slot; by way of the host, where nothing is compiled."""
    whole = np.array(x[...])
    whole[slot] = new
    return nnx.Param(jax.device_put(whole, x[...].sharding), axes=x.get_metadata()["axes"])


def _places(model: nnx.Module) -> list[Place]:
    left = {place.path: place for place in _projections(model.config)}
    places = []
    for path, paths in JOINED.items():
        joint = lora.module(model.blocks[0], path) if set(paths) <= set(left) else None
        if joint is not None:
            parts = [left.pop(path) for path in paths]
            several = tuple(place.parts[0] for place in parts)
            places.append(Place(path, several, parts[0].axes, joint.shards))
    return [*places, *left.values()]


@functools.cache
def _projections(config: ModelConfig) -> list[Place]:
    """All of a block, each by itself."""
    like, places = models.abstract(config), []
    for path in lora.TARGETS[config.family].values():
        projection = lora.module(like, path)
        shape, n = projection.w.shape[1:], projection.num_inputs
        path = path.removeprefix("blocks.")
        part = Part(path, math.prod(shape[:n]), math.prod(shape[n:]))
        places.append(Place(path, (part,), projection.flat_axes, 1))
    return places
