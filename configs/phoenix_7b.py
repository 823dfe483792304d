"""Phoenix 7B: BLOOMZ-7b1-mt, all weights, with LLM Zoo's hyper-parameters.

    python -m llmzoo_jax.train --config=configs/phoenix_7b.py \\
        --hardware=configs/hardware/gpu.py:h100-8
    python -m llmzoo_jax.train --config=configs/phoenix_7b.py \\
        --hardware=configs/hardware/gpu.py:h200-1 \\
        --config.optim.accumulation=128
    python -m llmzoo_jax.train --config=configs/phoenix_7b.py \\
        --hardware=configs/hardware/tpu.py:v5e-256 \\
        --config.optim.accumulation=1

on 8 H100 (80 GB), one H200 (141 GB), a v5e pod. Weights, gradients and AdamW, all float32, take 113
GB, shared by the devices.

Download first: bigscience/bloomz-7b1-mt, to models/bloomz-7b1-mt (its safetensors, config.json and
tokenizer files), and LLM Zoo's 465k conversations, FreedomIntelligence/phoenix-sft-data-v1 on the
hub, its data.json to data/phoenix/. Make the training files with this as phoenix_data.py

    from data_pipelines.language import identify
    from data_pipelines.recipes import RawSource
    from data_pipelines.sources import llmzoo

    about = {
        "kind": "conversation",
        "lang": lambda text: identify(text).lang,
        "source": "FreedomIntelligence/phoenix-sft-data-v1",
        "license": "CC BY-NC 4.0",
    }
    RECIPE = (RawSource("phoenix_sft", llmzoo.conversations, "data.json", about),)

and

    python -m data_pipelines.build --recipe=phoenix_data.py --shared=data/phoenix \\
        --out=cache/phoenix --heldout=0.01

A batch is 256 packed rows of 2,048 tokens; LLM Zoo's is 256 conversations, padded. The set's 457
million tokens (LLM Zoo's count) so make about 870 steps an epoch, not 1,820: for steps as small as
LLM Zoo's, halve data.batch_size.

Loss, speed and peak memory were not measured; bytes are computed (tests/test_recipes.py).
"""

from llmzoo_jax.config import (
    BloomConfig,
    ComputeConfig,
    Config,
    DataConfig,
    OptimConfig,
    Source,
)

BASE = "models/bloomz-7b1-mt"


def get_config() -> Config:
    return Config(
        run_dir="runs/phoenix-7b",
        tokenizer=BASE,
        init_from=BASE,
        model=BloomConfig(
            vocab_size=250880,
            hidden_size=4096,
            num_layers=30,
            num_heads=32,
            layer_norm_eps=1e-5,
            residual_post_layernorm=False,
            tie_embeddings=True,
            init_std=0.02,
        ),
        chat_format="phoenix",
        data=DataConfig(
            train=(Source(path="cache/phoenix/phoenix_sft.train.jsonl"),),
            heldout=(Source(path="cache/phoenix/phoenix_sft.heldout.jsonl"),),
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
