"""Two small tokenizers, as BLOOM's and as LLaMA's, trained once on ten scripts."""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken

from data_pipelines.tokenizers import train_bpe, train_sentencepiece
from llmzoo_jax.conversation import FORMATS, Conversation, Message, write_jsonl
from llmzoo_jax.tokenizer import load_tokenizer

KINDS = ("bpe", "sentencepiece")
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, 1234 times.\n\n  Indented line;\ttab.",
    "敏捷的棕色狐狸跳过了懒狗。你好，世界！今天天气怎么样？",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요?",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Victor jagt zwölf Boxkämpfer quer über den großen Sylter Deich.",
    "👩‍👩‍👧‍👦 👍🏽 🇹🇭 e\u0301 \u200d zero\u200bwidth ﷽ 𠮷",
)
TEXTS = st.one_of(
    st.lists(st.sampled_from("".join(SENTENCES)), min_size=1, max_size=12).map("".join),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
).filter(lambda text: text.strip() and not re.search(r"</?s>|<unk>|<pad>|<\|", text))


def conversation(*contents, system=None, **names):
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    start = [Message("system", system)] if system else []
    return Conversation(messages=(*start, *messages), **names)


@functools.cache
def data() -> Path:
    """A file of a hundred conversations."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pairs = [(a, b) for a in SENTENCES for b in SENTENCES]
    write_jsonl(folder / "train.jsonl", [conversation(a, b) for a, b in pairs])
    return folder / "train.jsonl"


@functools.cache
def tiny(kind: str):
    """A tokenizer that knows the special tokens of every format."""
    if kind == "bpe":
        tokenizer = train_bpe(data(), vocab_size=600)
    else:
        tokenizer = llama_tokenizer(train_sentencepiece(data(), vocab_size=700))
    more = {t for f in FORMATS.values() for t in f.special_tokens} - {"<s>", "</s>"}
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in sorted(more)])
    return tokenizer


def llama_tokenizer(model: bytes):
    """The tokenizer of a SentencePiece model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        return load_tokenizer(folder)
