"""A run folder: resolved config, tokenizer, and Orbax checkpoints that a run resumes from.

    run_dir/config.json         the resolved config
    run_dir/tokenizer/          the tokenizer with the chat template of the run
    run_dir/checkpoints/STEP/   state (step, params, optimiser) and the position in the data

The position in the data is the step itself: the batch of a step depends on nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from llmzoo_jax import config as configs
from llmzoo_jax import models
from llmzoo_jax.config import Config, ModelConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.sharding import named_leaves, tree_shardings
from llmzoo_jax.step import TrainState

# What may change between a run and its continuation: where it runs and what it prints.
FREE_KEYS = (
    "run_dir",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "mesh.",
    "compute.remat",
    "data.cache_dir",
    "data.heldout",
)
FREE_KEYS_LORA = ("init_from",)  # the base may move: its content is checked (lora_run.py)


class RunError(InputError):
    """A run folder can't be used; the message names it and says what to do."""


# --- the folder ---------------------------------------------------------------------------------


def claim(config: Config, model: ModelConfig) -> None:
    """Makes ``run_dir`` this run's, or checks that it already is.

    Raises RunError, with every key that differs, where it belongs to another config.
    """
    path = Path(config.run_dir) / "config.json"
    ours = configs.to_dict(config) | {"model": configs.to_dict(model)}
    if path.is_file():
        theirs = read_config(config.run_dir)
        free = FREE_KEYS + (FREE_KEYS_LORA if config.lora else ())
        different = {
            key: values
            for key, values in configs.differences(ours, theirs).items()
            if not key.startswith(free)
        }
        if different:
            lines = [f"  {key}: now {a!r}, there {b!r}" for key, (a, b) in different.items()]
            raise RunError(
                f"{config.run_dir} belongs to another config:\n"
                + "\n".join(lines)
                + "\nGo on with the config it was started with, set --config.run_dir to a new "
                "folder, or delete that one."
            )
        return
    if any(Path(config.run_dir).glob("checkpoints/*")):
        raise RunError(
            f"{config.run_dir} has checkpoints but no config.json; set --config.run_dir to a new "
            "folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(ours, indent=2, ensure_ascii=False) + "\n")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The resolved config of a run, as plain JSON types."""
    path = Path(run_dir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; {run_dir} is not a run folder") from error
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: line {error.lineno} is not JSON; was it edited?") from error


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# --- checkpoints --------------------------------------------------------------------------------


def open_manager(run_dir: str | Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a run. Saves go on in the background; an unfinished one never counts."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(
        Path(run_dir).resolve() / "checkpoints",
        options=options,
        item_handlers=ocp.PyTreeCheckpointHandler(),
    )


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Starts to save a state under its step. Raises RunError where the disk can't hold it."""
    step = int(state.step)
    leaves = _plain(state)
    size = sum(x.nbytes for x in leaves.values())
    check_space(manager.directory, size, f"the checkpoint of step {step}")
    try:
        manager.save(step, args=ocp.args.PyTreeSave(leaves))
    except OSError as error:
        raise RunError(f"{manager.directory}: can't save step {step}: {error}") from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits for saves in the background. Raises RunError where one failed."""
    try:
        manager.wait_until_finished()
        manager.check_for_errors()
    except Exception as error:  # Orbax and TensorStore raise many types; all mean: not saved
        raise RunError(
            f"{manager.directory}: a checkpoint was not saved: {error}\nThe checkpoint before it "
            "is whole; mend the cause and run the same command again."
        ) from error


def check_space(folder: str | Path, size: int, what: str) -> None:
    """Raises RunError where ``folder`` has less room than ``size`` bytes and a little."""
    free = shutil.disk_usage(folder).free
    if free < size * 1.05 + 2**20:
        raise RunError(
            f"{folder}: the disk is full: {what} needs {size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB "
            "are free. Make room and run the same command again; what was saved before is whole."
        )


def restore(manager: ocp.CheckpointManager, abstract: TrainState, mesh) -> TrainState:
    """The newest state, laid out on ``mesh``, whatever mesh it was saved from."""
    shardings = jax.tree.map(
        lambda sharding, tree: jax.tree.map(lambda _: sharding, tree),
        tree_shardings(abstract, mesh),
        abstract,
        is_leaf=lambda x: isinstance(x, jax.sharding.Sharding),
    )
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for (name, x), sharding in zip(
            _plain(abstract).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    leaves = _restore(manager, target)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in target])


def restore_params(run_dir: str | Path, config: ModelConfig) -> nnx.Module:
    """The model of the newest checkpoint of a run, without its optimiser, on one device."""
    return restore_tree(run_dir, models.abstract(config))


def restore_tree(run_dir: str | Path, abstract: Any) -> Any:
    """What the newest checkpoint of a run trained, laid out as ``abstract``, on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_manager(run_dir) as manager:
        if manager.latest_step() is None:
            raise RunError(f"{run_dir}: no finished checkpoint; train first")
        saved = _saved_leaves(manager)
        target = {
            f"params.{name}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
            for name, x in named_leaves(abstract).items()
        }
        others = {name: ocp.PLACEHOLDER for name in saved if not name.startswith("params.")}
        leaves = _restore(manager, target | others)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in target])


def _restore(manager: ocp.CheckpointManager, target: dict[str, Any]) -> dict[str, jax.Array]:
    step, saved = manager.latest_step(), _saved_leaves(manager)
    where = f"{manager.directory}/{step}"
    for name in sorted(saved.keys() ^ target.keys()):
        what = "misses" if name in target else "has an unexpected"
        raise RunError(f"{where} {what} tensor {name}; was it saved by another version?")
    for name, want in target.items():
        if want is not ocp.PLACEHOLDER and tuple(saved[name].shape) != want.shape:
            raise RunError(
                f"{where}: tensor {name} has shape {saved[name].shape}, not {want.shape}"
            )
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return manager.restore(
        step, args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
    )


def _saved_leaves(manager: ocp.CheckpointManager) -> dict[str, Any]:
    return manager.item_metadata(manager.latest_step()).tree


def _plain(state: TrainState) -> dict[str, Any]:
    """A flat dict, so that a checkpoint can be read without this code. LoRA's base is not in it."""
    leaves = {}
    for name, x in named_leaves(state._replace(base=None)).items():
        leaves[name] = x if hasattr(x, "sharding") else np.asarray(x)
    return leaves
