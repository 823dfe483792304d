"""A run folder: resolved config, tokenizer, and Orbax checkpoints that a run resumes from.

    run_dir/config.json         the resolved config
    run_dir/tokenizer/          the tokenizer with the chat template of the run
    run_dir/checkpoints/STEP/   state (step, params, optimiser), its manifest, its held-out loss
    run_dir/damaged/STEP/       checkpoints that could not be read, moved out of the way

The position in the data is the step itself: the batch of a step depends on nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llmzoo_jax import config as configs
from llmzoo_jax import manifest, models, retention
from llmzoo_jax.config import Config, ModelConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.metrics import say
from llmzoo_jax.sharding import named_leaves, tree_shardings
from llmzoo_jax.step import TrainState

# What may change between a run and its continuation: where it runs and what it prints.
FREE_KEYS = (
    "run_dir", "log_every", "eval_every", "save_every", "keep_checkpoints", "keep_best", "mesh.",
    "hardware.", "optim.max_skipped", "optim.accumulation", "compute.remat", "compute.loss_chunk",
    "compute.attention", "compute.compile_cache", "compute.peak_flops", "data.cache_dir",
    "data.worker", "data.heldout",
)  # fmt: skip

Step = int | Literal["latest", "best"]  # a checkpoint of a run; best: by its held-out loss


class RunError(InputError):
    """A run folder can't be used; the message names it and says what to do."""


class DamagedError(RunError):
    """A checkpoint is not what was saved."""


# --- the folder ---------------------------------------------------------------------------------


def claim(config: Config, model: ModelConfig) -> None:
    """Makes ``run_dir`` this run's, or checks that it already is.

    Raises RunError, with every key that differs, where it belongs to another config.
    """
    path = Path(config.run_dir) / "config.json"
    ours = configs.to_dict(config) | {"model": configs.to_dict(model)}
    if path.is_file():
        theirs = read_config(config.run_dir)
        different = {
            key: values
            for key, values in configs.differences(ours, theirs).items()
            if not key.startswith(FREE_KEYS) and not (config.lora and key == "init_from")
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
    if jax.process_index():  # the first has written it
        raise RunError(
            f"{config.run_dir}: process {jax.process_index()} does not see what process 0 wrote; "
            "set --config.run_dir to a folder on a disk that all hosts share"
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


@contextlib.contextmanager
def open_manager(
    run_dir: str | Path, *, keep: int | None = None, keep_best: int = 0
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a run. Saves go on in the background; an unfinished one never counts.

    ``keep`` newest ones stay, and the ``keep_best`` ones of the lowest held-out loss; all of them
    where ``keep`` is None, as for a reader. With ``keep``, the folder is this process's own: what
    a killed run has left half written is deleted.
    """

    directory = Path(run_dir).resolve() / "checkpoints"
    options = ocp.CheckpointManagerOptions(
        preservation_policy=retention.Retention(directory, keep, keep_best),
        cleanup_tmp_directories=keep is not None,
        lightweight_initialize=True,
        create=True,
    )
    with _loops_wait():
        manager = ocp.CheckpointManager(
            directory, options=options, item_handlers=ocp.PyTreeCheckpointHandler()
        )
        try:
            yield manager
            wait(manager)
        finally:
            with contextlib.suppress(Exception):  # raised above, or another one is on its way
                manager.close()


def save(
    manager: ocp.CheckpointManager, state: TrainState, *, heldout_loss: float | None = None
) -> None:
    """Starts to save a state under its step. Returns when the state is copied to the host, so its
    buffers may be donated. Raises RunError where the disk can't hold it, or an earlier save failed.
    """
    step = int(state.step)
    leaves = named(state)
    size = sum(x.nbytes for x in leaves.values())
    wait(manager)
    check_space(manager.directory, size, f"the checkpoint of step {step}")
    if heldout_loss is not None and not math.isfinite(heldout_loss):
        heldout_loss = None
    try:
        manager.save(
            step,
            args=ocp.args.PyTreeSave(leaves),
            metrics=None if heldout_loss is None else {"heldout_loss": heldout_loss},
            custom_metadata=manifest.make(leaves, heldout_loss=heldout_loss),
        )
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


def find_step(run_dir: str | Path, step: Step) -> int:
    """The step of a finished checkpoint. Raises RunError, with those there are."""
    with open_manager(run_dir) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise RunError(f"{run_dir}: no finished checkpoint; train first")
    losses = retention.heldout_losses(manager.directory, steps)
    if step == "latest":
        return steps[-1]
    if step == "best" and losses:
        return min(losses, key=losses.get)
    if step in steps:
        return step
    known = ", ".join(f"{at} ({losses[at]:.4f})" if at in losses else str(at) for at in steps)
    raise RunError(
        f"{run_dir} has no checkpoint {step!r}; there are (with held-out loss, where it was "
        f"measured at that step) {known}"
    )


def restore(manager: ocp.CheckpointManager, abstract: TrainState, mesh) -> TrainState:
    """The newest state that is whole, laid out on ``mesh``, whatever mesh it was saved from.

    Newer ones that are damaged are moved to ``run_dir/damaged``, and it is said on the console.
    Raises RunError where none is whole (and moves none), or the state is another model's.
    """
    shardings = jax.tree.map(
        lambda sharding, tree: jax.tree.map(lambda _: sharding, tree),
        tree_shardings(abstract, mesh),
        abstract,
        is_leaf=lambda x: isinstance(x, jax.sharding.Sharding),
    )
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for (name, x), sharding in zip(
            named(abstract).items(), jax.tree.leaves(shardings), strict=True
        )
    }
    damaged: dict[int, DamagedError] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            leaves = _restore(manager, step, target)
        except DamagedError as error:
            damaged[step] = error
            continue
        for number, error in damaged.items():
            moved = _move_aside(manager, number)
            say(f"{error}\n  It was moved to {moved}; the run goes back to step {step}.")
        say(f"resuming {manager.directory.parent} at step {step}")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in target])
    lines = [f"  {error}" for error in damaged.values()]
    raise RunError(
        "\n".join([f"{manager.directory}: every checkpoint is damaged:", *lines])
        + "\nRestore one from a copy, or set --config.run_dir to a new folder to start again."
    )


def restore_params(
    run_dir: str | Path,
    of: ModelConfig | Any,
    *,
    step: Step = "latest",
    mesh: Mesh | None = None,
) -> Any:
    """What a checkpoint of a run holds without its optimiser: the model of a config or, of a LoRA
    run, adapters like the abstract ones; on one device, or as ``mesh`` splits it."""
    abstract = models.abstract(of) if isinstance(of, ModelConfig) else of
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = itertools.repeat(device)
    if mesh is not None:
        places = jax.tree.leaves(tree_shardings(abstract, mesh, uneven="replicate"))
    target = {
        f"params.{name}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for (name, x), place in zip(named_leaves(abstract).items(), places, strict=False)
    }
    step = find_step(run_dir, step)
    with open_manager(run_dir) as manager:
        leaves = _restore(manager, step, target, only="params.")
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in target])


def _restore(
    manager: ocp.CheckpointManager, step: int, target: dict[str, Any], *, only: str = ""
) -> dict[str, jax.Array]:
    """The tensors of ``target``: all that were saved, or those that begin with ``only``.

    Raises DamagedError where what is there is not what was saved, on every process if on one;
    RunError where ``target`` is not what was saved.
    """
    where = f"{manager.directory}/{step}"
    made = manifest.read(Path(where))
    if not _everywhere(made is not None):
        raise DamagedError(
            f"{where} is damaged: its manifest, _CHECKPOINT_METADATA, is missing or was changed"
        )
    saved = made["tensors"]
    for name in sorted({n for n in saved if n.startswith(only)} ^ target.keys()):
        what = "misses" if name in target else "has an unexpected"
        raise RunError(f"{where} {what} tensor {name}; was it saved by another version?")
    for name, want in target.items():
        shape = f"[{','.join(map(str, want.shape))}]"
        if manifest.shape(saved[name]) != shape:
            raise RunError(
                f"{where}: tensor {name} has shape {manifest.shape(saved[name])}, not {shape}"
            )
    item = target | dict.fromkeys(saved.keys() - target.keys(), ocp.PLACEHOLDER)
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
    )
    # Not manager.restore: it would wait for processes that have met an error here.
    handler, folder = ocp.PyTreeCheckpointHandler(), manager.directory / str(step) / "default"
    problem = ""
    try:
        leaves = handler.restore(folder, args=args)
    except Exception as error:  # Orbax and TensorStore raise many types; all mean: can't be read
        problem = (str(error).strip() or repr(error)).splitlines()[0][:200]
    if not _everywhere(not problem):
        raise DamagedError(f"{where} is damaged: it can't be read: {problem or 'elsewhere'}")
    leaves = {name: leaves[name] for name in target}
    if changed := manifest.changed(saved, leaves):
        raise DamagedError(
            f"{where} is damaged: {len(changed)} of {len(leaves)} tensors are not what was saved, "
            f"{changed[0]} for one"
        )
    return leaves


@contextlib.contextmanager
def _loops_wait():
    """When one of many reads or writes fails, Orbax closes its event loop under the others, each of
    which then writes a traceback to the console. Here a loop waits for them before it closes."""

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self):
            loop = super().new_event_loop()
            close = loop.close

            def await_and_close():
                if tasks := asyncio.all_tasks(loop):
                    loop.run_until_complete(asyncio.wait(tasks))
                close()

            loop.close = await_and_close
            return loop

    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _everywhere(ok: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.array(ok)).all())


def _move_aside(manager: ocp.CheckpointManager, step: int) -> Path:
    """Moves a checkpoint out of the manager's sight, to ``run_dir/damaged``."""
    source = Path(manager.directory) / str(step)
    folder = source.parent.parent / "damaged"
    names = itertools.chain([f"{step}"], (f"{step}-{n}" for n in itertools.count(2)))
    to = next(folder / name for name in names if not (folder / name).exists())
    _everywhere(True)  # all have looked
    if jax.process_index() == 0:
        folder.mkdir(exist_ok=True)
        os.rename(source, to)
    _everywhere(True)  # it is done
    manager.reload()
    return to


def named(state: TrainState) -> dict[str, Any]:
    """A flat dict, so that a checkpoint can be read without this code. LoRA's base is not in it."""
    leaves = {}
    for name, x in named_leaves(state._replace(base=None)).items():
        leaves[name] = x if hasattr(x, "sharding") else np.asarray(x)
    return leaves
