"""One training step and one evaluation step: pure functions of state and batch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llmzoo_jax import models
from llmzoo_jax.config import ComputeConfig, ModelConfig
from llmzoo_jax.packing import Batch
from llmzoo_jax.sharding import tree_shardings


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: nnx.Module  # float32
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step; float32 scalars."""

    loss: jax.Array  # mean over the loss tokens of the global batch
    loss_tokens: jax.Array
    grad_norm: jax.Array  # before clipping


def init_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int):
    """A random TrainState, made on the mesh: no device ever holds the whole model."""

    def make(key):
        return start_state(models.init(config, key), tx)

    key = jax.random.key(seed)
    return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make, key), mesh))(key)


def start_state(params: nnx.Module, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def token_losses(
    model: nnx.Module, batch: Batch, compute: ComputeConfig
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of every target in float32 ``[B,T]``, 0 where it is not a loss token, and
    the number of loss tokens."""
    hidden, _ = model.hidden(
        batch.tokens,
        models.packed_mask(batch.segment_ids),
        batch.positions,
        dtype=jnp.dtype(compute.dtype),
        remat=compute.remat,
    )

    def cross_entropy(x, targets):  # [...,D], [...] -> [...]
        logits = model.logits(x)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    if compute.loss_chunk:
        losses = _in_chunks(cross_entropy, hidden, batch.targets, compute.loss_chunk)
    else:
        losses = cross_entropy(hidden, batch.targets)
    return jnp.where(batch.loss_mask, losses, 0.0), batch.loss_mask.sum()


def _in_chunks(cross_entropy, hidden, targets, chunk: int) -> jax.Array:
    """The same losses with the logits of ``chunk`` positions of every row at once, which the
    backward pass computes again: ``[B,T,V]`` never exists. The last chunk is padded."""
    B, T, D = hidden.shape
    chunk = max(1, min(T, chunk // B))
    pad = -T % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    n = (T + pad) // chunk
    chunks = (
        jnp.moveaxis(hidden.reshape(B, n, chunk, D), 1, 0),  # [n,B,chunk,D]
        jnp.moveaxis(targets.reshape(B, n, chunk), 1, 0),
    )
    losses = jax.lax.map(jax.checkpoint(lambda args: cross_entropy(*args)), chunks)
    return jnp.moveaxis(losses, 0, 1).reshape(B, T + pad)[:, :T]


def loss_and_grads(
    params: nnx.Module, batch: Batch, compute: ComputeConfig, accumulation: int
) -> tuple[jax.Array, jax.Array, nnx.Module]:
    """(mean loss, number of loss tokens, gradients of the mean), with one division by the loss
    tokens of the whole batch, however many parts it is computed in."""

    def loss_sum(params, part):
        losses, count = token_losses(params, part, compute)
        return losses.sum(), count

    grad = jax.value_and_grad(loss_sum, has_aux=True)
    if accumulation == 1:
        (total, count), grads = grad(params, batch)
    else:
        # Part i takes rows i, i + n, ..: every part spreads over all devices of the batch axis.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), batch
        )

        def add(carry, part):
            (total, count), grads = grad(params, part)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
        (total, count, grads), _ = jax.lax.scan(add, zeros, parts)
    scale = 1.0 / jnp.maximum(count, 1)
    return total * scale, count, jax.tree.map(lambda g: g * scale, grads)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    tx: optax.GradientTransformation,
    compute: ComputeConfig,
    accumulation: int,
) -> tuple[TrainState, Metrics]:
    loss, count, grads = loss_and_grads(state.params, batch, compute, accumulation)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = Metrics(loss, count.astype(jnp.float32), optax.global_norm(grads))
    return TrainState(state.step + 1, params, opt_state), metrics


def jit_train_step(tx, compute: ComputeConfig, accumulation: int, shardings: TrainState):
    """``step(state, batch) -> (state, metrics)``; the old state's buffers are reused."""
    step = functools.partial(train_step, tx=tx, compute=compute, accumulation=accumulation)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def jit_eval_step(compute: ComputeConfig):
    """``step(params, batch) -> float32 [B,T]``, the loss of every loss token."""
    return jax.jit(lambda params, batch: token_losses(params, batch, compute)[0])
