"""Speed and memory of the way from a raw LLM Zoo file to batches, stage by stage.

    python -m tests.benchmarks.data --work=/tmp/data-bench --conversations=465000 \\
        --tokenizer=runs/tokenizers/phoenix

makes a list of so many conversations as LLM Zoo's data.json has them, 3.4 kB each on average
(465,000 are 1.6 GB, the size of LLM Zoo's own), and runs each stage in a process of its own:

    make      the synthetic file; not made again if it is there
    build     data_pipelines.build: the list as a stream -> JSON Lines, exact duplicates dropped
    clean     data_pipelines.clean: near duplicates, spoilt text, scripts and languages
    cut       reads the cleaned file, hashes it and finds the shards
    batches   tokenizers' own encode_batch on the rendered text, on all cores: nothing else is timed
    tokenise  reading, checking, rendering, encoding, masks, writing
    again     the same when it is in the cache
    plan      packing
    threads   the iterator of one host, batches made by threads
    workers   the same, by processes of Grain

Peak memory is that of the process, plus that of its largest child times their number. --data takes
JSON Lines files of your own, and begins at "cut".
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, Message, read_jsonl, render

WORK = flags.DEFINE_string("work", None, "Folder for all that is made here.", required=True)
CONVERSATIONS = flags.DEFINE_integer("conversations", 30_000, "Conversations to make.")
SEED = flags.DEFINE_integer("seed", 0, "Of the conversations that are made, and of the order.")
DATA = flags.DEFINE_list("data", [], "Files or patterns to read instead of the synthetic one.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder of a tokenizer.", required=True)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes, wherever there are some.")
LENGTH = flags.DEFINE_integer("length", 2048, "Positions of a row.")
ROWS = flags.DEFINE_integer("rows", 16, "Rows of a batch.")
SECONDS = flags.DEFINE_float("seconds", 10, "How long the iterator runs.")
STAGE = flags.DEFINE_string("stage", None, "Used by the program itself: run this stage only.")

# --- a synthetic file ---------------------------------------------------------------------------

MEAN_BYTES = 3440  # of a line, as in phoenix-sft-data-v1: 1.6 GB in 465k conversations
LEXICON = 20_000  # words a language, made of halves of the sample's: real text has rare words too


def lexicons(rng: random.Random) -> dict[str, list[str]]:
    """Words by language, from the project's sample data."""
    sample = Path(__file__).parents[2] / "data_pipelines/sample/train.jsonl"
    words = defaultdict(set)
    for conversation in read_jsonl(sample):
        for message in conversation.messages:
            words[conversation.lang].update(message.content.split())
    result = {}
    for lang, known in sorted(words.items()):
        known = sorted(known)
        starts = [word[: (len(word) + 1) // 2] for word in known]
        ends = [word[(len(word) + 1) // 2 :] for word in known]
        more = (a + b for a, b in zip(rng.choices(starts, k=LEXICON), rng.choices(ends, k=LEXICON)))  # noqa: B905
        result[lang] = (known + list(more))[:LEXICON]
    return result


def synthetic(count: int, seed: int) -> Iterator[Conversation]:
    """``count`` conversations in the languages of the sample; the same for the same seed."""
    rng = random.Random(seed)
    words = lexicons(rng)
    zipf = list(itertools.accumulate(1 / rank for rank in range(2, LEXICON + 2)))
    size = {
        lang: sum(len(w.encode()) for w in rng.choices(known, cum_weights=zipf, k=2000)) / 2000 + 1
        for lang, known in words.items()
    }
    for number in range(count):
        lang = rng.choice(list(words))
        turns = 2 * min(8, 1 + int(rng.expovariate(0.7)))
        # A line has about 200 bytes that are not content, and a few more for each turn.
        left = max(60, rng.lognormvariate(0, 0.8) * 0.726 * (MEAN_BYTES - 300))
        messages = []
        for turn in range(turns):
            share = (0.4 if turn % 2 == 0 else 1.6) * left / turns / size[lang]
            text = rng.choices(words[lang], cum_weights=zipf, k=max(1, int(share)))
            messages.append(Message(("user", "assistant")[turn % 2], " ".join(text) + "."))
        yield Conversation(
            id=f"synthetic/{number}",
            lang=lang,
            kind="conversation",
            source="llmzoo-synthetic",
            license="CC0-1.0",
            messages=tuple(messages),
        )


# --- stages: each returns what it measured ------------------------------------------------------


SYNTHETIC, CLEANED = "llmzoo.json", "cleaned/llmzoo.train.jsonl"  # in --work


def in_work(name: str) -> str:
    return os.path.join(WORK.value, name)


def paths() -> list[str]:
    """The JSON Lines that are tokenised."""
    return [f for p in DATA.value or [in_work(CLEANED)] for f in sorted(glob.glob(p))]


def codec() -> dict:
    from llmzoo_jax.tokenizer import load_tokenizer, resolve_format

    tokenizer = load_tokenizer(TOKENIZER.value)
    return {"tokenizer": tokenizer, "chat_format": resolve_format("phoenix", tokenizer)}


def records() -> list:
    from llmzoo_jax.tokenise import tokenise_all

    return tokenise_all(paths(), **codec(), cache_dir=in_work("cache"), workers=WORKERS.value)


def make() -> dict:
    """As ``json.dump`` writes a list, but one record at a time."""
    roles = {"user": "human", "assistant": "gpt"}
    part = in_work(SYNTHETIC) + ".part"
    with open(part, "w", encoding="utf-8") as file:
        for number, item in enumerate(synthetic(CONVERSATIONS.value, SEED.value)):
            turns = [{"from": roles[m.role], "value": m.content} for m in item.messages]
            record = {"id": item.id, "language": item.lang, "conversations": turns}
            file.write((", " if number else "[") + json.dumps(record, ensure_ascii=False))
        file.write("]")
    os.replace(part, in_work(SYNTHETIC))
    return {"conversations": CONVERSATIONS.value}


def build() -> dict:
    from data_pipelines.build import RawSource, build
    from data_pipelines.sources import llmzoo

    about = {"kind": "conversation", "source": "synthetic", "license": "CC0-1.0"}
    row = RawSource("llmzoo", llmzoo.conversations, SYNTHETIC, about)
    (built,) = build((row,), shared=WORK.value, out=in_work("built"), heldout=0.0)
    return {"conversations": built.read, "kept": len(built.train), "dropped": dict(built.dropped)}


def clean() -> dict:
    from data_pipelines.clean import File, clean_files
    from data_pipelines.examine import Rules

    # What the synthetic languages are is no use to ask, but what asking costs is.
    file = File(in_work("built/llmzoo.train.jsonl"), heldout=False)
    clean_files([file], in_work("cleaned"), Rules(), workers=WORKERS.value)
    return {"conversations": file.read, "kept": file.kept, "dropped": dict(file.dropped)}


def cut() -> dict:
    from llmzoo_jax.tokenise import _shards

    return {"shards": sum(len(_shards(path, "", (), in_work("cache"))) for path in paths())}


def batches() -> dict:
    """Only the calls are timed, so that nothing but ``tokenizers`` is."""
    options = codec()
    backend = options["tokenizer"].backend_tokenizer
    seconds = count = 0
    items = itertools.chain.from_iterable(map(read_jsonl, paths()))
    texts = (
        "".join(segment.text for segment in render(item.messages, options["chat_format"]))
        for item in items
        if all(message.role != "tool" for message in item.messages)
    )
    while batch := list(itertools.islice(texts, 1000)):
        since = time.perf_counter()
        backend.encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - since
        count += len(batch)
    return {"conversations": count, "seconds": seconds}


def tokenise() -> dict:
    files = records()
    return {
        "conversations": sum(map(len, files)),
        "tokens": sum(int(file.lengths.sum()) for file in files),
    }


def plan() -> dict:
    data = train_data(records())
    report = data.parts[0].plan.report
    return {"rows": report.rows, "efficiency": report.efficiency, "lost": report.lost}


def train_data(files: list):
    from llmzoo_jax.config import DataConfig, Source
    from llmzoo_jax.data import mix

    sources = tuple(Source(path=file.path) for file in files)
    config = DataConfig(train=sources, sequence_length=LENGTH.value, batch_size=ROWS.value)
    return mix(files, config, seed=SEED.value)


def iterate(workers: int) -> dict:
    data = train_data(records())
    batches = data.iterate(0, 1_000_000_000, workers=workers)
    for _ in range(2 + 2 * workers):  # until all workers have begun
        next(batches)
    tokens, since = 0, time.perf_counter()
    while time.perf_counter() - since < SECONDS.value:
        tokens += int((next(batches).segment_ids > 0).sum())
    seconds = time.perf_counter() - since
    batches.close()
    return {"tokens": tokens, "seconds": seconds}


STAGES = {
    "make": make,
    "build": build,
    "clean": clean,
    "cut": cut,
    "batches": batches,
    "tokenise": tokenise,
    "again": tokenise,
    "plan": plan,
    "threads": lambda: iterate(0),
    "workers": lambda: iterate(WORKERS.value),
}
RAW = ("make", "build", "clean")  # stages that read the raw file, or what came of it


def run_stage(name: str) -> dict:
    since = time.perf_counter()
    result = STAGES[name]()
    result.setdefault("seconds", time.perf_counter() - since)
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024  # kB, on Linux
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return result | {"peak_mb": own + children * WORKERS.value}


def main(_: list[str]) -> None:
    if STAGE.value:
        print(json.dumps(run_stage(STAGE.value)))
        return
    os.makedirs(WORK.value, exist_ok=True)
    done = {}
    for name in STAGES:
        if name in RAW and (DATA.value or (name == "make" and os.path.exists(in_work(SYNTHETIC)))):
            continue
        command = [sys.executable, "-m", "tests.benchmarks.data", *sys.argv[1:], f"--stage={name}"]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
        out = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        done[name] = json.loads(out.stdout.splitlines()[-1])
        size = sum(map(os.path.getsize, [in_work(SYNTHETIC)] if name in RAW else paths()))
        print(describe(name, done[name], size / 1e6), flush=True)
    ratio = speed(done["tokenise"]) / speed(done["batches"])
    print(f"tokenise reaches {ratio:.0%} of encode_batch")


def speed(result: dict) -> float:
    return result["conversations"] / result["seconds"]


def describe(name: str, result: dict, megabytes: float) -> str:
    seconds = result["seconds"]
    parts = [f"{name:9} {seconds:7.1f} s"]
    if name in ("threads", "workers"):
        parts.append(f"{result['tokens'] / seconds:,.0f} tokens/s")
    else:
        parts.append(f"{megabytes / seconds:,.1f} MB/s of {megabytes:,.1f}")
    if name in (*RAW, "batches", "tokenise"):
        parts.append(f"{speed(result):,.0f} conversations/s")
    parts += [
        f"{key} {result[key]}"
        for key in ("shards", "rows", "efficiency", "kept", "dropped")
        if key in result
    ]
    return "  ".join([*parts, f"peak {result['peak_mb']:,.0f} MB"])


if __name__ == "__main__":
    cli.run(main)
