"""``config.json`` of Hugging Face, read and written. Every key is used, known to be harmless, or an
error; both spellings of RoPE, of transformers 4 and 5, are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmzoo_jax.config import BloomConfig, LlamaConfig, ModelConfig, RopeConfig
from llmzoo_jax.errors import InputError

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
                    "forward pass, add it to HARMLESS_KEYS in llmzoo_jax/hf_config.py; otherwise "
                    "the model would be computed wrongly"
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
    rope: dict[str, Any] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        for name, value in keys.get(spelling, absent={}).items():
            name = "rope_type" if name == "type" else name  # before transformers 4.43
            if value is not None and rope.setdefault(name, value) != value:
                raise CheckpointError(
                    f"{keys.path}: rope is described twice and differently: {name} "
                    f"is {rope[name]!r} and {value!r}"
                )
    theta = keys.get("rope_theta", absent=rope.get("rope_theta", 10000.0))
    if rope.pop("rope_theta", theta) != theta:
        raise CheckpointError(f"{keys.path}: rope_theta and rope_parameters say different things")
    scaling = rope.pop("rope_type", "default")
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
