"""Exports a checkpoint of a run as a Hugging Face folder.

    python -m llmzoo_jax.export --run=runs/quickstart-phoenix
    python -m llmzoo_jax.export --run=runs/quickstart-phoenix --step=best
    python -m llmzoo_jax.export --run=runs/phoenix-7b-lora --adapter

The folder has safetensors with their index, config.json, generation_config.json, the tokenizer
with its chat template, a model card with the figures of the run, and its loss plot; transformers
and llmzoo_jax.load read it. Of a LoRA run that is the merged model; --adapter writes the adapter
alone, as a folder of PEFT. It appears whole or not at all. The same command again replaces it by
an export of the checkpoint that is then the newest, or the best one by its held-out loss.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from absl import flags
from safetensors import SafetensorError

from llmzoo_jax import checkpoint, cli, hf, lora, lora_run, model_card, models, peft_format
from llmzoo_jax import config as configs
from llmzoo_jax.config import LoraConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import stop_token_ids
from llmzoo_jax.metrics import say
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format

# What an export may hold; a folder with anything else in it is not replaced.
FILES = (
    "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "README.md", "loss.png", peft_format.CONFIG, peft_format.WEIGHTS,
)  # fmt: skip
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class ExportError(InputError):
    """A run can't be exported, or not to there; the message says what to do."""


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    step: checkpoint.Step = "latest",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    content: Literal["model", "adapter"] = "model",
) -> Path:
    """Writes a checkpoint of the folder ``run`` to ``out``; returns it.

    ``content`` is a whole model (to ``run/export``) or, of a LoRA run, the adapter as PEFT has it,
    in float32 (to ``run/adapter``).

    Raises ExportError where ``out`` is something else than an earlier export (unless
    ``overwrite``) or can't be written, RunError where there is no checkpoint or no room.
    """
    run = Path(run)
    out = Path(out or run / {"model": "export", "adapter": "adapter"}[content])
    limit = _bytes(max_shard_size)
    if dtype not in ("float32", "bfloat16"):
        raise ExportError(f"--dtype={dtype}: float32 or bfloat16")
    config = checkpoint.read_config(run)
    _check_target(out, run, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    model_config = configs.model_from_dict(config["model"])
    if content == "adapter":
        lora_config = _lora_config(run, config, dtype)
        abstract = lora.abstract(lora_config, model_config)
        restore = functools.partial(checkpoint.restore_params, run, abstract)
    else:
        abstract = models.abstract(model_config)
        restore = functools.partial(lora_run.restore_model, run, model_config)
    num_params = models.num_params(abstract)
    size = num_params * (2 if dtype == "bfloat16" else 4)
    checkpoint.check_space(out.parent, size, f"the export of {run}")
    number, params = _read(run, step, restore)

    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.mkdir()
        _write_about(part, run, config, content, num_params, number, dtype)
        if content == "adapter":
            base = lora_run.read_base(run)["folder"]
            peft_format.save(part, params, lora_config, model_config, base=base)
        else:
            _write_model(part, params, config, model_config, dtype, limit)
        for path in part.glob("*.safetensors"):  # safetensors writes for the owner only
            shutil.copymode(part / "README.md", path)
        _replace(part, out)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{out}: not written: {error}. Make room or choose another --out, and run the same "
            "command again"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _lora_config(run: Path, config: dict[str, Any], dtype: str) -> LoraConfig:
    if config.get("lora") is None:
        raise ExportError(f"--adapter: {run} trained all weights; only a LoRA run has adapters")
    if dtype != "float32":
        raise ExportError(f"--adapter writes float32, not --dtype={dtype}")
    return configs.lora_from_dict(config["lora"])


def _write_about(part: Path, run: Path, config, content, num_params, step, dtype) -> None:
    """Tokenizer, model card and loss plot, into the empty folder ``part``."""
    shutil.copytree(run / "tokenizer", part, dirs_exist_ok=True)
    chat_format = resolve_format(config["chat_format"], load_tokenizer(part))
    plot = "loss.png" if (run / "loss.png").is_file() else None
    if plot:
        shutil.copyfile(run / plot, part / plot)
    card = model_card.write(
        run, config, content=content, step=step, chat_format=chat_format, num_params=num_params,
        dtype=dtype, plot=plot,
    )  # fmt: skip
    (part / "README.md").write_text(card, encoding="utf-8")


def _write_model(part: Path, model, config, model_config, dtype, limit) -> None:
    """Weights, config.json and generation_config.json, beside the tokenizer in ``part``."""
    tokenizer = load_tokenizer(part)
    names = ("bos", "eos", "pad")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    _write_json(part / "config.json", hf.config_to_hf(model_config, dtype=dtype) | ids)
    stops = stop_token_ids(tokenizer, resolve_format(config["chat_format"], tokenizer))
    generation = ids | {
        "eos_token_id": list(stops) if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": next((i for i in (ids["pad_token_id"], *stops) if i is not None), None),
        "do_sample": False,
    }
    generation = {key: value for key, value in generation.items() if value is not None}
    _write_json(part / "generation_config.json", generation)
    hf.save_params(part, model, model_config, dtype=dtype, max_shard_bytes=limit)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(run: Path, step: checkpoint.Step, restore: Callable[..., Any]) -> tuple[int, Any]:
    """(step, parameters) of a checkpoint, also while training saves more and deletes some."""
    while True:
        number = checkpoint.find_step(run, step)
        try:
            return number, restore(step=number)
        except checkpoint.DamagedError:
            if checkpoint.find_step(run, step) == number:
                raise


def _check_target(out: Path, run: Path, overwrite: bool) -> None:
    """Raises ExportError where ``out`` is not to be replaced."""
    if run.resolve().is_relative_to(out.resolve()) or (out / "checkpoints").is_dir():
        raise ExportError(f"--out={out} holds a run; choose another folder")
    if not out.exists() or overwrite:
        return
    if not out.is_dir():
        raise ExportError(f"--out={out} is a file; choose another name, or set --overwrite")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, known) for known in FILES)]
    if foreign:
        raise ExportError(
            f"--out={out} holds {foreign[0]!r}, which is no part of an export; choose another "
            "folder, or set --overwrite to delete what is there"
        )
    card = out / "README.md"
    if names and not (card.is_file() and model_card.MARK in card.read_text("utf-8", "replace")):
        raise ExportError(
            f"--out={out} holds a model that was not exported here; choose another folder, or set "
            "--overwrite to delete it"
        )


def _replace(part: Path, out: Path) -> None:
    """Puts the folder ``part`` in the place of ``out``."""
    old = part.with_suffix(".old")
    if out.exists():
        os.rename(out, old)
    os.rename(part, out)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text.strip())
    try:
        size = int(float(match[1]) * UNITS[match[2].upper()])
    except (TypeError, ValueError, KeyError):
        size = 0
    if size < 1:
        raise ExportError(f"--max_shard_size={text}: a size such as 5GB, 500MB or 2GiB")
    return size


def main(_) -> None:
    out = export(
        RUN.value,
        OUT.value,
        step=int(STEP.value) if STEP.value.isdecimal() else STEP.value,
        dtype=DTYPE.value,
        max_shard_size=MAX_SHARD_SIZE.value,
        overwrite=OVERWRITE.value,
        content="adapter" if ADAPTER.value else "model",
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"exported to {out} ({size / 1e6:,.1f} MB); try python -m serving.chat --model={out}")


if __name__ == "__main__":
    RUN = flags.DEFINE_string("run", None, "Run folder to export.", required=True)
    OUT = flags.DEFINE_string(
        "out", None, "Folder to write; RUN/export, or RUN/adapter, where it is not given."
    )
    STEP = flags.DEFINE_string(
        "step",
        "latest",
        "Checkpoint: its step, latest, or best (of the lowest held-out loss; see keep_best).",
    )
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights.")
    MAX_SHARD_SIZE = flags.DEFINE_string(
        "max_shard_size", "5GB", "Largest size of one safetensors file."
    )
    OVERWRITE = flags.DEFINE_bool(
        "overwrite", False, "Delete --out even where it is no earlier export."
    )
    ADAPTER = flags.DEFINE_bool(
        "adapter", False, "Of a LoRA run: the adapter alone, as PEFT has it, not the merged model."
    )
    cli.run(main)
