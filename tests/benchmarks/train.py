"""Training speed: the jitted train step against a torch loop with transformers, on the same model.

    python -m tests.benchmarks.train --case=rows --family=llama --rounds=3 --out=rows.json
    python -m tests.benchmarks.train --maxtext_python=/path/to/venv/bin/python --rounds=3
    python -m tests.benchmarks.train --case=conversations --micro_batch=4 --out=conversations.json

Makes a random model, then runs ours, torch, ours, torch, .. with it: AdamW, clipping, float32.
Steps that compile or warm up are reported apart. Reading data is left out on both sides.

--case=rows: all sides get the same rows of random tokens, all of them in the loss. With
--maxtext_python, a Python 3.12 with MaxText 0.2.5 in it (README.md says how to make one), MaxText's
own train step is the third side, from the same weights.

--case=conversations: both sides get conversations of the raw data in --shared, in format phoenix,
by a tokenizer that is trained on them, and what counts is loss tokens per second. Ours are packed
rows, --batch_size of --length. Torch's are as LLM Zoo trains: shuffled, cut on the right to
--length, one a row, padded to the longest of --micro_batch rows, accumulated over so many
conversations a step that a step of both sides has about the same number of tokens.
"""

from __future__ import annotations

import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags

from llmzoo_jax.packing import Batch
from tests.benchmarks import sides

flags.adopt_module_key_flags(sides)  # so that --help tells them

CASE = flags.DEFINE_enum("case", "rows", ["rows", "conversations"], "See above.")
LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of a row (T); 512 for rows, else 1024, by default."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Rows of our batch; 8 for rows, else 4, by default."
)
MICRO_BATCH = flags.DEFINE_integer(
    "micro_batch", 4, "Conversations that torch computes at once; LLM Zoo: 4 for 7B, 1 for 13B."
)
STEPS = flags.DEFINE_integer("steps", 3, "Timed steps in each round, each with its own batch.")
ACCUMULATION = flags.DEFINE_integer(
    "accumulation", 2, "optim.accumulation of ours: so many parts of the batch, one after another."
)
LOSS_CHUNK = flags.DEFINE_integer(
    "loss_chunk", None, "compute.loss_chunk of ours; 0 for rows, else 1024, by default."
)
MAXTEXT_PYTHON = flags.DEFINE_string(
    "maxtext_python", None, "Python with MaxText in it: MaxText is a third side (rows, llama)."
)
MAXTEXT_REMAT = flags.DEFINE_string(
    "maxtext_remat", "minimal", "MaxText's remat_policy; its own default is full."
)
SHARED = flags.DEFINE_string("shared", "../shared/data", "Folder of the raw conversations.")

SOURCES = ("sharegpt_zh", "alpaca_en", "alpaca_zh", "xpersona")
WARMUP = 1  # steps before the timed ones
VOCAB = 8192
LEARNING_RATE = 2e-5


class Padded(NamedTuple):
    """A batch of torch's, one conversation a row; arrays are [B, T]."""

    tokens: np.ndarray  # int64
    targets: np.ndarray  # int64, the token after tokens; -100 where it is not in the loss
    mask: np.ndarray | None  # int64, 0 on padding; None: there is none


# --- data: the steps of both sides, made before any is timed ------------------------------------


def random_rows() -> tuple[list[list[Batch]], list[list[Padded]]]:
    """The same rows for both sides. A step is a list of batches to accumulate."""
    rng = np.random.default_rng(0)
    B, T = BATCH_SIZE.value, LENGTH.value
    ours, theirs = [], []
    for _ in range(WARMUP + STEPS.value):
        rows = rng.integers(4, VOCAB, (B, T + 1))
        tokens, targets = rows[:, :-1], rows[:, 1:]
        batch = Batch(
            tokens=tokens.astype(np.int32),
            targets=targets.astype(np.int32),
            loss_mask=np.ones((B, T), bool),
            segment_ids=np.ones((B, T), np.int32),
            positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        )
        ours.append([batch])
        theirs.append([Padded(tokens, targets, None)])
    return ours, theirs


def conversations(folder: str) -> tuple[list[list[Batch]], list[list[Padded]]]:
    """Packed rows for ours; for torch, as many conversations a step as hold as many tokens."""
    from data_pipelines.build import RECIPES, build
    from data_pipelines.tokenizers import train_bpe
    from llmzoo_jax.config import DataConfig, Source
    from llmzoo_jax.data import train_data
    from llmzoo_jax.tokenizer import resolve_format

    sources = tuple(row for row in RECIPES["real"] if row.name in SOURCES)
    build(sources, shared=SHARED.value, out=folder, heldout=0.0)
    files = [f"{folder}/{row.name}.train.jsonl" for row in sources]
    tokenizer = train_bpe(*files, vocab_size=VOCAB)
    T, steps = LENGTH.value, WARMUP + STEPS.value
    config = DataConfig(
        train=tuple(Source(path=path) for path in files),
        sequence_length=T,
        batch_size=BATCH_SIZE.value,
        cache_dir=f"{folder}/cache",
    )
    chat_format = resolve_format("phoenix", tokenizer)
    data = train_data(config, tokenizer=tokenizer, chat_format=chat_format, seed=0)
    print(data.report)
    examples = [file[i] for part in data.parts for file in part.files for i in range(len(file))]
    pairs = np.minimum([len(tokens) - 1 for tokens, _ in examples], T)
    micro = MICRO_BATCH.value
    count = max(1, round(BATCH_SIZE.value * T / pairs.mean() / micro))  # micro batches a step
    order = iter(np.random.default_rng(0).permutation(len(examples)).tolist())
    theirs = [
        [pad([examples[next(order)] for _ in range(micro)], T) for _ in range(count)]
        for _ in range(steps)
    ]
    return [[data.batch(step)] for step in range(steps)], theirs


def pad(examples: Sequence[tuple[np.ndarray, np.ndarray]], limit: int) -> Padded:
    lengths = [min(len(tokens) - 1, limit) for tokens, _ in examples]
    shape = (len(examples), max(lengths))
    batch = Padded(np.full(shape, 3), np.full(shape, -100), np.zeros(shape, np.int64))
    for i, ((tokens, in_loss), n) in enumerate(zip(examples, lengths, strict=True)):
        batch.tokens[i, :n] = tokens[:n]
        batch.targets[i, :n] = np.where(in_loss, tokens, -100)[1 : n + 1]
        batch.mask[i, :n] = 1
    return batch


def count_tokens(step: list[Batch] | list[Padded]) -> dict[str, int]:
    """Positions that a step computes, those that are no padding, and those in the loss."""
    counts = {"positions": 0, "tokens": 0, "loss_tokens": 0}
    for batch in step:
        counts["positions"] += batch.tokens.size
        if isinstance(batch, Batch):
            counts["tokens"] += int((batch.segment_ids > 0).sum())
            counts["loss_tokens"] += int(batch.loss_mask.sum())
        else:
            counts["tokens"] += batch.tokens.size if batch.mask is None else int(batch.mask.sum())
            counts["loss_tokens"] += int((batch.targets >= 0).sum())
    return counts


def save(path: Path, steps: list[list[NamedTuple]]) -> None:
    names = {
        f"{i}.{j}.{key}": array
        for i, step in enumerate(steps)
        for j, batch in enumerate(step)
        for key, array in batch._asdict().items()
        if array is not None
    }
    np.savez(path, **names)


def load(path: Path, kind: type) -> Iterator[list[NamedTuple]]:
    with np.load(path) as arrays:
        keys = sorted({tuple(map(int, name.split(".")[:2])) for name in arrays})
        for step in range(keys[-1][0] + 1):
            yield [
                kind(*(arrays.get(f"{step}.{j}.{field}") for field in kind._fields))
                for i, j in keys
                if i == step
            ]


# --- the sides: each gives a function that does a step and returns its mean loss -----------------


def ours(folder: Path) -> Callable[[list[Batch]], float]:
    import jax

    from llmzoo_jax import optim, sharding
    from llmzoo_jax import step as steps
    from llmzoo_jax.config import ComputeConfig, MeshConfig, OptimConfig

    config = OptimConfig(
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_ratio=0.0,
        accumulation=ACCUMULATION.value,
    )
    tx = optim.make_optimizer(config, WARMUP + STEPS.value)
    mesh = sharding.make_mesh(MeshConfig())
    jax.set_mesh(mesh)
    state = steps.start_state(sides.our_model(str(folder))[1], tx)
    shardings = sharding.tree_shardings(state, mesh)
    state = jax.device_put(state, shardings)
    compute = ComputeConfig(loss_chunk=LOSS_CHUNK.value)
    train_step = steps.jit_train_step(tx, compute, config.accumulation, shardings)
    place = sharding.batch_sharding(mesh, (BATCH_SIZE.value, LENGTH.value))

    def step(batches: list[Batch]) -> float:
        nonlocal state
        state, metrics = train_step(state, jax.device_put(batches[0], place))
        return float(metrics.loss)

    return step


def torch(folder: Path) -> Callable[[list[Padded]], float]:
    import torch

    model = sides.torch_model(str(folder)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    summed = functools.partial(
        torch.nn.functional.cross_entropy, ignore_index=-100, reduction="sum"
    )

    def step(batches: list[Padded]) -> float:
        count = sum(int((batch.targets >= 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            mask = None if batch.mask is None else torch.from_numpy(batch.mask)
            ids = torch.from_numpy(batch.tokens)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            targets = torch.from_numpy(batch.targets)
            loss = summed(logits.flatten(0, 1), targets.flatten()) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def run_side() -> dict:
    folder = Path(sides.WORK.value)
    make, kind = {"ours": (ours, Batch), "torch": (torch, Padded)}[sides.SIDE.value]
    batches = list(load(folder / f"{sides.SIDE.value}.npz", kind))
    step = make(folder)
    losses = [step(batch) for batch in batches[:WARMUP]]
    first = sides.since_start()
    watch, timed = sides.stopwatch(), []
    for number, batch in enumerate(batches[WARMUP:]):
        loss, time_ = watch(lambda batch=batch: step(batch))
        losses.append(loss)
        timed.append(time_ | {"step": number})
    return {"first_step_s": first, "timed": timed, "losses": losses}


# --- both ---------------------------------------------------------------------------------------


def compare() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = sides.write_model(name)
        steps = random_rows() if CASE.value == "rows" else conversations(f"{name}/data")
        save(folder / "ours.npz", steps[0])
        save(folder / "torch.npz", steps[1])
        others = maxtext() if MAXTEXT_PYTHON.value else {}
        if others:
            save(folder / "maxtext.npz", steps[0])
        rounds = sides.alternate("tests.benchmarks.train", name, others)
    counts = {
        side: [count_tokens(step) for step in mine[WARMUP:]]
        for side, mine in zip(sides.SIDES, steps, strict=True)
    }
    counts |= dict.fromkeys(others, counts["ours"])
    rows, summary = [], {}
    for side in counts:
        mine = summary[side] = summarise(rounds, side, counts[side])
        rows.append(
            [
                side,
                f"{mine['loss_tokens_per_s']:,.0f}",
                f"{mine['tokens_per_s']:,.0f}",
                f"{mine['positions_per_s']:,.0f}",
                f"{mine['padding']:.1%}",
                f"{mine['first_step_s']:.1f}",
                f"{mine['timed']}",
                f"{mine['losses'][0]:.5f}",
            ]
        )
    head = ["side", "loss tokens/s", "tokens/s", "positions/s", "padding", "first step, s"]
    ratios = {
        other: {
            key: summary["ours"][f"{key}_per_s"] / summary[other][f"{key}_per_s"]
            for key in ("loss_tokens", "tokens", "positions")
        }
        | {"first_step": summary["ours"]["first_step_s"] / summary[other]["first_step_s"]}
        for other in counts
        if other != "ours"
    }
    print(f"\n{size:,} parameters, float32, {settings_text()}\n")
    print(sides.table([*head, "timed", "first loss"], rows))
    print()
    for other, mine in ratios.items():
        print(f"ours / {other}: " + ", ".join(f"{key} {mine[key]:.2f}" for key in mine))
    sides.write_result(
        settings() | {"parameters": size, "ratios": ratios, "summary": summary, "rounds": rounds}
    )


def maxtext() -> dict[str, list[str]]:
    """The command of MaxText's side."""
    keys = {
        "warmup": WARMUP,
        "learning_rate": LEARNING_RATE,
        "remat_policy": MAXTEXT_REMAT.value,
        "max_foreign": sides.MAX_FOREIGN.value,
        "patience": sides.PATIENCE.value,
    }
    program = str(Path(__file__).with_name("maxtext_side.py"))
    options = [f"--{key}={value}" for key, value in keys.items()]
    return {"maxtext": [MAXTEXT_PYTHON.value, program, *options]}


def summarise(rounds: list[dict], side: str, counts: list[dict[str, int]]) -> dict:
    """Medians over the rounds of each step; then sums over the steps, which differ in tokens."""
    steps = [sides.timed(rounds, side, step=i) for i in range(len(counts))]
    seconds = [statistics.median(t["seconds"] for t in timed) for timed in steps]
    total = {key: sum(step[key] for step in counts) for key in counts[0]}
    speeds = {f"{key}_per_s": total[key] / sum(seconds) for key in total}
    return (
        total
        | speeds
        | {
            "seconds_by_step": seconds,
            "padding": 1 - total["tokens"] / total["positions"],
            "first_step_s": sides.median(rounds, side, "first_step_s"),
            "timed": sum(map(len, steps)),
            "losses": next(r["losses"] for r in rounds if r["side"] == side),
        }
    )


def settings_text() -> str:
    return ", ".join(f"{key}={value}" for key, value in settings().items())


def settings() -> dict:
    own = (CASE, LENGTH, BATCH_SIZE, ACCUMULATION, LOSS_CHUNK, STEPS)
    own += (MICRO_BATCH,) if CASE.value == "conversations" else ()
    own += (MAXTEXT_REMAT,) if MAXTEXT_PYTHON.value else ()
    return {"family": sides.FAMILY.value} | {flag.name: flag.value for flag in own}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --NAME=VALUE")
    if MAXTEXT_PYTHON.value and (CASE.value, sides.FAMILY.value) != ("rows", "llama"):
        raise app.UsageError("--maxtext_python goes with --case=rows --family=llama")
    defaults = {"rows": (512, 8, 0), "conversations": (1024, 4, 1024)}[CASE.value]
    for flag, default in zip((LENGTH, BATCH_SIZE, LOSS_CHUNK), defaults, strict=True):
        if flag.value is None:
            flags.FLAGS[flag.name].value = default
    if sides.SIDE.value:
        print(json.dumps(run_side()))
    else:
        compare()


if __name__ == "__main__":
    app.run(main)
