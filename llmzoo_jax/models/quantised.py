"""Frozen weights in few bits: int8 by output channel, and the 4-bit NormalFloat of QLoRA with
double quantisation (Dettmers et al., 2023).

A quantised weight stands in the place of ``layers.Proj.w`` and has its shape, ``[*inputs,
*outputs]``. It is made dense where it is used, so inside the scan over layers one layer at a time,
and again in the backward pass: nothing dense is kept. It has no gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from llmzoo_jax.errors import InputError

BLOCK = 64  # weights that share a scale (NF4), along the last input axis

# NF4: quantiles of the normal distribution, scaled to [-1, 1], with an exact zero; the values of
# the paper's appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class QuantisationError(InputError):
    """A weight can't be quantised as asked; the message names it."""


class Int8(nnx.Module):
    """``codes * scale``: int8 ``codes[*inputs,*outputs]``, float32 ``scale[*outputs]``."""

    def __init__(self, w: jax.Array, *, num_inputs: int, axes: Sequence[str]):
        self.num_inputs = num_inputs
        scale = jnp.abs(w).max(tuple(range(num_inputs))) / 127.0
        codes = jnp.round(w / jnp.where(scale == 0.0, 1.0, scale)).astype(jnp.int8)
        self.codes = nnx.Param(codes, axes=tuple(axes))
        self.scale = nnx.Param(scale.astype(jnp.float32), axes=tuple(axes[num_inputs:]))

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """``[*inputs,*outputs]``."""
        return (self.codes[...] * self.scale[...]).astype(dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """``x[...,K] -> [...,N]``, K and N the products of the sizes of inputs and outputs."""
        return _matmul(x, self)


class Nf4(nnx.Module):
    """``NF4_LEVELS[code] * scale``, a scale for each block of weights along the last input axis:
    64 or, where that does not divide the axis, its largest even divisor below.

    Two codes a byte: ``codes`` uint8 ``[*inputs,*outputs]`` with half the last input axis. The
    scales are quantised too, as ``low + step * scale_codes``: uint8 ``scale_codes`` with the number
    of blocks in the place of the last input axis, float32 ``low, step [*outputs]``.
    """

    def __init__(self, w: jax.Array, *, num_inputs: int, axes: Sequence[str]):
        self.num_inputs = num_inputs
        self.block = _block_size(w.shape[num_inputs - 1])
        inputs = tuple(range(num_inputs))
        blocks = self._split(w, self.block)
        absmax = jnp.abs(blocks).max(num_inputs)  # [..,blocks,*outputs]
        low = absmax.min(inputs)
        step = (absmax.max(inputs) - low) / 255.0
        scale_codes = jnp.round((absmax - low) / jnp.where(step == 0.0, 1.0, step))
        # Small, so every device has the scales of the whole axis: few meshes divide its blocks.
        scale_axes = (*axes[: num_inputs - 1], "blocks", *axes[num_inputs:])
        self.scale_codes = nnx.Param(scale_codes.astype(jnp.uint8), axes=scale_axes)
        self.low = nnx.Param(low.astype(jnp.float32), axes=tuple(axes[num_inputs:]))
        self.step = nnx.Param(step.astype(jnp.float32), axes=tuple(axes[num_inputs:]))
        scale = self._scale()
        codes = _nearest_level(blocks / jnp.where(scale == 0.0, 1.0, scale))
        pairs = self._split(codes.reshape(w.shape), 2)
        even, odd = jnp.moveaxis(pairs, num_inputs, 0)
        self.codes = nnx.Param(even | odd << 4, axes=tuple(axes))

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """``[*inputs,*outputs]``."""
        n, codes = self.num_inputs, self.codes[...]
        shape = (*codes.shape[: n - 1], 2 * codes.shape[n - 1], *codes.shape[n:])
        codes = jnp.stack([codes & 15, codes >> 4], axis=n).reshape(shape)
        w = _levels(self._split(codes, self.block)) * self._scale()
        return w.reshape(shape).astype(dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        """``x[...,K] -> [...,N]``, K and N the products of the sizes of inputs and outputs."""
        return _matmul(x, self)

    def _scale(self) -> jax.Array:
        """float32 ``[..,blocks,1,*outputs]``."""
        scale = self.low[...] + self.step[...] * self.scale_codes[...]
        return jnp.expand_dims(scale, self.num_inputs)

    def _split(self, x: jax.Array, size: int) -> jax.Array:
        """The last input axis as two: ``[..,I,*outputs] -> [..,I/size,size,*outputs]``."""
        n = self.num_inputs
        return x.reshape(*x.shape[: n - 1], -1, size, *x.shape[n:])


KINDS: dict[str, type[nnx.Module]] = {"int8": Int8, "nf4": Nf4}


def _block_size(size: int) -> int:
    if size % 2:
        raise QuantisationError(f"nf4: an axis of size {size} can't be cut into pairs; take int8")
    return max(b for b in range(2, BLOCK + 1, 2) if size % b == 0)


def _nearest_level(x: jax.Array) -> jax.Array:
    """The code of the level next to each of ``x`` in [-1, 1]; uint8."""
    between = [(a + b) / 2 for a, b in itertools.pairwise(NF4_LEVELS)]
    return sum((x > middle).astype(jnp.uint8) for middle in between)


def _levels(codes: jax.Array) -> jax.Array:
    """``NF4_LEVELS[codes]``, float32. A gather: selects by the bits took 3x as long on a CPU, and
    the compiler lifted their constants out of the scan, 16 dense layers of them."""
    return jnp.array(NF4_LEVELS, jnp.float32)[codes]


@jax.custom_vjp
def _matmul(x: jax.Array, w: Int8 | Nf4) -> jax.Array:
    return jax.lax.dot_general(x, _flat(w, x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_backward(w, dy):
    dense = _flat(w, dy.dtype)  # again: the quantised weight is all that was kept
    return jax.lax.dot_general(dy, dense, (((dy.ndim - 1,), (1,)), ((), ()))), None


_matmul.defvjp(lambda x, w: (_matmul(x, w), w), _matmul_backward)


def _flat(w: Int8 | Nf4, dtype: jnp.dtype) -> jax.Array:
    """``[K,N]``."""
    dense = w.dense(dtype)
    return dense.reshape(math.prod(dense.shape[: w.num_inputs]), -1)
