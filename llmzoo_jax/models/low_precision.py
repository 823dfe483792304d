"""Products of projections in 8 bits, for training on hardware that multiplies them faster.

``y = x @ w`` and the gradients ``dx = dy @ w.T`` and ``dw = x.T @ dy`` are products of codes of 8
bits, summed in int32 or float32, and scaled afterwards. So a scale may differ only by what is not
summed over: ``x`` has one a row, ``w`` one a column (an output). The gradients take the codes of
the forward pass again: what stands in their sum, the scale of the other side, goes into ``dy``
before that is made codes. They are the gradients of what was computed, up to the rounding of
``dy``, and ``x`` and ``w`` are rounded once. All is rounded to the nearest and nothing is kept from
step to step, so a step depends on its batch and weights alone.

int8 has one step size for a whole row, and ``dw`` sums over all tokens, whose gradients differ by
orders of magnitude: it stays a product in the dtype of ``x`` (SwitchBack: Wortsman et al., 2023).
float8 has an exponent for each number, and takes ``dw`` too; with a scale a row, e4m3 has the range
for gradients (torchao's "rowwise", DeepSeek-V3), and twice the precision of e5m2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmzoo_jax.models.layers import Proj, weight_gradient


class Format(NamedTuple):
    codes: jnp.dtype  # of x, w and dy
    dw: bool  # a product of codes, too?


FORMATS = {"int8": Format(jnp.int8, dw=False), "fp8": Format(jnp.float8_e4m3fn, dw=True)}


class Codes(NamedTuple):
    """``values * scale``, float32 ``scale`` with 1 in the place of every axis that shares it."""

    values: jax.Array
    scale: jax.Array


def quantise(x: jax.Array, axes: int | Sequence[int], dtype: jnp.dtype) -> Codes:
    """``x`` in 8 bits, the largest magnitude along ``axes`` as the largest code. What is not finite
    leaves a scale that is not, so no product hides it."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)
    scale = jnp.abs(x).max(axes, keepdims=True).astype(jnp.float32) / largest
    # A product instead of a quotient for each number; so tiny a scale that it has no inverse is 0.
    inverse = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0.0, 1.0 / scale)
    values = x.astype(jnp.float32) * inverse
    return Codes((jnp.round(values) if integer else values).astype(dtype), scale)


def _product(a: jax.Array, b: jax.Array, contract: Any, dtype: jnp.dtype, **options) -> jax.Array:
    """Of codes, contracted over the axes ``(of a, of b)``; float32. Sums of floats are rounded to
    ``dtype``, that of activations, as sums of ``layers.matmul`` are."""
    sums = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else dtype
    y = jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=sums, **options)
    return y.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, kind: str) -> jax.Array:
    """``x[...,K] @ w[K,N]`` in the dtype of ``x``; ``kind`` is a key of FORMATS."""
    return _forward(x, w, kind)[0]


def _forward(x, w, kind):
    form = FORMATS[kind]
    qx, qw = quantise(x, -1, form.codes), quantise(w, 0, form.codes)
    y = _product(qx.values, qw.values, ((x.ndim - 1,), (0,)), x.dtype) * qx.scale * qw.scale[0]
    like = jnp.zeros((), w.dtype)  # only arrays may be kept
    return y.astype(x.dtype), (qx if form.dw else x, qw, like)


def _backward(kind, saved, dy):  # dy[...,N]
    x, qw, like = saved
    form, lead = FORMATS[kind], tuple(range(dy.ndim - 1))
    # On a GPU, the highest precision of a product of float8 is that its sums are float32.
    gradient = functools.partial(_product, dtype=dy.dtype, precision=jax.lax.Precision.HIGHEST)
    q = quantise(dy * qw.scale[0], -1, form.codes)
    dx = gradient(q.values, qw.values, ((dy.ndim - 1,), (1,))) * q.scale
    if form.dw:
        q = quantise(dy * x.scale, lead, form.codes)
        dw = gradient(x.values, q.values, (lead, lead)) * q.scale.reshape(-1)
    else:
        dw = weight_gradient(x, dy)
    return dx.astype(dy.dtype), dw.astype(like.dtype)


matmul.defvjp(_forward, _backward)


class Weight(nnx.Module):
    """In the place of ``Proj.w``, and its parameter: ``w[*inputs,*outputs]``, of which products are
    computed in 8 bits."""

    def __init__(self, w: nnx.Param, kind: str):
        self.w = w
        self.kind = kind

    def matmul(self, x: jax.Array) -> jax.Array:
        """``x[...,K] -> [...,N]``, K and N the products of the sizes of inputs and outputs."""
        return matmul(x, self.w[...].reshape(x.shape[-1], -1), self.kind)


def attach(model: nnx.Module, kind: str) -> nnx.Module:
    """The model that computes: ``model`` with every projection in 8 bits, or as it is where
    ``kind`` is "dtype". No array is copied."""
    if kind == "dtype":
        return model

    def one(node):
        if not isinstance(node, Proj):
            return node
        proj = jax.tree.map(lambda x: x, node)  # another module, the same arrays
        proj.w = nnx.data(Weight(proj.w, kind))
        return proj

    return jax.tree.map(one, model, is_leaf=lambda node: isinstance(node, Proj))
