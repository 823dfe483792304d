"""Optimiser state in fewer bits: bfloat16, or int8 in blocks (Dettmers et al., 2022).

``compressed(tx, dtype)`` is ``tx``, whose moments of matrices are kept in ``dtype`` between steps;
its arithmetic stays float32, and so do vectors, which are few.

Rounding is stochastic: with b2 = 0.999 a second moment changes by less than half a step of
bfloat16 or int8, so that rounding to the nearest would never let it fall. The noise depends on the
step alone, so a run that resumes rounds as it would have.

int8 is the paper's dynamic quantisation, by arithmetic in place of a table: a code is the binary
number of leading zeros (a power of ten each), a one, and a fraction; each block of up to ``BLOCK``
numbers along the last axis is divided by its largest. Second moments have no sign, and the code of
their root is kept: twice the range, and small ones never become zero beside a first moment.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llmzoo_jax.sharding import path_name

BLOCK = 64  # at most; a divisor of the axis, and small, so that shards hold whole blocks


class Compressed(NamedTuple):
    """The state of ``compressed(tx)``."""

    count: jax.Array  # int32, updates done: the seed of the noise
    inner: Any  # the state of tx, with its matrices compressed


class Quantised(NamedTuple):
    """A moment in int8. Both are laid out on the mesh as the parameter is."""

    codes: nnx.Param  # int8, or uint8 of a second moment, in the moment's shape
    scales: nnx.Param  # float32, the largest magnitude of each block


def is_matrix(name: str) -> bool:
    """Whether a parameter, by its dotted name, is a matrix: no norm and no bias."""
    return name.endswith((".w", ".lora_a", ".lora_b"))


def compressed(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """``tx`` with its moments in ``dtype``: "float32" (``tx`` itself), "bfloat16" or "int8"."""
    if dtype == "float32":
        return tx
    pack = {"bfloat16": _pack_bfloat16, "int8": _pack_int8}[dtype]

    def zeros(name, moment, seed):  # not pack: XLA would fold all of it into constants, for long
        made = jax.eval_shape(functools.partial(pack, name), moment, seed)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

    def init(params):
        count = jnp.zeros((), jnp.int32)
        return Compressed(count, _map_matrices(zeros, tx.init(params), count))

    def update(updates, state, params=None):
        inner = jax.tree.map(_unpack, state.inner, is_leaf=_is_moment)
        updates, inner = tx.update(updates, inner, params)
        count = optax.safe_increment(state.count)
        return updates, Compressed(count, _map_matrices(pack, inner, count))

    return optax.GradientTransformation(init, update)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays of a pytree, over all devices, each counted once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _is_moment(node: Any) -> bool:
    return isinstance(node, nnx.Variable | Quantised)


def _map_matrices(pack: Callable, state: Any, count: jax.Array) -> Any:
    """``pack(name, moment, seed)`` on every moment of a matrix; a seed for each."""
    numbers = itertools.count(1)

    def one(path, node):
        name = path_name(path)
        # In a tree that optax has masked, a variable may hold nothing.
        if not isinstance(node, nnx.Variable) or not is_matrix(name) or not jax.tree.leaves(node):
            return node
        return pack(name, node, _mix(count.astype(jnp.uint32) + _mix(jnp.uint32(next(numbers)))))

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_moment)


def _unpack(node: Any) -> Any:
    if isinstance(node, Quantised):
        return jax.tree.map(lambda codes: dequantise(codes, node.scales[...]), node.codes)
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, node)


def _noise(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """uint32, as good as random, from the index of each number alone: on any mesh the same, and
    ten times as fast to compile and to compute as ``jax.random``."""
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(index + seed)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3, after a multiplication that parts neighbours."""
    x = x * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# --- bfloat16 -----------------------------------------------------------------------------------


def _pack_bfloat16(name: str, moment: nnx.Variable, seed: jax.Array) -> nnx.Variable:
    return jax.tree.map(lambda x: round_bfloat16(x, seed), moment)


def round_bfloat16(x: jax.Array, seed: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probability that keeps the mean."""
    noise = _noise(x.shape, seed) >> 16
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


# --- int8 ---------------------------------------------------------------------------------------


def _pack_int8(name: str, moment: nnx.Variable, seed: jax.Array) -> Quantised | nnx.Variable:
    x = moment[...]
    if block_size(x.shape[-1]) < 4:  # scales would take more than codes save
        return moment
    codes, scales = quantise(x, seed, signed="nu" not in name.split("."))
    axes = moment.get_metadata()["axes"]
    return Quantised(
        jax.tree.map(lambda _: codes, moment), nnx.Param(scales, axes=axes, uneven="replicate")
    )


def block_size(n: int) -> int:
    """The largest divisor of ``n`` up to ``BLOCK``."""
    return max(d for d in range(1, min(n, BLOCK) + 1) if n % d == 0)


def quantise(x: jax.Array, seed: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    """float32 ``[..., n]`` to codes ``[..., n]``, int8 if ``signed`` and else uint8, and scales
    ``[..., n / block]``. The magnitude, or the root of what has no sign, is rounded up or down
    with the probability that keeps its mean."""
    blocks = x.reshape(*x.shape[:-1], -1, block_size(x.shape[-1]))
    size = jnp.abs(blocks) if signed else jnp.sqrt(blocks)
    scales = size.max(-1)
    bits = 7 if signed else 8
    y = size / jnp.where(scales > 0, scales, 1)[..., None] * _value(2**bits - 1, bits)
    n, power = jnp.full_like(y, 2.0 ** (bits - 1)), jnp.ones_like(y)
    for decade in range(1, bits):
        n = jnp.where(y <= 0.1**decade, 2.0 ** (bits - 1 - decade), n)
        power = jnp.where(y <= 0.1**decade, 10.0**decade, power)
    place = n + (y * power - 0.1) / 0.9 * n - 0.5  # the inverse of _value, between codes
    least = _value(1, bits)
    place = jnp.where(y < least, y / least, place)
    noise = (_noise(blocks.shape, seed) >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
    codes = jnp.clip(jnp.floor(place + noise), 0, 2**bits - 1)
    codes = (jnp.sign(blocks) * codes).astype(jnp.int8) if signed else codes.astype(jnp.uint8)
    return codes.reshape(x.shape), scales


def dequantise(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The inverse of ``quantise``, but for the rounding: float32 ``[..., n]``."""
    signed = codes.dtype == jnp.int8
    bits = 7 if signed else 8
    blocks = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    value = _value(jnp.abs(blocks), bits) * (scales / _value(2**bits - 1, bits))[..., None]
    x = jnp.sign(blocks) * value if signed else jnp.square(value)
    return x.reshape(codes.shape)


def _value(code: Any, bits: int) -> Any:
    """The number that a code stands for: with n the highest power of two in it, and z the number
    of zeros before that, 10^-z * (0.1 + 0.9 * (code - n + 0.5) / n); 0 stands for 0."""
    xp = jnp if isinstance(code, jax.Array) else np
    n = xp.ones_like(code, dtype=np.float32)
    power = n * 0.1 ** (bits - 1)
    for decade in reversed(range(bits - 1)):
        highest = 2 ** (bits - 1 - decade)
        n = xp.where(code >= highest, highest, n)
        power = xp.where(code >= highest, 0.1**decade, power)
    return xp.where(code > 0, power * (0.1 + 0.9 * (code - n + 0.5) / n), 0.0)
