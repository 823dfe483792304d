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

from llmzoo_jax import flops, lora, models
from llmzoo_jax.config import ComputeConfig, ConfigError, LoraConfig, ModelConfig
from llmzoo_jax.models import attention, low_precision
from llmzoo_jax.packing import Batch
from llmzoo_jax.sharding import tree_shardings
from llmzoo_jax.vocabulary_loss import Loss, chunked_loss


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Any  # float32, what is trained: the model or, with a base, its adapters
    opt_state: Any
    base: nnx.Module | None = None  # LoRA's frozen weights; read again, never saved

    @property
    def model(self) -> nnx.Module:
        """The model that computes."""
        return lora.attach(self.base, self.params)


class Metrics(NamedTuple):
    """Of one step; float32 scalars."""

    loss: jax.Array  # mean over the loss tokens of the global batch
    loss_tokens: jax.Array
    tokens: jax.Array  # those of conversations, the rest of the batch is padding
    pairs: jax.Array  # of a token and a key that it sees
    grad_norm: jax.Array  # before clipping
    skipped: jax.Array  # steps so far (spikes.py)
    skipped_in_a_row: jax.Array  # the last ones; 0 where this one was taken
    by_language: jax.Array | None = None  # [languages, 2]: sum of losses, loss tokens


def init_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, seed: int):
    """A random TrainState, made on the mesh: no device ever holds the whole model."""

    def make(key):
        return start_state(models.init(config, key), tx)

    key = jax.random.key(seed)
    return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make, key), mesh))(key)


def start_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def resolve(compute: ComputeConfig, mesh: Mesh, *, lora: LoraConfig | None = None) -> ComputeConfig:
    """``compute`` for the devices of the mesh: what "auto" stands for there. Raises where they
    can't do what it asks for, or the base of ``lora`` can't."""
    device = mesh.devices.flat[0]
    platform = device.platform
    if compute.remat == "offload" and platform == "cpu":
        raise ConfigError(
            "compute.remat=offload: a CPU computes in the host's memory, there is nowhere to "
            "offload to; set compute.remat=dots or full"
        )
    faster = flops.eight_bit_formats(device.device_kind)
    if compute.matmul not in ("dtype", *faster):
        raise ConfigError(
            f"compute.matmul={compute.matmul}: a {device.device_kind} multiplies it no faster than "
            f"bfloat16; set compute.matmul={' or '.join(('dtype', *faster))}"
        )
    if compute.matmul != "dtype" and lora and lora.quantise != "none":
        raise ConfigError(
            f"compute.matmul={compute.matmul}: products with a base in {lora.quantise} are those "
            "of its dense weights; set lora.quantise=none or compute.matmul=dtype"
        )
    return dataclasses.replace(compute, attention=attention.choose(compute.attention, platform))


def batch_loss(model: nnx.Module, batch: Batch, compute: ComputeConfig) -> Loss:
    """Cross-entropy of every target in float32 ``[B,T]``, 0 where it is not a loss token, and its
    sum, through which gradients go."""
    hidden, _ = model.hidden(
        batch.tokens,
        models.packed_mask(batch.segment_ids),
        batch.positions,
        dtype=jnp.dtype(compute.dtype),
        remat=compute.remat,
        attention=compute.attention,
    )

    if compute.loss_chunk:
        return chunked_loss(
            model.head_table(),
            hidden,
            batch.targets,
            batch.loss_mask,
            chunk=compute.loss_chunk,
        )
    logits = model.logits(hidden)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(batch.loss_mask, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
    return Loss(losses.sum(), losses)


def loss_and_grads(
    params: Any,
    batch: Batch,
    compute: ComputeConfig,
    accumulation: int,
    *,
    base: nnx.Module | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """(mean loss, losses ``[B,T]``, gradients of the mean by ``params``), with one division by the
    loss tokens of the whole batch, however many parts it is computed in. Losses are 0 where there
    is no target.

    With a ``base``, ``params`` are its adapters; ``key`` is of their dropout (None: none), which a
    row has whatever part it is in."""

    def loss_sum(params, part, rows):
        keys = None if key is None else jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        model = low_precision.attach(lora.attach(base, params, keys), compute.matmul)
        return batch_loss(model, part, compute)

    grad = jax.value_and_grad(loss_sum, has_aux=True)
    rows = jnp.arange(len(batch.tokens))
    if accumulation == 1:
        (total, losses), grads = grad(params, batch, rows)
    else:
        # Part i takes rows i, i + n, ..: every part spreads over all devices of the batch axis.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0), (batch, rows)
        )

        def add(carry, part):
            (total, losses), grads = grad(params, *part)
            return jax.tree.map(jnp.add, carry, (total, grads)), losses

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (total, grads), losses = jax.lax.scan(add, zeros, parts)
        losses = jnp.moveaxis(losses, 0, 1).reshape(batch.loss_mask.shape)
    scale = 1.0 / jnp.maximum(batch.loss_mask.sum(), 1)
    return total * scale, losses, jax.tree.map(lambda g: g * scale, grads)


def loss_by_language(
    losses: jax.Array, mask: jax.Array, language: jax.Array, languages: int
) -> jax.Array:
    """float32 ``[languages, 2]``, sum and number of ``losses[B,T]`` by ``language[B,T]``."""

    def one(number):
        mine = mask & (language == number)
        return jnp.stack([jnp.where(mine, losses, 0.0).sum(), mine.sum().astype(jnp.float32)])

    return jax.vmap(one)(jnp.arange(languages))


def train_step(
    state: TrainState,
    batch: Batch,
    language: jax.Array | None = None,
    *,
    tx: optax.GradientTransformation,
    compute: ComputeConfig,
    accumulation: int,
    seed: int | None = None,
    languages: int = 0,
) -> tuple[TrainState, Metrics]:
    """``language`` is the number of the language of each position, below ``languages``. ``seed`` is
    of LoRA's dropout, which is the same whenever a step is done; None: none."""
    key = None if seed is None else lora.dropout_key(seed, state.step)
    loss, losses, grads = loss_and_grads(
        state.params, batch, compute, accumulation, base=state.base, key=key
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
    params = optax.apply_updates(state.params, updates)
    real = batch.segment_ids > 0
    metrics = Metrics(
        loss=loss,
        loss_tokens=batch.loss_mask.sum().astype(jnp.float32),
        tokens=real.sum().astype(jnp.float32),
        pairs=jnp.where(real, batch.positions + 1, 0).astype(jnp.float32).sum(),
        grad_norm=optax.global_norm(grads),
        skipped=opt_state.skipped.astype(jnp.float32),
        skipped_in_a_row=opt_state.in_a_row.astype(jnp.float32),
        by_language=None
        if language is None
        else loss_by_language(losses, batch.loss_mask, language, languages),
    )
    return TrainState(state.step + 1, params, opt_state, state.base), metrics


def jit_train_step(
    tx,
    compute: ComputeConfig,
    accumulation: int,
    shardings: TrainState,
    *,
    seed: int | None = None,
    languages: int = 0,
):
    """``step(state, batch, language=None) -> (state, metrics)``, which reuses the buffers of the
    old state."""
    step = functools.partial(
        train_step,
        tx=tx,
        compute=compute,
        accumulation=accumulation,
        seed=seed,
        languages=languages,
    )
    # Metrics are laid out as the number of the step is: every process has them.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def jit_eval_step(compute: ComputeConfig, everywhere: jax.sharding.Sharding | None = None):
    """``step(params, batch) -> float32 [B,T]``, the loss of every loss token; ``everywhere``, if it
    is given, is the replicated sharding in which every process has all of them."""
    losses = lambda params, batch: batch_loss(params, batch, compute).losses  # noqa: E731
    return jax.jit(losses, out_shardings=everywhere)
