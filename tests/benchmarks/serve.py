"""Serving speed: the same requests to our server and to others: vLLM's, one around
``transformers.generate``, or any OpenAI-compatible one.

    python -m tests.benchmarks.serve --vllm_python=../vllm/bin/python --rounds=2
    python -m tests.benchmarks.serve --transformers --answers=real --max_tokens=512 --concurrency=16
    python -m tests.benchmarks.serve --url=http://localhost:8000 --served=phoenix

Makes a random model with the tokenizer --tokenizer, starts a server, warms it, and sends real
prompts (the first turns of conversations) as token ids to /v1/completions, each answer exactly
--max_tokens long, or with --answers=real as long as that of the conversation, so that all servers
do the same work; then the next server, in turn. A request counts from before it is sent; a client
process of its own measures. Prints a table.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx2 as httpx
from absl import app, flags

from tests.benchmarks import sides

flags.adopt_module_key_flags(sides)

URL = flags.DEFINE_string("url", "", "Only drive this server, which runs already.")
SERVED = flags.DEFINE_string("served", "model", "Its model's name.")
VLLM = flags.DEFINE_string("vllm_python", "", "Python of an environment with vLLM; empty: no vLLM.")
TRANSFORMERS = flags.DEFINE_bool("transformers", False, "Drive transformers.generate, too.")
DATA = flags.DEFINE_list("data", [], "Files of conversations, JSON Lines, to take prompts of.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "Its folder; of 8,192 tokens at most.")
CONCURRENCY = flags.DEFINE_list("concurrency", ["1", "4", "16", "64"], "Requests at a time.")
REQUESTS = flags.DEFINE_integer("requests", 3, "Requests, as a multiple of those at a time.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Tokens of every answer, or at most.")
ANSWERS = flags.DEFINE_enum("answers", "fixed", ["fixed", "real"], "How long answers are.")
MODES = flags.DEFINE_list("modes", ["greedy", "sampled"], "greedy, sampled (temperature 1), top_p.")
CONTEXT = flags.DEFINE_integer("context", 1024, "Tokens of a request; longer prompts are left out.")

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
}


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    answer: int  # tokens


@dataclass(frozen=True)
class Load:
    """Of one server under one load; times in seconds."""

    side: str
    mode: str
    concurrency: int
    tokens_per_second: float
    first_token: float  # median
    first_token_p99: float
    between_tokens: float  # mean, after the first


def read_prompts() -> list[Prompt]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.value)
    prompts = []
    for path in DATA.value:
        with open(path, encoding="utf-8") as file:
            for line in itertools.islice(file, 500):
                asked, said = (
                    tokenizer(message["content"]).input_ids
                    for message in json.loads(line)["messages"][:2]
                )
                wanted = len(said) if ANSWERS.value == "real" else MAX_TOKENS.value
                prompts.append(Prompt(asked, max(2, min(wanted, MAX_TOKENS.value))))
    room = CONTEXT.value - MAX_TOKENS.value
    prompts = [prompt for prompt in prompts if 4 <= len(prompt.tokens) <= room]
    random.Random(0).shuffle(prompts)
    return prompts


async def ask(client: httpx.AsyncClient, prompt: Prompt, mode: str, seed: int):
    """(seconds to the first token, seconds in all, tokens)."""
    body = {
        "model": SERVED.value, "prompt": prompt.tokens, "max_tokens": prompt.answer,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        "seed": seed, **SAMPLING[mode],
    }  # fmt: skip
    began, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"the server says {event['error']}")
            if event["choices"] and not first:
                first = time.perf_counter() - began
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    assert tokens == prompt.answer
    return first, time.perf_counter() - began, tokens


async def drive(url: str, side: str, mode: str, concurrency: int, prompts) -> Load:
    """``concurrency`` clients, each with one request at a time."""
    count = max(16, REQUESTS.value * concurrency)
    todo = iter(range(count))
    results = []

    async def one(client):
        for n in todo:
            results.append(await ask(client, prompts[n % len(prompts)], mode, n))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(concurrency)))
        seconds = time.perf_counter() - began
    firsts = sorted(first for first, _, _ in results)
    gaps = [(whole - first) / (tokens - 1) for first, whole, tokens in results]
    return Load(
        side, mode, concurrency, sum(tokens for *_, tokens in results) / seconds,
        statistics.median(firsts),
        firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))], statistics.fmean(gaps),
    )  # fmt: skip


@contextmanager
def server(side: str, folder: str) -> Iterator[str]:
    port = 18000 + os.getpid() % 1000
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    if side == "ours":
        command = [
            sys.executable, "-m", "serving.server", f"--model={folder}", f"--name={SERVED.value}",
            f"--port={port}", f"--context={CONTEXT.value}", "--noembeddings",
        ]  # fmt: skip
        ready = "/ready"
    elif side == "transformers":
        command = [
            sys.executable, "-m", "tests.benchmarks.transformers_side", f"--model={folder}",
            f"--port={port}",
        ]  # fmt: skip
        ready = "/health"
    else:
        command = [
            VLLM.value, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}",
            f"--served-model-name={SERVED.value}", f"--port={port}", "--dtype=float32",
            f"--max-model-len={CONTEXT.value}", "--max-num-seqs=64",
        ]  # fmt: skip
        ready = "/health"
    with open(f"{folder}/{side}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        began = time.perf_counter()
        while True:
            if process.poll() is not None:
                raise SystemExit(
                    f"{side} ended: {Path(f'{folder}/{side}.log').read_text()[-3000:]}"
                )
            try:
                urllib.request.urlopen(url + ready, timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        print(f"{side}: ready after {time.perf_counter() - began:.1f} s", flush=True)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def measure(url: str, side: str, prompts) -> list[Load]:
    asyncio.run(drive(url, side, "greedy", 4, prompts))  # warm
    loads = []
    for mode in MODES.value:
        for concurrency in CONCURRENCY.value:
            loads.append(asyncio.run(drive(url, side, mode, int(concurrency), prompts)))
            print(json.dumps(asdict(loads[-1])), flush=True)
    return loads


def table(loads: Sequence[Load]) -> str:
    by_side = {load.side for load in loads}
    others = sorted(by_side - {"ours"})
    lines = [
        "| | at a time | " + " | ".join(f"{s}, tok/s | first token, s" for s in sorted(by_side))
        + "".join(f" | ours / {side}" for side in others) + " |",
        "| --- |" + " ---: |" * (1 + 2 * len(by_side) + len(others)),
    ]  # fmt: skip
    for mode in MODES.value:
        for concurrency in map(int, CONCURRENCY.value):
            cells, rates = [], {}
            for side in sorted(by_side):
                mine = [
                    x for x in loads if (x.side, x.mode, x.concurrency) == (side, mode, concurrency)
                ]
                rates[side] = statistics.median(x.tokens_per_second for x in mine)
                first = statistics.median(x.first_token for x in mine)
                cells.append(f"{rates[side]:,.0f} | {first:.3f}")
            cells += [f"{rates['ours'] / rates[side]:.2f}" for side in others]
            lines.append(f"| {mode} | {concurrency} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(_) -> None:
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    prompts = read_prompts()
    for name, lengths in (
        ("prompts", sorted(len(prompt.tokens) for prompt in prompts)),
        ("answers", sorted(prompt.answer for prompt in prompts)),
    ):
        mean, middle = statistics.fmean(lengths), lengths[len(lengths) // 2]
        print(f"{len(lengths)} {name}, tokens: median {middle}, mean {mean:.0f}, to {lengths[-1]}")
    if URL.value:
        print(table(measure(URL.value, "ours", prompts)))
        return
    loads = []
    all_sides = ["ours", *["vllm"] * bool(VLLM.value), *["transformers"] * TRANSFORMERS.value]
    with tempfile.TemporaryDirectory() as folder:
        sides.write_model(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_bytes((Path(TOKENIZER.value) / name).read_bytes())
        for _ in range(sides.ROUNDS.value):
            for side in all_sides:
                with server(side, folder) as url:
                    loads += measure(url, side, prompts)
    print(table(loads))


if __name__ == "__main__":
    app.run(main)
