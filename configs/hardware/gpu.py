"""NVIDIA H100 (80 GB) and H200 (141 GB): KIND-GPUS[xHOSTS][-tTENSOR].

    --hardware=configs/hardware/gpu.py:h200-1        one GPU
    --hardware=configs/hardware/gpu.py:h100-8        one host of eight
    --hardware=configs/hardware/gpu.py:h100-8x4      four of them: FSDP in each, replicas across
    --hardware=configs/hardware/gpu.py:h100-8x4-t8   tensor parallel in each, FSDP across

The model and optimiser state are split over the GPUs of a host, and NVLink carries that. Where a
model does not fit one host, split them over all: --config.mesh.replica=1.

These cards multiply float8 twice as fast as bfloat16: --config.compute.matmul=fp8. It changes the
numerics a little, and so is not the default.
"""

import re

from llmzoo_jax.config import Hardware

LOSS_TOKENS = 2048  # a GPU: 2 GB of float32 logits over BLOOM's 250,880 tokens

# Collectives of one layer run while another is computed: JAX's "GPU performance tips" and NVIDIA's
# "Tips for high-performance LLMs with JAX and XLA" (2026). Those of collective matmul changed none
# of the programs compiled for H200s with this project's layouts.
OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_while_loop_double_buffering=true",
    "--xla_gpu_enable_all_gather_combine_by_dim=false",
    "--xla_gpu_enable_reduce_scatter_combine_by_dim=false",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
)


def get_hardware(target: str) -> Hardware:
    match = re.fullmatch(r"(h100|h200)-(\d+)(?:x(\d+))?(?:-t(\d+))?", target)
    if not match:
        raise KeyError(target)
    gpus, hosts, tensor = (int(n or 1) for n in match.groups()[1:])
    return Hardware(
        name=target,
        settings=(
            # Replicas have the slow network between hosts to themselves, unless tensor does.
            f"mesh.replica={hosts if tensor == 1 else 1}",
            "mesh.fsdp=-1",
            f"mesh.tensor={tensor}",
            "compute.dtype=bfloat16",
            f"compute.loss_chunk={LOSS_TOKENS * gpus * hosts}",
        ),
        xla_flags=OVERLAP if gpus * hosts > 1 else (),
        environment=("XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",),
    )
