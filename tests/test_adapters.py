"""A row with an adapter says what the merged model says, beside rows without one."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from llmzoo_jax import generate as decoding
from llmzoo_jax import lora, peft_format
from llmzoo_jax.config import LoraConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving.engine import Engine
from tests import parity
from tests.test_engine import SMALL, ask, model_of, prompts

BLOOM, LLAMA = parity.FAMILIES
TARGETS = {LLAMA: ("q_proj", "v_proj", "up_proj", "down_proj"), BLOOM: ()}
RANKS = {"strong": 4, "other": 3}


def adapters_of(case, rank, seed):
    config = LoraConfig(rank=rank, alpha=8.0, targets=TARGETS[case])
    adapters = lora.init(config, parity.our_config(case), jax.random.key(seed))
    for n, adapter in enumerate(adapters.values()):  # else they change nothing
        shape = adapter.lora_b.shape
        adapter.lora_b = nnx.Param(0.3 * jax.random.normal(jax.random.key(n), shape))
    return config, adapters


@pytest.fixture(scope="module", params=[pytest.param(BLOOM, marks=pytest.mark.slow), LLAMA])
def served(request, tmp_path_factory):
    """(engine with room for two, {name: folder}, {name: merged model})."""
    case = request.param
    folders, merged = {}, {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        config, adapters = adapters_of(case, rank, seed)
        folders[name] = tmp_path_factory.mktemp("peft")
        peft_format.save(folders[name], adapters, config, parity.our_config(case), base="base")
        merged[name] = decoding.prepare(lora.merge(parity.our_model(case), adapters))
    options = dataclasses.replace(
        SMALL, max_adapters=2, max_lora_rank=4, max_batch=3, prefill_tokens=8, deterministic=True
    )  # one shape, so little is compiled
    engine = Engine(model_of(case), options)
    engine.start()
    yield engine, folders, merged
    assert engine.stats().compilations_after_ready == 0
    engine.close()


def greedy(params, asked):
    rows = decoding.generate(params, asked, sampling=decoding.Sampling(max_new_tokens=12))
    return [row.tokens for row in rows]


def test_each_row_has_its_own_adapter_or_none(served):
    engine, folders, merged = served
    asked = prompts(9, seed=4)
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    assert engine.adapters == sorted(folders)
    names = [None, "strong", "other"] * 3
    answers = [ask(engine, p, adapter=n) for p, n in zip(asked, names, strict=True)]
    want = {n: greedy(m, asked) for n, m in (merged | {None: engine.model.params}).items()}
    for i, (name, answer) in enumerate(zip(names, answers, strict=True)):
        assert answer.tokens == want[name][i]
    assert want[None] != want["strong"] != want["other"]
    # The same prompt, but other keys and values: what is cached of one is not found by another.
    prompt = list(range(30))
    for name in (None, "strong", "other", None, "strong"):
        model = merged.get(name, engine.model.params)
        assert ask(engine, prompt, adapter=name).tokens == greedy(model, [prompt])[0]
    for name in folders:
        engine.unload_adapter(name)


def test_an_adapter_can_take_the_place_of_another(served):
    engine, folders, merged = served
    prompt = list(range(20))
    for name in ("strong", "other"):
        engine.load_adapter("mine", folders[name])
        assert ask(engine, prompt, adapter="mine").tokens == greedy(merged[name], [prompt])[0]
        engine.unload_adapter("mine")
    with pytest.raises(InputError, match="no adapter 'mine'"):
        ask(engine, prompt, adapter="mine")


def test_what_does_not_fit_is_said(served, tmp_path):
    engine, folders, _ = served
    engine.load_adapter("a", folders["strong"])
    with pytest.raises(InputError, match="already"):
        engine.load_adapter("a", folders["other"])
    engine.load_adapter("b", folders["other"])
    with pytest.raises(InputError, match="max_adapters"):
        engine.load_adapter("c", folders["other"])
    with pytest.raises(InputError, match="no adapter"):
        engine.unload_adapter("c")
    engine.unload_adapter("a")
    engine.unload_adapter("b")
    case = engine.model.path
    config, adapters = adapters_of(case, 5, 0)
    peft_format.save(tmp_path, adapters, config, parity.our_config(case), base="base")
    with pytest.raises(InputError, match="rank is 5"):
        engine.load_adapter("wide", tmp_path)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (LLAMA, "int8"),
        pytest.param(BLOOM, "nf4", marks=pytest.mark.slow),
        pytest.param(BLOOM, "int8", marks=pytest.mark.slow),
        pytest.param(LLAMA, "nf4", marks=pytest.mark.slow),
    ],
)
def test_quantised_weights_serve_what_they_hold(case, kind):
    """As the dense model of the same rounded weights, token for token."""
    frozen = lora.freeze(parity.our_model(case), LoraConfig(quantise=kind))
    held = Model(case, parity.our_config(case), None, None, decoding.prepare(frozen), (), "float32")
    engine = Engine(held, dataclasses.replace(SMALL, max_batch=1, prefill_tokens=8))
    engine.start()
    asked = prompts(4, seed=8)
    answers = [ask(engine, prompt, logprobs=0) for prompt in asked]
    dense = decoding.prepare(lora.merge(frozen, {}))
    assert [answer.tokens for answer in answers] == greedy(dense, asked)
    exact = greedy(decoding.prepare(parity.our_model(case)), asked)
    assert np.mean([a.tokens[0] == b[0] for a, b in zip(answers, exact, strict=True)]) >= 0.5
    engine.close()
