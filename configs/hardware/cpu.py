"""CPUs: this machine, or several of them, e.g. to try many processes out (launch/local.sh).

python -m llmzoo_jax.train --config=... --hardware=configs/hardware/cpu.py
"""

from llmzoo_jax.config import Hardware


def get_hardware() -> Hardware:
    # bfloat16 is slower than float32 on most CPUs; the vocabulary's logits do not fit caches.
    return Hardware(
        name="cpu",
        settings=("compute.dtype=float32", "compute.remat=dots", "compute.loss_chunk=512"),
    )
