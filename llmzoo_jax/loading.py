"""Folders -> ``inference.Model``: a run, a Hugging Face folder, an adapter, a base plus a delta."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from llmzoo_jax import checkpoint, hf, lora, lora_run, peft_format, placement, sharding
from llmzoo_jax import config as configs
from llmzoo_jax import generate as decoding
from llmzoo_jax.config import LoraConfig
from llmzoo_jax.inference import LoadError, Model, find_format, stop_token_ids
from llmzoo_jax.models import quantised
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format


def load_model(
    path: str | Path,
    *,
    dtype: str = "float32",
    step: checkpoint.Step = "latest",
    weights: str = "dtype",
    base: str | Path | None = None,
    tensor: int = 1,
) -> Model:
    """``llmzoo_jax.load``; see there."""
    path = Path(path)
    if weights not in ("dtype", *quantised.KINDS):
        raise LoadError(f"weights={weights!r}: dtype, {' or '.join(quantised.KINDS)}")
    if dtype not in ("float32", "bfloat16"):
        raise LoadError(f"dtype={dtype!r}: float32 or bfloat16")
    if tensor < 0:
        raise LoadError(f"tensor={tensor}: 1 device or more, or 0")
    if not any((path / name).is_file() for name in ("config.json", peft_format.CONFIG)):
        what = "it has no config.json" if path.is_dir() else "no such folder"
        raise LoadError(f"{path}: {what}; give a Hugging Face folder or a run folder")
    is_adapter = not (path / "config.json").is_file()
    if not is_adapter and is_run(path):
        if base is not None:
            raise LoadError(f"base={base}: {path} is a run folder, whose checkpoints are whole")
        loaded = _from_run(path, jnp.dtype(dtype), step, tensor)
    elif step != "latest":
        raise LoadError(f"{path}: step={step!r} is for a run folder; this is a Hugging Face folder")
    elif is_adapter:
        loaded = _from_peft(path, jnp.dtype(dtype), base, tensor)
    else:
        loaded = _from_hf(path, dtype, weights, base, tensor)
    config, tokenizer, chat_format, params, more_stops, mesh = loaded
    if weights != "dtype" and not isinstance(params.blocks, tuple):
        params = lora.freeze(params, LoraConfig(quantise=weights, base_dtype=dtype))
    stops = stop_token_ids(tokenizer, chat_format) if tokenizer is not None else ()
    return Model(
        path=str(path),
        config=config,
        tokenizer=tokenizer,
        format=chat_format,
        params=decoding.prepare(params, mesh),
        stop_ids=tuple(sorted({*stops, *more_stops})),
        dtype=dtype,
        mesh=mesh,
    )


def is_run(path: Path) -> bool:
    return "run_dir" in checkpoint.read_config(path)


def _from_run(path: Path, dtype: jnp.dtype, step: checkpoint.Step, tensor: int):
    run = checkpoint.read_config(path)
    config = configs.model_from_dict(run["model"])
    tokenizer = load_tokenizer(path / "tokenizer")
    chat_format = resolve_format(run["chat_format"], tokenizer)
    mesh = sharding.tensor_mesh(config, tensor)
    params = lora_run.restore_model(path, config, step=step, mesh=mesh)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return config, tokenizer, chat_format, params, (), mesh


def _from_peft(path: Path, dtype: jnp.dtype, base: str | Path | None, tensor: int):
    """An adapter, merged into its base; with the tokenizer beside it, else the base's."""
    if base is None:
        base = peft_format.read_json(path).get("base_model_name_or_path") or ""
        if not (Path(base) / "config.json").is_file():
            raise LoadError(
                f"{path}/{peft_format.CONFIG}: base_model_name_or_path is {base!r}, which is no "
                "folder with a model here; download it, and give base=FOLDER (--base)"
            )
    base = Path(base)
    config = hf.read_config(base)
    tokenizer, chat_format = _tokenizer(path, base)
    mesh = sharding.tensor_mesh(config, tensor)
    params = lora_run.load_peft(path, base, config, mesh=mesh)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return config, tokenizer, chat_format, params, _eos_ids(base), mesh


def _from_hf(path: Path, dtype: str, weights: str, base: str | Path | None, tensor: int):
    config = hf.read_config(path)
    tokenizer, chat_format = _tokenizer(path, *([] if base is None else [Path(base)]))
    mesh = sharding.tensor_mesh(config, tensor)
    params = placement.read(path, config, dtype=dtype, weights=weights, mesh=mesh, delta_of=base)
    return config, tokenizer, chat_format, params, _eos_ids(path), mesh


def _tokenizer(*folders: Path):
    """(tokenizer, format) of the first folder that has one, else None."""
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            tokenizer = load_tokenizer(folder)
            return tokenizer, find_format(tokenizer)
    return None, None


def _eos_ids(path: Path) -> tuple[int, ...]:
    """``eos_token_id`` of the generation config, else, as transformers does, of the config."""
    file = path / "generation_config.json"
    file = file if file.is_file() else path / "config.json"
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except json.JSONDecodeError as error:
        raise LoadError(f"{file}: line {error.lineno} is not JSON: {error.msg}") from error
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
