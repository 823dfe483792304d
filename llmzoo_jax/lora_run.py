"""LoRA runs: the frozen base, read again from ``init_from`` at every start, and the adapters of the
checkpoint. ``base.json`` in the run folder says where the base was, and the hash of its content.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmzoo_jax import checkpoint, distributed, hf, lora, models, peft_format, sharding
from llmzoo_jax import config as configs
from llmzoo_jax import step as steps
from llmzoo_jax.checkpoint import RunError
from llmzoo_jax.config import Config, LoraConfig, MeshConfig, ModelConfig
from llmzoo_jax.metrics import say

BASE = "base.json"


def start_state(config: Config, model: ModelConfig, tx, mesh: Mesh, manager) -> steps.TrainState:
    """The adapters of the newest checkpoint, else those of ``lora.init_from``, else new ones; and
    their base. Raises RunError where the base is not the one that the run began with."""
    distributed.in_turn(lambda: claim_base(config.run_dir, config.init_from))
    say(f"reading {config.init_from}")
    base = load_base(config.init_from, model, config.lora, mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    say(f"frozen: {models.num_params(models.abstract(model)):,} parameters in {size / 1e6:,.1f} MB")

    def start(adapters):
        return steps.start_state(adapters, tx)

    if manager.latest_step() is not None:
        abstract = jax.eval_shape(start, lora.abstract(config.lora, model))
        return checkpoint.restore(manager, abstract, mesh)._replace(base=base)
    if config.lora.init_from:
        make = functools.partial(start, peft_format.load(config.lora.init_from, config.lora, model))
    else:
        key = lora.init_key(config.seed)
        make = lambda: start(lora.init(config.lora, model, key))  # noqa: E731
    shardings = sharding.tree_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=shardings)()._replace(base=base)


def load_base(folder: str | Path, model: ModelConfig, config: LoraConfig, mesh: Mesh) -> nnx.Module:
    """The model of a Hugging Face folder, frozen as ``config`` says. What is quantised is so a
    layer at a time, as it is read: no device ever holds more of it."""
    like = models.abstract(model)
    abstract = jax.eval_shape(functools.partial(lora.freeze, config=config), like)
    shardings = jax.tree.leaves(sharding.tree_shardings(abstract, mesh))
    layout = dict(zip(sharding.named_leaves(abstract), shardings, strict=True))
    quantised = lora.TARGETS[model.family].values() if config.quantise != "none" else ()
    placed = {}
    for name, array in hf.read_params(folder, model):
        path = name.removesuffix(".w")
        if path in quantised:
            weight = _quantise(lora.module(like, path), name, array, config, mesh)
            placed |= {f"{name}.{part}": x for part, x in sharding.named_leaves(weight).items()}
        else:
            array = array.astype(jnp.dtype(config.base_dtype))
            placed[name] = distributed.place(array, layout[name])
    return jax.tree.unflatten(jax.tree.structure(abstract), [placed[name] for name in layout])


def _quantise(proj, name: str, array: np.ndarray, config: LoraConfig, mesh: Mesh) -> nnx.Module:
    """The stacked float32 weight ``array[L,..]`` of a projection, quantised layer by layer."""
    make = functools.partial(lora.quantise, proj, config=config)
    whole = sharding.sharding_of(array.shape, proj.w.get_metadata()["axes"], mesh, name=name)
    layout = sharding.tree_shardings(jax.eval_shape(make, array[:1]), mesh)
    quantise = jax.jit(make, out_shardings=layout)
    layers = [quantise(distributed.place(array[i : i + 1], whole)) for i in range(len(array))]
    join = lambda *layers: jax.tree.map(lambda *x: jnp.concatenate(x), *layers)  # noqa: E731
    return jax.jit(join, out_shardings=layout)(*layers)


# --- a model to use -----------------------------------------------------------------------------


def restore_model(
    run_dir: str | Path,
    model: ModelConfig,
    *,
    step: checkpoint.Step = "latest",
    mesh: Mesh | None = None,
) -> nnx.Module:
    """The model of a checkpoint of any run, float32, on one device or a mesh; of a LoRA run, its
    adapters merged into the weights they were trained on (of a quantised base, those)."""
    config = configs.lora_from_dict(checkpoint.read_config(run_dir).get("lora"))
    if config is None:
        return checkpoint.restore_params(run_dir, model, step=step, mesh=mesh)
    abstract = lora.abstract(config, model)
    adapters = checkpoint.restore_params(run_dir, abstract, step=step, mesh=mesh)
    known = read_base(run_dir)
    _check_content(Path(run_dir) / BASE, known["folder"], known)
    base = load_base(known["folder"], model, config, mesh or one_device())
    return lora.merge(base, adapters)


def load_peft(
    folder: str | Path, base: str | Path, model: ModelConfig, *, mesh: Mesh | None = None
) -> nnx.Module:
    """A PEFT adapter merged into the Hugging Face folder ``base``, float32, on one device or a
    mesh."""
    config = peft_format.read_config(folder, model)
    frozen = load_base(base, model, config, mesh or one_device())
    return lora.merge(frozen, peft_format.load(folder, config, model))


def one_device() -> Mesh:
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


# --- which base ---------------------------------------------------------------------------------


def read_base(run_dir: str | Path) -> dict[str, str]:
    """ "folder" and "sha256" of the base of a LoRA run."""
    path = Path(run_dir) / BASE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise RunError(f"{path}: the base of this LoRA run can't be read: {error}") from error


def claim_base(run_dir: str | Path, folder: str) -> None:
    """Notes the base of a run that begins; one that goes on must find the same content, though
    perhaps in another folder."""
    path = Path(run_dir) / BASE
    if path.is_file():
        known = read_base(run_dir)
        _check_content(path, folder, known)
    else:
        known = {"sha256": hf.content_hash(folder)}
    checkpoint.write_text(path, json.dumps({**known, "folder": folder}, indent=2) + "\n")


def _check_content(path: Path, folder: str, known: dict[str, Any]) -> None:
    if not Path(folder).is_dir():
        raise RunError(
            f"{path}: the base of this LoRA run was in {folder}, which is gone; put it back, or "
            'write where it is now as "folder"'
        )
    if hf.content_hash(folder) != known["sha256"]:
        raise RunError(
            f"{folder}: its safetensors are not those that the run of {path.parent} began with "
            "(SHA-256), and adapters fit no other base; put the old ones back, or start a new run"
        )
