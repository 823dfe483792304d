"""Cross-entropy over a large vocabulary, a chunk of tokens at a time: ``[tokens, V]`` never exists.

A device takes its loss tokens first and skips chunks without any, so prompts and padding cost no
logits. Gradients are computed with the losses, while a chunk's logits are at hand, and wait for the
backward pass; so the loss is a sum, whose gradient by each token is known. The table is gathered
once, and its gradient, summed in float32, is reduced once; left to the compiler, both would cross
the network for every chunk.

Letters: see ``models/layers.py``, but C tokens of a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from llmzoo_jax.sharding import RULES, per_device


class _Plan(NamedTuple):
    """Static: tokens of a device in a chunk, and the mesh axes (empty: not split) over which the
    vocabulary, the width of the table, and the tokens are split."""

    width: int
    vocab: tuple[str, ...]
    embed: tuple[str, ...]
    tokens: tuple[str, ...]


class Loss(NamedTuple):
    total: jax.Array  # float32
    losses: jax.Array  # float32 [B,T], 0 outside the mask; for metrics, they carry no gradient


def chunked_loss(
    table: jax.Array, x: jax.Array, targets: jax.Array, mask: jax.Array, *, chunk: int
) -> Loss:
    """The sum of the cross-entropies within ``mask[B,T]`` of ``targets[B,T]`` under the logits
    ``x[B,T,D] @ table[V,D].T``, with about ``chunk`` tokens' logits at once, over all devices.
    Products in the dtype of ``x``, sums in float32. Differentiable by ``table`` and ``x``, through
    ``total`` alone: a gradient through ``losses`` is a TypeError."""
    mesh = jax.sharding.get_abstract_mesh()
    split = {a for a in mesh.axis_names if mesh.shape[a] > 1}
    axes = {k: tuple(a for a in RULES[k] if a in split) for k in ("vocab", "embed")}
    tokens = tuple(a for k in ("batch", "length") for a in RULES[k] if a in split)
    devices = math.prod(mesh.shape[a] for a in tokens)
    plan = _Plan(max(1, chunk // devices), axes["vocab"], axes["embed"], tokens)
    return Loss(*_loss(plan, table, x, targets, mask))


TABLE, X, TOKENS = ("vocab", "embed"), ("batch", "length", None), ("batch", "length")
INPUTS = (TABLE, X, TOKENS, TOKENS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, *arrays):
    run = functools.partial(_losses, plan)
    losses = per_device(run, inputs=INPUTS, outputs=TOKENS, undivided="error")(*arrays)
    return losses.sum(), losses


def _loss_forward(plan: _Plan, *arrays):
    train_table = arrays[0].perturbed  # not where the base of an adapter has it
    run = per_device(
        functools.partial(_losses_and_gradients, plan, train_table),
        inputs=INPUTS,
        outputs=(TOKENS, X, TABLE if train_table else None),
        undivided="error",
    )
    losses, *gradients = run(*custom_vjp_primal_tree_values(arrays))
    return (losses.sum(), losses), gradients


def _loss_backward(plan: _Plan, gradients, cotangents):
    d_total, d_losses = cotangents
    if not isinstance(d_losses, SymbolicZero):
        raise TypeError("chunked_loss is differentiable through its total, not through its losses")
    dx, d_table = jax.tree.map(lambda x: (x * d_total).astype(x.dtype), gradients)
    return d_table, dx, None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


# --- on one device ------------------------------------------------------------------------------


def _losses(plan: _Plan, table, x, targets, mask) -> jax.Array:
    table = _gathered(plan, table, x.dtype)  # [V,D]

    def some(x, targets, mask):
        return jnp.where(mask, _logits(plan, table, x, targets)[0], 0.0)

    def one(chunk):
        mask = chunk[-1]
        return lax.cond(mask.any(), some, lambda *_: jnp.zeros(mask.shape, jnp.float32), *chunk)

    order, inverse = _loss_tokens_first(mask)
    losses = lax.map(one, _chunks(plan, order, x, targets, mask))
    return _joined(losses, inverse, mask.shape)


def _losses_and_gradients(plan: _Plan, train_table: bool, table, x, targets, mask):
    """Losses, and the gradients of their sum by ``x`` and this device's part of ``table``, float32
    or None."""
    full = _gathered(plan, table, x.dtype)

    def some(d_table, x, targets, mask):
        losses, logits, log_sum, mine = _logits(plan, full, x, targets)
        one_hot = jnp.arange(full.shape[0]) == mine[:, None]
        d_logits = jnp.where(mask[:, None], jnp.exp(logits - log_sum[:, None]) - one_hot, 0.0)
        d_logits = d_logits.astype(x.dtype)  # [C,V]
        dx = jnp.einsum("CV,VD->CD", d_logits, full)
        if train_table:
            # As [D,V]: a CPU would turn all of ``d_logits`` for the product that gives [V,D].
            product = jnp.einsum("CD,CV->DV", x, d_logits, preferred_element_type=jnp.float32)
            d_table = d_table + product
        return d_table, (jnp.where(mask, losses, 0.0), dx)

    def none(d_table, x, targets, mask):
        return d_table, (jnp.zeros(mask.shape, jnp.float32), jnp.zeros_like(x))

    def one(d_table, chunk):
        return lax.cond(chunk[-1].any(), some, none, d_table, *chunk)

    order, inverse = _loss_tokens_first(mask)
    zeros = jnp.zeros(full.shape[::-1], jnp.float32) if train_table else None
    d_table, (losses, dx) = lax.scan(one, zeros, _chunks(plan, order, x, targets, mask))
    losses = _joined(losses, inverse, mask.shape)
    dx = _joined(dx, inverse, mask.shape)
    if plan.vocab:
        dx = lax.psum(dx, plan.vocab)
    return losses, dx, _reduced(plan, d_table.T).astype(table.dtype) if train_table else None


def _gathered(plan: _Plan, table: jax.Array, dtype) -> jax.Array:
    table = table.astype(dtype)
    return lax.all_gather(table, plan.embed, axis=1, tiled=True) if plan.embed else table


def _reduced(plan: _Plan, d_table: jax.Array) -> jax.Array:
    if plan.embed:
        d_table = lax.psum_scatter(d_table, plan.embed, scatter_dimension=1, tiled=True)
    others = tuple(a for a in plan.tokens if a not in plan.embed)
    return lax.psum(d_table, others) if others else d_table


def _logits(plan: _Plan, table, x, targets) -> Any:
    """(losses, logits of this device's part of the vocabulary, log of the sum of their exp over all
    parts, the targets' places in this part) of ``x[C,D]``."""
    logits = jnp.einsum("CD,VD->CV", x, table, preferred_element_type=jnp.float32)
    V = table.shape[0]
    mine = targets - lax.axis_index(plan.vocab) * V if plan.vocab else targets
    here = (mine >= 0) & (mine < V)
    picked = jnp.take_along_axis(logits, jnp.clip(mine, 0, V - 1)[:, None], axis=-1)[:, 0]
    picked = jnp.where(here, picked, 0.0)
    if not plan.vocab:
        log_sum = jax.nn.logsumexp(logits, axis=-1)
    else:
        picked = lax.psum(picked, plan.vocab)
        top = lax.pmax(logits.max(-1), plan.vocab)
        total = lax.psum(jnp.exp(logits - top[:, None]).sum(-1), plan.vocab)
        log_sum = top + jnp.log(total)
    return log_sum - picked, logits, log_sum, mine


def _loss_tokens_first(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of the B * T tokens of the device, and its inverse."""
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    return order, jnp.argsort(order)


def _chunks(plan: _Plan, order: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each ``[B,T,...]`` in the given order as ``[n,C,...]``, padded."""
    width = min(plan.width, order.size)

    def split(x):
        x = x.reshape(-1, *x.shape[2:])[order]
        x = jnp.pad(x, ((0, -order.size % width), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, width, *x.shape[1:])

    return tuple(map(split, arrays))


def _joined(x: jax.Array, inverse: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The inverse of ``_chunks``."""
    x = x.reshape(-1, *x.shape[2:])[inverse]
    return x.reshape(*shape, *x.shape[1:])
