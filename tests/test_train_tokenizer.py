"""Trained tokenizers: BLOOM's or LLaMA's kind, the same bytes each time, nothing lost."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from data_pipelines.tokenizers import train_bpe, train_sentencepiece
from llmzoo_jax.conversation import (
    ConversationError,
)
from tests.tiny_tokenizers import SENTENCES, TEXTS, data, llama_tokenizer


def run(*flags):
    command = [sys.executable, "-m", "data_pipelines.tokenizers", *flags]
    root = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_a_trained_tokenizer_is_blooms_or_llamas_and_the_same_bytes_each_time(tmp_path):
    for kind, size in (("bpe", 500), ("sentencepiece", 700)):
        out = tmp_path / kind
        flags = (f"--data={data()}", f"--out={out}", f"--kind={kind}", f"--vocab_size={size}")
        done = run(*flags)
        assert done.returncode == 0 and f"{size} tokens ({kind})" in done.stdout, done.stderr
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert run(*flags).returncode == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        other = "sentencepiece" if kind == "bpe" else "bpe"
        done = run(*flags[:2], f"--kind={other}")
        assert done.returncode == 1 and "is a tokenizer of another kind" in done.stderr
    assert sorted(files) == ["tokenizer.model"]


def test_a_trained_bpe_has_blooms_tokens_loses_nothing_and_knows_the_format():
    tokenizer = train_bpe(data(), vocab_size=800)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer.pad_token_id == 3 and tokenizer("x").input_ids[0] != 1

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def round_trip(text):
        ids = tokenizer(text).input_ids
        assert 0 not in ids or "<unk>" in text
        assert tokenizer.decode(ids) == text

    round_trip()
    for words in (" artificial", " intelligence", "Human", "Assistant"):
        assert len(tokenizer(words).input_ids) == 1


def test_a_tokenizer_that_cannot_be_trained_says_why(tmp_path):
    with pytest.raises(ConversationError, match=r"none\.jsonl"):
        train_bpe(tmp_path / "none.jsonl", vocab_size=500)
    with pytest.raises(ValueError, match=r"--vocab_size=100: .*260"):
        train_bpe(data(), vocab_size=100)
    with pytest.raises(ValueError, match=r"99999 does not fit .*train\.jsonl"):
        train_sentencepiece(data(), vocab_size=99999)
    for size in (264, 330):  # hardly a character: the rest are bytes
        tokenizer = llama_tokenizer(train_sentencepiece(data(), vocab_size=size))
        assert tokenizer.decode(tokenizer(SENTENCES[2]).input_ids, True) == SENTENCES[2]
    done = run(f"--data={tmp_path / 'none.jsonl'}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
