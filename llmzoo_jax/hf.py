"""Hugging Face folders: safetensors, read and written (``config.json``: ``hf_config.py``).

One table a family says which of our parameters is which of theirs, with an einops pattern; reading
follows it from left to right, writing from right to left. Every tensor of a checkpoint is used,
known to be harmless, or an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import einops
import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from llmzoo_jax import models
from llmzoo_jax.config import ModelConfig
from llmzoo_jax.hf_config import CheckpointError as CheckpointError  # re-exported
from llmzoo_jax.hf_config import config_to_hf as config_to_hf
from llmzoo_jax.hf_config import read_config as read_config
from llmzoo_jax.sharding import named_leaves

# ours -> (theirs, "their axes -> our axes"). {l} is the layer. Letters as in models/layers.py.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "bloom": {
        "embed.w": ("transformer.word_embeddings.weight", "v d -> v d"),
        "embed_norm.scale": ("transformer.word_embeddings_layernorm.weight", "d -> d"),
        "embed_norm.bias": ("transformer.word_embeddings_layernorm.bias", "d -> d"),
        "blocks.norm1.scale": ("transformer.h.{l}.input_layernorm.weight", "d -> d"),
        "blocks.norm1.bias": ("transformer.h.{l}.input_layernorm.bias", "d -> d"),
        "blocks.attention.qkv.w": (
            "transformer.h.{l}.self_attention.query_key_value.weight",
            "(n c h) d -> d n c h",
        ),
        "blocks.attention.qkv.b": (
            "transformer.h.{l}.self_attention.query_key_value.bias",
            "(n c h) -> n c h",
        ),
        "blocks.attention.out.w": (
            "transformer.h.{l}.self_attention.dense.weight",
            "d (n h) -> n h d",
        ),
        "blocks.attention.out.b": ("transformer.h.{l}.self_attention.dense.bias", "d -> d"),
        "blocks.norm2.scale": ("transformer.h.{l}.post_attention_layernorm.weight", "d -> d"),
        "blocks.norm2.bias": ("transformer.h.{l}.post_attention_layernorm.bias", "d -> d"),
        "blocks.up.w": ("transformer.h.{l}.mlp.dense_h_to_4h.weight", "f d -> d f"),
        "blocks.up.b": ("transformer.h.{l}.mlp.dense_h_to_4h.bias", "f -> f"),
        "blocks.down.w": ("transformer.h.{l}.mlp.dense_4h_to_h.weight", "d f -> f d"),
        "blocks.down.b": ("transformer.h.{l}.mlp.dense_4h_to_h.bias", "d -> d"),
        "norm.scale": ("transformer.ln_f.weight", "d -> d"),
        "norm.bias": ("transformer.ln_f.bias", "d -> d"),
        "head.w": ("lm_head.weight", "v d -> v d"),
    },
    "llama": {
        "embed.w": ("model.embed_tokens.weight", "v d -> v d"),
        "blocks.norm1.scale": ("model.layers.{l}.input_layernorm.weight", "d -> d"),
        "blocks.attention.q.w": ("model.layers.{l}.self_attn.q_proj.weight", "(n h) d -> d n h"),
        "blocks.attention.q.b": ("model.layers.{l}.self_attn.q_proj.bias", "(n h) -> n h"),
        "blocks.attention.k.w": ("model.layers.{l}.self_attn.k_proj.weight", "(n h) d -> d n h"),
        "blocks.attention.k.b": ("model.layers.{l}.self_attn.k_proj.bias", "(n h) -> n h"),
        "blocks.attention.v.w": ("model.layers.{l}.self_attn.v_proj.weight", "(n h) d -> d n h"),
        "blocks.attention.v.b": ("model.layers.{l}.self_attn.v_proj.bias", "(n h) -> n h"),
        "blocks.attention.out.w": ("model.layers.{l}.self_attn.o_proj.weight", "d (n h) -> n h d"),
        "blocks.attention.out.b": ("model.layers.{l}.self_attn.o_proj.bias", "d -> d"),
        "blocks.norm2.scale": ("model.layers.{l}.post_attention_layernorm.weight", "d -> d"),
        "blocks.gate.w": ("model.layers.{l}.mlp.gate_proj.weight", "f d -> d f"),
        "blocks.gate.b": ("model.layers.{l}.mlp.gate_proj.bias", "f -> f"),
        "blocks.up.w": ("model.layers.{l}.mlp.up_proj.weight", "f d -> d f"),
        "blocks.up.b": ("model.layers.{l}.mlp.up_proj.bias", "f -> f"),
        "blocks.down.w": ("model.layers.{l}.mlp.down_proj.weight", "d f -> f d"),
        "blocks.down.b": ("model.layers.{l}.mlp.down_proj.bias", "d -> d"),
        "norm.scale": ("model.norm.weight", "d -> d"),
        "head.w": ("lm_head.weight", "v d -> v d"),
    },
}
# Tensors that hold nothing: buffers that older versions of transformers saved.
HARMLESS_TENSORS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.masked_bias)$")

# --- tensors ------------------------------------------------------------------------------------


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, str, dict[str, int], tuple[int, ...]]]:
    """(our name, their name with {l}, pattern, sizes of its letters, their shape) a parameter."""
    for ours, leaf in named_leaves(models.abstract(config)).items():
        theirs, pattern = TABLES[config.family][ours]
        shape = leaf.shape[1:] if "{l}" in theirs else leaf.shape
        left, right = (side.strip() for side in pattern.split("->"))
        sizes = dict(zip(right.split(), shape, strict=True))
        groups = [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\w+", left)]
        their_shape = tuple(math.prod(sizes[a] for a in group) for group in groups)
        yield ours, theirs, pattern, sizes, their_shape


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    place: Callable[[str, np.ndarray], jax.Array],
    delta_of: str | Path | None = None,
) -> Any:
    """Reads the safetensors of ``folder`` into a model, one parameter in host memory at a time.

    ``place(name, float32 array)`` puts a parameter on the devices. The rest is as in
    ``read_params``.
    """
    params = read_params(folder, config, delta_of=delta_of)
    placed = {name: place(name, array) for name, array in params}
    abstract = models.abstract(config)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [placed[n] for n in named_leaves(abstract)]
    )


def read_params(
    folder: str | Path, config: ModelConfig, *, delta_of: str | Path | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Our name and float32 array of every parameter in the safetensors of ``folder``; where they
    are differences to those of the folder ``delta_of``, the sums.

    Raises CheckpointError for a missing, unexpected or misshapen tensor; nothing is filled in and
    nothing is ignored. A delta may have more tokens than its base.
    """
    if delta_of is not None:
        yield from _sums(folder, config, delta_of)
        return
    with ExitStack() as stack:
        tensors = _open_tensors(Path(folder), stack)
        if config.family == "bloom" and "word_embeddings.weight" in tensors:
            # bigscience's own uploads were saved from the inner model, without the prefix.
            tensors = {
                name if name.startswith("lm_head.") else f"transformer.{name}": tensor
                for name, tensor in tensors.items()
            }
        used = set()
        for ours, theirs, pattern, sizes, their_shape in _rows(config):

            def read(name: str, pattern=pattern, sizes=sizes, shape=their_shape) -> np.ndarray:
                used.add(name)
                array = _read_tensor(tensors, name, shape, folder)
                return einops.rearrange(array, pattern, **sizes)

            if "{l}" in theirs:
                first = read(theirs.format(l=0))
                array = np.empty((config.num_layers, *first.shape), np.float32)
                array[0] = first
                for layer in range(1, config.num_layers):
                    array[layer] = read(theirs.format(l=layer))
            else:
                array = read(theirs)
            yield ours, np.ascontiguousarray(array, dtype=np.float32)
        if config.tie_embeddings and "lm_head.weight" in tensors:
            # Some tools save the tied head a second time; it must then be the same.
            used.add("lm_head.weight")
            table, _ = TABLES[config.family]["embed.w"]
            if not np.array_equal(tensors["lm_head.weight"](), tensors[table]()):
                raise CheckpointError(
                    f"{folder}: lm_head.weight differs from {table}, but config.json says "
                    "tie_word_embeddings: true"
                )
        extra = [n for n in sorted(tensors.keys() - used) if not HARMLESS_TENSORS.match(n)]
        if extra:
            raise CheckpointError(
                f"{folder}: unexpected tensors {_few(extra)}; config.json describes a model "
                "without them"
            )


def _sums(
    folder: str | Path, config: ModelConfig, base: str | Path
) -> Iterator[tuple[str, np.ndarray]]:
    """As FastChat's ``apply_delta``, in float32. For tokens that the base lacks its ``make_delta``
    took zeros, so their rows are whole."""
    theirs = read_config(base)
    described = dataclasses.asdict(theirs)
    for key, value in dataclasses.asdict(config).items():
        other = described.get(key)
        if value != other and key not in ("vocab_size", "max_positions", "init_std"):
            raise CheckpointError(
                f"{folder}: {key} is {value!r}, and in {base} it is {other!r}; differences to "
                "another model?"
            )
    for (name, delta), (_, whole) in zip(
        read_params(folder, config), read_params(base, theirs), strict=True
    ):
        rows = len(whole)
        if len(delta) < rows:
            tensor, _ = TABLES[config.family][name]
            raise CheckpointError(
                f"{folder}: tensor {tensor} has {len(delta):,} rows, and that of {base} {rows:,}; "
                "a delta may have more, not fewer"
            )
        if name == "embed.w" and np.linalg.norm(delta[:rows]) > np.linalg.norm(whole) / 2:
            raise CheckpointError(
                f"{folder}: its embeddings are as large as those of {base}, so these are whole "
                "weights and no differences; load it without a base"
            )
        yield name, np.concatenate([delta[:rows] + whole, delta[rows:]])


def content_hash(folder: str | Path) -> str:
    """SHA-256 over the safetensors of a folder, whatever their names and dates."""

    def one(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(one, sorted(Path(folder).glob("*.safetensors"))))
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Callable[[], np.ndarray]]:
    """``{tensor name: function that reads it}`` over all safetensors of a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: not JSON with a weight_map: {error}") from error
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        hint = ""
        if any(folder.glob("pytorch_model*.bin")):
            hint = (
                "; it has pytorch_model*.bin, which would run code: load it once with "
                "transformers and save_pretrained() it as safetensors"
            )
        raise CheckpointError(f"{folder}: no *.safetensors file{hint}")
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing, but {index.name} names it")
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="np"))
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / file}: not a whole safetensors file: {error}"
            ) from error
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in tensors:
                raise CheckpointError(f"{folder / file}: tensor {name} is in another file as well")
            tensors[name] = lambda handle=handle, name=name: handle.get_tensor(name)
    return tensors


def _read_tensor(tensors, name: str, shape: tuple[int, ...], folder) -> np.ndarray:
    if name not in tensors:
        raise CheckpointError(f"{folder}: missing tensor {name}, shape {list(shape)}")
    array = tensors[name]()
    if array.shape != shape:
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {list(array.shape)}; config.json asks for "
            f"{list(shape)}"
        )
    return array


def save_params(
    folder: str | Path, model: Any, config: ModelConfig, *, dtype: str, max_shard_bytes: int
) -> list[str]:
    """Writes ``model-0000i-of-0000n.safetensors`` and their index; returns the file names.

    ``dtype`` is "float32" or "bfloat16". One shard is in host memory at a time; shards are cut
    before they exceed ``max_shard_bytes``.
    """
    folder = Path(folder)
    to = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    leaves = named_leaves(model)
    rows = list(_rows(config))
    jobs = []  # (their name, ours, layer or None, pattern, bytes)
    for ours, theirs, pattern, _, shape in rows:
        size = math.prod(shape) * np.dtype(to).itemsize
        for layer in range(config.num_layers) if "{l}" in theirs else (None,):
            jobs.append((theirs.format(l=layer), ours, layer, pattern, size))
    jobs.sort(key=lambda job: -1 if job[2] is None else job[2])  # shards hold whole layers
    shards: list[list] = [[]]
    for job in jobs:
        if shards[-1] and sum(j[4] for j in shards[-1]) + job[4] > max_shard_bytes:
            shards.append([])
        shards[-1].append(job)
    files, weight_map = [], {}
    for i, shard in enumerate(
        tqdm(shards, desc="writing", unit=" files", delay=2, disable=None), 1
    ):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for theirs, ours, layer, pattern, _ in shard:
            array = leaves[ours] if layer is None else leaves[ours][layer]
            left, right = pattern.split("->")
            array = einops.rearrange(np.asarray(array), f"{right} -> {left}")
            tensors[theirs] = np.ascontiguousarray(array.astype(to))
            weight_map[theirs] = name
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.append(name)
    total = sum(job[4] for job in jobs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
