"""The server through the real openai client: a tiny model behind the real engine."""

import asyncio
import json

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import llmzoo_jax
from llmzoo_jax import models
from serving.engine import Engine
from serving.runner import EngineOptions
from tests.live_server import NAME, live, until
from tests.tiny_runs import make_run

CHAT = [{"role": "user", "content": "Who are you?"}]
TALK = [
    {"role": "system", "content": "Answer in French."},
    *CHAT,
    {"role": "assistant", "content": "Phénix."},
    {"role": "user", "content": "你是谁？"},
]
SMALL = EngineOptions(
    context=256, max_batch=4, page_size=16, prefill_tokens=32, window=4, cache_tokens=640,
    max_waiting=64, deterministic=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    yield from serving(tmp_path_factory, "bpe")


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory):
    yield from serving(tmp_path_factory, "sentencepiece")


@pytest.fixture(params=("server", "llama_server"))
def each(request):
    """A server of either family."""
    return request.getfixturevalue(request.param)


def serving(tmp_path_factory, kind):
    model = llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), kind))
    with live(model, Engine(model, SMALL)) as running:
        yield running
        until(lambda: not running.engine.stats().running)
        stats = running.engine.stats()
        assert (stats.waiting, stats.pages_used) == (0, 0)


def test_models(server):
    client = server.client()
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=CHAT)


@pytest.mark.parametrize("messages", (CHAT, TALK), ids=("one turn", "system and turns"))
def test_chat_says_what_the_model_says(each, messages):
    want = each.model.chat(messages, max_new_tokens=12)
    client, asked = each.client(), {"temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(model=NAME, messages=messages, **asked)
    assert answer.choices[0].message.content == want.text
    assert answer.choices[0].finish_reason == want.finish_reason
    assert answer.usage.prompt_tokens == want.prompt_tokens
    assert answer.usage.completion_tokens == len(want.tokens)
    assert answer.usage.total_tokens == want.prompt_tokens + len(want.tokens)
    *chunks, last = client.chat.completions.create(
        model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content for c in chunks) == want.text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == want.finish_reason
    assert all(c.usage is None for c in chunks)
    assert last.choices == [] and last.usage.total_tokens == answer.usage.total_tokens
    assert last.usage.prompt_tokens_details.cached_tokens >= 16  # the pages of the first time
    assert len({c.id for c in [*chunks, last]}) == 1


def test_completions_say_what_the_model_says(server):
    prompts = ["The quick brown", "你好"]
    ids = [server.model.tokenizer(p).input_ids for p in prompts]
    want = [result.text for result in server.model.generate(prompts, max_new_tokens=12)]
    client, asked = server.client(), {"model": NAME, "temperature": 0, "max_tokens": 12}
    for given in (prompts, ids):
        choices = client.completions.create(prompt=given, **asked).choices
        assert [choice.text for choice in choices] == want
        assert [choice.index for choice in choices] == [0, 1]
    assert client.completions.create(prompt=ids[1], **asked).choices[0].text == want[1]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == want
    echoed = client.completions.create(prompt=prompts, echo=True, **asked).choices
    assert [choice.text for choice in echoed] == [a + b for a, b in zip(prompts, want, strict=True)]


def test_echoed_logprobs_are_the_models(each):
    """As lm-evaluation-harness asks for them: token ids, and one token or none more."""
    ids = each.model.tokenizer("The quick brown fox").input_ids
    logprobs = jax.nn.log_softmax(each.model.logits([ids])[0])
    want = [logprobs[i - 1, token] for i, token in enumerate(ids)][1:]
    for more in (0, 1):
        choice = each.client().completions.create(
            model=NAME, prompt=ids, echo=True, logprobs=2, max_tokens=more, temperature=0
        ).choices[0]  # fmt: skip
        got = choice.logprobs
        assert got.token_logprobs[0] is got.top_logprobs[0] is None
        assert np.allclose(got.token_logprobs[1 : len(ids)], want, atol=1e-4)
        assert len(got.tokens) == len(got.text_offset) == len(ids) + more
        for i, top in enumerate(got.top_logprobs[1 : len(ids)]):
            assert np.isclose(max(top.values()), logprobs[i].max(), atol=1e-4)
            assert got.token_logprobs[i + 1] in top.values()
        for at, name in zip(got.text_offset, got.tokens, strict=True):
            if not name.startswith(("bytes:", "<s>")):
                assert choice.text[at:].startswith(name if at else name.lstrip(" "))
        assert choice.finish_reason == "length"


def test_a_stop_token_is_among_the_logprobs_and_not_in_the_text(each):
    """lm-evaluation-harness drops the last of the log-probabilities: that of a new token."""
    asked = {"model": NAME, "prompt": "The quick", "logprobs": 1, "temperature": 0}
    create = each.client().completions.create
    first = create(max_tokens=1, **asked).choices[0].logprobs
    id = int(jnp.argmax(each.model.logits([each.model.tokenizer("The quick").input_ids])[0, -1]))
    stopped = {"max_tokens": 4, "extra_body": {"stop_token_ids": [id]}}
    answer = create(**asked, **stopped)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs.tokens == first.tokens
    assert np.allclose(answer.choices[0].logprobs.token_logprobs, first.token_logprobs, atol=1e-4)
    echoed = create(echo=True, **asked, **stopped).choices[0]
    assert echoed.text == "The quick"
    assert echoed.logprobs.tokens[-1:] == first.tokens
    (chunk,) = [c.choices[0] for c in create(stream=True, **asked, **stopped) if c.choices]
    assert (chunk.text, chunk.logprobs.tokens) == ("", first.tokens)


def test_chat_logprobs_spell_the_answer(each):
    asked = {"model": NAME, "messages": CHAT, "max_tokens": 12, "seed": 5}
    asked |= {"logprobs": True, "top_logprobs": 3}
    answer = each.client().chat.completions.create(**asked).choices[0]
    parts = answer.logprobs.content
    spelled = b"".join(bytes(part.bytes) for part in parts).decode("utf-8", "replace")
    assert spelled.lstrip(" ").startswith(answer.message.content)
    assert all(len(part.top_logprobs) == 3 for part in parts)
    assert all(part.logprob <= part.top_logprobs[0].logprob + 1e-6 for part in parts)
    streamed = [
        part
        for chunk in each.client().chat.completions.create(stream=True, **asked)
        for part in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [part.token for part in streamed] == [part.token for part in parts]
    assert np.allclose([p.logprob for p in streamed], [p.logprob for p in parts], atol=1e-5)


def test_a_choice_has_its_own_seed(server):
    def texts(**options):
        answer = server.client().chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=10, **options
        )
        return [choice.message.content for choice in answer.choices]

    three = texts(seed=7, n=3)
    assert len(set(three)) == 3
    assert three == [*texts(seed=7), *texts(seed=8), *texts(seed=9)]
    assert len({*texts(), *texts(), *texts()}) == 3  # none given: a random one
    assert len(set(texts(temperature=0, n=2))) == 1


def test_best_of_gives_the_likeliest(server):
    asked = {"model": NAME, "prompt": "The", "max_tokens": 8, "seed": 3, "logprobs": 0}
    every = server.client().completions.create(n=5, **asked).choices
    best = server.client().completions.create(n=2, best_of=5, **asked).choices
    ranked = sorted(every, key=lambda choice: -np.mean(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best] == [choice.text for choice in ranked[:2]]
    assert [choice.index for choice in best] == [0, 1]


def test_a_stop_string_ends_the_answer_and_the_request(server):
    client, asked = server.client(), {"model": NAME, "prompt": "The", "max_tokens": 40, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[8:10]
    want = whole[: whole.index(stop)]
    cut = client.completions.create(stop=[stop], **asked)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (want, "stop")
    assert cut.usage.completion_tokens < 40
    assert "".join(
        c.choices[0].text for c in client.completions.create(stop=stop, stream=True, **asked)
    ) == want  # fmt: skip
    until(lambda: not server.engine.stats().running)


def test_embeddings(server):
    texts = ["Hello", "你好", "a longer text " * 6]
    client, hidden = server.client(), jax.jit(server.model.params.hidden)
    answer = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64
    numbers = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
    rows = [server.model.tokenizer(text).input_ids for text in texts]
    for row, one, other in zip(rows, answer.data, numbers.data, strict=True):
        tokens = jnp.asarray([row])
        mask = models.packed_mask(jnp.ones_like(tokens))
        x, _ = hidden(tokens, mask, jnp.arange(len(row))[None])
        mean = np.asarray(x[0]).mean(0)
        assert np.allclose(one.embedding, mean / np.linalg.norm(mean), atol=1e-5)
        assert np.allclose(one.embedding, other.embedding, atol=1e-6)
    assert answer.usage.prompt_tokens == sum(map(len, rows))
    assert client.embeddings.create(model=NAME, input=rows[1]).data[0].embedding == (
        answer.data[1].embedding
    )


def test_tokenize_and_detokenize(server):
    ids = server.model.tokenizer("Hello 世界").input_ids
    _, _, body = server.post("/tokenize", {"prompt": "Hello 世界"})
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), 256)
    assert server.post("/detokenize", {"tokens": ids})[2]["prompt"] == "Hello 世界"
    _, _, body = server.post("/tokenize", {"messages": CHAT})
    assert body["tokens"] == server.model.prompt(CHAT)
    whole = server.post("/detokenize", {"tokens": body["tokens"]})[2]["prompt"]
    assert whole.endswith("Human: <s>Who are you?</s>Assistant: <s>")
    info = server.get("/tokenizer_info")[2]
    assert (info["eos_token"], info["model_max_length"]) == ("</s>", 256)
    assert "Human: <s>" in info["chat_template"]


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "maximum": 99, "minimum": 0},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}  # fmt: skip


def test_answers_have_the_form_that_is_asked_for(each):
    client, asked = each.client(), {"model": NAME, "messages": CHAT, "max_tokens": 150}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for seed in range(3):
        answer = client.chat.completions.create(response_format=schema, seed=seed, **asked)
        value = json.loads(answer.choices[0].message.content)
        assert 0 <= value["a"] <= 99 and value["b"] in "xy" and len(value) == 2
        assert answer.choices[0].finish_reason == "stop"
    answer = client.chat.completions.create(response_format={"type": "json_object"}, **asked)
    assert answer.choices[0].message.content.startswith("{")
    for structured, good in (
        ({"json": SCHEMA}, lambda text: json.loads(text)["b"] in "xy"),
        ({"regex": "[0-9]{3}-[a-c]{2}"}, lambda text: text[3] == "-" and len(text) == 6),
        ({"choice": ["红", 'a "b"\\n', "blue"]}, lambda text: text in ("红", 'a "b"\\n', "blue")),
        ({"grammar": 'start: "<" /[à-ü]{2,5}/ ">"'}, lambda text: 4 <= len(text) <= 7),
    ):
        answer = client.chat.completions.create(
            extra_body={"structured_outputs": structured}, seed=1, **asked
        )
        assert good(answer.choices[0].message.content), answer.choices[0]


def test_many_async_clients_get_their_own_answers(server):
    async def ask(client, seed, stream):
        answer = await client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=8, seed=seed, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content
        return "".join([c.choices[0].delta.content or "" async for c in answer])

    async def all_of(count):
        options = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**options) as client:
            return await asyncio.gather(
                *(ask(client, seed // 2, bool(seed % 2)) for seed in range(count))
            )

    texts = asyncio.run(all_of(24))
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) > 8
