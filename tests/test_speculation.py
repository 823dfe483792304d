"""A draft model changes how fast tokens come, and never which."""

import dataclasses
import functools
import random
import threading
import types

import pytest

from llmzoo_jax import generate as decoding
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving import speculation
from serving.engine import Engine
from tests import parity
from tests.test_engine import BLOOM, LLAMA, SMALL, ask, kinds, model_of

OPTIONS = dataclasses.replace(SMALL, speculate=3, max_batch=2, cache_tokens=96)


def other(case):
    """A small random model with the same tokens; of the other family, for BLOOM."""
    config = parity.our_config(LLAMA)
    config = dataclasses.replace(
        config, vocab_size=parity.our_config(case).vocab_size, num_layers=1
    )
    params = decoding.prepare(parity.random_model(config, seed=5))
    return Model("other", config, None, None, params, (), "float32")


DRAFTS = {"itself": model_of, "other": other}


@functools.cache
def engine_of(case, draft):
    engine = Engine(model_of(case), OPTIONS, draft=DRAFTS[draft](case))
    engine.start()
    return engine


@pytest.fixture(autouse=True)
def nothing_leaks():
    yield
    for key in USED:
        engine = engine_of(*key)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert len(engine._slots) == engine.options.max_batch
        assert stats.compilations_after_ready == 0


USED: set[tuple] = set()


def plainly(engine, *args, **sampling):
    """The tokens of a request without guesses, by the same programs."""
    engine.options = dataclasses.replace(OPTIONS, speculate=0)
    tokens = ask(engine, *args, **sampling).tokens
    engine.options = OPTIONS
    return tokens


def use(case, draft):
    USED.add((case, draft))
    return engine_of(case, draft)


def counts(engine, then):
    """(guessed, right) of what ``then`` does."""
    before = engine.stats()
    then()
    after = engine.stats()
    return (
        after.guessed_tokens - before.guessed_tokens,
        after.right_tokens - before.right_tokens,
    )


SLOW = {(BLOOM, "itself"), (LLAMA, "itself"), (LLAMA, "other")}


@pytest.mark.parametrize(
    ("case", "draft"),
    [
        pytest.param(case, draft, marks=[pytest.mark.slow] * ((case, draft) in SLOW))
        for case in (BLOOM, LLAMA)
        for draft in DRAFTS
    ],
)
def test_tokens_are_the_same_with_any_draft(case, draft):
    """150 requests, greedy and sampled, some of which can't be guessed, with shared beginnings, too
    few pages, and a fifth of them aborted at any time."""
    engine, asked = use(case, draft), list(kinds(0))
    want = [plainly(engine, prompt, **sampling) for prompt, sampling in asked]
    rng = random.Random(draft)
    answers = []

    def storm():
        for n in range(150):
            i = rng.randrange(len(asked))
            answer = ask(engine, asked[i][0], **asked[i][1])
            answers.append((i, answer))
            if rng.random() < 0.2:
                delay = rng.choice([0, 0, 0.002, 0.01])
                threading.Timer(delay, engine.abort, [answer.id]).start()
            if n % 10 == 9:
                answer.ended.wait(60)
        for i, answer in answers:
            ended = answer.reason == "abort"
            assert answer.tokens == (want[i][: len(answer.tokens)] if ended else want[i])

    guessed, right = counts(engine, storm)
    assert guessed > 500
    assert engine.stats().preemptions > 0
    assert engine.stats().cached_tokens > 0
    if draft == "itself":  # so its keys and values are always those of the row's own tokens
        assert right > 0.97 * guessed
    else:
        assert 0 < right < 0.5 * guessed


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "drawn"])
def test_what_is_guessed_right_takes_no_step_of_its_own(sampling, monkeypatch):
    engine, prompt = use(LLAMA, "itself"), [5, 6, 7, 9, 11]
    verify, calls = engine._runner.verify, []
    monkeypatch.setattr(engine._runner, "verify", lambda *a: calls.append(1) or verify(*a))
    tokens = []
    sampling |= {"max_tokens": 41}
    guessed, right = counts(engine, lambda: tokens.extend(ask(engine, prompt, **sampling).tokens))
    assert tokens == plainly(engine, prompt, **sampling)
    assert (guessed, right) == (30, 30)
    assert len(calls) == 10  # of 3 + 1 tokens each, after the first token


def test_as_many_tokens_as_a_page_has_go_where_they_belong():
    """A guess of seven and the token before it, from any place of a page of eight."""
    options = dataclasses.replace(
        OPTIONS, speculate=SMALL.page_size - 1, max_batch=1, compile_at="first_use"
    )
    engine = Engine(model_of(LLAMA), options, draft=model_of(LLAMA))
    engine.start()
    prompt = [5, 6, 7, 9, 11]
    answer = ask(engine, prompt, max_tokens=41)
    assert answer.tokens == plainly(use(LLAMA, "itself"), prompt, max_tokens=41)
    stats = engine.stats()
    assert stats.right_tokens == stats.guessed_tokens == 35
    engine.close()


def test_a_page_that_many_rows_share_is_filled_once(monkeypatch):
    engine = use(LLAMA, "itself")
    fill, filled = engine._draft._runner.fill, []
    monkeypatch.setattr(
        engine._draft._runner, "fill", lambda todo, **k: filled.extend(todo) or fill(todo, **k)
    )
    prompt = list(range(30, 70))  # five pages
    ask(engine, prompt, max_tokens=20).ended.wait(60)
    assert [n for _, n in filled if n < 5] == [0, 1, 2, 3, 4]
    del filled[:]
    for last in (1, 2):
        answer = ask(engine, [*prompt, last], max_tokens=20)
        assert answer.tokens == plainly(engine, [*prompt, last], max_tokens=20)
        assert answer.outputs[0].cached_tokens == 40
    assert {n for _, n in filled} == {5}  # what is their own


def test_a_draft_that_fails_fails_what_runs_and_nothing_later(monkeypatch):
    engine = use(LLAMA, "itself")
    want = ask(engine, [4, 5, 6]).tokens
    decode = engine._draft._runner.decode

    def fail_once(*args):
        monkeypatch.setattr(engine._draft._runner, "decode", decode)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._draft._runner, "decode", fail_once)
    broken = ask(engine, [4, 5, 6], max_tokens=40)
    assert (broken.reason, broken.outputs[-1].error) == ("error", "RuntimeError: out of memory")
    assert ask(engine, [4, 5, 6]).tokens == want


def tokenizer(*tokens):
    return types.SimpleNamespace(get_vocab=lambda: {t: i for i, t in enumerate(tokens)})


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({}, {"speculate": 0}, "speculate=0: a draft model has nothing to guess"),
        ({}, {"deterministic": True}, "speculate: shapes change"),
        ({"vocab_size": 82}, {}, "draft_model=x has 82 tokens, and .* 83"),
        ({"max_positions": 63}, {}, "draft_model=x has 63 positions, and context=64"),
        ({"tokenizer": tokenizer("a", "c")}, {}, "draft_model=x has other tokens than .*: 'b'"),
    ],
    ids=["speculate", "deterministic", "vocab_size", "context", "tokens"],
)
def test_a_draft_that_does_not_fit_is_refused(changes, options, match):
    target = dataclasses.replace(model_of(LLAMA), tokenizer=tokenizer("a", "b"))
    changes = dict(changes)
    config = target.config
    draft = dataclasses.replace(
        target,
        path="x",
        tokenizer=changes.pop("tokenizer", None),
        config=dataclasses.replace(config, **changes),
    )
    with pytest.raises(InputError, match=match):
        Engine(target, dataclasses.replace(OPTIONS, **options), draft=draft)


def test_looking_up_finds_what_followed_the_same_tokens():
    assert speculation.find([1, 2, 3, 4, 1, 2, 3], 2) == [4, 1]
    assert speculation.find([1, 2, 9, 1, 2, 8, 1, 2], 3) == [8, 1, 2]  # the newest place
    assert speculation.find([1, 2, 3], 2) == []
