"""What a checkpoint should hold: a checksum of every tensor, made on the devices that hold it.

    {"tensors": {"params.embed.w": "float32[620,40] 1f0c93aa", ...}, "heldout_loss": 2.2, "sum": ""}

File formats notice few of the bytes that a disk or a network changes, and a missing chunk reads as
zeros. So each tensor is summed up where it is before it is saved, and again after it is restored:
that covers the copies to the host, the files, and a new layout. Integer sums don't depend on the
mesh. It takes one pass over the memory of each device; no file is read twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def make(leaves: dict[str, Any], *, heldout_loss: float | None = None) -> dict[str, Any]:
    """The manifest of named tensors, as plain JSON types. ``heldout_loss`` is what was measured
    of them, if it was."""
    body = {"tensors": _describe(leaves), "heldout_loss": heldout_loss}
    return body | {"sum": _sum(body)}


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of the checkpoint in ``folder``; None where it is missing or was changed."""
    try:
        text = (folder / "_CHECKPOINT_METADATA").read_text(encoding="utf-8")
        made = dict(json.loads(text)["custom_metadata"])
        expected = made.pop("sum")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return made if expected == _sum(made) else None


def shape(tensor: str) -> str:
    """``"float32[620,40] 1f0c93aa" -> "[620,40]"``."""
    return tensor[tensor.index("[") : tensor.index("]") + 1]


def changed(tensors: dict[str, str], leaves: dict[str, Any]) -> list[str]:
    """The names of those ``leaves`` that are not what the ``tensors`` of a manifest say."""
    return [name for name, found in _describe(leaves).items() if found != tensors[name]]


def _describe(leaves: dict[str, Any]) -> dict[str, str]:
    sums = jax.device_get(_checksums(leaves))
    return {name: f"{_kind(x)} {int(sums[name]):08x}" for name, x in leaves.items()}


def _kind(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit  # as one program: on CPUs, several at once that reduce over devices can block each other
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(x) for name, x in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """uint32: the sum of a mix of each element's bits with its index, modulo 2**32. The mix (the
    last steps of MurmurHash3) is one-to-one, so that a change of one element always shows, and any
    other with a chance of all but 2**-32."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    mixed = x.astype(jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) * 0x9E3779B1 % 2**32
        mixed += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
