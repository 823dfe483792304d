"""Chimera 7B: LLaMA 7B, all weights, with LLM Zoo's hyper-parameters.

    python -m llmzoo_jax.train --config=configs/chimera_7b.py \\
        --hardware=configs/hardware/gpu.py:h100-8
    python -m llmzoo_jax.train --config=configs/chimera_7b.py \\
        --hardware=configs/hardware/gpu.py:h200-1 \\
        --config.optim.accumulation=128
    python -m llmzoo_jax.train --config=configs/chimera_7b.py \\
        --hardware=configs/hardware/tpu.py:v5e-256 \\
        --config.optim.accumulation=1

on 8 H100 (80 GB), one H200 (141 GB), a v5e pod. Weights, gradients and AdamW, all float32, take 108
GB, shared by the devices.

Download first: LLaMA 7B in Hugging Face's format (Meta's licence), to models/llama-7b (its
safetensors, config.json and tokenizer files). Data: as in configs/phoenix_7b.py, of which Chimera
takes the languages in Latin and Cyrillic letters.

A batch is 256 packed rows of 2,048 tokens; LLM Zoo's is 256 conversations, padded. The set's 457
million tokens (LLM Zoo's count) so make about 870 steps an epoch, not 1,820: for steps as small as
LLM Zoo's, halve data.batch_size.

Loss, speed and peak memory were not measured; bytes are computed (tests/test_recipes.py).
"""

from llmzoo_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    LlamaConfig,
    OptimConfig,
    RopeConfig,
    Source,
)

BASE = "models/llama-7b"

# In Latin and Cyrillic letters, as in LLM Zoo, which does not list them.
LANGUAGES = (
    "en", "es", "fr", "pt", "de", "it", "id", "vi", "tr", "pl", "nl", "ro", "cs", "sv", "da", "fi",
    "hu", "ca", "sw", "ru", "uk", "bg", "sr",
)  # fmt: skip


def get_config() -> Config:
    return Config(
        run_dir="runs/chimera-7b",
        tokenizer=BASE,
        init_from=BASE,
        model=LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope=RopeConfig(theta=10000.0),
            max_positions=2048,
            attention_bias=False,
            mlp_bias=False,
            tie_embeddings=False,
            init_std=0.02,
        ),
        chat_format="phoenix",
        data=DataConfig(
            train=(Source(path="cache/phoenix/phoenix_sft.train.jsonl"),),
            heldout=(Source(path="cache/phoenix/phoenix_sft.heldout.jsonl"),),
            languages=LANGUAGES,
            sequence_length=2048,
            batch_size=256,
        ),
        optim=OptimConfig(
            learning_rate=2e-5,
            schedule="cosine",
            warmup_ratio=0.03,
            epochs=3.0,
            weight_decay=0.0,
            clip_norm=1.0,
            accumulation=8,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=2048),
        log_every=10,
        eval_every=500,
        save_every=500,
        keep_checkpoints=3,
    )
