"""Peak memory of attention and of the vocabulary loss, forward and backward, as compiled.

    python -m tests.benchmarks.memory --target=cpu:1
    python -m tests.benchmarks.memory --target=h200:1      (jax[cuda13], JAX_PLATFORMS=cpu)
    python -m tests.benchmarks.memory --target=v5e:2x2     (jax[tpu], JAX_PLATFORMS=cpu)

prints temporaries, MiB a device, at T, 2T, 4T with and without a T x T array, and for tokens and
chunks of the loss. No device is needed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding

from llmzoo_jax import sharding, targets
from llmzoo_jax.config import MeshConfig
from llmzoo_jax.models import attention
from llmzoo_jax.vocabulary_loss import TABLE, TOKENS, X, chunked_loss

TARGET = flags.DEFINE_string("target", "cpu:1", "As for llmzoo_jax.plan.")
LENGTHS = (2048, 4096, 8192)
HEADS, HEAD_DIM = 32, 128  # of a 7B model
WIDTH, VOCABULARY = 1024, 250880  # of bloom-560m


def temporaries(mesh, function, *arrays) -> float:
    """MiB a device that the gradients of ``function`` by the floating-point arrays take beside
    inputs and outputs; ``arrays`` are (shape, dtype, logical axes)."""
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(axes)))
        for shape, dtype, axes in arrays
    ]
    by = tuple(i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating))

    def loss(*args):
        return function(*args).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=by)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def attend(q, k, v, segment_ids, *, alibi: bool, implementation: str):
    bias = {}
    if alibi:
        slopes = jnp.array(attention.alibi_slopes(HEADS), jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(q.shape[1]), segment_ids.shape)
        bias = {"alibi_slopes": slopes, "key_positions": positions}
    mask = attention.packed_mask(segment_ids)
    return attention.attend(q, k, v, mask, implementation=implementation, **bias)


def attention_table(mesh, platform: str) -> None:
    rows = mesh.size  # one a device
    best = attention.choose("auto", platform)
    print("| attention | " + " | ".join(f"T = {T:,}" for T in LENGTHS) + " |\n|---|---:|---:|---:|")
    for implementation in dict.fromkeys((best, "blocks", "scores")):
        for family, alibi in (("LLaMA", False), ("BLOOM", True)):
            sizes = []
            for T in LENGTHS:
                by_heads = ("batch", "kv_heads", None, None)
                kv = ((rows, HEADS, T, HEAD_DIM), jnp.bfloat16, by_heads)
                q = ((rows, T, HEADS, HEAD_DIM), jnp.bfloat16, ("batch", None, "heads", None))
                ids = ((rows, T), jnp.int32, ("batch", None))
                run = functools.partial(attend, alibi=alibi, implementation=implementation)
                sizes.append(f"{temporaries(mesh, run, q, kv, kv, ids):,.0f}")
            print(f"| {implementation}, {family} | " + " | ".join(sizes) + " |", flush=True)


def loss_table(mesh) -> None:
    counts = (4096, 8192, 16384)
    print("| loss | " + " | ".join(f"{n:,} tokens" for n in counts) + " |\n|---|---:|---:|---:|")
    for chunk in (1024, 2048):
        sizes = []
        for tokens in counts:
            rows = tokens // 2048

            def run(*arrays, chunk=chunk * mesh.size):
                return chunked_loss(*arrays, chunk=chunk).total

            size = temporaries(
                mesh,
                run,
                ((VOCABULARY, WIDTH), jnp.float32, TABLE),
                ((rows * mesh.size, 2048, WIDTH), jnp.bfloat16, X),
                ((rows * mesh.size, 2048), jnp.int32, TOKENS),
                ((rows * mesh.size, 2048), jnp.bool_, TOKENS),
            )
            sizes.append(f"{size:,.0f}")
        print(f"| chunks of {chunk:,} tokens | " + " | ".join(sizes) + " |", flush=True)
    whole = [f"{n * VOCABULARY * 4 / 2**20:,.0f}" for n in counts]
    print("| all logits in float32, alone | " + " | ".join(whole) + " |")


def main(_) -> None:
    target = targets.load(TARGET.value)
    mesh = sharding.make_mesh(MeshConfig(), target.devices)
    attention_table(mesh, target.devices[0].platform)
    loss_table(mesh)


if __name__ == "__main__":
    app.run(main)
