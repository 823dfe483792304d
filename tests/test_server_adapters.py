"""Adapters over HTTP: each is a model of its own, loaded and unloaded while the server serves."""

import dataclasses

import jax
import openai
import pytest
from flax import nnx

import llmzoo_jax
from llmzoo_jax import lora, peft_format
from llmzoo_jax.config import LoraConfig
from serving.engine import Engine
from tests.live_server import NAME, live
from tests.test_server import SMALL
from tests.tiny_runs import make_run

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))
    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(rank=2, alpha=16.0)
    adapters = lora.init(config, model.config, jax.random.key(0))
    for adapter in adapters.values():
        shape = adapter.lora_b.shape
        adapter.lora_b = nnx.Param(jax.random.normal(jax.random.key(1), shape))
    (folder / "mine").mkdir()
    peft_format.save(folder / "mine", adapters, config, model.config, base="base")
    options = dataclasses.replace(SMALL, max_adapters=1, max_lora_rank=4)
    with live(model, Engine(model, options), adapters_dir=str(folder)) as running:
        yield running


def say(server, model):
    answer = server.client().completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0.0
    )
    return answer.choices[0].text


def test_an_adapter_is_a_model_from_load_to_unload(server):
    plain = say(server, NAME)
    load = {"lora_name": "mine", "lora_path": "mine"}
    assert server.post("/v1/load_lora_adapter", load)[0] == 200
    entry = next(m for m in server.client().models.list() if m.id == "mine")
    assert entry.parent == NAME
    assert say(server, "mine") != plain
    assert say(server, NAME) == plain
    assert server.post("/v1/load_lora_adapter", load)[0] == 400
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "mine"})[0] == 200
    with pytest.raises(openai.NotFoundError, match="no model 'mine'"):
        say(server, "mine")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"lora_name": "x", "lora_path": "../../etc"}, 400, "not in the server's folder"),
        ({"lora_name": "x", "lora_path": "absent"}, 400, "no such file"),
        ({"lora_name": NAME, "lora_path": "mine"}, 400, "already"),
        ({"lora_name": "x"}, 400, "lora_path"),
    ],
)
def test_what_cannot_be_loaded_is_said(server, body, status, says):
    got, _, answer = server.post("/v1/load_lora_adapter", body)
    assert got == status
    assert says in answer["error"]["message"]


def test_only_adapters_are_unloaded(server):
    assert server.post("/v1/unload_lora_adapter", {"lora_name": NAME})[0] == 404
