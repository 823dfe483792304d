"""Scaling on paper: the real training step, compiled for 1 to 4,096 chips that are not here.

    python -m tests.benchmarks.scaling --chip=h200 --models=llama-7b,phoenix-7b
    python -m tests.benchmarks.scaling --chip=v5p --models=phoenix-7b --chips=64,512,4096
    python -m tests.benchmarks.scaling --chip=v5e --models=llama-7b --chips=64 --matmul=int8

prints a row of a table for every model and number of chips; the rows a chip has stay the same (weak
scaling). Figures are those of one chip in one step, as ``llmzoo_jax.plan`` counts them. Needs
``jax[cuda13]`` or ``jax[tpu]``, and JAX_PLATFORMS=cpu; no device.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from absl import app, flags

from llmzoo_jax import plan, targets
from llmzoo_jax.config import (
    BloomConfig,
    ComputeConfig,
    Config,
    DataConfig,
    LlamaConfig,
    MeshConfig,
    ModelConfig,
    RopeConfig,
)

LENGTH = 2048
TOPOLOGIES = {  # chips: topology
    "h200": {1: "1", 8: "8", 64: "8x8", 512: "64x8", 4096: "512x8"},
    "v5e": {16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 64: "4x4x4", 512: "8x8x8", 4096: "16x16x16"},
}


def bloom(hidden_size: int, num_layers: int, num_heads: int) -> BloomConfig:
    return BloomConfig(
        vocab_size=250880,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        layer_norm_eps=1e-5,
        residual_post_layernorm=False,
        tie_embeddings=True,
        init_std=0.02,
    )


def llama(hidden_size: int, intermediate_size: int, num_layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=10000.0),
        max_positions=LENGTH,
        attention_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
        init_std=0.02,
    )


class Case(NamedTuple):
    model: ModelConfig
    fsdp: int  # at most; what is left are replicas
    tensor: int  # at most
    rows: int  # a chip, times tensor


CASES = {
    "phoenix-7b": Case(bloom(4096, 30, 32), fsdp=64, tensor=1, rows=2),
    "llama-7b": Case(llama(4096, 11008, 32, 32), fsdp=64, tensor=1, rows=2),
    "llama-13b": Case(llama(5120, 13824, 40, 40), fsdp=64, tensor=1, rows=2),
    "bloom-176b": Case(bloom(14336, 70, 112), fsdp=512, tensor=8, rows=4),
}

CHIP = flags.DEFINE_enum("chip", "h200", list(TOPOLOGIES), "What to compile for.")
MODELS = flags.DEFINE_list("models", list(CASES), "Which models.")
MATMUL = flags.DEFINE_enum("matmul", "dtype", ["dtype", "int8", "fp8"], "As compute.matmul.")
CHIPS = flags.DEFINE_list("chips", None, "How many; all that the chip has a topology for.")


def config_for(case: Case, chips: int) -> Config:
    tensor = min(case.tensor, chips)
    fsdp = min(case.fsdp, chips // tensor)
    return Config(
        run_dir="",
        tokenizer="",
        data=DataConfig(train=(), sequence_length=LENGTH, batch_size=case.rows * chips // tensor),
        model=case.model,
        compute=ComputeConfig(
            dtype="bfloat16",
            remat="full",
            loss_chunk=2048 * (chips // tensor),
            matmul=MATMUL.value,
        ),
        mesh=MeshConfig(replica=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor),
    )


HEADER = """\
| model | chips | replica x fsdp x tensor | tokens a chip | memory, GiB | FLOPs | in 8 bits | \
bytes | all-gather, GiB | reduce-scatter | all-reduce | all-to-all, permute | compiled, s |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def row(name: str, chips: int, mesh: MeshConfig, result: plan.Plan) -> str:
    moved = {kind: size / 2**30 for kind, size in result.traffic.collectives.items()}
    kinds = (
        ("all-gather",),
        ("reduce-scatter",),
        ("all-reduce",),
        ("all-to-all", "collective-permute"),
    )
    gib = [f"{sum(moved.get(kind, 0) for kind in group):.2f}" for group in kinds]
    cells = [
        *(name, f"{chips:,}", f"{mesh.replica} x {mesh.fsdp} x {mesh.tensor}"),
        f"{result.tokens // chips:,}",
        f"{result.needed / 2**30:.1f}",
        f"{result.flops_a_device:.2e}",
        f"{result.flops.eight_bits / result.devices:.2e}",
        f"{result.traffic.bytes:.2e}",
        *gib,
        f"{result.compile_seconds:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(_) -> None:
    topologies = TOPOLOGIES[CHIP.value]
    print(HEADER, flush=True)
    for name in MODELS.value:
        for chips in [int(n) for n in CHIPS.value or topologies]:
            config = config_for(CASES[name], chips)
            result = plan.plan(config, targets.load(f"{CHIP.value}:{topologies[chips]}"))
            if isinstance(result, plan.DoesNotFit):
                print(f"{name} on {chips}: {result.reason}", file=sys.stderr, flush=True)
            else:
                print(row(name, chips, config.mesh, result), flush=True)


if __name__ == "__main__":
    app.run(main)
