"""LLM Zoo in JAX: multilingual chat models, from data to a served checkpoint.

    import llmzoo_jax

    model = llmzoo_jax.load("path/to/a/hugging-face-or-run-folder")
    print(model.chat([{"role": "user", "content": "Hello!"}]).text)

The rest is commands, such as ``python -m llmzoo_jax.train --help``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llmzoo_jax.inference import Model


def load(
    path: str | os.PathLike,
    *,
    dtype: str = "float32",
    step: int | Literal["latest", "best"] = "latest",
    weights: Literal["dtype", "int8", "nf4"] = "dtype",
    base: str | os.PathLike | None = None,
    tensor: int = 1,
) -> Model:
    """A model to use: of a Hugging Face folder, or of a checkpoint of a run folder.

    ``dtype`` is "float32" or "bfloat16", of the weights and the activations. ``step`` chooses the
    checkpoint of a run; "best" is that of the lowest held-out loss. ``weights`` "int8" or "nf4"
    holds the projections in 8 or 4 bits, a half or a quarter of bfloat16. With ``base``, a Hugging
    Face folder, ``path`` has differences to its weights, as Vicuna and Chimera were released, and
    the model is their sum; or it is a PEFT adapter, for that base and not the one it names.
    ``tensor`` splits the model over so many devices, by heads; 0: over those of a CPU of few cores,
    if it has one a core. Raises InputError where the folder is none of these, or does not hold what
    it should.
    """
    from llmzoo_jax.loading import load_model  # here: `import llmzoo_jax` stays without JAX

    return load_model(path, dtype=dtype, step=step, weights=weights, base=base, tensor=tensor)
