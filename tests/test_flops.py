"""Counted FLOPs against the compiler's own count, and a table of peaks that knows what it meets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import flops, models, sharding
from llmzoo_jax.config import BloomConfig, ComputeConfig, LlamaConfig, MeshConfig, RopeConfig
from llmzoo_jax.models.attention import Mask
from llmzoo_jax.step import Metrics

B, T = 2, 128
COMMON = {"vocab_size": 500, "hidden_size": 384, "num_layers": 2, "num_heads": 6, "init_std": 0.02}
CONFIGS = {
    "bloom": BloomConfig(
        layer_norm_eps=1e-5, residual_post_layernorm=False, tie_embeddings=True, **COMMON
    ),
    "llama": LlamaConfig(
        intermediate_size=800, num_kv_heads=2, head_dim=80, rms_norm_eps=1e-5, max_positions=T,
        rope=RopeConfig(theta=1e4), attention_bias=False, mlp_bias=False, tie_embeddings=False,
        **COMMON,
    ),
}  # fmt: skip


def counted_by_xla(config, *, backward: bool) -> float:
    """Of a program without scans, whose loops the compiler counts once, with all T x T scores."""
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def loss(model, tokens):
        model.blocks = models.unstack(model.blocks, shards=1, panels=False)
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        everything = Mask(jnp.zeros((B, T), jnp.int32), jnp.full((B, T), T - 1))
        x, _ = model.hidden(tokens, everything, positions)
        return model.logits(x).sum()

    run = jax.grad(loss) if backward else loss
    compiled = jax.jit(run).lower(models.abstract(config), tokens).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_forward_pass_is_counted_within_two_per_cent_of_the_compiler(family):
    work = flops.Work(tokens=B * T, pairs=B * T * T, loss_tokens=B * T)
    ours, xla = (
        flops.forward(CONFIGS[family], work),
        counted_by_xla(CONFIGS[family], backward=False),
    )
    print(f"{family}: {ours:.4g}, {xla:.4g}, {xla / ours:.3f}")
    assert ours <= xla <= 1.02 * ours  # the rest is norms, softmax and activations


def test_seven_billion_parameters_take_six_flops_each_and_a_little_for_attention():
    llama = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        num_kv_heads=32, head_dim=128, rms_norm_eps=1e-5, max_positions=4096,
        rope=RopeConfig(theta=1e4), attention_bias=False, mlp_bias=False, tie_embeddings=False,
        init_std=0.02,
    )  # fmt: skip
    weights = 6_738_415_616 - 32000 * 4096  # the lookup of an embedding is no product
    alone = flops.Work(tokens=1, pairs=0, loss_tokens=1)
    assert flops.training(llama, alone) == pytest.approx(6 * weights, rel=1e-4)
    row = flops.Work(tokens=2048, pairs=2048 * 2049 / 2, loss_tokens=2048)
    share = flops.training(llama, row) / (2048 * flops.training(llama, alone))
    assert share == pytest.approx(1.041, abs=2e-3)


def test_frozen_weights_save_their_gradients_and_nothing_of_attention():
    config = CONFIGS["llama"]
    weights, pairs = flops.Work(64, 0, 64), flops.Work(0, 64, 0)
    for work, ratio in ((weights, 2 / 3), (pairs, 1.0)):
        frozen = flops.training(config, work, frozen=True)
        assert frozen == pytest.approx(ratio * flops.training(config, work))


def test_padding_other_segments_and_prompts_are_not_counted():
    config = CONFIGS["bloom"]
    whole = flops.forward(config, flops.Work(tokens=64, pairs=64 * 65 / 2, loss_tokens=64))
    split = flops.forward(config, flops.Work(tokens=64, pairs=2 * 32 * 33 / 2, loss_tokens=64))
    prompt = flops.forward(config, flops.Work(tokens=64, pairs=64 * 65 / 2, loss_tokens=10))
    assert whole - split == 2 * (64 * 65 / 2 - 32 * 33) * 2 * 6 * 64 * 2
    assert whole - prompt == 2 * 54 * 384 * 500


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
    ("cpu", None), ("Quantum 9000", None),
])  # fmt: skip
def test_peaks_by_device(kind, peak):
    known = flops.peak(kind, 0.0)
    assert (known and known.bfloat16) == peak
    assert flops.peak(kind, 1e12) == (1e12, 1e12, 1e12)


def test_utilisation_is_work_over_time_and_peak_of_all_devices_and_unknown_without_a_peak():
    config, mesh = CONFIGS["llama"], sharding.make_mesh(MeshConfig(), jax.devices()[:4])
    steps = [Metrics(*map(np.float32, (2.0, 50, 100, 700, 1.0, 0, 0)))] * 3
    work = flops.Work(tokens=300, pairs=2100, loss_tokens=150)
    known = flops.Utilisation(config, ComputeConfig(peak_flops=1e9), mesh)
    assert known(steps, 2.0)["mfu"] == flops.training(config, work) / 2.0 / 4e9
    assert flops.Utilisation(config, ComputeConfig(), mesh)(steps, 2.0) == {}


def test_products_in_8_bits_have_a_peak_of_their_own():
    """A step at peak all the time: products in 8 bits take half of what they would."""
    config, work = CONFIGS["llama"], flops.Work(tokens=300, pairs=2100, loss_tokens=150)
    steps = [Metrics(*map(np.float32, (2.0, 150, 300, 2100, 1.0, 0, 0)))]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    peak = flops.PEAKS["NVIDIA H100 PCIe"]
    matrices = flops.forward(config, flops.Work(tokens=300, pairs=0, loss_tokens=0))
    for matmul, products in (("dtype", 0), ("int8", 2), ("fp8", 3)):
        low = flops.eight_bits(config, work, matmul)
        assert low == products * matrices
        seconds = peak.seconds(flops.training(config, work) - low, low, matmul)
        used = flops.Utilisation(config, ComputeConfig(matmul=matmul), mesh)
        used._peak = peak
        assert used(steps, seconds)["mfu"] == pytest.approx(1.0)
    assert peak.int8 == peak.fp8 == 1513e12 and flops.PEAKS["TPU v4"].int8 == 0.0


def test_the_faster_formats_of_a_device_are_those_with_a_higher_peak():
    for kind, peak in flops.PEAKS.items():
        assert all(x == 0.0 or x > 1.5 * peak.bfloat16 for x in peak[1:]), kind
        formats = tuple(f for f in ("int8", "fp8") if getattr(peak, f))
        assert flops.eight_bit_formats(kind + " 80GB") == formats
    assert flops.eight_bit_formats("cpu") == ("int8", "fp8")
