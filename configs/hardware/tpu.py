"""Cloud TPU slices by the names of Google Cloud: GENERATION-SIZE[xSLICES][-tTENSOR].

    --hardware=configs/hardware/tpu.py:v5e-8         8 chips, one host
    --hardware=configs/hardware/tpu.py:v5e-256       a whole pod
    --hardware=configs/hardware/tpu.py:v5p-128x2     two slices of 64 chips, replicas across
    --hardware=configs/hardware/tpu.py:v6e-64-t4     tensor parallel over four neighbours

As in Google Cloud, the size counts cores for v4 and v5p, two a chip, and chips for v5e and v6e.

v5e, v5p and v6e multiply int8 twice as fast as bfloat16: --config.compute.matmul=int8. It changes
the numerics a little, and so is not the default.
"""

import re
from typing import NamedTuple

from llmzoo_jax.config import Hardware

# Collectives run while something else is computed. MaxText's tables of flags (2026) explain these;
# libtpu refuses to fuse collectives into the products beside them elsewhere than on v5e.
OVERLAP = ("--xla_enable_async_all_gather=true", "--xla_enable_async_all_reduce=true")
FUSED_OVERLAP = (
    *OVERLAP,
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)
# The gradients' sum over slices runs on beside the backward pass.
OVER_SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# Of the 128 MB of VMEM; with libtpu's default a v6e waits for its memory.
VMEM = ("--xla_tpu_scoped_vmem_limit_kib=98304",)


class Generation(NamedTuple):
    cores: int  # a chip, as Google Cloud counts them in a slice's size
    largest: int  # size of a slice
    loss_tokens: int  # a chip; what fits its memory
    overlap: tuple[str, ...]
    vmem: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


GENERATIONS = {
    "v4": Generation(2, 8192, 2048, OVERLAP),  # 32 GB
    "v5e": Generation(1, 256, 1024, FUSED_OVERLAP, settings=("compute.remat=full",)),  # 16 GB
    "v5p": Generation(2, 12288, 4096, OVERLAP),  # 95 GB
    "v6e": Generation(1, 256, 2048, OVERLAP, vmem=VMEM),  # 32 GB
}


def get_hardware(target: str) -> Hardware:
    match = re.fullmatch(r"(v\d[ep]?)-(\d+)(?:x(\d+))?(?:-t(\d+))?", target)
    if not match or match[1] not in GENERATIONS:
        raise KeyError(target)
    size, slices, tensor = (int(n or 1) for n in match.groups()[1:])
    generation = GENERATIONS[match[1]]
    if size > generation.largest or size % generation.cores:
        raise KeyError(target)
    chips = size // generation.cores * slices
    return Hardware(
        name=target,
        settings=(
            f"mesh.replica={slices}",
            "mesh.fsdp=-1",
            f"mesh.tensor={tensor}",
            "compute.dtype=bfloat16",
            f"compute.loss_chunk={generation.loss_tokens * chips}",
            *generation.settings,
        ),
        libtpu_flags=(generation.overlap if chips > 1 else ())
        + (OVER_SLICES if slices > 1 else ())
        + generation.vmem,
    )
