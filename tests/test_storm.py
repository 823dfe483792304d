"""Clients that behave badly, many at once: nobody else notices, and nothing is left behind."""

import dataclasses
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import llmzoo_jax
from serving.engine import Engine
from tests.live_server import NAME, live, until
from tests.test_server import SMALL
from tests.tiny_runs import make_run

OPTIONS = dataclasses.replace(SMALL, max_waiting=18)  # what is compiled is the same
PATH = "/v1/chat/completions"
SEEDS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))
    with live(model, Engine(model, OPTIONS)) as running:
        yield running


def body(seed, **changes):
    messages = [{"role": "user", "content": f"Question {seed}"}]
    usual = {"model": NAME, "messages": messages, "seed": seed, "max_tokens": 24}
    return usual | {"ignore_eos": True} | changes


def text_of(server, seed, **changes):
    """The answer to a well-behaved request, or None where the queue was full."""
    if changes.get("stream"):
        status, _, text = server.post(PATH, body(seed, **changes))
        if status == 429:
            return None
        events = [json.loads(x[6:]) for x in text.split("\n\n")[:-2]]
        return "".join(e["choices"][0]["delta"]["content"] for e in events)
    status, headers, answer = server.post(PATH, body(seed, **changes))
    assert status in (200, 429), answer
    if status == 429:
        assert int(headers["retry-after"]) >= 1
        return None
    return answer["choices"][0]["message"]["content"]


def leave(server, rng, changes):
    """Sends a request, reads a little of the answer, and goes."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("POST", PATH, json.dumps(body(1, max_tokens=200, **changes)))
    if rng.random() < 0.7:
        connection.getresponse().read(rng.choice((1, 200, 2000)))
    connection.close()


def misbehave(server, rng):
    """(kind, whether it went as it should)"""
    kind = rng.choice(
        ("leave", "deadline", "long", "large", "broken", "choices", "grammar", "stop")
    )
    if kind == "leave":
        leave(server, rng, {"stream": rng.random() < 0.8, "n": rng.choice((1, 1, 3))})
        return True
    if kind == "deadline":
        status, _, _ = server.post(PATH, body(2, max_tokens=200, timeout=rng.choice((0.001, 0.02))))
        return status in (200, 429, 504)
    if kind == "long":
        return server.post(PATH, body(3, max_tokens=256))[0] == 400
    if kind == "large":
        return server.post(PATH, body(4, user="x" * 300_000))[0] == 413
    if kind == "broken":
        whole = json.dumps(body(5)).encode()
        return server.post(PATH, whole[: rng.randrange(1, len(whole) - 1)])[0] == 400
    if kind == "choices":
        return server.post(PATH, body(6, n=rng.randrange(2, 20), max_tokens=3))[0] in (200, 429)
    if kind == "grammar":
        form = {"structured_outputs": {"regex": "[a-z]{3,5}"}, "ignore_eos": False}
        return server.post(PATH, body(7, **form))[0] in (200, 429)
    return server.post(PATH, body(8, stop=["a", "e", " "], stream=True))[0] in (200, 429)


def storm(server, count):
    alone = [text_of(server, seed) for seed in range(SEEDS)]
    assert None not in alone and len(set(alone)) == SEEDS
    threads = threading.active_count()
    refused = []

    def one(number):
        rng = random.Random(number)
        if rng.random() < 0.6:
            assert misbehave(server, rng), number
            return
        seed = rng.randrange(SEEDS)
        how = {"stream": True} if rng.random() < 0.5 else {}
        while (text := text_of(server, seed, **how)) is None:  # comes again, so each is served
            refused.append(number)
            time.sleep(0.02)
        assert text == alone[seed], number

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(count)))
    assert refused or count < 1000  # the queue was full, too
    until(lambda: server.engine.stats().running + server.engine.stats().waiting == 0)
    stats = server.engine.stats()
    assert stats.pages_used == 0
    assert "error" not in stats.finished
    assert sum(stats.finished.values()) >= count / 4
    assert {"length", "abort"} <= set(stats.finished)
    assert [text_of(server, seed) for seed in range(SEEDS)] == alone
    until(lambda: threading.active_count() <= threads)
    assert server.get("/ready")[0] == 200


def test_nothing_is_left_behind(server):
    storm(server, 200)


@pytest.mark.slow
def test_nothing_is_left_behind_by_two_thousand(server):
    storm(server, 2_000)
