"""Cross-entropy over a large vocabulary, a chunk of tokens at a time: ``[tokens, V]`` never exists.

The loss tokens of a row come first and chunks without any are skipped, so that prompts and padding
cost no logits. The backward pass computes a chunk's logits again. Each device computes the chunks
of its own rows: the table is gathered once a pass, and its gradient, summed in float32, is reduced
once; left to the compiler, both would cross the network for every chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llmzoo_jax.sharding import RULES, per_device


class _Plan(NamedTuple):
    """Static: tokens of a row in a chunk, and the mesh axes (empty: not split) over which the
    vocabulary, the width of the table, and the tokens are split."""

    width: int
    vocab: tuple[str, ...]
    embed: tuple[str, ...]
    tokens: tuple[str, ...]


def chunked_losses(
    table: jax.Array, x: jax.Array, targets: jax.Array, mask: jax.Array, *, chunk: int
) -> jax.Array:
    """The cross-entropy, float32 ``[B,T]`` and 0 outside ``mask[B,T]``, of ``targets[B,T]`` under
    the logits ``x[B,T,D] @ table[V,D].T``, with about ``chunk`` tokens' logits at once, over all
    devices. Products in the dtype of ``x``, sums in float32."""
    mesh = jax.sharding.get_abstract_mesh()
    split = {a for a in mesh.axis_names if mesh.shape[a] > 1}
    axes = {k: tuple(a for a in RULES[k] if a in split) for k in ("vocab", "embed", "length")}
    rows = x.shape[0] * math.prod(mesh.shape[a] for a in axes["length"])
    plan = _Plan(
        width=max(1, chunk // rows),
        vocab=axes["vocab"],
        embed=axes["embed"],
        tokens=tuple(a for k in ("batch", "length") for a in RULES[k] if a in split),
    )
    return _losses(plan, table, x, targets, mask)


TABLE, X, TOKENS = ("vocab", "embed"), ("batch", "length", None), ("batch", "length")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(plan: _Plan, table, x, targets, mask):
    run = per_device(
        functools.partial(_forward, plan),
        inputs=(TABLE, X, TOKENS, TOKENS),
        outputs=TOKENS,
        undivided="error",
    )
    return run(table, x, targets, mask)


def _losses_forward(plan: _Plan, *args):
    return _losses(plan, *args), args


def _losses_backward(plan: _Plan, saved, d_losses):
    run = per_device(
        functools.partial(_backward, plan),
        inputs=(TABLE, X, TOKENS, TOKENS, TOKENS),
        outputs=(TABLE, X),
        undivided="error",
    )
    return (*run(*saved, d_losses), None, None)


_losses.defvjp(_losses_forward, _losses_backward)


# --- on one device ------------------------------------------------------------------------------


def _forward(plan: _Plan, table, x, targets, mask):
    table = _gathered(plan, table, x.dtype)  # [V,D]
    order, inverse = _loss_tokens_first(mask)

    def losses(x, targets):
        return _logits(plan, table, x, targets)[0]

    def skip(x, targets):
        return jnp.zeros(targets.shape, jnp.float32)

    def one(chunk):
        x, targets, mask = chunk
        return jnp.where(mask, lax.cond(mask.any(), losses, skip, x, targets), 0.0)

    chunks = _chunks(plan, order, x, targets, mask)
    return _joined(lax.map(one, chunks), inverse)


def _backward(plan: _Plan, table, x, targets, mask, d_losses):
    """Gradients of ``table`` (float32, this device's part) and ``x``."""
    full = _gathered(plan, table, x.dtype)
    order, inverse = _loss_tokens_first(mask)

    def gradients(x, targets, d_losses):
        _, logits, log_sum, mine = _logits(plan, full, x, targets)
        one_hot = jnp.arange(full.shape[0]) == mine[..., None]
        d_logits = (jnp.exp(logits - log_sum[..., None]) - one_hot) * d_losses[..., None]
        d_logits = d_logits.astype(x.dtype)  # [B,width,V]
        d_table = jnp.einsum("BTV,BTD->VD", d_logits, x, preferred_element_type=jnp.float32)
        return d_table, jnp.einsum("BTV,VD->BTD", d_logits, full)

    def one(d_table, chunk):
        x, targets, mask, d_losses = chunk

        def add():
            more, dx = gradients(x, targets, jnp.where(mask, d_losses, 0.0))
            return d_table + more, dx

        return lax.cond(mask.any(), add, lambda: (d_table, jnp.zeros_like(x)))

    zeros = jnp.zeros(full.shape, jnp.float32)
    d_table, dx = lax.scan(one, zeros, _chunks(plan, order, x, targets, mask, d_losses))
    dx = _joined(dx, inverse)
    if plan.vocab:
        dx = lax.psum(dx, plan.vocab)
    if plan.embed:
        d_table = lax.psum_scatter(d_table, plan.embed, scatter_dimension=1, tiled=True)
    others = tuple(a for a in plan.tokens if a not in plan.embed)
    if others:
        d_table = lax.psum(d_table, others)
    return d_table.astype(table.dtype), dx


def _gathered(plan: _Plan, table: jax.Array, dtype) -> jax.Array:
    table = table.astype(dtype)
    return lax.all_gather(table, plan.embed, axis=1, tiled=True) if plan.embed else table


def _logits(plan: _Plan, table, x, targets) -> Any:
    """(losses, logits of this device's part of the vocabulary, log of the sum of their exp over all
    parts, the targets' places in this part)."""
    logits = jnp.einsum("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
    V = table.shape[0]
    mine = targets - lax.axis_index(plan.vocab) * V if plan.vocab else targets
    here = (mine >= 0) & (mine < V)
    picked = jnp.take_along_axis(logits, jnp.clip(mine, 0, V - 1)[..., None], axis=-1)[..., 0]
    picked = jnp.where(here, picked, 0.0)
    if not plan.vocab:
        log_sum = jax.nn.logsumexp(logits, axis=-1)
    else:
        picked = lax.psum(picked, plan.vocab)
        top = lax.pmax(logits.max(-1), plan.vocab)
        total = lax.psum(jnp.exp(logits - top[..., None]).sum(-1), plan.vocab)
        log_sum = top + jnp.log(total)
    return log_sum - picked, logits, log_sum, mine


def _loss_tokens_first(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    order = jnp.argsort(~mask, axis=1, stable=True)  # [B,T]
    return order, jnp.argsort(order, axis=1)


def _chunks(plan: _Plan, order: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each ``[B,T,...]`` in the given order as ``[n,B,width,...]``, padded."""
    B, T = order.shape
    width = min(plan.width, T)

    def split(x):
        x = jnp.take_along_axis(x, order.reshape(B, T, *(1,) * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, -T % width)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, width, *x.shape[2:]), 1, 0)

    return tuple(map(split, arrays))


def _joined(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """The inverse of ``_chunks``."""
    B, T = inverse.shape
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(B, -1, *x.shape[3:])[:, :T]
    return jnp.take_along_axis(x, inverse.reshape(B, T, *(1,) * (x.ndim - 2)), axis=1)
