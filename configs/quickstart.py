"""A tiny Phoenix (21 languages) and a tiny Chimera (12), from scratch, on the sample data.

    python -m llmzoo_jax.train --config=configs/quickstart.py:phoenix
    python -m llmzoo_jax.train --config=configs/quickstart.py:chimera

Run by launch/quickstart.sh, which makes the tokenizers first. On two CPU cores a run takes two to
three minutes and ends near 100 % exact match on training and 90 % on held-out questions.
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

SAMPLE = "data_pipelines/sample"
# Chimera is for the languages in Latin and Cyrillic letters, as in LLM Zoo.
CHIMERA_LANGUAGES = ("en", "fr", "es", "de", "it", "pt", "id", "sw", "tr", "vi", "ru", "uk")


def get_config(family: str = "phoenix") -> Config:
    common = {"hidden_size": 192, "num_layers": 2, "num_heads": 6, "init_std": 0.05}
    model = {
        "phoenix": BloomConfig(
            vocab_size=4096,
            layer_norm_eps=1e-5,
            residual_post_layernorm=False,
            tie_embeddings=True,
            **common,
        ),
        "chimera": LlamaConfig(
            vocab_size=4096,
            intermediate_size=512,
            num_kv_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=10000.0),
            max_positions=2048,
            attention_bias=False,
            mlp_bias=False,
            tie_embeddings=True,
            **common,
        ),
    }[family]
    return Config(
        run_dir=f"runs/quickstart-{family}",
        tokenizer=f"runs/tokenizers/{family}",
        model=model,
        data=DataConfig(
            train=(Source(path=f"{SAMPLE}/train.jsonl"),),
            heldout=(Source(path=f"{SAMPLE}/heldout.jsonl"),),
            languages=CHIMERA_LANGUAGES if family == "chimera" else (),
            sequence_length=256,
            batch_size=8,
        ),
        optim=OptimConfig(
            learning_rate=3e-3,
            epochs=7 if family == "chimera" else 5,
            b2=0.98,
            warmup_ratio=0.05,
            final_ratio=0.02,
        ),
        compute=ComputeConfig(loss_chunk=1024),
        log_every=25,
        eval_every=200,
        save_every=200,
        keep_checkpoints=1,
    )
