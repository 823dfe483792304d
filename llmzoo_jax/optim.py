"""Schedules and optimisers: AdamW, Adafactor, Lion and Muon (optax does the arithmetic)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llmzoo_jax.config import ConfigError, OptimConfig
from llmzoo_jax.moments import compressed, is_matrix
from llmzoo_jax.sharding import named_leaves, path_name
from llmzoo_jax.spikes import skip_spikes

MUON_RMS = 0.2  # of an update of a matrix: AdamW's, so that one learning rate serves both
FACTORED = 32  # Adafactor: matrices whose shorter side is less keep whole second moments


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
    """True for matrices (``*.w``, and LoRA's), False for norms and biases: what HF's Trainer
    decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path_name(path)), params)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """The update rule of the config, which skips steps that would do harm; see ``update_rule``."""
    return skip_spikes(update_rule(config, total_steps), config)


def update_rule(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping, then the optimiser of the config. Raises ConfigError where a key has no effect."""
    check(config)
    direction = {"adamw": _adam, "adafactor": _adafactor, "lion": _lion, "muon": _muon}
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.chain(
            compressed(direction[config.optimizer](config), config.state_dtype),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule(config, total_steps)),
        ),
    )


def check(config: OptimConfig) -> None:
    """Raises ConfigError where a key would be accepted and ignored."""
    if config.optimizer == "lion" and config.eps != OptimConfig.eps:
        raise ConfigError(
            f"optim.eps={config.eps} has no effect with optim.optimizer=lion; leave it out"
        )
    if config.optimizer == "adafactor" and not config.b1 and config.state_dtype != "float32":
        raise ConfigError(
            f"optim.state_dtype={config.state_dtype} has no effect with optim.optimizer=adafactor "
            "and optim.b1=0: there is no first moment. Leave it out, or set optim.b1"
        )


# --- gradients -> directions --------------------------------------------------------------------


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    """Chen et al., 2023."""
    return optax.scale_by_lion(config.b1, config.b2)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018) as Zhai et al. (2022) have it: learning rates are
    AdamW's, the decay of second moments rises to ``b2``, and a first moment is kept if ``b1``."""

    def decay(step, exponent):
        return jnp.minimum(1.0 - (step + 1.0) ** -exponent, config.b2)

    factored = optax.scale_by_factored_rms(
        min_dim_size_to_factor=FACTORED, epsilon=config.eps**2, decay_rate_fn=decay
    )
    return optax.chain(
        _on_matrices(factored), optax.ema(config.b1) if config.b1 else optax.identity()
    )


def _on_matrices(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on ``{name: array}`` in which weights have two axes, and L in front if stacked:
    the axes that optax factors, the two longest, are then those of the matrix."""

    def flat(tree):
        arrays = {}
        for path, node in _variables(tree):
            x, axes, name = node[...], _axes(node), path_name(path)
            if is_matrix(name):
                stacked = x.shape[: axes.count("layers")]
                side = axes.index(_side(axes))
                rest = (x.shape[side], -1) if side < len(axes) - 1 else (-1, x.shape[side])
                x = x.reshape(*stacked, *rest)
            arrays[name] = x
        return arrays

    def update(updates, state, params=None):
        new, state = tx.update(flat(updates), state, None if params is None else flat(params))
        leaves = [new[name].reshape(x.shape) for name, x in named_leaves(updates).items()]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformation(lambda params: tx.init(flat(params)), update)


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) for the matrices of the layers, each layer and each of query, key and
    value by itself; Adam for the rest. Updates have AdamW's size (Liu et al., 2025)."""

    def label(path, node):
        name = path_name(path)
        layers = is_matrix(name) and not name.startswith(("embed.", "head."))
        return jax.tree.map(lambda _: "muon" if layers else "adam", node)

    def rescale(updates, params=None):
        def one(x, dims):
            sides = (math.prod(x.shape[i] for i in side) for side in dims)
            return x * (MUON_RMS * math.sqrt(max(sides)))

        return jax.tree.map(one, updates, _matrix_axes(updates))

    matrices = optax.contrib.scale_by_muon(
        beta=config.b1, eps=config.eps, weight_dimension_numbers=_matrix_axes
    )
    return optax.partition(
        {"muon": optax.chain(matrices, optax.stateless(rescale)), "adam": _adam(config)},
        lambda params: jax.tree_util.tree_map_with_path(label, params, is_leaf=_is_variable),
    )


def _matrix_axes(tree: Any) -> Any:
    """Which axes of each weight are the two sides of its matrix, whatever counts matrices aside."""

    def one(node):
        if not jax.tree.leaves(node):  # masked by optax
            return node
        axes = _axes(node)
        others = [i for i, axis in enumerate(axes) if axis not in ("layers", "qkv", _side(axes))]
        dims = optax.contrib.MuonDimensionNumbers((axes.index(_side(axes)),), tuple(others))
        return jax.tree.map(lambda _: dims, node)

    return jax.tree.map(one, tree, is_leaf=_is_variable)


def _side(axes: tuple[str, ...]) -> str:
    """The axis that is one side of a weight by itself; the rest of them is the other side."""
    return "rank" if "rank" in axes else "embed"


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _variables(tree: Any) -> list[tuple[Any, nnx.Variable]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]


def _axes(node: nnx.Variable) -> tuple[str, ...]:
    """The logical axes of a parameter, ``layers`` in front where it is stacked."""
    axes = node.get_metadata()["axes"]
    stacked = [x.ndim for x in jax.tree.leaves(node)] == [len(axes) + 1]
    return ("layers", *axes) if stacked else axes
