"""Loading: a folder, a bare SentencePiece model, or an error that says what was looked for."""

import io
import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_pipelines.tokenizers import train_sentencepiece
from llmzoo_jax.conversation import (
    chat_template,
)
from llmzoo_jax.tokenizer import (
    fingerprint,
    load_tokenizer,
    resolve_format,
    save_tokenizer,
)
from tests.tiny_tokenizers import KINDS, SENTENCES, TEXTS, data, llama_tokenizer, tiny


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tiny(request.param)


def test_a_sentencepiece_model_loads_from_its_path_and_from_a_folder_that_has_only_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(data(), vocab_size=700))
    for path in (tmp_path, str(tmp_path), tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
        assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.eos_token_id == 2 and tokenizer.pad_token is None
        for text in SENTENCES:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_converted_model_gives_the_ids_of_the_sentencepiece_library():
    import sentencepiece

    model = train_sentencepiece(data(), vocab_size=900)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = llama_tokenizer(model)

    def expected(text):  # LLaMA's: what stands between special tokens is a text of its own
        pieces = re.split("(<unk>|<s>|</s>)", text)
        ids = [[theirs.piece_to_id(p)] if i % 2 else theirs.encode(p) for i, p in enumerate(pieces)]
        return list(itertools.chain.from_iterable(ids))

    parts = st.one_of(
        TEXTS, st.sampled_from(["<s>", "</s>", "<unk>", "  ", "\n", "▁", "aaaa", "<0x41>"])
    )

    @settings(max_examples=400, deadline=None)
    @given(st.lists(parts, max_size=8).map("".join))
    def same(text):
        assert ours(text, add_special_tokens=False).input_ids == expected(text)

    same()
    for text in (*SENTENCES, "Assistant: <s>" + "</s>Human: <s>".join(SENTENCES)):
        assert ours(text, add_special_tokens=False).input_ids == expected(text)


def test_a_saved_tokenizer_is_the_same_for_us_and_for_auto_tokenizer(tokenizer, tmp_path):
    chat_format = resolve_format("phoenix", tokenizer)
    save_tokenizer(tokenizer, tmp_path, chat_format=chat_format)
    family = "bloom" if tokenizer.pad_token else "llama"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template is None
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == chat_template(chat_format) == theirs.chat_template
    for text in (*SENTENCES, "<s>" + "</s><s> ".join(SENTENCES)):
        expected = tokenizer(text).input_ids
        assert ours(text).input_ids == theirs(text).input_ids == expected
    assert fingerprint(ours, chat_format) == fingerprint(tokenizer, chat_format)


def test_a_tokenizer_that_cannot_be_loaded_says_what_was_looked_for(tmp_path):
    def fails(path, *says):
        with pytest.raises(ValueError) as error:
            load_tokenizer(path)
        assert all(word in str(error.value) for word in (str(path), *says)), str(error.value)

    fails(tmp_path / "none", "no folder or file", "tokenizer.json", "tokenizer.model")
    fails(tmp_path, "no tokenizer.json and no tokenizer.model", "it has nothing")
    (tmp_path / "vocab.txt").write_text("a")
    fails(tmp_path, "it has vocab.txt", "convert a slow tokenizer first")
    model = tmp_path / "tokenizer.model"
    model.write_text("IQ== 0\nIg== 1\n")  # Llama 3's form
    fails(model, "SentencePiece", "tokenizer.json")
    model.write_bytes(_train_other(model_type="unigram"))
    fails(model, "is no BPE model with byte fallback")
    model.write_bytes(_train_other(normalization_rule_name="nmt_nfkc"))
    fails(model, "normalises text (nmt_nfkc)")
    model.write_bytes(_train_other(bos_id=2, eos_id=1))
    fails(model, "begins with ['<unk>', '</s>', '<s>']")
    model.write_bytes(_train_other(user_defined_symbols=["<x>"]))
    fails(model, "user-defined")
    (tmp_path / "tokenizer.json").write_text("{")
    fails(tmp_path, "cannot read")


def _train_other(**options):
    import sentencepiece

    options = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 300,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 4,
    } | options
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES[:1] * 9), model_writer=model, **options
    )
    return model.getvalue()
