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


class Peak(NamedTuple):
    """Dense FLOP/s of a device by the operands of its products; 0: no faster than bfloat16."""

    bfloat16: float
    int8: float = 0.0
    fp8: float = 0.0

    def seconds(self, full: float, low: float, matmul: str) -> float:
        """For ``full`` FLOPs in bfloat16 and ``low`` in ``matmul``."""
        return full / self.bfloat16 + (low / getattr(self, matmul) if low else 0.0)


# By the beginning of a JAX device's ``device_kind``, longer names first. Sources: Google Cloud's
# pages "TPU v4", "v5e", "v5p", "v6e" and "TPU7x" (a chip of which is two devices); NVIDIA's data
# sheet of each card, the figures "with sparsity" halved.
PEAKS: dict[str, Peak] = {
    "TPU7x": Peak(1153.5e12, fp8=2307e12),
    "TPU v6 lite": Peak(918e12, int8=1836e12),  # v6e
    "TPU v6e": Peak(918e12, int8=1836e12),
    "TPU v5 lite": Peak(197e12, int8=394e12),  # v5e
    "TPU v5e": Peak(197e12, int8=394e12),
    "TPU v5p": Peak(459e12, int8=918e12),
    "TPU v5": Peak(459e12, int8=918e12),  # what a v5p calls itself
    "TPU v4": Peak(275e12),
    "NVIDIA B200": Peak(2250e12, int8=4500e12, fp8=4500e12),
    "NVIDIA H200 NVL": Peak(836e12, int8=1671e12, fp8=1671e12),
    "NVIDIA H200": Peak(989e12, int8=1979e12, fp8=1979e12),
    "NVIDIA GH200": Peak(989e12, int8=1979e12, fp8=1979e12),
    "NVIDIA H100 PCIe": Peak(756e12, int8=1513e12, fp8=1513e12),
    "NVIDIA H100 NVL": Peak(836e12, int8=1671e12, fp8=1671e12),
    "NVIDIA H100": Peak(989e12, int8=1979e12, fp8=1979e12),
    "NVIDIA A100": Peak(312e12, int8=624e12),
    "NVIDIA A10G": Peak(70e12, int8=140e12),
    "NVIDIA L40S": Peak(362e12, int8=733e12, fp8=733e12),
    "NVIDIA L4": Peak(121e12, int8=242e12, fp8=242e12),
    "NVIDIA GeForce RTX 4090": Peak(165e12, int8=661e12, fp8=330e12),
    "NVIDIA GeForce RTX 3090": Peak(71e12, int8=284e12),
}

# Of the three products of a projection in training (y, dx, dw), those that low_precision.py
# computes in 8 bits; the first two need no gradient of the weight.
EIGHT_BIT_PRODUCTS = {"dtype": 0, "int8": 2, "fp8": 3}


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


def eight_bits(config: ModelConfig, work: Work, matmul: str, *, frozen: bool = False) -> float:
    """FLOPs of a training step with operands of 8 bits; ``matmul`` as in the config."""
    products = min(EIGHT_BIT_PRODUCTS[matmul], 2 if frozen else 3)
    return products * _projections(config, work)


def _weights(config: ModelConfig, work: Work) -> float:
    head = config.hidden_size * config.vocab_size
    return _projections(config, work) + 2 * work.loss_tokens * head


def _projections(config: ModelConfig, work: Work) -> float:
    """Of the layers."""
    D, N, H = config.hidden_size, config.num_heads, config.head_dim
    if isinstance(config, LlamaConfig):
        K, matrices = config.num_kv_heads, 3 * D * config.intermediate_size
    elif isinstance(config, BloomConfig):
        K, matrices = N, 2 * D * 4 * D
    matrices += D * H * (N + 2 * K) + N * H * D  # query, key and value; output
    return 2 * work.tokens * config.num_layers * matrices


def _attention(config: ModelConfig, work: Work) -> float:
    """Scores and the weighted sum."""
    return 2 * work.pairs * config.num_layers * 2 * config.num_heads * config.head_dim


def peak(device_kind: str, configured: float) -> Peak | None:
    """Of a device at best: what is configured, if not 0, for products of any kind, else by its
    kind, else None."""
    if configured:
        return Peak(configured, configured, configured)
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def eight_bit_formats(device_kind: str) -> tuple[str, ...]:
    """The values of ``compute.matmul`` that a device multiplies faster than bfloat16. All of them,
    where that is not known, and on a CPU, where none is but all can be tried."""
    known = peak(device_kind, 0.0)
    formats = ("int8", "fp8")
    return formats if known is None else tuple(f for f in formats if getattr(known, f))


class Utilisation:
    """Model FLOP utilisation, called with the metrics of some steps and their seconds: the time
    that their products take at the peak of all devices of a mesh, over the time that they took. The
    peak is that of int8 or float8 for products in 8 bits, of dense bfloat16 for all others,
    whatever the compute dtype."""

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, mesh: Mesh, *, frozen: bool = False
    ):
        self._peak = peak(mesh.devices.flat[0].device_kind, compute.peak_flops)
        self._config, self._matmul, self._devices = config, compute.matmul, mesh.size
        self._frozen = frozen

    def __call__(self, steps: Sequence[Any], seconds: float) -> dict[str, float]:
        """``{"mfu": share}``; nothing where the peak of the devices is not known."""
        if not self._peak:
            return {}
        work = Work(*(float(sum(getattr(m, key) for m in steps)) for key in Work._fields))
        low = eight_bits(self._config, work, self._matmul, frozen=self._frozen)
        full = training(self._config, work, frozen=self._frozen) - low
        return {"mfu": self._peak.seconds(full, low, self._matmul) / seconds / self._devices}
