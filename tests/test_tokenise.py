"""Tokenising: the same bytes from any number of processes, kept shards, batches like encode()."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmzoo_jax import shards
from llmzoo_jax import tokenise as tokenise_module
from llmzoo_jax.byte_tokens import byte_lengths, byte_mask
from llmzoo_jax.conversation import ConversationError, from_dict, render
from llmzoo_jax.shards import encode_batch
from llmzoo_jax.tokenise import tokenise, tokenise_all
from llmzoo_jax.tokenizer import encode, resolve_format
from tests.test_data import CODEC, assert_equal, conversation, write
from tests.test_tokenizer import words_tokenizer
from tests.tiny_tokenizers import KINDS, TEXTS, tiny
from tests.tiny_tokenizers import conversation as chat


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokenise_module, "SHARD_BYTES", 1000)
    monkeypatch.setattr(shards, "BATCH", 3)


def conversations(path, n, lang="en"):
    return write(path, [conversation(f"{path.stem}{i}", lang, 3 + i % 5) for i in range(n)])


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_any_number_of_processes_gives_the_same_bytes_and_none_imports_jax(
    tmp_path, small_shards, monkeypatch, capfd
):
    paths = [conversations(tmp_path / "a.jsonl", 30, "zh"), conversations(tmp_path / "b.jsonl", 20)]
    single = tokenise_all(paths, **CODEC, cache_dir=str(tmp_path / "1"), workers=1)
    capfd.readouterr()
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # they write what they import to stderr
    tokenise_all(paths, **CODEC, cache_dir=str(tmp_path / "2"), workers=2)
    imported = {line.rpartition("|")[2].strip() for line in capfd.readouterr().err.splitlines()}
    assert "llmzoo_jax.shards" in imported and not imported & {"jax", "jaxlib", "grain"}
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert len(tree(tmp_path / "1")) > 10 and [len(file) for file in single] == [30, 20]
    for path, file in zip(paths, single, strict=True):
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                expected = encode(from_dict(json.loads(line), where=""), **CODEC)
                assert_equal(file[number], (expected.tokens, expected.loss_mask))
                assert file.where(number) == f"{path}:{number + 1}"


def test_a_build_that_was_stopped_goes_on_with_the_shards_that_are_not_finished(
    tmp_path, small_shards, monkeypatch
):
    path, cache = conversations(tmp_path / "a.jsonl", 40), tmp_path / "cache"
    whole = tokenise(path, **CODEC, cache_dir=str(tmp_path / "whole"))
    encoded = []

    def counting(items, **options):
        if len(encoded) > 20:
            raise KeyboardInterrupt
        encoded.extend(items)
        return encode_batch(items, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "encode_batch", counting)
        tokenise(path, **CODEC, cache_dir=str(cache), workers=1)
    kept = {path: content for path, content in tree(cache).items() if path.suffix == ".npz"}
    assert kept and not [path for path in tree(cache) if path.suffix == ".tmp"]

    def rest(items, **options):
        encoded.extend(items)
        return encode_batch(items, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "encode_batch", rest)
        again = tokenise(path, **CODEC, cache_dir=str(cache), workers=1)
    assert len(encoded) < 22 + 40 - len(kept)  # a shard has several conversations
    assert tree(cache) == tree(tmp_path / "whole")
    for record in range(40):
        assert_equal(again[record], whole[record])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_tells_the_errors_that_this_process_would(tmp_path, small_shards, workers):
    path = conversations(tmp_path / "a.jsonl", 40)
    with open(path, "a", encoding="utf-8") as out:
        out.write("\n" + json.dumps(conversation("<|im_end|>")) + "\n")
    with pytest.raises(ConversationError, match=r"a\.jsonl:42: turn 1 .*<\|im_end\|>"):
        tokenise(path, **CODEC, cache_dir=str(tmp_path / "cache"), workers=workers)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_no_conversation_is_refused_as_by_read_jsonl(tmp_path, small_shards):
    path = conversations(tmp_path / "a.jsonl", 30)
    for line, says in ((b"{", "not JSON"), (b"\xff", "not UTF-8 at byte 1"), (b"[]", "an object")):
        with open(path, "rb") as file:
            good = file.read()
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + line + b"\n" + good)
        with pytest.raises(ConversationError, match=rf"bad\.jsonl:32: .*{says}"):
            tokenise(str(bad), **CODEC, cache_dir=str(tmp_path / "cache"))
    for nothing in (b"", b"\n \n"):
        bad.write_bytes(nothing)
        with pytest.raises(ConversationError, match="no conversation in this file"):
            tokenise(str(bad), **CODEC, cache_dir=str(tmp_path / "cache"))


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["phoenix", "llama-2", "chatml"])
def test_a_batch_is_encoded_as_each_of_its_conversations(kind, name):
    tokenizer = tiny(kind)
    codec = {"tokenizer": tokenizer, "chat_format": resolve_format(name, tokenizer)}

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.lists(TEXTS, min_size=2, max_size=5), min_size=1, max_size=4))
    def equal(contents):
        items = [chat(*turns[: len(turns) // 2 * 2]) for turns in contents]
        coded = encode_batch(items, **codec, where=["x"] * len(items))
        for item, example in zip(items, coded, strict=True):
            expected = encode(item, **codec)
            assert_equal(example.__dict__.values(), expected.__dict__.values())
            assert example.tokens.dtype == expected.tokens.dtype
            assert example.loss_mask.dtype == expected.loss_mask.dtype

    equal()


@pytest.mark.parametrize("name", ["phoenix", "llama-2", "chatml", "alpaca"])
def test_the_bytes_of_tokens_give_the_mask_that_their_characters_give(name):
    tokenizer = tiny("bpe")
    chat_format = resolve_format(name, tokenizer)
    lengths = byte_lengths(tokenizer, len(tokenizer))
    assert lengths is not None

    @settings(max_examples=40, deadline=None)
    @given(st.lists(TEXTS, min_size=2, max_size=6))
    def equal(contents):
        segments = render(chat(*contents[: len(contents) // 2 * 2]).messages, chat_format)
        text = "".join(segment.text for segment in segments)
        trained = "".join(("01"[segment.train]) * len(segment.text) for segment in segments)
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        by_characters = ["1" in trained[a:b] for a, b in coded.offset_mapping]
        assert byte_mask(np.array(coded.input_ids), segments, lengths).tolist() == by_characters

    equal()


def test_a_batch_with_text_that_has_no_tokens_is_refused_by_name():
    tokenizer = words_tokenizer()
    codec = {"tokenizer": tokenizer, "chat_format": resolve_format("phoenix", tokenizer)}
    items = [chat("a  b ", "b"), chat("a", "é")]  # it leaves out "\n" and has no "é"
    with pytest.raises(ConversationError, match=r"^f:2: turn 2: .* cannot represent 'é'"):
        encode_batch(items, **codec, where=["f:1", "f:2"])
    for unk in ("<unk>", "</s>"):  # the latter, as GPT-2's, is a token that each text has
        tokenizer.unk_token = unk
        (coded,) = encode_batch(items[:1], **codec, where=["f:1"])
        expected = encode(items[0], **codec)
        assert_equal(coded.__dict__.values(), expected.__dict__.values())
