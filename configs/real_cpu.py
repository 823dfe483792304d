"""A small Phoenix or Chimera from scratch on real conversations, on two CPU cores.

    python -m data_pipelines.build --recipe=real --out=cache/real --heldout=0.1
    python -m data_pipelines.tokenizers --data='cache/real/*.train.jsonl' \\
        --out=runs/tokenizers/real-phoenix --kind=bpe --vocab_size=8192
    python -m data_pipelines.tokenizers --data='cache/real/*.train.jsonl' \\
        --out=runs/tokenizers/real-chimera --kind=sentencepiece --vocab_size=8192
    python -m llmzoo_jax.train --config=configs/real_cpu.py:phoenix
    python -m llmzoo_jax.train --config=configs/real_cpu.py:chimera

5,989 conversations in 7 languages (ShareGPT, Alpaca, XPersona, FastChat), a tenth held out. The
README has the losses and times that were measured. A model of this size learns the shape of
answers, not their facts.
"""

from llmzoo_jax.config import (
    BloomConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LlamaConfig,
    OptimConfig,
    RopeConfig,
    Source,
)

# All of the recipe but the tool calls (glaive_*): format phoenix has no turn for a tool's result.
SOURCES = (
    "sharegpt_zh",
    "alpaca_en",
    "alpaca_zh",
    "identity",
    "v1_sft",
    "dpo_zh",
    "xpersona",
    "fastchat_dummy",
)


def get_config(family: str = "phoenix") -> Config:
    common = {"vocab_size": 8192, "hidden_size": 192, "num_layers": 3, "num_heads": 6}
    model = {
        "phoenix": BloomConfig(
            layer_norm_eps=1e-5,
            residual_post_layernorm=False,
            tie_embeddings=True,
            init_std=0.04,
            **common,
        ),
        "chimera": LlamaConfig(
            intermediate_size=512,
            num_kv_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=10000.0),
            max_positions=2048,
            attention_bias=False,
            mlp_bias=False,
            tie_embeddings=True,
            init_std=0.04,
            **common,
        ),
    }[family]
    return Config(
        run_dir=f"runs/real-{family}",
        tokenizer=f"runs/tokenizers/real-{family}",
        model=model,
        data=DataConfig(
            train=tuple(Source(path=f"cache/real/{name}.train.jsonl") for name in SOURCES),
            heldout=tuple(Source(path=f"cache/real/{name}.heldout.jsonl") for name in SOURCES),
            sequence_length=512,
            batch_size=8,
        ),
        optim=OptimConfig(
            learning_rate=2e-3, epochs=0.25, b2=0.98, warmup_ratio=0.05, final_ratio=0.05
        ),
        compute=ComputeConfig(loss_chunk=1024),
        log_every=20,
        eval_every=50,
        save_every=100,
        keep_checkpoints=1,
    )
