"""Tiny random models, in Hugging Face's form and in ours, that several test files share.

Everything that could be forgotten is perturbed: norms, biases, epsilons, RoPE, head counts.
``CASES`` are keyword arguments of transformers' own config classes.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmzoo_jax import hf, models
from llmzoo_jax.sharding import named_leaves

BLOOM = {"model_type": "bloom", "vocab_size": 91, "n_layer": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}
POST_NORM = {"apply_residual_connection_post_layernorm": True}


def _bloom(heads: int, head_dim: int, eps: float, **keys) -> dict:
    size = heads * head_dim
    return BLOOM | {"n_head": heads, "hidden_size": size, "layer_norm_epsilon": eps} | keys


def _llama(heads: int, kv_heads: int, head_dim: int, eps: float, rope: dict, **keys) -> dict:
    own = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default"} | rope,
    }
    return LLAMA | own | keys


def _llama3(theta: float, factor: float, original: int) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.5,
        "original_max_position_embeddings": original,
    }


CASES: dict[str, dict] = {
    "bloom-3-heads": _bloom(3, 12, 1e-2),
    "bloom-5-heads-post-norm": _bloom(5, 8, 3e-3, **POST_NORM),
    "bloom-6-heads-untied": _bloom(6, 8, 1e-1, tie_word_embeddings=False),
    "bloom-7-heads": _bloom(7, 8, 2e-2),
    "bloom-12-heads-post-norm": _bloom(12, 4, 5e-2, **POST_NORM),
    "bloom-8-heads-one-layer": _bloom(8, 4, 1e-5, n_layer=1),
    "llama-theta": _llama(4, 4, 12, 1e-2, {"rope_theta": 777.7}),
    "llama-gqa-4-to-1-bias": _llama(
        8, 2, 6, 1e-1, {"rope_theta": 31.4}, attention_bias=True, tie_word_embeddings=True
    ),
    "llama-mqa-mlp-bias": _llama(6, 1, 8, 3e-2, {"rope_theta": 123456.7}, mlp_bias=True),
    "llama-wide-heads": _llama(3, 3, 20, 1e-5, {"rope_theta": 5e5}),
    "llama-linear": _llama(
        4, 2, 12, 2e-2, {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.7}
    ),
    "llama-llama3": _llama(4, 1, 16, 1e-2, _llama3(1000.5, 8.0, 32)),
    "llama-llama3-tied-all-biases": _llama(
        8, 4, 10, 5e-2, _llama3(5e5, 4.0, 64),
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "llama-linear-gqa-untied-bias": _llama(
        12, 3, 4, 1e-3, {"rope_type": "linear", "rope_theta": 99.0, "factor": 2.5},
        attention_bias=True,
    ),
}  # fmt: skip
FAMILIES = ("bloom-7-heads", "llama-llama3-tied-all-biases")  # one of each, for costlier tests


@functools.cache
def our_config(case: str):
    """The case as transformers writes it and we read it; needs no torch."""
    import transformers

    keys = dict(CASES[case])
    theirs = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return hf.read_config(folder)


def random_model(config, seed: int, *, scale: float = 0.25):
    """A model of ours in which no parameter is at its initial value."""
    rng = np.random.default_rng(seed)
    abstract = models.abstract(config)
    leaves = [
        jnp.asarray(_random(rng, name, leaf.shape, scale))
        for name, leaf in named_leaves(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


@functools.cache
def our_model(case: str):
    return random_model(our_config(case), seed=1)


def _random(rng, name: str, shape, scale: float) -> np.ndarray:
    x = scale * rng.standard_normal(shape)
    is_norm = "norm" in name and name.endswith(("scale", "weight"))
    return (1.0 + x if is_norm else x).astype(np.float32)


@functools.cache
def their_model(case: str):
    """The case on torch, with random weights; skips where torch is not installed."""
    return random_torch(CASES[case], seed=sorted(CASES).index(case))


def random_torch(keys: dict, seed: int, *, scale: float = 0.25):
    import pytest

    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    keys = dict(keys)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(_random(rng, name, tuple(weight.shape), scale)))
    return model


def from_torch(model):
    """(config, model) of ours, through a folder that transformers wrote."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = hf.read_config(folder)
        return config, hf.load_params(folder, config, place=lambda name, x: jnp.array(x))


@functools.cache
def pair(case: str):
    """(transformers on torch, ours) with the same weights."""
    theirs = their_model(case)
    return theirs, from_torch(theirs)[1]


def to_torch(folder: str | Path, config, model, *, dtype: str = "float32"):
    """Our model as transformers reads it from the folder that we write."""
    import torch
    import transformers

    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(config, dtype=dtype)))
    hf.save_params(folder, model, config, dtype=dtype, max_shard_bytes=10_000)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model, tokens: np.ndarray, lengths=None) -> np.ndarray:
    """Logits ``[B,T,V]`` of transformers, right-padded rows with their attention mask."""
    import torch

    mask = None
    if lengths is not None:
        mask = torch.from_numpy(padding_mask(tokens.shape, lengths).astype(np.int64))
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        return model(input_ids=ids, attention_mask=mask).logits.float().numpy()


def padding_mask(shape, lengths) -> np.ndarray:
    return np.arange(shape[1])[None] < np.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnames="dtype")
def forward(model, tokens, segment_ids, positions, dtype: str = "float32"):
    """Our logits ``[B,T,V]`` of packed rows."""
    x, _ = model.hidden(tokens, models.packed_mask(segment_ids), positions, dtype=jnp.dtype(dtype))
    return model.logits(x)


def segments(rows, length: int) -> tuple[np.ndarray, np.ndarray]:
    """``segment_ids, positions`` int32[B,T] for ``rows``, each a list of segment lengths."""
    ids = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for row, sizes in enumerate(rows):
        at = 0
        for segment, size in enumerate(sizes, 1):
            ids[row, at : at + size] = segment
            positions[row, at : at + size] = np.arange(size)
            at += size
        assert at <= length
    return ids, positions


def max_difference(a, b) -> float:
    """The largest absolute difference of two arrays, or of the leaves of two pytrees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()) for x, y in pairs
    )
