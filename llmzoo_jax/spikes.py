"""Steps that would do harm are skipped: the loss or the gradient is not finite, or the gradient is
far larger than it was of late.

The rule wraps the optimiser, so it runs inside the training step and its memory is part of the
training state: nothing waits for the host, and a resumed run skips what an undisturbed one skips.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmzoo_jax.config import OptimConfig


class Guarded(NamedTuple):
    """The state of the optimiser and what the rule remembers."""

    inner: Any
    norms: jax.Array  # float32[spike_window], of the last steps that were taken; NaN: not yet
    skipped: jax.Array  # int32, steps so far
    in_a_row: jax.Array  # int32, of them the last ones


def skip_spikes(
    tx: optax.GradientTransformation, config: OptimConfig
) -> optax.GradientTransformationExtraArgs:
    """``tx``, but a skipped step leaves its state and the parameters as they are, bit for bit.

    A step is skipped where its loss (``value`` of ``update``, if it is given) or its gradient norm
    is not finite, or the norm is over ``spike_factor`` times the median of the last
    ``spike_window`` steps that were taken; so none is a spike before there were as many.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        zeros = [jnp.zeros((), jnp.int32) for _ in range(2)]  # apart: both are donated
        norms = jnp.full(config.spike_window, jnp.nan, jnp.float32)
        return Guarded(tx.init(params), norms, *zeros)

    def update(grads, state, params=None, *, value=None, **extra):
        norm = optax.global_norm(grads).astype(jnp.float32)
        take = jnp.isfinite(norm)
        if value is not None:
            take &= jnp.isfinite(value)
        if config.spike_factor:
            # The median of a window with a NaN is NaN, and nothing is greater than that.
            take &= ~(norm > config.spike_factor * jnp.median(state.norms))

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)

        updates, inner = tx.update(grads, state.inner, params, value=value, **extra)
        none = jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates)  # x + -0.0 is x
        after = Guarded(
            inner=choose(inner, state.inner),
            norms=choose(jnp.roll(state.norms, -1).at[-1].set(norm), state.norms),
            skipped=state.skipped + ~take,
            in_a_row=jnp.where(take, 0, state.in_a_row + 1),
        )
        return choose(updates, none), after

    return optax.GradientTransformationExtraArgs(init, update)
