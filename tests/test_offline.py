"""``generate`` on an engine is ``generate`` of the model."""

import dataclasses

import pytest

import llmzoo_jax
from llmzoo_jax.errors import InputError
from serving.offline import on_engine
from tests.tiny_runs import make_run

TEXTS = ["Who are you?", "你是谁？", "a", "Bonjour, comment", "2 + 2 =", "مرحبا"]
SAMPLED = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 7}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    model = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))
    with on_engine(model, max_batch=2, context=128, prefill_tokens=32) as fast:
        yield model, fast


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_results_are_those_of_the_model(models, sampling):
    model, fast = models
    want = model.generate(TEXTS, max_new_tokens=20, **sampling)
    assert fast.generate(TEXTS, max_new_tokens=20, **sampling) == want
    ids = [[5, 6, 7], [8]]
    assert fast.generate(ids, max_new_tokens=9) == model.generate(ids, max_new_tokens=9)


def test_a_stop_string_ends_a_row_and_nothing_else(models):
    model, fast = models
    texts = [row.text for row in model.generate(TEXTS, max_new_tokens=20)]
    stop = texts[0][2:4]
    got = fast.generate(TEXTS, max_new_tokens=20, stop=stop)
    assert got == model.generate(TEXTS, max_new_tokens=20, stop=stop)
    assert got[0].finish_reason == "stop"


def test_a_draft_is_the_engines(models):
    model, _ = models
    config = dataclasses.replace(model.config, vocab_size=619)
    draft = dataclasses.replace(model, config=config)
    with (
        on_engine(model, max_batch=2, draft=draft, speculate=2) as fast,
        pytest.raises(InputError, match=r"draft_model=.* has 619 tokens"),
    ):
        fast.generate([[5]])


def test_all_else_is_the_models_own(models):
    model, fast = models
    assert fast.tokenizer is model.tokenizer
    assert fast.generate([]) == []
