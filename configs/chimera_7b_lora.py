"""Chimera 7B with LoRA: LLaMA 7B held in int8, LLM Zoo's adapters.

    python -m llmzoo_jax.train --config=configs/chimera_7b_lora.py \\
        --hardware=configs/hardware/gpu.py:h100-1
    python -m llmzoo_jax.train --config=configs/chimera_7b_lora.py \\
        --hardware=configs/hardware/gpu.py:h200-1
    python -m llmzoo_jax.train --config=configs/chimera_7b_lora.py \\
        --hardware=configs/hardware/tpu.py:v5e-8 \\
        --config.optim.accumulation=32

on one H100 (80 GB), one H200 (141 GB), 8 chips of v5e. The frozen model takes 7.0 GB, adapters and
their optimiser 0.27 GB.

Download first: LLaMA 7B in Hugging Face's format (Meta's licence), to models/llama-7b (its
safetensors, config.json and tokenizer files). Data: as in configs/phoenix_7b.py, of which Chimera
takes the languages in Latin and Cyrillic letters.

A batch is 256 packed rows of 2,048 tokens; LLM Zoo's is 256 conversations, padded. The set's 457
million tokens (LLM Zoo's count) so make about 870 steps an epoch, not 1,820: for steps as small as
LLM Zoo's, halve data.batch_size.

LLM Zoo has these adapters as an option of its train.py, and no script that uses it, so no learning
rate for them: this is that of its scripts, 2e-5. LoRA is mostly trained with 1e-4 to 3e-4:
--config.optim.learning_rate=2e-4. An nf4 base is smaller: --config.lora.quantise=nf4; a bfloat16
one needs no dequantising: --config.lora.quantise=none.

Loss, speed and peak memory were not measured; bytes are computed (tests/test_recipes.py).
"""

from llmzoo_jax.config import (
    ComputeConfig,
    Config,
    DataConfig,
    LlamaConfig,
    LoraConfig,
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
        run_dir="runs/chimera-7b-lora",
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
        # int8 is what LLM Zoo's option holds the frozen weights in.
        lora=LoraConfig(rank=16, alpha=16.0, dropout=0.05, base_dtype="bfloat16", quantise="int8"),
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
            accumulation=64,
        ),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=2048),
        log_every=10,
        eval_every=500,
        save_every=500,
        keep_checkpoints=3,
    )
