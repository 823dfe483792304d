"""Trains a tokenizer on the conversations of a JSON Lines file.

    python -m data_pipelines.tokenizers --data=train.jsonl --out=DIR --kind=bpe --vocab_size=8192

``bpe`` is a byte-level BPE as BLOOM's: a folder with tokenizer.json, no BOS, and ``<unk>`` 0,
``<s>`` 1, ``</s>`` 2, ``<pad>`` 3. ``sentencepiece`` is LLaMA's: one tokenizer.model, with byte
fallback, ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, and no pad. The same file gives the same bytes.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

from llmzoo_jax.conversation import FORMATS, read_jsonl, render

KINDS = ("bpe", "sentencepiece")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")

# bigscience/bloom: tokenizer.json, `pre_tokenizer`. A word takes the space before it with it, and
# punctuation of many scripts is set apart.
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def texts(data: str | Path) -> Iterator[str]:
    """The text that a model of ``data`` reads in format phoenix, cut at the special tokens.

    So the system text and the names of the roles are as frequent as they will be in training.
    """
    for conversation in read_jsonl(data):
        whole = "".join(s.text for s in render(conversation.messages, FORMATS["phoenix"]))
        yield from (text for text in re.split("</?s>", whole) if text)


def train_bpe(data: str | Path, vocab_size: int):
    """A transformers fast tokenizer like BLOOM's; ``vocab_size`` counts the special tokens too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"--vocab_size={vocab_size}: bytes and special tokens alone are 260")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_sentencepiece(data: str | Path, vocab_size: int) -> bytes:
    """The bytes of a LLaMA-style ``tokenizer.model``."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts(data) for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


_DATA = flags.DEFINE_string("data", None, "JSON Lines file of conversations.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_KIND = flags.DEFINE_enum("kind", "bpe", KINDS, "As BLOOM's (bpe) or as LLaMA's (sentencepiece).")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "Tokens, special ones included.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    if _KIND.value == "bpe":
        tokenizer = train_bpe(_DATA.value, _VOCAB_SIZE.value)
        tokenizer.save_pretrained(out)
    else:
        model = train_sentencepiece(_DATA.value, _VOCAB_SIZE.value)
        with tempfile.NamedTemporaryFile(dir=out, delete=False) as file:
            file.write(model)
        os.replace(file.name, out / "tokenizer.model")
    print(f"{out}: a tokenizer of kind {_KIND.value}, {_VOCAB_SIZE.value} tokens at most")


if __name__ == "__main__":
    app.run(main)
