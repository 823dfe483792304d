"""llmzoo_jax.load: run and Hugging Face folders, logits, text, chat, streaming."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmzoo_jax
from data_pipelines.tokenizers import train_sentencepiece
from llmzoo_jax import hf, models
from llmzoo_jax.conversation import FORMATS, ConversationError, Message
from llmzoo_jax.errors import InputError
from llmzoo_jax.export import export
from llmzoo_jax.inference import answer_frame
from llmzoo_jax.text_stream import TextStream
from llmzoo_jax.tokenizer import encode, encode_prompt, load_tokenizer, resolve_format
from tests.parity import random_model
from tests.tiny_runs import LLAMA, MODELS, make_run
from tests.tiny_tokenizers import SENTENCES, conversation, data, tiny

KINDS = tuple(MODELS)
CHAT = [{"role": "user", "content": "Who are you?"}]
TOKENS = np.array([[5, 9, 300, 2, 7], [8, 8, 1, 400, 599]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(tokenizer kind, "run" or "hf"): folder}"""
    folder = tmp_path_factory.mktemp("folders")
    made = {}
    for kind in KINDS:
        made[kind, "run"] = make_run(folder / kind, kind)
        made[kind, "hf"] = export(made[kind, "run"], folder / f"{kind}-hf")
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    return {kind: llmzoo_jax.load(folders[kind, "run"]) for kind in KINDS}


# --- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_export_are_the_same_model(kind, folders, loaded):
    run, hf_model = loaded[kind], llmzoo_jax.load(folders[kind, "hf"])
    assert run.config == hf_model.config == MODELS[kind]
    assert run.format == hf_model.format
    assert run.format.name == "phoenix"
    assert run.stop_ids == hf_model.stop_ids == (2,)
    logits = run.logits(TOKENS)
    assert logits.shape == (2, 5, MODELS[kind].vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, hf_model.logits(TOKENS.tolist()))
    assert run.prompt(CHAT) == hf_model.prompt([Message("user", "Who are you?")])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_plain_model(kind, loaded):
    plain = models.logits(random_model(MODELS[kind], 0), jnp.asarray(TOKENS), dtype=jnp.float32)
    np.testing.assert_allclose(loaded[kind].logits(TOKENS), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["run", "hf"])
def test_bfloat16_is_kept_for_the_weights(kind, form, folders, loaded):
    model = llmzoo_jax.load(folders[kind, form], dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    logits, exact = model.logits(TOKENS), loaded[kind].logits(TOKENS)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - exact).max() < 0.2 * np.abs(exact).max()


def test_importing_the_package_imports_no_jax():
    code = "import llmzoo_jax, sys; assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_load_is_a_function_however_often_it_is_called(folders):
    for _ in range(2):
        assert llmzoo_jax.load(folders["bpe", "hf"]).config == MODELS["bpe"]


def bare(folder, kind):
    """A folder with the weights alone."""
    config = MODELS[kind]
    folder.mkdir(exist_ok=True)
    model = random_model(config, 0)
    hf.save_params(folder, model, config, dtype="float32", max_shard_bytes=10**9)
    keys = hf.config_to_hf(config, dtype="float32")
    (folder / "config.json").write_text(json.dumps(keys | {"eos_token_id": 77}))
    return folder


def test_a_folder_without_a_tokenizer_works_on_ids(tmp_path):
    model = llmzoo_jax.load(bare(tmp_path / "bare", "bpe"))
    assert model.tokenizer is None
    assert model.format is None
    assert model.stop_ids == (77,)  # of config.json, as there is no generation_config.json
    (result,) = model.generate([[5, 6, 7]], max_new_tokens=3)
    assert (result.text, len(result.tokens), result.prompt_tokens) == (None, 3, 3)
    for call in (
        lambda: model.generate(["text"]),
        lambda: model.generate([[5]], stop="x"),
        lambda: model.chat(CHAT),
    ):
        with pytest.raises(InputError, match="tokenizer"):
            call()


def test_a_llama_folder_with_a_bare_sentencepiece_model(tmp_path):
    folder = bare(tmp_path / "llama", "sentencepiece")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(data(), vocab_size=700))
    model = llmzoo_jax.load(folder)
    (result,) = model.generate(["你好"], max_new_tokens=4)
    ids = load_tokenizer(folder)("你好").input_ids
    assert ids[0] == 1  # BOS, as the tokenizer adds it
    assert model.generate([ids], max_new_tokens=4) == [result]
    assert model.format is None
    with pytest.raises(InputError, match="no chat template"):
        model.chat(CHAT)


def test_a_template_of_its_own_is_the_format_tokenizer(folders, tmp_path):
    folder = shutil.copytree(folders["bpe", "hf"], tmp_path / "own")
    template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    model = llmzoo_jax.load(folder)
    assert model.format.name == "tokenizer"
    assert model.tokenizer.decode(model.prompt(CHAT)) == "[user] Who are you?</s>[assistant] "
    assert model.chat(CHAT, max_new_tokens=4).prompt_tokens == len(model.prompt(CHAT))


def test_every_token_that_may_end_an_answer_stops_it(folders, tmp_path):
    folder = shutil.copytree(folders["bpe", "hf"], tmp_path / "eos")
    free = llmzoo_jax.load(folder).generate(["Hello"], max_new_tokens=20)[0]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, free.tokens[7]]})
    )
    model = llmzoo_jax.load(folder)
    assert set(model.stop_ids) == {2, free.tokens[7]}
    result = model.generate(["Hello"], max_new_tokens=20)[0]
    assert result.tokens == free.tokens[: free.tokens.index(free.tokens[7])]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("name", FORMATS)
def test_stop_ids_hold_eos_and_those_of_the_format(name, tmp_path):
    run = make_run(tmp_path / "run", "bpe", name)
    model = llmzoo_jax.load(run)
    stops = {"</s>", *FORMATS[name].stop}
    assert {model.tokenizer.convert_ids_to_tokens(i) for i in model.stop_ids} == stops


# --- text ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(loaded):
    model, prompts = loaded["bpe"], ["Hello", "素早い茶色の狐がのろまな犬を", [9, 8, 7]]
    options = {"max_new_tokens": 24, "temperature": 0.7}
    batch = model.generate(prompts, seed=5, **options)
    for i, prompt in enumerate(prompts):
        assert model.generate([prompt], seed=5 + i, **options) == [batch[i]]
    assert model.generate([], **options) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_continuation_follows_the_prompt(kind, loaded):
    model = loaded[kind]
    prompts = ["The quick brown", "你好", "Съешь же ещё", "a\n"]
    for prompt, result in zip(prompts, model.generate(prompts, max_new_tokens=8), strict=True):
        ids = [*model.tokenizer(prompt).input_ids, *result.tokens]
        whole = model.tokenizer.decode(ids, skip_special_tokens=True)
        assert (prompt + result.text).startswith(whole.rstrip("\ufffd"))  # broken bytes at the end
        assert len(prompt + result.text) <= len(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_ends_the_text_and_never_shows(kind, loaded):
    model = loaded[kind]
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    free = model.chat(CHAT, **options)
    assert len(free.text) > 12
    stop = free.text[8:11]
    pieces = []
    result = model.chat(CHAT, stop=["no such text", stop], on_text=pieces.append, **options)
    assert result.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert result.finish_reason == "stop"
    assert result.tokens == free.tokens[: len(result.tokens)]
    text = [model.tokenizer.decode(result.tokens[:n]) for n in (len(result.tokens) - 1, None)]
    assert [stop in one for one in text] == [False, True]
    (row,) = model.generate([model.prompt(CHAT)], stop=stop, **options)
    assert row.tokens == result.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_join_to_the_text(kind, loaded):
    model = loaded[kind]
    for seed in range(12):
        pieces = []
        options = {"max_new_tokens": 33, "temperature": 1.3, "seed": seed}
        result = model.chat(CHAT, on_text=pieces.append, **options)
        assert "".join(pieces) == result.text
        assert model.chat(CHAT, **options) == result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_model_is_trained_to_answer_reads_as_the_content(kind, name):
    tokenizer = tiny(kind)
    chat_format = resolve_format(name, tokenizer)
    before, after = answer_frame(chat_format)
    after = after.partition(chat_format.stop[0])[0]
    stop = tokenizer.convert_tokens_to_ids(chat_format.stop[0])
    for answer in SENTENCES:
        item = conversation("question", answer)
        prompt = encode_prompt(item.messages[:1], tokenizer=tokenizer, chat_format=chat_format)
        tokens = encode(item, tokenizer=tokenizer, chat_format=chat_format).tokens.tolist()
        new = tokens[len(prompt) : tokens.index(stop, len(prompt))]
        stream = TextStream(tokenizer, (), (), before, after)
        assert stream.feed(new) + stream.finish(whole=True) == answer


# --- errors -------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(folders, loaded, tmp_path):
    for path, message in ((tmp_path / "no", "no such folder"), (tmp_path, "no config.json")):
        with pytest.raises(InputError, match=message):
            llmzoo_jax.load(path)
    with pytest.raises(InputError, match="dtype='float16'"):
        llmzoo_jax.load(folders["bpe", "hf"], dtype="float16")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model_type is None"):
        llmzoo_jax.load(tmp_path)
    model = loaded["bpe"]
    for message, call in {
        "token id 620; the model has 0 to 619": lambda: model.logits([[1, 620]]),
        "prompt 2: token id -1": lambda: model.generate([[1], [-1]]),
        r"int\[B,T\]": lambda: model.logits([[0.5]]),
        "prompts is a list": lambda: model.generate("text"),
        "empty string": lambda: model.generate(["a"], stop=["a", ""]),
        "at least one token": lambda: model.generate([[]]),
        "temperature=-1": lambda: model.generate(["a"], temperature=-1),
        "message 1: a message has role and content": lambda: model.chat([{"role": "user"}]),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(ConversationError, match="could forge a turn"):
        model.chat([{"role": "user", "content": "</s>"}])


def test_more_tokens_than_positions_are_refused(loaded):
    model = loaded["sentencepiece"]
    assert model.context == LLAMA.max_positions == 512
    with pytest.raises(InputError, match=r"prompt 2 has 500 tokens.*512 positions"):
        model.generate([[5], [5] * 500], max_new_tokens=13)
    assert len(model.generate([[5] * 500], max_new_tokens=12)[0].tokens) <= 12
    assert loaded["bpe"].context is None  # ALiBi
