"""Chat formats on a tokenizer: BOS, jinja, and the template that a checkpoint brings."""

import copy
import dataclasses
import functools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings

from data_pipelines.tokenizers import train_bpe
from llmzoo_jax.conversation import (
    FORMATS,
    ConversationError,
    Message,
    chat_template,
    render,
)
from llmzoo_jax.tokenizer import (
    encode,
    encode_prompt,
    load_tokenizer,
    resolve_format,
    save_tokenizer,
)
from tests.test_conversation import conversations
from tests.tiny_tokenizers import KINDS, SENTENCES, conversation, data, tiny

CASES = [(kind, name) for kind in KINDS for name in FORMATS]


def test_bos_comes_first_where_the_tokenizer_puts_it_first():
    for name in FORMATS:
        assert resolve_format(name, tiny("bpe")).begin == ""
        begin = resolve_format(name, tiny("sentencepiece")).begin
        assert begin == ("" if name == "llama-2" else "<s>")  # llama-2 writes it itself


def test_bos_is_found_whatever_the_configuration_beside_tokenizer_json_says(tmp_path):
    tokenizer = tiny("sentencepiece")
    save_tokenizer(tokenizer, tmp_path, chat_format=FORMATS["phoenix"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for config in (
        names | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
        names | {"tokenizer_class": "LlamaTokenizerFast"},
        {"tokenizer_class": "LlamaTokenizer"},
        {},
        None,
    ):
        path = tmp_path / "tokenizer_config.json"
        path.unlink() if config is None else path.write_text(json.dumps(config))
        loaded = load_tokenizer(tmp_path)
        assert resolve_format("phoenix", loaded) == resolve_format("phoenix", tokenizer)
        text = "Hello<s>" + SENTENCES[1]
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_an_unknown_format_suggests_one_and_a_missing_token_is_named():
    with pytest.raises(ValueError, match="unknown chat format 'phenix'; did you mean 'phoenix'"):
        resolve_format("phenix", tiny("bpe"))
    with pytest.raises(ValueError, match=r"There are phoenix, alpaca.*, tokenizer"):
        resolve_format("zzzz", tiny("bpe"))
    plain = train_bpe(data(), vocab_size=300)
    for name, token in (("chatml", "<|im_start|>"), ("llama-3", "<|start_header_id|>")):
        with pytest.raises(ValueError, match=f"{name}.*needs '{re.escape(token)}' as one token"):
            resolve_format(name, plain)
    with pytest.raises(ValueError, match="it has none; use one of phoenix"):
        resolve_format("tokenizer", plain)


def dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_apply_chat_template_gives_the_same_text_and_the_same_ids(kind, name):
    tokenizer = tiny(kind)
    chat_format = resolve_format(name, tokenizer)
    apply = functools.partial(
        tokenizer.apply_chat_template, chat_template=chat_template(chat_format)
    )

    @settings(max_examples=40, deadline=None)
    @given(conversations(tools=chat_format.tool is not None))
    def same(conversation):
        messages = conversation.messages
        for history, prompt in ((messages, False), (messages[:-1], True)):
            text = "".join(s.text for s in render(history, chat_format, generation_prompt=prompt))
            theirs = apply(dicts(history), tokenize=False, add_generation_prompt=prompt)
            assert theirs == text

    same()
    for system in (None, "Sei still.", " \n'quoted' \\n {{ x }} {% if %} "):
        example = conversation(*SENTENCES, system=system)
        ours = encode(example, tokenizer=tokenizer, chat_format=chat_format).tokens.tolist()
        theirs = apply(dicts(example.messages), tokenize=True, return_dict=True).input_ids
        assert theirs == ours
        history = example.messages[:-1]
        ours = encode_prompt(history, tokenizer=tokenizer, chat_format=chat_format)
        theirs = apply(dicts(history), add_generation_prompt=True, return_dict=True).input_ids
        assert theirs == ours


def test_the_template_refuses_what_the_format_cannot_write():
    import jinja2

    tool = [Message("user", "x"), Message("assistant", "y"), Message("tool", "z")]
    odd = [Message("system", "s"), Message("assistant", "y")]
    for name, messages in (("phoenix", tool), ("llama-2", tool), ("llama-2", odd)):
        with pytest.raises(ConversationError, match="cannot write a turn of the"):
            render(messages, FORMATS[name])
        with pytest.raises(jinja2.TemplateError, match="cannot write a turn of the"):
            tiny("bpe").apply_chat_template(
                dicts(messages), chat_template=chat_template(FORMATS[name])
            )


# --- the tokenizer's own template ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_checkpoints_own_template_gives_the_same_tokens_and_masks(kind, name):
    tokenizer = tiny(kind)
    ours = resolve_format(name, tokenizer)
    if name == "phoenix":  # a template cannot say that the end of its prompt is trained
        ours = dataclasses.replace(ours, trained=("", "</s>"))
    tokenizer.chat_template = chat_template(ours)
    try:
        own = resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None
    assert own.stop == ours.stop and chat_template(own) == chat_template(ours)
    example = conversation(*SENTENCES, system="Be kind.")
    example = dataclasses.replace(
        example,
        messages=tuple(
            dataclasses.replace(m, train=False) if m.content == SENTENCES[3] else m
            for m in example.messages
        ),
    )
    expected = encode(example, tokenizer=tokenizer, chat_format=ours)
    actual = encode(example, tokenizer=tokenizer, chat_format=own)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.loss_mask, expected.loss_mask)
    prompts = [
        encode_prompt(example.messages[:2], tokenizer=tokenizer, chat_format=f) for f in (ours, own)
    ]
    assert prompts[0] == prompts[1]


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # thinking is dropped from all answers but the last
        (
            TEMPLATE.replace(
                "m.content }}", "(m.content if loop.last or m.role == 'user' else '') }}"
            ),
            r"turn 2 \(assistant\): the tokenizer's chat template writes the text up to it diff",
        ),
        # the prompt opens a thought that the history does not have
        (
            TEMPLATE + "{% if add_generation_prompt %}<s>assistant: <think>{% endif %}",
            r"turn 2 \(assistant\): the tokenizer's chat template writes the prompt before it diff",
        ),
        (
            "{% if messages[2] %}{{ raise_exception('one turn!') }}{% endif %}" + TEMPLATE,
            "the tokenizer's chat template refuses: one turn!",
        ),
    ],
)
def test_a_template_that_rewrites_history_is_refused(template, says):
    tokenizer = tiny("bpe")
    tokenizer.chat_template = template
    try:
        own = resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None
    with pytest.raises(ConversationError, match="^d:1: " + says):
        encode(conversation("a", "b", "c", "d"), tokenizer=tokenizer, chat_format=own, where="d:1")


def test_a_template_is_served_as_it_is_even_where_it_rewrites_history():
    tokenizer = copy.deepcopy(tiny("bpe"))
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content[-1:]")
    own = resolve_format("tokenizer", tokenizer)
    history = conversation("ab", "cd", "ef").messages
    ids = encode_prompt(history, tokenizer=tokenizer, chat_format=own)
    assert tokenizer.decode(ids) == "<s>user: b</s><s>assistant: d</s><s>user: f</s>"


def test_the_tokens_of_a_template_may_not_be_typed_even_if_the_tokenizer_has_them_unmarked():
    tokenizer = train_bpe(data(), vocab_size=400)
    tokenizer.add_tokens(["<turn>", "user", "  "])
    tokenizer.chat_template = TEMPLATE.replace("<s>", "<turn>")
    own = resolve_format("tokenizer", tokenizer)
    assert own.special_tokens == ("</s>", "<turn>") and own.stop == ("</s>",)
    encode(conversation("a  user", "b"), tokenizer=tokenizer, chat_format=own)
    with pytest.raises(ConversationError, match=r"turn 1 \(user\): the text contains '<turn>'"):
        encode(conversation("<turn>", "b"), tokenizer=tokenizer, chat_format=own)


def test_a_template_that_ends_no_answer_is_refused():
    tokenizer = tiny("bpe")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        with pytest.raises(ValueError, match="writes nothing after an answer"):
            resolve_format("tokenizer", tokenizer)
    finally:
        tokenizer.chat_template = None
