"""Masks of tokens: whatever is chosen within them, the text has the form that was asked for."""

import itertools
import json
import random
import re
import types

import numpy as np
import pytest

from llmzoo_jax.byte_tokens import token_bytes
from serving.grammar import Grammars
from serving.protocol import ApiError, ResponseFormat, StructuredOutputs
from tests.tiny_runs import MODELS
from tests.tiny_tokenizers import KINDS, SENTENCES, tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["红", "ไทย", "b"]}, "maxItems": 3},
        "size": {"type": ["integer", "null"], "minimum": -9, "maximum": 9},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """All that a grammar needs of one."""
    tokenizer = tiny(request.param)
    end = (tokenizer.convert_tokens_to_ids("</s>"),)
    return types.SimpleNamespace(
        tokenizer=tokenizer, config=MODELS[request.param], stop_ids=end, kind=request.param
    )


def asking(response_format=None, **structured):
    return types.SimpleNamespace(
        structured_outputs=StructuredOutputs(**structured) if structured else None,
        response_format=response_format,
        ignore_eos=None,
        min_tokens=None,
    )


def allowed(model, grammar):
    mask, size = np.asarray(grammar.mask()), model.config.vocab_size
    assert mask.dtype == np.int32 and mask.shape == (-(-size // 32),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[len(model.tokenizer) :].any()  # the model has more tokens than the tokenizer
    return np.flatnonzero(bits).tolist()


def walk(model, grammar, rng, most=400):
    """Random allowed tokens until a stop token; their text."""
    tokens = []
    while len(tokens) < most:
        choice = rng.choice(allowed(model, grammar))
        if choice in model.stop_ids:
            return model.tokenizer.decode(tokens)
        tokens.append(choice)
        grammar.advance(choice)
    return None


def follow(model, grammar, text):
    """Whether the model may write ``text``, in allowed tokens of any cut, and end there."""
    pieces = token_bytes(model.tokenizer, len(model.tokenizer)).text
    rest = text.encode()
    while rest:
        fits = [i for i in allowed(model, grammar) if pieces[i] and rest.startswith(pieces[i])]
        if not fits:
            return False
        token = max(fits, key=lambda i: len(pieces[i]))
        grammar.advance(token)
        rest = rest.removeprefix(pieces[token])
    return model.stop_ids[0] in allowed(model, grammar)


def test_any_walk_through_a_schema_is_json_of_that_schema(model):
    make = Grammars(model).of(asking(json=SCHEMA))
    texts = [walk(model, make(), random.Random(seed)) for seed in range(25)]
    found = [json.loads(text) for text in texts if text is not None]
    assert len(found) >= 20
    for value in found:
        assert list(value) == ["name", "tags", "size"]
        assert len(value["name"]) <= 12 and len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"红", "ไทย", "b"}
        assert value["size"] is None or -9 <= value["size"] <= 9
    assert len({json.dumps(value) for value in found}) > 10


@pytest.mark.parametrize("value", ({}, {"a": [1, None, {"b": "你好 \n"}]}), ids=str)
def test_json_may_be_compact_or_indented(model, value):
    any_object = Grammars(model).of(asking(ResponseFormat(type="json_object")))
    for indent in (None, 2):
        assert follow(model, any_object(), json.dumps(value, indent=indent, ensure_ascii=False))
    for broken in ("[1]", '"text"', '{"a": 1'):
        assert not follow(model, any_object(), broken)


def test_spaces_between_parts_of_json_come_to_an_end(model):
    grammar = Grammars(model).of(asking(ResponseFormat(type="json_object")))()
    space = next(
        i for i in allowed_after(model, grammar, "{") if model.tokenizer.decode([5, i])[-1] == " "
    )
    count = 0
    while space in allowed(model, grammar):
        grammar.advance(space)
        count += 1
        assert count < 50
    assert count >= 8


def allowed_after(model, grammar, text):
    follow(model, grammar, text)
    return allowed(model, grammar)


@pytest.mark.parametrize("pattern", ("[0-9]{3}-[a-c]+", "(ja|nein)!?", "[α-ω]{2,4}", "👍🏽{1,2}"))
def test_any_walk_through_an_expression_matches_it(model, pattern):
    make = Grammars(model).of(asking(regex=pattern))
    texts = [walk(model, make(), random.Random(seed)) for seed in range(8)]
    assert all(re.fullmatch(pattern, text) for text in texts if text is not None)
    assert any(text is not None for text in texts)


def test_a_choice_is_one_of_the_texts_and_every_one_can_be_chosen(model):
    choices = [*SENTENCES[1:5], "yes", "yes, but", 'a "quoted" \\ text']
    make = Grammars(model).of(asking(choice=choices))
    for text in choices:
        assert follow(model, make(), text)
    assert not follow(model, make(), "maybe")
    assert {walk(model, make(), random.Random(seed)) for seed in range(9)} <= set(choices)


def test_a_grammar_in_larks_form(model):
    make = Grammars(model).of(asking(grammar='start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'))
    assert follow(model, make(), "<ab,c>") and not follow(model, make(), "<ab,c")


def test_two_choices_of_a_request_do_not_share_a_state(model):
    make = Grammars(model).of(asking(choice=["ab", "cd"]))
    first, second = make(), make()
    follow(model, first, "ab")
    assert follow(model, second, "cd")


def test_a_token_outside_the_mask_is_an_error(model):
    grammar = Grammars(model).of(asking(regex="[0-9]"))()
    letter = model.tokenizer("\x02a", add_special_tokens=False).input_ids[-1]
    with pytest.raises(ValueError, match="grammar"):
        grammar.advance(letter)


def test_special_tokens_are_never_text(model):
    """ "</s>" as text would end a turn; as its characters it is only text."""
    special = set(model.tokenizer.added_tokens_decoder) - set(model.stop_ids)
    grammar = Grammars(model).of(asking(regex="(.|\n)*"))()
    assert not special & set(allowed(model, grammar))


def test_what_is_no_schema_or_expression_is_refused(model):
    grammars = Grammars(model)
    for structured in ({"regex": "("}, {"grammar": "start: %"}, {"json": {"type": "odd"}}):
        with pytest.raises(ApiError) as error:
            grammars.of(asking(**structured))
        assert error.value.param == "structured_outputs"
    for name, value in itertools.product(("ignore_eos", "min_tokens"), (1,)):
        request = asking(regex="a")
        setattr(request, name, value)
        with pytest.raises(ApiError, match=f"{name} can't be used"):
            grammars.of(request)
    with pytest.raises(ApiError, match="no stop token"):
        Grammars(types.SimpleNamespace(**vars(model) | {"stop_ids": ()})).of(asking(regex="a"))
    assert grammars.of(asking())() is None
