"""AdamW with a schedule, clipping and a decay mask by name (optax does the arithmetic)."""

from __future__ import annotations

from typing import Any

import jax
import optax

from llmzoo_jax.config import OptimConfig
from llmzoo_jax.sharding import path_name
from llmzoo_jax.spikes import skip_spikes


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up over ``warmup_ratio`` of the steps, then the named decay to
    ``learning_rate * final_ratio``. Step 0 is the first update, as in torch's LambdaLR."""
    warmup = round(config.warmup_ratio * total_steps)
    peak, end = config.learning_rate, config.learning_rate * config.final_ratio
    rest = max(total_steps - warmup, 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def decay_mask(params: Any) -> Any:
    """True for matrices (``*.w``), False for norms and biases: what HF's Trainer decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith(".w"), params)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(config, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return skip_spikes(optax.chain(clip, adamw), config)
