"""Adapters as PEFT's files, written and read: adapter_config.json, adapter_model.safetensors.

Which tensor is which follows from the table of the family in ``hf.py``. What PEFT can do and this
code can't (DoRA, trained biases, ranks by layer, ...) is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmzoo_jax import hf, lora
from llmzoo_jax.config import LoraConfig, ModelConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.lora import Adapters
from llmzoo_jax.sharding import named_leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys of adapter_config.json that are used, or change nothing in what is computed. Any other must
# be null, false or empty, or have the value in FIXED.
KNOWN = frozenset(
    """
    r lora_alpha lora_dropout target_modules peft_type task_type base_model_name_or_path revision
    inference_mode peft_version auto_mapping megatron_core qalora_group_size layers_pattern
    """.split()
)
FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base as well
}


class AdapterError(InputError):
    """A PEFT folder does not hold what it should; the message names file, key or tensor."""


class Row(NamedTuple):
    """One tensor of PEFT, and where it is in ours."""

    theirs: str  # with {l}, the layer
    ours: str
    pattern: str  # their axes -> our axes
    sizes: dict[str, int]  # of the letters


def _rows(adapters: Adapters, model: ModelConfig) -> Iterator[Row]:
    """For (abstract) adapters. Letters as in ``hf.TABLES``, and r, the rank."""
    for path, adapter in adapters.items():
        theirs, pattern = hf.TABLES[model.family][f"{path}.w"]
        left, right = pattern.split("->")
        outputs, inputs = re.findall(r"\([^)]*\)|\w+", left)  # torch: [out,in]
        letters = [letter for letter in right.split() if letter in inputs]
        out_letters = [letter for letter in right.split() if letter in outputs]
        module = "base_model.model." + theirs.removesuffix(".weight")
        a, b = f"r {inputs} -> {' '.join(letters)} r", f"{outputs} r -> r {' '.join(out_letters)}"
        for part, pattern, x in (("A", a, adapter.lora_a), ("B", b, adapter.lora_b)):
            sizes = dict(zip(pattern.split("->")[1].split(), x.shape[1:], strict=True))
            ours = f"{path}.lora_{part.lower()}"
            yield Row(f"{module}.lora_{part}.weight", ours, pattern, sizes)


def save(
    folder: str | Path, adapters: Adapters, config: LoraConfig, model: ModelConfig, *, base: str
) -> None:
    """Writes the two files; ``base`` is the name or folder of the model that they are for."""
    theirs = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(lora.targets(config, model)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (Path(folder) / CONFIG).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")
    leaves, tensors = named_leaves(adapters), {}
    for row in _rows(adapters, model):
        left, right = row.pattern.split("->")
        for layer, array in enumerate(np.asarray(leaves[row.ours])):
            array = einops.rearrange(array, f"{right} -> {left}", **row.sizes)
            tensors[row.theirs.format(l=layer)] = np.ascontiguousarray(array)
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def read_config(folder: str | Path, model: ModelConfig) -> LoraConfig:
    """The config of a PEFT folder. Raises AdapterError for a key that is not followed."""
    path = Path(folder) / CONFIG
    theirs = read_json(folder)
    if theirs.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {theirs.get('peft_type')!r}; supported is LORA")
    for key, value in theirs.items():
        fine = value in FIXED[key] if key in FIXED else key in KNOWN or not value
        if not fine:
            raise AdapterError(f"{path}: {key} is {value!r}, which is not supported")
    for key in ("r", "lora_alpha"):
        if key not in theirs:
            raise AdapterError(f"{path}: no key {key!r}")
    with _open(folder) as file:
        modules = {name.split(".")[-3] for name in file.keys() if name.count(".") >= 3}  # noqa: SIM118
    config = LoraConfig(
        rank=theirs["r"],
        alpha=float(theirs["lora_alpha"]),
        dropout=float(theirs.get("lora_dropout", 0.0)),
        targets=tuple(sorted(modules)),  # target_modules may be a pattern
    )
    return dataclasses.replace(config, targets=lora.targets(config, model))


def read_json(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json as it is."""
    path = Path(folder) / CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: no such file; is {folder} a folder of PEFT?") from error
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error


def load(folder: str | Path, config: LoraConfig, model: ModelConfig) -> Adapters:
    """The adapters of a PEFT folder, float32, on the first device.

    Raises AdapterError where ``config`` describes others, and for every tensor that is missing,
    unexpected or misshapen.
    """
    theirs = read_config(folder, model)
    keys = {
        "rank": (config.rank, theirs.rank),
        "alpha": (config.alpha, theirs.alpha),
        "targets": (lora.targets(config, model), theirs.targets),
    }
    for key, (now, there) in keys.items():
        if now != there:
            there = ",".join(there) if key == "targets" else there
            raise AdapterError(
                f"{folder}: its lora.{key} is not that of the config ({now}); set "
                f"--config.lora.{key}={there}"
            )
    abstract = lora.abstract(config, model)
    leaves, used = {}, set()
    with _open(folder) as file:
        names = set(file.keys())
        for row in _rows(abstract, model):
            layers = []
            for layer in range(model.num_layers):
                name = row.theirs.format(l=layer)
                if name not in names:
                    raise AdapterError(f"{folder}/{WEIGHTS}: missing tensor {name}")
                used.add(name)
                try:
                    array = file.get_tensor(name).astype(np.float32)
                    layers.append(einops.rearrange(array, row.pattern, **row.sizes))
                except einops.EinopsError as error:
                    raise AdapterError(
                        f"{folder}/{WEIGHTS}: tensor {name} has shape {list(array.shape)}, which "
                        f"is not {row.pattern.partition('->')[0].strip()} with {row.sizes}"
                    ) from error
            leaves[row.ours] = jnp.asarray(np.stack(layers))
    if names - used:
        raise AdapterError(f"{folder}/{WEIGHTS}: unexpected tensor {sorted(names - used)[0]}")
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [leaves[name] for name in named_leaves(abstract)]
    )


def _open(folder: str | Path):
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{path}: no such file (adapters as .bin would run code: not read)")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {error}") from error
