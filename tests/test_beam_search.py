"""Beams are those of transformers, and a search is a request like any other."""

import dataclasses
import functools
import random
import threading
import time

import openai
import pytest

import llmzoo_jax
from llmzoo_jax.errors import InputError
from serving.beam_search import BeamOptions, Search
from serving.engine import Engine
from serving.offline import EngineModel
from serving.requests import Request, Sampling
from tests import parity
from tests.live_server import NAME, live, until
from tests.test_engine import BLOOM, LLAMA, SMALL, model_of
from tests.tiny_runs import make_run

OPTIONS = dataclasses.replace(SMALL, compile_at="first_use")
KINDS = [  # (beams, n, length_penalty, early_stopping)
    (2, 2, 1.0, False), (3, 1, 1.0, False), (4, 4, 0.0, False), (4, 2, 2.0, "never"),
    (5, 5, 1.0, True), (5, 3, -1.5, "never"), (7, 7, 0.5, True), (7, 7, 3.0, False),
    (1, 1, 1.0, False),
]  # fmt: skip


@functools.cache
def model(case):
    """On an engine."""
    return EngineModel(model_of(case), OPTIONS)


@pytest.fixture(autouse=True)
def nothing_leaks():
    yield
    for case in (BLOOM, LLAMA):
        engine = model(case)._running
        if engine is not None:
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def with_stops(case, stop_ids):
    """The same engine, for a model that ends its answers with these tokens."""
    found = EngineModel(dataclasses.replace(model_of(case), stop_ids=tuple(stop_ids)), OPTIONS)
    found._running = model(case)._engine
    return found


def prompts(seed, n=3):
    rng = random.Random(seed)
    return [[rng.randrange(80) for _ in range(rng.randrange(2, 30))] for _ in range(n)]


@pytest.fixture(scope="module", params=[BLOOM, pytest.param(LLAMA, marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """(case, transformers' model)"""
    pytest.importorskip("torch")
    case = request.param
    folder = tmp_path_factory.mktemp("torch")
    return case, parity.to_torch(folder, parity.our_config(case), parity.our_model(case))


def theirs(model, prompt, kind, stop_ids, max_new_tokens):
    """(tokens up to the stop token, the stop token) of each answer."""
    import torch

    beams, n, length_penalty, early_stopping = kind
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
        num_beams=beams, num_return_sequences=n, length_penalty=length_penalty,
        early_stopping=early_stopping, eos_token_id=list(stop_ids) or None, pad_token_id=0,
    )  # fmt: skip
    for row in found[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in stop_ids), None)
        yield row[:end], None if end is None else "stop"


@pytest.mark.parametrize("stops", [0, 1, 3])
def test_answers_and_their_order_are_those_of_transformers(pair, stops):
    case, torch_model = pair
    ours = model(case)
    ended = 0
    for number, prompt in enumerate(prompts(stops)):
        # Tokens that beams do say, so that some of them end early.
        (free,) = ours.beam_search([prompt], BeamOptions(beams=4), n=4, max_new_tokens=12)
        said = [token for row in free for token in row.tokens[2:]]
        stop_ids = sorted(set(said), key=lambda token: (-said.count(token), token))[:stops]
        for kind in KINDS:
            beams, n, length_penalty, early_stopping = kind
            options = BeamOptions(
                beams=beams, length_penalty=length_penalty, early_stopping=early_stopping
            )
            want = list(theirs(torch_model, prompt, kind, stop_ids, 9 + number))
            (got,) = with_stops(case, stop_ids).beam_search(
                [prompt], options, n=n, max_new_tokens=9 + number
            )
            assert [row.tokens for row in got] == [tokens for tokens, _ in want], kind
            reasons = [reason or "length" for _, reason in want]
            assert [row.finish_reason for row in got] == reasons
            ended += reasons.count("stop")
    assert ended > 20 if stops else not ended


def test_one_beam_is_greedy_decoding():
    ours = model(LLAMA)
    rows = ours.beam_search(prompts(8), BeamOptions(beams=1), max_new_tokens=20)
    assert [row for (row,) in rows] == ours.generate(prompts(8), max_new_tokens=20)


def test_many_searches_at_once_give_what_each_gives_alone():
    """More beams than there are places and pages, beside other requests."""
    ours, options = model(LLAMA), BeamOptions(beams=6)
    asked = prompts(9, n=8)
    alone = [ours.beam_search([prompt], options, n=3, max_new_tokens=15)[0] for prompt in asked]
    plain = ours.generate(asked, max_new_tokens=20)
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(ours.beam_search(asked, options, n=3, max_new_tokens=15))
    )
    thread.start()
    assert ours.generate(asked, max_new_tokens=20) == plain
    thread.join()
    assert got == alone


class Outputs:
    def __init__(self, n):
        self.found = [None] * n
        self.ended = threading.Semaphore(0)

    def senders(self):
        return [functools.partial(self._take, i) for i in range(len(self.found))]

    def _take(self, i, output):
        assert self.found[i] is None
        self.found[i] = output
        self.ended.release()

    def reasons(self):
        for _ in self.found:
            assert self.ended.acquire(timeout=60)
        return {output.finish_reason for output in self.found}


def start(engine, *, max_tokens=40, n=2, deadline=None):
    outputs = Outputs(n)
    request = Request(
        id=f"search {time.monotonic()}", prompt=[1, 2, 3], sampling=Sampling(max_tokens=max_tokens),
        deadline=deadline,
    )  # fmt: skip
    search = Search(
        engine, request, BeamOptions(beams=3), stop_ids=(), on_outputs=outputs.senders()
    )
    search.start()
    return search, outputs


def test_a_search_ends_when_it_is_aborted_or_its_deadline_comes():
    engine = model(LLAMA)._engine
    for delay in (0, 0.002, 0.01, 0.03):
        search, outputs = start(engine, max_tokens=60)
        time.sleep(delay)
        search.abort()
        assert outputs.reasons() == {"abort"}
        search.abort()
    _, outputs = start(engine, deadline=time.monotonic() + 0.02, max_tokens=60)
    assert outputs.reasons() == {"deadline"}


def test_a_closing_engine_ends_searches_that_have_begun_and_a_closed_one_fails_them():
    for close, want in ((lambda e: e.drain(60), "length"), (lambda e: e.close(), "abort")):
        engine = Engine(model_of(LLAMA), OPTIONS)
        _, outputs = start(engine)  # it waits for the engine
        engine._runner._programs = model(LLAMA)._engine._runner._programs
        engine._runner.warm_up = lambda: None
        engine.start()
        until(lambda engine=engine: engine.stats().generated_tokens > 6)
        assert close(engine) in (True, None)
        assert outputs.reasons() == {want}
        assert engine.stats().pages_used == 0
        engine.close()


@pytest.mark.parametrize(
    ("options", "asked", "match"),
    [
        (
            BeamOptions(beams=21),
            {"max_new_tokens": 8},
            "21 beams: with 0 stop tokens there can be 20 at most",
        ),
        (BeamOptions(beams=2), {"n": 3, "max_new_tokens": 8}, "n=3: 1 to the 2 beams"),
        (BeamOptions(beams=2), {"max_new_tokens": 0}, "max_tokens=0"),
        ({"beams": 0}, {}, "beams=0: must be 1 or more"),
        ({"beams": 1, "length_penalty": -11}, {}, "length_penalty=-11 is out of range: -10 to 10"),
        ({"beams": 1, "early_stopping": "no"}, {}, "early_stopping='no': True, False or 'never'"),
        (BeamOptions(beams=2), {"max_new_tokens": 63}, "more than context=64"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(options, asked, match):
    with pytest.raises(InputError, match=match):
        options = BeamOptions(**options) if isinstance(options, dict) else options
        model(LLAMA).beam_search([[1, 2]], options, **asked)


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    loaded = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))
    options = dataclasses.replace(SMALL, context=256, deterministic=True)  # few shapes to compile
    with live(loaded, Engine(loaded, options)) as running:
        yield running
        until(lambda: not running.engine.stats().running)
        stats = running.engine.stats()
        assert (stats.pages_used, stats.compilations_after_ready) == (0, 0)


def test_beams_over_http_are_the_best_first(server):
    offline = EngineModel(server.model, server.engine.options)
    offline._running = server.engine
    prompts = ["The quick brown", "你好"]
    options = BeamOptions(beams=4, length_penalty=0.5, early_stopping=True)
    want = offline.beam_search(prompts, options, n=3, max_new_tokens=12)
    client = server.client()
    beams = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": True}
    answer = client.completions.create(
        model=NAME, prompt=prompts, max_tokens=12, n=3, best_of=4, extra_body=beams
    )
    texts = [row.text for rows in want for row in rows]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert answer.usage.completion_tokens == sum(len(row.tokens) for rows in want for row in rows)
    assert answer.usage.prompt_tokens == sum(rows[0].prompt_tokens for rows in want)
    messages = [{"role": "user", "content": "Who are you?"}]
    chat = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=12, n=3, extra_body={"use_beam_search": True}
    )
    (want,) = offline.beam_search(
        [server.model.prompt(messages)], BeamOptions(beams=3), n=3, max_new_tokens=12
    )
    assert len(chat.choices) == 3
    assert chat.usage.completion_tokens == sum(len(row.tokens) for row in want)
    for choice, row in zip(chat.choices, want, strict=True):
        assert row.text.strip().startswith(choice.message.content.strip())
        assert choice.finish_reason == row.finish_reason


def test_a_client_that_goes_ends_its_search(server):
    client = server.client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model=NAME, prompt="The", max_tokens=200, n=8,
            extra_body={"use_beam_search": True, "ignore_eos": True},
        )  # fmt: skip
    until(lambda: not server.engine.stats().running)
