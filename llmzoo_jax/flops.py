"""Counted floating-point operations of a model, and what share of the devices' peak a run uses.

Counted is what a batch needs, forward and backward: products with weights for each token, attention
for each pair of a token and a key that it sees, logits for each token in the loss. What is computed
beside that (padding, other segments, logits of prompts, a second forward pass for remat) is not
counted, nor are norms and activations, which are less than a hundredth. So the utilisation is that
of the PaLM paper (Chowdhery et al., 2022, appendix B), with nothing counted that packing wastes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from llmzoo_jax.config import BloomConfig, ComputeConfig, LlamaConfig, ModelConfig

# Dense bfloat16 FLOP/s of a JAX device by the beginning of its ``device_kind``, longer names first.
# Sources: Google Cloud's pages "TPU v4", "v5e", "v5p" and "v6e"; NVIDIA's data sheet of each card,
# the figures "with sparsity" halved.
PEAK_FLOPS: dict[str, float] = {
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # what a v5p calls itself
    "TPU v4": 275e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 836e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


class Work(NamedTuple):
    """What is in a batch; numbers, or arrays of them."""

    tokens: float  # no padding
    pairs: float  # of a token and a key that it sees, itself included
    loss_tokens: float


def forward(config: ModelConfig, work: Work) -> float:
    """FLOPs of a forward pass; a multiplication and an addition are two."""
    return _weights(config, work) + _attention(config, work)


def training(config: ModelConfig, work: Work, *, frozen: bool = False) -> float:
    """FLOPs of a training step: the backward pass takes two products for each of the forward's, or
    one with weights that are ``frozen`` (adapters themselves, a hundredth, are not counted)."""
    return (2 if frozen else 3) * _weights(config, work) + 3 * _attention(config, work)


def _weights(config: ModelConfig, work: Work) -> float:
    D, N, H = config.hidden_size, config.num_heads, config.head_dim
    if isinstance(config, LlamaConfig):
        K, matrices = config.num_kv_heads, 3 * D * config.intermediate_size
    elif isinstance(config, BloomConfig):
        K, matrices = N, 2 * D * 4 * D
    matrices += D * H * (N + 2 * K) + N * H * D  # query, key and value; output
    in_layers = work.tokens * config.num_layers * matrices
    return 2 * (in_layers + work.loss_tokens * D * config.vocab_size)


def _attention(config: ModelConfig, work: Work) -> float:
    """Scores and the weighted sum."""
    return 2 * work.pairs * config.num_layers * 2 * config.num_heads * config.head_dim


def peak_flops(device_kind: str, configured: float) -> float | None:
    """FLOP/s of a device at best: what is configured, if not 0, else by its kind, else None."""
    if configured:
        return configured
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


class Utilisation:
    """Model FLOP utilisation, of the dense bfloat16 peak of all devices of a mesh whatever the
    compute dtype; called with the metrics of some steps and their seconds."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, mesh: Mesh, *, frozen: bool = False
    ):
        peak = peak_flops(mesh.devices.flat[0].device_kind, compute.peak_flops)
        self._config, self._peak = config, peak and peak * mesh.size
        self._frozen = frozen

    def __call__(self, steps: Sequence[Any], seconds: float) -> dict[str, float]:
        """``{"mfu": share}``; nothing where the peak of the devices is not known."""
        if not self._peak:
            return {}
        work = Work(*(float(sum(getattr(m, key) for m in steps)) for key in Work._fields))
        return {"mfu": training(self._config, work, frozen=self._frozen) / seconds / self._peak}
