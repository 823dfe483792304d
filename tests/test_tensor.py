"""A model that is split over devices says what it says on one, and no weight ever travels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import llmzoo_jax
from llmzoo_jax import generate as decoding
from llmzoo_jax import hf, lora, peft_format, placement, program, sharding
from llmzoo_jax.config import LoraConfig
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from llmzoo_jax.models import panels
from llmzoo_jax.sharding import ShardingError
from serving.engine import Engine
from tests import parity
from tests.test_engine import SMALL, ask, prompts
from tests.test_sharding import CONFIGS

# 16 query and 8 key/value heads on 8 devices, and a vocabulary that they don't divide; 8 heads
# with ALiBi on 4.
CASES = {
    "llama": (dataclasses.replace(CONFIGS["llama"], vocab_size=67), 8),
    "bloom": (CONFIGS["bloom"], 4),
}
OPTIONS = {
    "llama": {"kv_dtype": "int8", "max_adapters": 1, "max_lora_rank": 4},
    "bloom": {},
}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 7}


@functools.cache
def model_of(family):
    return parity.random_model(CASES[family][0], seed=5)


def split(family, ways, *, quantise="none"):
    """A model to use, on so many devices."""
    config = CASES[family][0]
    mesh = sharding.tensor_mesh(config, ways)
    params = lora.freeze(model_of(family), LoraConfig(quantise=quantise))
    return Model(family, config, None, None, decoding.prepare(params, mesh), (), "float32", mesh)


@pytest.fixture(scope="module", autouse=True)
def narrow_panels():
    """So that some weights of these models are in panels, where a machine has few cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "WIDTH", 4)
        yield


@pytest.fixture(scope="module", params=CASES)
def engines(request, narrow_panels):
    """(family, engine on one device, engine on several), the same but for that."""
    options = dataclasses.replace(
        SMALL, max_batch=2, prefill_tokens=8, deterministic=True, **OPTIONS[request.param]
    )  # one shape, so little is compiled
    both = []
    for ways in (1, CASES[request.param][1]):
        both.append(Engine(split(request.param, ways), options))
        both[-1].start()
    yield request.param, *both
    for engine in both:
        stats = engine.stats()
        assert (stats.pages_used, stats.compilations_after_ready) == (0, 0)
        engine.close()


def tokens_of(engine, asked, **how):
    answers = [ask(engine, prompt, max_tokens=8, **how) for prompt in asked]
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_one_device(engines, how):
    _, alone, together = engines
    asked = [[token % 64 for token in prompt] for prompt in prompts(8, seed=3)]
    assert tokens_of(together, asked, **how) == tokens_of(alone, asked, **how)


def test_log_probabilities_are_those_of_one_device(engines):
    _, alone, together = engines
    answers = [
        ask(engine, list(range(20)), logprobs=3, prompt_logprobs=2) for engine in (alone, together)
    ]
    one, several = ([x.logprob for x in answer.logprobs] for answer in answers)
    np.testing.assert_allclose(several, one, atol=1e-4)
    one, several = ([x.top for x in a.outputs[0].prompt_logprobs[1:]] for a in answers)
    assert [[i for i, _ in x] for x in several] == [[i for i, _ in x] for x in one]


def test_logits_of_several_devices_are_the_same_to_the_last_bit(engines):
    _, _, together = engines
    asked = [[token % 64 for token in prompt] for prompt in prompts(6, seed=5)]
    apart = [ask(together, prompt, logprobs=5).logprobs for prompt in asked]
    answers = [ask(together, prompt, logprobs=5) for prompt in reversed(asked)]
    assert [answer.logprobs for answer in answers][::-1] == apart


def test_an_adapter_is_split_as_what_it_is_added_to(engines, tmp_path):
    family, alone, together = engines
    if not together.options.max_adapters:
        pytest.skip("the other family has adapters here, to compile less")
    config = LoraConfig(rank=3, alpha=8.0, targets=tuple(lora.TARGETS[family]))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32),
        lora.abstract(config, CASES[family][0]),
    )
    peft_format.save(tmp_path, adapters, config, CASES[family][0], base="base")
    asked = [[token % 64 for token in prompt] for prompt in prompts(6, seed=4)]
    want = {}
    for engine in (alone, together):
        engine.load_adapter("mine", tmp_path)
        got = tokens_of(engine, asked, adapter="mine")
        assert got == want.setdefault("tokens", got)
        assert got != tokens_of(engine, asked)
        engine.unload_adapter("mine")


def test_a_step_exchanges_activations_alone(engines):
    """Two sums a layer and one of the embedding; of each kind all together is less than a weight.
    What is gathered is for the sampler: parts of logits, the best of each device."""
    family, _, together = engines
    config, _ = CASES[family]
    rows, weight = 2, 4 * config.hidden_size**2
    decode = together._runner._programs["decode", rows]
    collectives = program.count_traffic(decode.as_text()).collectives
    sums = 2 * config.num_layers * rows * config.hidden_size * 4
    assert sums <= collectives["all-reduce"]
    assert max(collectives.values()) < weight


def test_no_device_holds_more_than_its_part(engines):
    family, _, together = engines
    ways = CASES[family][1]
    runner = together._runner
    pages = jax.tree.leaves(runner.state.cache)
    leaves = sharding.named_leaves(together.model.params)
    matrices = [x for name, x in leaves.items() if name.startswith("blocks.") and x.ndim >= 2]
    for x in (*pages, *matrices):
        (size,) = {shard.data.size for shard in x.addressable_shards}
        assert x.size == ways * size


@pytest.mark.parametrize("family", CASES)
def test_logits_and_embeddings_are_those_of_one_device(family, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # so weights are in panels
    one, several = (split(family, ways) for ways in (1, CASES[family][1]))
    shapes = {x.ndim for x in jax.tree.leaves(several.params.blocks[0].attention.out.w)}
    assert shapes == {3}
    tokens = np.arange(24).reshape(2, 12)
    np.testing.assert_allclose(several.logits(tokens), one.logits(tokens), atol=1e-4)
    prompts = [[1, 2, 3], list(range(40))]
    np.testing.assert_allclose(several.embed(prompts), one.embed(prompts), atol=1e-5)


@pytest.mark.parametrize(("family", "quantise"), [("llama", "int8"), ("bloom", "nf4")])
def test_quantised_weights_are_split_as_well(family, quantise):
    tokens = np.arange(24).reshape(2, 12)
    one, several = (
        split(family, ways, quantise=quantise).logits(tokens) for ways in (1, CASES[family][1])
    )
    np.testing.assert_allclose(several, one, atol=2e-4)


@pytest.mark.parametrize("weights", ["dtype", "int8"])
@pytest.mark.parametrize("family", CASES)
def test_a_folder_is_read_to_its_place(family, weights, tmp_path):
    config, ways = CASES[family]
    hf.save_params(tmp_path, model_of(family), config, dtype="float32", max_shard_bytes=2**30)
    read = functools.partial(placement.read, tmp_path, config, dtype="float32", weights=weights)
    mesh = sharding.tensor_mesh(config, ways)
    quantise = "none" if weights == "dtype" else weights
    want = split(family, ways, quantise=quantise).params
    got = read(mesh=mesh)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert parity.max_difference(got, want) < 1e-6
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    alone = split(family, 1, quantise=quantise).params
    assert jax.tree.structure(read(mesh=None)) == jax.tree.structure(alone)
    assert parity.max_difference(read(mesh=None), alone) < 1e-6


def test_what_can_not_be_split_is_said():
    llama, bloom = (CASES[family][0] for family in ("llama", "bloom"))
    with pytest.raises(ShardingError, match=r"tensor=16 does not divide axis 'mlp'.*1, 2, 4, 8$"):
        sharding.tensor_mesh(llama, 16)
    with pytest.raises(ShardingError, match="tensor=5 does not divide axis 'heads'"):
        sharding.tensor_mesh(bloom, 5)
    few = dataclasses.replace(llama, num_kv_heads=2)
    with pytest.raises(ShardingError, match=r"'kv_heads'.*size 2"):
        sharding.tensor_mesh(few, 4)
    with pytest.raises(ShardingError, match="this process has 8 device"):
        sharding.tensor_mesh(dataclasses.replace(bloom, num_heads=32), 16)
    with pytest.raises(InputError, match="tensor=-1"):
        llmzoo_jax.load("anywhere", tensor=-1)


@pytest.mark.parametrize(("cores", "heads", "ways"), [(2, 8, 2), (4, 8, 4), (4, 6, 1), (64, 64, 1)])
def test_a_cpu_of_few_cores_is_a_device_a_core(cores, heads, ways, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    config = dataclasses.replace(CASES["bloom"][0], num_heads=heads)
    assert sharding.ways(sharding.tensor_mesh(config, 0)) == ways
