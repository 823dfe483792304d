"""Speed of log-likelihoods in lm-evaluation-harness: our backend against its own ``hf``.

    python -m tests.benchmarks.harness --model=runs/quickstart-phoenix/export --rounds=2
    python -m tests.benchmarks.harness --layers=8 --width=512 --rounds=2

The same exported model (one given, or a random LLaMA with the tokenizer of the tests), the same
requests: questions with four choices, as in MGSM or XCOPA; in turn, in one process. The first call
of ours compiles, and counts in "first". The log-likelihoods are compared.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

MODEL = flags.DEFINE_string("model", "", "Exported folder; empty: a random LLaMA.")
LAYERS = flags.DEFINE_integer("layers", 8, "Of the random one.")
WIDTH = flags.DEFINE_integer("width", 512, "Of the random one.")
QUESTIONS = flags.DEFINE_integer("questions", 100, "With four choices each.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows together.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "How often each side runs after its first call.")


def random_llama(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_tokenizers import tiny

    tokenizer = tiny("bpe")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=WIDTH.value, intermediate_size=WIDTH.value * 8 // 3,
        num_hidden_layers=LAYERS.value, num_attention_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def requests() -> list:
    from lm_eval.api.instance import Instance

    from tests.tiny_tokenizers import SENTENCES

    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    found = []
    for number in range(QUESTIONS.value):
        question = " ".join(draw.choices(words, k=draw.randint(10, 40)))
        for choice in range(4):
            arguments = (question, " " + " ".join(draw.choices(words, k=draw.randint(1, 6))))
            found.append(Instance("loglikelihood", {}, arguments, 4 * number + choice))
    return found


def main(_) -> None:
    from lm_eval.models.huggingface import HFLM

    import llmzoo_jax
    from eval.harness_backend import Backend

    with tempfile.TemporaryDirectory() as scratch:
        folder = MODEL.value or str(random_llama(Path(scratch)))
        sides = {
            "ours": Backend(llmzoo_jax.load(folder), batch_size=BATCH_SIZE.value),
            "hf": HFLM(
                pretrained=folder, device="cpu", dtype="float32", batch_size=BATCH_SIZE.value
            ),
        }
        asked, results = requests(), {}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(1 + ROUNDS.value):
            for name, side in sides.items():
                start = time.perf_counter()
                results[name] = side.loglikelihood(asked, disable_tqdm=True)
                seconds[name].append(time.perf_counter() - start)
    values = {name: np.array([one[0] for one in rows]) for name, rows in results.items()}
    print(f"{len(asked)} log-likelihoods, batches of {BATCH_SIZE.value}")
    for name, (first, *rest) in seconds.items():
        print(f"{name:<6} first {first:6.2f} s, then {min(rest):6.2f} s (best of {len(rest)})")
    print(f"largest difference {np.abs(values['ours'] - values['hf']).max():.2e}")


if __name__ == "__main__":
    app.run(main)
