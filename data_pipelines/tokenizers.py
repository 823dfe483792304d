"""Trains a tokenizer on the conversations of JSON Lines files.

    python -m data_pipelines.tokenizers --data='a.jsonl,b*.jsonl' --out=DIR --kind=bpe

``bpe`` is a byte-level BPE as BLOOM's: a folder with tokenizer.json, no BOS, and ``<unk>`` 0,
``<s>`` 1, ``</s>`` 2, ``<pad>`` 3. ``sentencepiece`` is LLaMA's: one tokenizer.model, with byte
fallback, ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, and no pad. The same file gives the same bytes.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from llmzoo_jax import cli
from llmzoo_jax.conversation import FORMATS, read_jsonl, render
from llmzoo_jax.errors import InputError
from llmzoo_jax.tokenizer import load_tokenizer

KINDS = ("bpe", "sentencepiece")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")

# bigscience/bloom: tokenizer.json, `pre_tokenizer`. A word takes the space before it with it, and
# punctuation of many scripts is set apart.
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def texts(*data: str | Path) -> Iterator[str]:
    """The text that a model of ``data`` reads in format phoenix, cut at the special tokens.

    So the system text and the names of the roles are as frequent as they will be in training. Of
    tool calls, for which phoenix has no turn, the bare contents are taken.
    """
    for conversation in itertools.chain.from_iterable(map(read_jsonl, data)):
        messages = conversation.messages
        if any(message.role == "tool" for message in messages):
            yield from (message.content for message in messages)
            continue
        whole = "".join(s.text for s in render(messages, FORMATS["phoenix"]))
        yield from (text for text in re.split("</?s>", whole) if text)


def train_bpe(*data: str | Path, vocab_size: int):
    """A transformers fast tokenizer like BLOOM's; ``vocab_size`` counts the special tokens too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise InputError(
            f"--vocab_size={vocab_size}: bytes and special tokens alone are 260 tokens"
        )
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
    backend.train_from_iterator(texts(*data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_sentencepiece(*data: str | Path, vocab_size: int) -> bytes:
    """The bytes of a LLaMA-style ``tokenizer.model``; InputError where the size does not fit.

    Single characters take half of the vocabulary at most; the rarest are left to byte fallback.
    """
    import sentencepiece

    lines = [line for text in texts(*data) for line in text.split("\n") if line]
    counts = Counter(itertools.chain.from_iterable(lines))
    by_count = sorted(counts, key=lambda character: (-counts[character], character))
    rare = by_count[max(1, (vocab_size - 259) // 2) :]  # 256 bytes, 3 special tokens
    if rare:
        cut = re.compile("[" + re.escape("".join(rare)) + "]")
        lines = [part for line in lines for part in cut.split(line) if part]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,  # bytes; longer lines would be left out
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=4,
        )
    except RuntimeError as error:
        reason, files = str(error).rpartition("] ")[2], ", ".join(map(str, data))
        raise InputError(f"--vocab_size={vocab_size} does not fit {files}: {reason}") from error
    return model.getvalue()


def define_flags() -> None:
    """Not done at import, so that other programs can use this module and flags of these names."""
    flags.DEFINE_list(
        "data", None, "JSON Lines files of conversations, or patterns such as cache/*.train.jsonl.",
        required=True,
    )  # fmt: skip
    flags.DEFINE_string("out", None, "Folder to write; safe to run again.", required=True)
    flags.DEFINE_enum("kind", "bpe", KINDS, "As BLOOM's (bpe) or as LLaMA's (sentencepiece).")
    flags.DEFINE_integer("vocab_size", 8192, "Tokens, special ones included.")


def main(_: list[str]) -> None:
    vocab_size, out, kind = flags.FLAGS.vocab_size, Path(flags.FLAGS.out), flags.FLAGS.kind
    data = [path for name in flags.FLAGS.data for path in sorted(glob.glob(name)) or [name]]
    other = out / ("tokenizer.model" if kind == "bpe" else "tokenizer.json")
    if other.exists():
        raise InputError(f"{other} is a tokenizer of another kind; give another --out")
    if kind == "bpe":
        tokenizer = train_bpe(*data, vocab_size=vocab_size)
    else:
        model = train_sentencepiece(*data, vocab_size=vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:  # so that `out` has whole files only
        if kind == "bpe":
            tokenizer.save_pretrained(folder)
        else:
            Path(folder, "tokenizer.model").write_bytes(model)
        for path in Path(folder).iterdir():
            os.replace(path, out / path.name)
    print(f"{out}: {len(load_tokenizer(out))} tokens ({kind})")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
