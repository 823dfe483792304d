"""Hugging Face folders: ``config.json`` and safetensors, read and written.

One table a family says which of our parameters is which of theirs, with an einops pattern; reading
follows it from left to right, writing from right to left. Every key of a ``config.json`` is used,
known to be harmless, or an error; every tensor of a checkpoint is used, known to be harmless, or
an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
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
from llmzoo_jax.config import BloomConfig, LlamaConfig, ModelConfig, RopeConfig
from llmzoo_jax.errors import InputError
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

# Keys of config.json that change nothing in the forward pass, or that the tokenizer and the
# generation config say better.
HARMLESS_KEYS = frozenset(
    """
    _name_or_path architectures attention_softmax_in_fp32 bias_dropout_fusion bos_token_id
    chunk_size_feed_forward dtype eos_token_id id2label label2id masked_softmax_fusion model_type
    offset_alibi output_attentions output_hidden_states pad_token_id pretraining_tp problem_type
    return_dict seq_length skip_bias_add skip_bias_add_qkv slow_but_exact torch_dtype
    transformers_version unk_token_id use_cache max_sequence_length
    """.split()
)
# Keys of which one value only is what this code computes.
FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "hidden_act": ("silu",),
    "is_encoder_decoder": (False,),
    "n_inner": (None,),
}


class CheckpointError(InputError):
    """A Hugging Face folder does not hold what it should; the message names file, key or tensor."""


# --- config.json --------------------------------------------------------------------------------


def read_config(folder: str | Path) -> ModelConfig:
    """The model config of a Hugging Face folder. Raises CheckpointError for a missing file, an
    unknown architecture, and every key that is neither used nor known to be harmless."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; is {folder} a Hugging Face model folder?")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
    keys = _Keys(theirs, str(path))
    family = theirs.get("model_type")
    if family not in _READERS:
        raise CheckpointError(
            f"{path}: model_type is {family!r}; known are {', '.join(sorted(_READERS))}"
        )
    config = _READERS[family](keys)
    keys.finish()
    return config


class _Keys:
    """The keys of a config.json, which remembers which of them were read."""

    def __init__(self, theirs: dict[str, Any], path: str):
        self.theirs, self.path, self.seen = theirs, path, set()

    def get(self, *names: str, absent: Any = None) -> Any:
        """The value under any of its spellings; ``absent`` is what HF's format says its absence
        means, None that it can't be absent."""
        self.seen.update(names)
        values = [self.theirs[n] for n in names if self.theirs.get(n) is not None]
        if any(value != values[0] for value in values):
            raise CheckpointError(f"{self.path}: {' and '.join(names)} say different things")
        if not values and absent is None:
            raise CheckpointError(f"{self.path}: no key {names[0]!r}, which the model needs")
        return values[0] if values else absent

    def finish(self) -> None:
        for name, value in self.theirs.items():
            if name in self.seen or name in HARMLESS_KEYS:
                continue
            if name not in FIXED_KEYS:
                raise CheckpointError(
                    f"{self.path}: unknown key {name!r} ({value!r}). If it changes nothing in the "
                    "forward pass, add it to HARMLESS_KEYS in llmzoo_jax/hf.py; otherwise the "
                    "model would be computed wrongly"
                )
            if value not in FIXED_KEYS[name]:
                wanted = " or ".join(map(repr, FIXED_KEYS[name]))
                raise CheckpointError(f"{self.path}: {name} is {value!r}; supported is {wanted}")


def _read_bloom(keys: _Keys) -> BloomConfig:
    config = BloomConfig(
        vocab_size=keys.get("vocab_size"),
        hidden_size=keys.get("hidden_size", "n_embed"),
        num_layers=keys.get("n_layer", "num_hidden_layers"),
        num_heads=keys.get("n_head", "num_attention_heads"),
        layer_norm_eps=keys.get("layer_norm_epsilon", absent=1e-5),
        residual_post_layernorm=keys.get("apply_residual_connection_post_layernorm", absent=False),
        tie_embeddings=keys.get("tie_word_embeddings", absent=True),
        init_std=keys.get("initializer_range", absent=0.02),
    )
    if config.hidden_size % config.num_heads:
        raise CheckpointError(
            f"{keys.path}: hidden_size {config.hidden_size} is not divisible by n_head "
            f"{config.num_heads}"
        )
    return config


def _read_llama(keys: _Keys) -> LlamaConfig:
    hidden, heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    max_positions = keys.get("max_position_embeddings", absent=2048)
    return LlamaConfig(
        vocab_size=keys.get("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.get("intermediate_size"),
        num_layers=keys.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=keys.get("num_key_value_heads", absent=heads),
        head_dim=keys.get("head_dim", absent=hidden // heads),
        rms_norm_eps=keys.get("rms_norm_eps", absent=1e-6),
        rope=_read_rope(keys, max_positions),
        max_positions=max_positions,
        attention_bias=keys.get("attention_bias", absent=False),
        mlp_bias=keys.get("mlp_bias", absent=False),
        tie_embeddings=keys.get("tie_word_embeddings", absent=False),
        init_std=keys.get("initializer_range", absent=0.02),
    )


def _read_rope(keys: _Keys, max_positions: int) -> RopeConfig:
    """Both spellings: ``rope_theta`` with ``rope_scaling`` (transformers 4), and
    ``rope_parameters`` (transformers 5). LLaMA 1 has neither: 10,000 and no scaling."""
    rope = dict(keys.get("rope_scaling", absent={})) | dict(keys.get("rope_parameters", absent={}))
    theta = keys.get("rope_theta", absent=rope.get("rope_theta", 10000.0))
    if rope.pop("rope_theta", theta) != theta:
        raise CheckpointError(f"{keys.path}: rope_theta and rope_parameters say different things")
    old = rope.pop("type", None)  # the spelling before transformers 4.43
    scaling = rope.pop("rope_type", None) or old or "default"
    names = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_positions": "original_max_position_embeddings",
        },
    }.get(scaling)
    if names is None:
        raise CheckpointError(
            f"{keys.path}: rope type {scaling!r}; supported are default, linear, llama3"
        )
    if rope.keys() - set(names.values()):
        unknown = ", ".join(sorted(rope.keys() - set(names.values())))
        raise CheckpointError(f"{keys.path}: unknown keys of rope scaling {scaling!r}: {unknown}")
    if scaling == "llama3":
        rope.setdefault("original_max_position_embeddings", max_positions)
    missing = set(names.values()) - rope.keys()
    if missing:
        raise CheckpointError(f"{keys.path}: rope scaling {scaling!r} needs {sorted(missing)}")
    return RopeConfig(
        theta=float(theta), scaling=scaling, **{our: rope[name] for our, name in names.items()}
    )


_READERS: dict[str, Callable[[_Keys], ModelConfig]] = {"bloom": _read_bloom, "llama": _read_llama}


def config_to_hf(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """A ``config.json`` in the spelling that transformers 4 and 5 both read."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "model_type": config.family,
        "use_cache": True,
    }
    if isinstance(config, BloomConfig):
        return common | {
            "architectures": ["BloomForCausalLM"],
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "layer_norm_epsilon": config.layer_norm_eps,
            "apply_residual_connection_post_layernorm": config.residual_post_layernorm,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
    rope = config.rope
    scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.scaling == "default" else scaling,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.mlp_bias,
    }


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
    folder: str | Path, config: ModelConfig, *, place: Callable[[str, np.ndarray], jax.Array]
) -> Any:
    """Reads the safetensors of ``folder`` into a model, one parameter in host memory at a time.

    ``place(name, float32 array)`` puts a parameter on the devices. Raises CheckpointError for a
    missing, unexpected or misshapen tensor; nothing is filled in and nothing is ignored.
    """
    abstract = models.abstract(config)
    with ExitStack() as stack:
        tensors = _open_tensors(Path(folder), stack)
        if config.family == "bloom" and "word_embeddings.weight" in tensors:
            # bigscience's own uploads were saved from the inner model, without the prefix.
            tensors = {
                name if name.startswith("lm_head.") else f"transformer.{name}": tensor
                for name, tensor in tensors.items()
            }
        placed, used = {}, set()
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
            placed[ours] = place(ours, np.ascontiguousarray(array, dtype=np.float32))
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
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [placed[n] for n in named_leaves(abstract)]
    )


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Callable[[], np.ndarray]]:
    """``{tensor name: function that reads it}`` over all safetensors of a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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
    for i, shard in enumerate(tqdm(shards, desc="writing", unit=" files", delay=2), 1):
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
