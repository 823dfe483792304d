"""Every parameter of the API acts, or is refused by name: one row each."""

import base64
import logging
import types

import numpy as np
import pytest
from openai.types import completion_create_params as completions
from openai.types import embedding_create_params as embeddings
from openai.types.chat import completion_create_params as chat
from tokenizers import processors

import llmzoo_jax
from serving import protocol
from serving.protocol import REFUSED, ChatRequest, CompletionRequest, EmbeddingRequest
from tests.fake_engine import FakeEngine
from tests.live_server import NAME, live, until
from tests.tiny_runs import make_run

SAID = "one two. three"
PATHS = {
    ChatRequest: "/v1/chat/completions",
    CompletionRequest: "/v1/completions",
    EmbeddingRequest: "/v1/embeddings",
    protocol.TokenizeRequest: "/tokenize",
    protocol.DetokenizeRequest: "/detokenize",
}
BODIES = {
    ChatRequest: {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]},
    CompletionRequest: {"model": NAME, "prompt": "Hi you"},
    EmbeddingRequest: {"model": NAME, "input": "Hi"},
    protocol.TokenizeRequest: {"prompt": "Hi you"},
    protocol.DetokenizeRequest: {"tokens": [43, 76]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )

    def answer(request):
        """A special token and SAID, or where there is a grammar the first token that it allows."""
        if request.grammar is not None:
            mask = np.asarray(request.grammar.mask()).view(np.uint32)
            return [i for i in range(model.config.vocab_size) if mask[i // 32] >> i % 32 & 1][:1]
        return model.tokenizer("<pad>" + SAID, add_special_tokens=False).input_ids

    with live(model, FakeEngine(answer), names={NAME: None, "adapted": "lora"}) as running:
        yield running


def ask(server, kind, **changes):
    """What a request makes the engine do, and what comes back."""
    before, facts = len(server.engine.seen), []
    handler = logging.Handler()
    handler.emit = lambda record: facts.append(record.facts)
    log = logging.getLogger("serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    status, _, body = server.post(PATHS[kind], BODIES[kind] | changes)
    until(lambda: facts)
    log.removeHandler(handler)
    asked = server.engine.seen[before:]
    how = asked[0].sampling if asked else None
    choices = body.get("choices", []) if isinstance(body, dict) else []
    return types.SimpleNamespace(
        status=status,
        body=body,
        asked=asked,
        facts=facts[0],
        how=how,
        choice=choices[0] if choices else None,
        text=_text(choices[0]) if choices else None,
    )


def _text(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


def same(name, value, want=None):
    """The engine is asked for just this."""
    want = value if want is None else want
    return value, lambda r: getattr(r.how, name) == want


LAST = [{"role": "user", "content": "Bye"}]
GENERATION = {
    "model": ("adapted", lambda r: r.asked[0].adapter == "lora" and r.body["model"] == "adapted"),
    "max_tokens": (3, lambda r: r.how.max_tokens == 3 and r.choice["finish_reason"] == "length"),
    "min_tokens": same("min_tokens", 5),
    "temperature": same("temperature", 0.5),
    "top_k": same("top_k", 7),
    "top_p": same("top_p", 0.5),
    "min_p": same("min_p", 0.1),
    "repetition_penalty": same("repetition_penalty", 1.5),
    "presence_penalty": same("presence_penalty", -1.5),
    "frequency_penalty": same("frequency_penalty", 1),
    "logit_bias": same("logit_bias", {"5": -100, "43": 1.5}, {5: -100, 43: 1.5}),
    "seed": same("seed", 2**32 + 9, 9),
    "n": (
        3,
        lambda r: len(r.body["choices"]) == 3 and len({a.sampling.seed for a in r.asked}) == 3,
    ),
    "best_of": (3, lambda r: len(r.asked) == 3 and len(r.body["choices"]) == 1),
    # Without a number of beams one: the first answer; each step is a request of its own.
    "use_beam_search": (True, lambda r: len(r.asked) == r.body["usage"]["completion_tokens"] > 5),
    "length_penalty": (0.0, lambda r: r.body["usage"]["completion_tokens"] == 0),
    "early_stopping": (True, lambda r: r.body["usage"]["completion_tokens"] == 1),
    "stop": (["never", "two"], lambda r: r.text == "one " and r.choice["finish_reason"] == "stop"),
    "stop_token_ids": same("stop_token_ids", [43, 44], (43, 44)),
    "include_stop_str_in_output": (True, lambda r: r.text == "one two"),
    "skip_special_tokens": (False, lambda r: r.text == "<pad>" + SAID),
    "ignore_eos": same("ignore_eos", True),
    "repetition_stop": same("repetition_stop", 4),
    "prompt_logprobs": (
        1,
        lambda r: len(r.choice.get("prompt_logprobs", ())) == len(r.asked[0].prompt),
    ),
    "truncate_prompt_tokens": (2, lambda r: len(r.asked[0].prompt) == 2),
    "structured_outputs": ({"regex": "H[0-9]+"}, lambda r: r.text == "H"),
    "stream": (True, lambda r: str(r.body).endswith("data: [DONE]\n\n")),
    "stream_options": ({"include_usage": True}, lambda r: '"total_tokens"' in r.body),
    "timeout": (1e-4, lambda r: r.status == 504 and "in time" in str(r.body)),
    "user": ("me", lambda r: r.facts["user"] == "me"),
}
ROWS = {
    ChatRequest: {
        **GENERATION,
        "messages": (LAST, lambda r: r.asked[0].prompt != r.usual.asked[0].prompt),
        "max_completion_tokens": same("max_tokens", 4),
        "logprobs": (True, lambda r: len((r.choice["logprobs"] or {}).get("content", ())) > 5),
        "top_logprobs": (2, lambda r: r.how.logprobs == 2),
        "response_format": ({"type": "json_object"}, lambda r: r.text == "{"),
        "safety_identifier": ("me", lambda r: r.facts["user"] == "me"),
    },
    CompletionRequest: {
        **GENERATION,
        "prompt": ([5, 6], lambda r: r.asked[0].prompt == [5, 6]),
        "echo": (True, lambda r: r.text == "Hi you" + SAID),
        "logprobs": (1, lambda r: len((r.choice["logprobs"] or {}).get("tokens", ())) > 5),
    },
    EmbeddingRequest: {
        "model": ("other", lambda r: r.body["error"]["param"] == "model" and r.status == 404),
        "input": (["a", "b", "c"], lambda r: len(r.body["data"]) == 3),
        "encoding_format": (
            "base64",
            lambda r: isinstance(_vector(r), str) and len(base64.b64decode(_vector(r))) == 4 * 40,
        ),
        "user": ("me", lambda r: r.facts["user"] == "me"),
    },
    protocol.TokenizeRequest: {
        "model": ("other", lambda r: r.body["error"]["param"] == "model" and r.status == 404),
        "prompt": ("H", lambda r: r.body["tokens"] == r.usual.body["tokens"][:2]),
        "messages": (LAST, lambda r: r.body.get("count", 0) > 20),
        "add_special_tokens": (False, lambda r: r.body["tokens"] == r.usual.body["tokens"][1:]),
        "return_token_strs": (True, lambda r: "<s>" in r.body.get("token_strs", ())),
    },
    protocol.DetokenizeRequest: {
        "model": ("other", lambda r: r.body["error"]["param"] == "model" and r.status == 404),
        "tokens": ([43, 82], lambda r: r.body["prompt"] == "Ho"),
    },
}
# The fake engine says at every step: 100, or half as likely 101.
BEAMS = {"use_beam_search": True, "best_of": 2, "stop_token_ids": [101], "max_tokens": 4}
WITH = {  # what a parameter needs beside it to be seen
    "early_stopping": BEAMS,
    "length_penalty": BEAMS,
    "use_beam_search": {"max_tokens": 6, "ignore_eos": True},
    "include_stop_str_in_output": {"stop": "two"},
    "min_tokens": {"max_tokens": 9},
    "stop_token_ids": {"max_tokens": 9},
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
}
INSTEAD = {(protocol.TokenizeRequest, "messages"): {"prompt": None}}


def _vector(r):
    return r.body["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ROWS for name in ROWS[kind]], ids=str
)
def test_a_parameter_acts(server, kind, name, monkeypatch):
    value, acts = ROWS[kind][name]
    around = WITH.get(name, {})
    change = {name: value} | INSTEAD.get((kind, name), {})
    if name == "timeout":
        monkeypatch.setattr(server.engine, "delay", 0.3)
    usual, changed = ask(server, kind, **around), ask(server, kind, **around, **change)
    usual.usual = changed.usual = usual
    assert usual.status == 200
    assert acts(changed), changed
    if changed.status == 200:
        assert not acts(usual), "it says the same without"


def test_the_table_has_every_parameter():
    for kind, rows in ROWS.items():
        assert rows.keys() == kind.model_fields.keys()
    documented = {
        ChatRequest: {*chat.CompletionCreateParamsBase.__annotations__, "stream"},
        CompletionRequest: {*completions.CompletionCreateParamsBase.__annotations__, "stream"},
        EmbeddingRequest: {*embeddings.EmbeddingCreateParams.__annotations__},
    }
    for kind, names in documented.items():
        missing = names - kind.model_fields.keys() - REFUSED[kind].keys()
        assert not missing, f"OpenAI documents {missing}"
        assert not kind.model_fields.keys() & REFUSED[kind].keys()


VALUES = {  # of parameters that are refused
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "audio": {"voice": "alloy", "format": "mp3"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "moderation": {"model": "x"},
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "prompt_cache_key": "x",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "suffix": "end",
    "dimensions": 8,
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in REFUSED for name in REFUSED[kind]], ids=str
)
def test_a_parameter_that_cannot_act_is_refused_by_name(server, kind, name):
    refused = ask(server, kind, **{name: VALUES[name]})
    assert (refused.status, refused.asked) == (400, [])
    error = refused.body["error"]
    assert error["param"] == name and name in error["message"]
    assert error["type"] == "invalid_request_error"
    for off in REFUSED[kind][name].off:
        assert ask(server, kind, **{name: off}).status == 200


@pytest.mark.parametrize("kind", PATHS, ids=str)
def test_an_unknown_parameter_is_refused_with_a_suggestion(server, kind):
    name = list(kind.model_fields)[1]
    refused = ask(server, kind, **{name + "x": 1})
    assert refused.status == 400
    assert refused.body["error"]["param"] == name + "x"
    assert f"did you mean '{name}'" in refused.body["error"]["message"]


BAD = {  # values out of range or of the wrong kind, and the parameter that is named
    ChatRequest: [
        {"temperature": -0.1}, {"temperature": 101}, {"temperature": "1"}, {"top_p": 0},
        {"top_p": 1.1}, {"min_p": -1}, {"top_k": -2}, {"max_tokens": -1}, {"max_tokens": 1.5},
        {"max_tokens": True}, {"min_tokens": 5, "max_tokens": 3}, {"presence_penalty": 3},
        {"frequency_penalty": -2.5}, {"repetition_penalty": 0}, {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"620": 1}}, {"n": 0}, {"n": 129},
        {"stop": ""}, {"stop": ["a"] * 17}, {"stop_token_ids": [-1]}, {"stop_token_ids": [620]},
        {"seed": 2**63}, {"seed": 1.5}, {"top_logprobs": 1}, {"logprobs": 3},
        {"top_logprobs": 21, "logprobs": True}, {"prompt_logprobs": 21}, {"repetition_stop": 1},
        {"timeout": 0}, {"messages": []}, {"messages": "Hi"}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a", "name": "me"}]},
        {"messages": [{"role": "owner", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"structured_outputs": {}}, {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"choice": []}}, {"structured_outputs": {"grammar": "x: %"}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"stream_options": {"include_usage": True}}, {"truncate_prompt_tokens": 0},
        {"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"length_penalty": 1.0},
        {"early_stopping": True}, {"early_stopping": "always", "use_beam_search": True},
        {"use_beam_search": True, "n": 20}, {"use_beam_search": True, "best_of": 20},
        {"use_beam_search": True, "max_tokens": 0},
        {"use_beam_search": True, "length_penalty": 11},
    ],
    CompletionRequest: [
        {"prompt": []}, {"prompt": [[]]}, {"prompt": [620]}, {"prompt": [[1], [-1]]},
        {"prompt": ["a", 1]}, {"prompt": None}, {"logprobs": 21}, {"best_of": 1, "n": 2},
        {"best_of": 2, "stream": True}, {"echo": 1}, {"use_beam_search": True, "logprobs": 0},
    ],
    EmbeddingRequest: [{"input": []}, {"input": [620]}, {"encoding_format": "int8"}],
    protocol.TokenizeRequest: [{"prompt": None}],
    protocol.DetokenizeRequest: [{"tokens": [-1]}, {"tokens": [620]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"), [(kind, one) for kind in BAD for one in BAD[kind]], ids=str
)
def test_a_bad_value_is_a_400_that_names_the_parameter(server, kind, changes):
    refused = ask(server, kind, **changes)
    assert (refused.status, refused.asked) == (400, [])
    assert refused.body["error"]["param"] in changes
    assert refused.body["error"]["message"]


NOT_OFF = {"stop": "a", "logit_bias": {"5": 1.0}, "response_format": {"type": "json_object"},
           "structured_outputs": {"regex": "a"}, "repetition_stop": 2}  # fmt: skip


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest], ids=str)
def test_what_cannot_act_with_beams_is_refused_by_name(server, kind):
    small = {"use_beam_search": True, "max_tokens": 2}
    for name, refused in protocol.BESIDE_BEAMS.items():
        if name not in kind.model_fields:
            continue
        kind_of = str(kind.model_fields[name].annotation)
        value = NOT_OFF.get(name, True if "bool" in kind_of else 1 if "int" in kind_of else 0.5)
        answer = ask(server, kind, **small, **{name: value})
        assert (answer.status, answer.asked) == (400, []), name
        assert answer.body["error"]["param"] == name and name in answer.body["error"]["message"]
        for off in refused.off:
            off = off.model_dump() if name == "response_format" and off else off
            if not (name == "logprobs" and kind is CompletionRequest and off is not None):
                assert ask(server, kind, **small, **{name: off}).status == 200, (name, off)


def test_a_prompt_that_does_not_fit_is_an_error_and_never_cut(server):
    for kind, changes in (
        (ChatRequest, {"messages": [{"role": "user", "content": "word " * 300}]}),
        (CompletionRequest, {"prompt": [5] * 250, "max_tokens": 7}),
        (EmbeddingRequest, {"input": [5] * 257}),
    ):
        refused = ask(server, kind, **changes)
        assert (refused.status, refused.asked) == (400, [])
        assert refused.body["error"]["code"] == "context_length_exceeded"
        assert "256" in refused.body["error"]["message"]
    assert ask(server, CompletionRequest, prompt=[5] * 250, max_tokens=6).status == 200
    cut = ask(server, CompletionRequest, prompt=[*range(5, 305)], truncate_prompt_tokens=9)
    assert cut.asked[0].prompt == [*range(296, 305)]


def test_an_adapter_has_no_embeddings_of_its_own(server):
    refused = ask(server, EmbeddingRequest, model="adapted")
    assert (refused.status, refused.body["error"]["param"]) == (400, "model")
