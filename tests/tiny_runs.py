"""Run folders with a tiny random model, as training leaves them, but made in a second."""

import json
from pathlib import Path

import jax.numpy as jnp

from llmzoo_jax import checkpoint, optim, step
from llmzoo_jax.config import (
    BloomConfig,
    Config,
    DataConfig,
    LlamaConfig,
    OptimConfig,
    RopeConfig,
    Source,
)
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.tokenizer import resolve_format, save_tokenizer
from tests.parity import random_model
from tests.tiny_tokenizers import conversation, tiny

STEP = 40
BLOOM = BloomConfig(
    vocab_size=620,
    hidden_size=40,
    num_layers=2,
    num_heads=5,
    layer_norm_eps=1e-2,
    residual_post_layernorm=False,
    tie_embeddings=True,
    init_std=0.02,
)
LLAMA = LlamaConfig(
    vocab_size=720,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    rms_norm_eps=1e-3,
    rope=RopeConfig(theta=777.7),
    max_positions=512,
    attention_bias=True,
    mlp_bias=False,
    tie_embeddings=False,
    init_std=0.02,
)
MODELS = {"bpe": BLOOM, "sentencepiece": LLAMA}  # by the tokenizer
CONVERSATIONS = (
    conversation("Qui es-tu ?", "Phénix.", lang="fr", source="a", license="MIT"),
    conversation("Who are you?", "Phoenix.", lang="en", source="owner/b", license="CC0-1.0"),
    conversation("你是谁？", "凤凰。", "真的吗？", "是。", lang="zh", source="a", license="MIT"),
)


def make_run(folder: Path, kind: str, chat_format: str = "phoenix", *, seed: int = 0, **options):
    """The run folder ``folder``, with one checkpoint; ``options`` are keys of Config."""
    tokenizer, model = tiny(kind), MODELS[kind]
    write_jsonl(folder / "train.jsonl", CONVERSATIONS)
    write_jsonl(folder / "heldout.jsonl", CONVERSATIONS[:1])
    data = {name: (Source(path=str(folder / f"{name}.jsonl")),) for name in ("train", "heldout")}
    config = Config(
        run_dir=str(folder),
        tokenizer="",
        data=DataConfig(**data, sequence_length=64, batch_size=4),
        chat_format=chat_format,
        **options,
    )
    checkpoint.claim(config, model)
    resolved = resolve_format(chat_format, tokenizer)
    save_tokenizer(tokenizer, folder / "tokenizer", chat_format=resolved)
    records = [
        {"step": 20, "loss": 3.25, "packing": 0.5},
        {"step": STEP, "loss": 2.125, "packing": 0.75},
        {"step": STEP, "heldout_loss": 2.25, "heldout_by_language": {"fr": 2.25}},
        {"step": STEP + 10, "loss": 1.0, "packing": 1.0},  # after the checkpoint
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save_checkpoint(folder, model, seed=seed)
    return folder


def save_checkpoint(folder: Path, model, *, seed: int, at: int = STEP) -> None:
    params = random_model(model, seed)
    state = step.start_state(params, optim.make_optimizer(OptimConfig(), 100))
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, state._replace(step=jnp.int32(at)))
        checkpoint.wait(manager)
