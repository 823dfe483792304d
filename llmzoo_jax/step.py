"""One training step and one evaluation step: pure functions of state and batch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llmzoo_jax import models
from llmzoo_jax.config import ComputeConfig, ModelConfig
from llmzoo_jax.models import attention
from llmzoo_jax.packing import Batch
from llmzoo_jax.sharding import tree_shardings
from llmzoo_jax.vocabulary_loss import chunked_losses


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: nnx.Module  # float32
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step; float32 scalars."""

    loss: jax.Array  # mean over the loss tokens of the global batch
    loss_tokens: jax.Array
    tokens: jax.Array  # those of conversations, the rest of the batch is padding
    grad_norm: jax.Array  # before clipping
    skipped: jax.Array  # steps so far (spikes.py)
    skipped_in_a_row: jax.Array  # the last ones; 0 where this one was taken


def init_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int):
    """A random TrainState, made on the mesh: no device ever holds the whole model."""

    def make(key):
        return start_state(models.init(config, key), tx)

    key = jax.random.key(seed)
    return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make, key), mesh))(key)


def start_state(params: nnx.Module, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def resolve(compute: ComputeConfig, mesh: Mesh) -> ComputeConfig:
    """``compute`` for the devices of the mesh: what "auto" stands for there. Raises where they
    can't do what it asks for."""
    platform = mesh.devices.flat[0].platform
    return dataclasses.replace(compute, attention=attention.choose(compute.attention, platform))


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
        attention=compute.attention,
    )

    if compute.loss_chunk:
        losses = chunked_losses(
            model.head_table(),
            hidden,
            batch.targets,
            batch.loss_mask,
            chunk=compute.loss_chunk,
        )
    else:
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        losses = jnp.where(batch.loss_mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    return losses, batch.loss_mask.sum()


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
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    metrics = Metrics(
        loss=loss,
        loss_tokens=count.astype(jnp.float32),
        tokens=(batch.segment_ids > 0).sum().astype(jnp.float32),
        grad_norm=optax.global_norm(grads),
        skipped=opt_state.skipped.astype(jnp.float32),
        skipped_in_a_row=opt_state.in_a_row.astype(jnp.float32),
    )
    return TrainState(state.step + 1, params, opt_state), metrics


def jit_train_step(tx, compute: ComputeConfig, accumulation: int, shardings: TrainState):
    """``step(state, batch) -> (state, metrics)``; the old state's buffers are reused."""
    step = functools.partial(train_step, tx=tx, compute=compute, accumulation=accumulation)
    # Metrics are laid out as the number of the step is: every process has them.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def jit_eval_step(compute: ComputeConfig, everywhere: jax.sharding.Sharding | None = None):
    """``step(params, batch) -> float32 [B,T]``, the loss of every loss token; ``everywhere``, if it
    is given, is the replicated sharding in which every process has all of them."""
    losses = lambda params, batch: token_losses(params, batch, compute)[0]  # noqa: E731
    return jax.jit(losses, out_shardings=everywhere)
