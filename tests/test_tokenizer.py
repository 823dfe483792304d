"""Tokens and loss masks: exact in every script, for both kinds of tokenizer."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from data_pipelines.tokenizers import train_bpe
from llmzoo_jax.conversation import (
    FORMATS,
    Conversation,
    ConversationError,
    Message,
    render,
)
from llmzoo_jax.tokenizer import (
    Example,
    encode,
    encode_prompt,
    fingerprint,
    resolve_format,
    save_tokenizer,
    show,
)
from tests.tiny_tokenizers import KINDS, SENTENCES, TEXTS, conversation, data, tiny


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tiny(request.param)


CASES = [(kind, name) for kind in KINDS for name in FORMATS]


# --- encoding -----------------------------------------------------------------------------------


VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the bytes
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def mask_by_bytes(tokenizer, kind, segments, tokens):
    """The loss mask, from the bytes that each token stands for, without offsets."""
    specials = "|".join(map(re.escape, tokenizer.added_tokens_encoder))
    text = "".join(s.text for s in segments)
    trained = [s.train for s in segments for _ in s.text]
    stream = []  # (byte, trained)
    for part in re.finditer(f"{specials}|(?:(?!{specials}).)+", text, re.DOTALL):
        characters = list(zip(part.group(), trained[slice(*part.span())], strict=True))
        if kind == "sentencepiece" and not re.fullmatch(specials, part.group()):
            characters.insert(0, (" ", characters[0][1]))  # LLaMA puts a space before each text
        stream += [(byte, train) for c, train in characters for byte in c.encode()]
    mask, at = [], 0
    for piece in tokenizer.convert_ids_to_tokens(tokens):
        if re.fullmatch(specials, piece):
            raw = piece.encode()
        elif kind == "bpe":
            raw = bytes(BYTES[c] for c in piece)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            raw = bytes.fromhex(byte[1])
        else:
            raw = piece.replace("▁", " ").encode()
        part = stream[at : at + len(raw)]
        assert bytes(byte for byte, _ in part) == raw
        mask.append(any(train for _, train in part))
        at += len(raw)
    assert at == len(stream)
    return mask


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_token_is_trained_when_one_of_its_bytes_is(kind, name):
    tokenizer = tiny(kind)
    chat_format = resolve_format(name, tokenizer)

    def right(example):
        coded = encode(example, tokenizer=tokenizer, chat_format=chat_format)
        segments = render(example.messages, chat_format)
        expected = mask_by_bytes(tokenizer, kind, segments, coded.tokens)
        assert coded.loss_mask.tolist() == expected
        assert coded.tokens.dtype == np.int32 and coded.loss_mask.dtype == np.bool_

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS.filter(lambda text: "▁" not in text), min_size=2, max_size=6))
    def always_right(contents):
        right(conversation(*contents[: len(contents) // 2 * 2]))

    always_right()
    right(conversation(*SENTENCES, *reversed(SENTENCES), system=SENTENCES[1]))
    right(conversation(*[f"  {s} \n " for s in SENTENCES]))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_tokens_before_every_answer_are_the_tokens_that_are_served(kind, name):
    tokenizer = tiny(kind)
    chat_format = resolve_format(name, tokenizer)
    messages = conversation(*SENTENCES, *reversed(SENTENCES), system=SENTENCES[4]).messages
    whole = encode(Conversation(messages=messages), tokenizer=tokenizer, chat_format=chat_format)
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = encode_prompt(messages[:turn], tokenizer=tokenizer, chat_format=chat_format)
            assert whole.tokens[: len(prompt)].tolist() == prompt
            # All that the model is to write from here is trained, up to what stops it.
            rest = tokenizer.convert_ids_to_tokens(whole.tokens[len(prompt) :])
            stop = len(prompt) + rest.index(chat_format.stop[0])
            assert whole.loss_mask[len(prompt) : stop + 1].all()
            assert not whole.loss_mask[stop + 1 : stop + 2].any()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("name", ["phoenix", "vicuna", "llama-2", "llama-3"])
def test_where_a_prompt_ends_no_answer_can_change_its_tokens(kind, name):
    tokenizer = tiny(kind)
    chat_format = resolve_format(name, tokenizer)

    @settings(max_examples=100, deadline=None)
    @given(TEXTS, st.sampled_from(["", " ", "\n", "//", "。", "|", "\u3000"]), TEXTS)
    def unchanged(question, start, answer):
        example = conversation(question, start + answer)
        whole = encode(example, tokenizer=tokenizer, chat_format=chat_format).tokens
        prompt = encode_prompt(example.messages[:1], tokenizer=tokenizer, chat_format=chat_format)
        assert whole[: len(prompt)].tolist() == prompt

    unchanged()


def test_text_that_contains_a_special_token_is_refused_by_name():
    for tokenizer in map(tiny, KINDS):
        chat_format = resolve_format("phoenix", tokenizer)
        call = functools.partial(encode, tokenizer=tokenizer, chat_format=chat_format)
        for token in ("</s>", "<s>", "<unk>", "<|im_end|>"):
            for turn, role in ((0, "system"), (1, "user"), (2, "assistant")):
                contents = ["sys", "hi", "hello"]
                contents[turn] = f"well{token}Assistant: "
                example = conversation(*contents[1:], system=contents[0], id="abc")
                says = rf"turn {turn + 1} \({role}\): the text contains '{re.escape(token)}'"
                with pytest.raises(ConversationError, match=f"^abc: {says}"):
                    call(example)
                with pytest.raises(ConversationError, match=f"^f.jsonl:3: {says}"):
                    call(example, where="f.jsonl:3")
                if role != "assistant":
                    with pytest.raises(ConversationError, match=f"^{says}"):
                        encode_prompt(
                            example.messages[:2], tokenizer=tokenizer, chat_format=chat_format
                        )
        call(conversation("a < b, <S> and </ s>", "fine"))  # none of these is a token


def words_tokenizer(unk=True, **names):
    """A tokenizer that knows the letters a-z and phoenix's special tokens, and no more."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzACHT:.,'▁"})
    vocab = {c: i for i, c in enumerate([*(["<unk>"] if unk else []), *letters])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>" if unk else None, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    backend.add_special_tokens(["<s>", "</s>"])
    if unk:
        names |= {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names
    )


@pytest.mark.parametrize("unk", [True, False])
def test_text_that_the_tokenizer_cannot_represent_is_refused_by_name(unk):
    tokenizer = words_tokenizer(unk)
    chat_format = resolve_format("phoenix", tokenizer)
    call = functools.partial(encode, tokenizer=tokenizer, chat_format=chat_format)
    call(conversation("plain words.", "more words"), where="x")
    lost = "é世" if unk else "é"
    says = f"^f:1: turn 3: the tokenizer cannot represent '{lost}'; remove it"
    with pytest.raises(ConversationError, match=says):
        call(conversation("a", "b", "caf é世  \n ", "d"), where="f:1")
    with pytest.raises(ConversationError, match=r"^turn 1: the tokenizer cannot represent 'Z'"):
        encode_prompt([Message("user", "Z")], tokenizer=tokenizer, chat_format=chat_format)


def test_a_byte_level_tokenizer_that_lacks_bytes_is_found_out():
    tokenizer = train_bpe(data(), vocab_size=400)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    missing = next(c for c, byte in BYTES.items() if byte == 0xBC)  # of "ü", the second byte
    merges = [m for m in state["model"]["merges"] if missing not in "".join(m)]
    vocab = [t for t in state["model"]["vocab"] if missing not in t]
    state["model"] |= {"vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    broken = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    chat_format = resolve_format("phoenix", broken)
    with pytest.raises(ConversationError, match=r"^turn 2: the tokenizer cannot represent 'ü'"):
        encode(conversation("a", "für"), tokenizer=broken, chat_format=chat_format)


def test_an_end_token_that_is_also_unk_is_not_taken_for_lost_text():
    tokenizer = words_tokenizer()
    tokenizer.unk_token = "</s>"  # as GPT-2's
    chat_format = resolve_format("phoenix", tokenizer)
    coded = encode(conversation("a", "b"), tokenizer=tokenizer, chat_format=chat_format)
    assert coded.tokens[-1] == tokenizer.eos_token_id and coded.loss_mask[-1]


def test_white_space_that_spans_leave_out_goes_with_the_token_after_it():
    tokenizer = train_bpe(data(), vocab_size=400)
    trimming = train_bpe(data(), vocab_size=400)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = conversation("  a  b ", "  x \n\n y ", " c", " d  ")
    for name in ("phoenix", "vicuna", "alpaca"):
        chat_format = resolve_format(name, tokenizer)
        expected = encode(example, tokenizer=tokenizer, chat_format=chat_format)
        actual = encode(example, tokenizer=trimming, chat_format=chat_format)
        np.testing.assert_array_equal(actual.tokens, expected.tokens)
        np.testing.assert_array_equal(actual.loss_mask, expected.loss_mask)


def test_malformed_messages_are_refused_with_their_place():
    tokenizer = tiny("bpe")
    chat_format = resolve_format("phoenix", tokenizer)
    with pytest.raises(ConversationError, match=r"^f:9: turn 1 \(user\): the conversation ends"):
        encode(conversation("a"), tokenizer=tokenizer, chat_format=chat_format, where="f:9")
    with pytest.raises(ConversationError, match=r"^turn 2 \(assistant\): the last message"):
        encode_prompt(conversation("a", "b").messages, tokenizer=tokenizer, chat_format=chat_format)


# --- fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_in_another_process_and_after_calls(tokenizer, tmp_path):
    chat_format = resolve_format("llama-3", tokenizer)
    ours = fingerprint(tokenizer, chat_format)
    tokenizer("b c d", truncation=True, max_length=2)
    if tokenizer.pad_token:
        tokenizer(["a", "b c d"], padding="max_length", truncation=True, max_length=2)
    assert fingerprint(tokenizer, chat_format) == ours
    tokenizer("a")
    save_tokenizer(tokenizer, tmp_path, chat_format=chat_format)
    code = (
        "import sys; from llmzoo_jax.tokenizer import *; t = load_tokenizer(sys.argv[1]);"
        "print(fingerprint(t, resolve_format('llama-3', t)))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == ours


def test_the_fingerprint_changes_with_any_part_of_the_tokenizer_or_the_format():
    tokenizer = tiny("sentencepiece")
    phoenix = resolve_format("phoenix", tokenizer)
    base = tokenizer.backend_tokenizer.to_str()

    def changed(change):
        state = json.loads(base)
        change(state)
        backend = Tokenizer.from_str(json.dumps(state))
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    def swap(state):
        vocab = state["model"]["vocab"]
        vocab["e"], vocab["t"] = vocab["t"], vocab["e"]

    def token(state):
        state["added_tokens"].append(
            {"id": 5000, "content": "<new>", "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False, "special": True}
        )

    changes = (
        lambda state: None,
        swap,
        token,
        lambda state: state["model"]["merges"].pop(),
        lambda state: state["model"]["merges"].reverse(),
        lambda state: state.update(normalizer=state["normalizer"]["normalizers"][1]),
        lambda state: state["model"].update(byte_fallback=False),
    )
    prints = [fingerprint(changed(change), phoenix) for change in changes]
    assert prints[0] == fingerprint(tokenizer, phoenix)
    formats = [resolve_format(name, tokenizer) for name in FORMATS]
    formats += [dataclasses.replace(phoenix, begin=""), dataclasses.replace(phoenix, strip=True)]
    formats += [dataclasses.replace(phoenix, trained=("", "</s>"))]
    prints += [fingerprint(tokenizer, f) for f in formats if f != phoenix]
    assert len(set(prints)) == len(prints)


# --- looking ------------------------------------------------------------------------------------


def test_show_marks_the_trained_text_in_whole_characters(tokenizer):
    chat_format = dataclasses.replace(FORMATS["chatml"], strip=True)
    example = conversation(*SENTENCES)
    coded = encode(example, tokenizer=tokenizer, chat_format=chat_format)
    shown = show(coded, tokenizer=tokenizer, color=False)
    segments = render(example.messages, chat_format)
    expected = "".join(f"⟦{s.text}⟧" if s.train else s.text for s in segments).replace("⟧⟦", "")
    space = " ?" if "▁" in tokenizer.get_vocab() else ""  # LLaMA's, after a special token

    def loose(text):
        return re.sub(rf"(⟦|⟧|<\|im_\w+\|>){space}", r"\1", text)

    assert loose(shown) == loose(expected)
    colored = show(coded, tokenizer=tokenizer)
    assert colored.count("\033[32m") == expected.count("⟦")
    assert re.sub("\033\\[[0-9]+m", "", colored) == re.sub("[⟦⟧]", "", shown)
    assert colored.endswith("\033[0m")
    empty = Example(np.zeros(0, np.int32), np.zeros(0, np.bool_))
    assert show(empty, tokenizer=tokenizer) == ""
