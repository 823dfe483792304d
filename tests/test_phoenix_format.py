"""Format phoenix gives the token ids and labels of LLM Zoo's own rules, on real conversations.

The rules (LLMZoo, ``llmzoo/datasets/datasets.py``), written here from their description:

- the text is the system text and, with nothing between, ``Human: <s>...</s>`` and
  ``Assistant: <s>...</s>``; it is tokenised as a whole, with what the tokenizer adds by itself;
- the labels of an assistant turn are the ids from ``len(tokens(before + "Assistant: <s>")) - 1`` to
  ``len(tokens(before + the turn))``; all others are -100;
- ids and labels are cut off at a greatest length, on the right. LLM Zoo measures the lengths above
  on text that is cut off, too: every turn that begins past the limit is measured as
  ``[limit - 1, limit)``, so the last id that is kept becomes a target, the user's as well.

That last one is the only difference allowed, and it is mended here.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.tokenizers import train_bpe, train_sentencepiece
from llmzoo_jax.conversation import (
    FORMATS,
    Conversation,
    ConversationError,
    Message,
    check_messages,
    render,
    write_jsonl,
)
from llmzoo_jax.tokenizer import encode, encode_prompt, load_tokenizer, resolve_format

DATA = Path(__file__).parents[2] / "shared/data/sharegpt-zh-1k/data/sft/sharegpt_zh_1K_format.jsonl"
COUNT = 500
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
)

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs the ShareGPT sample")


@pytest.fixture(scope="module")
def conversations():
    """The first 500 that are in order (a handful end with the user, or have an empty turn)."""
    roles, kept = {"human": "user", "gpt": "assistant"}, []
    for line in DATA.read_text("utf-8").splitlines():
        turns = json.loads(line)["conversations"]
        messages = tuple(Message(roles[turn["from"]], turn["value"]) for turn in turns)
        try:
            check_messages(messages)
        except ConversationError:
            continue
        kept.append(Conversation(messages=messages, lang="zh", id=str(len(kept))))
    assert len(kept) > COUNT
    return kept[:COUNT]


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request, conversations, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "train.jsonl", conversations[:60])
    if request.param == "bpe":
        return train_bpe(folder / "train.jsonl", vocab_size=2000)
    model = train_sentencepiece(folder / "train.jsonl", vocab_size=3000)
    (folder / "tokenizer.model").write_bytes(model)
    return load_tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def ours(tokenizer, conversations):
    chat_format = resolve_format("phoenix", tokenizer)
    return [encode(c, tokenizer=tokenizer, chat_format=chat_format) for c in conversations]


def by_the_rules(conversation, tokenizer):
    """The ids of the whole text, and where in them each answer begins and ends."""
    text, prefixes = SYSTEM, []
    for message in conversation.messages:
        if message.role == "user":
            text += "Human: <s>" + message.content + "</s>"
        else:
            prefixes.append(text + "Assistant: <s>")
            text += "Assistant: <s>" + message.content + "</s>"
            prefixes.append(text)
    coded = tokenizer.backend_tokenizer.encode_batch_fast(prefixes)  # it adds special tokens
    starts, ends = coded[0::2], coded[1::2]
    spans = [(len(a.ids) - 1, len(b.ids)) for a, b in zip(starts, ends, strict=True)]
    return np.array(ends[-1].ids), spans


@pytest.fixture(scope="module")
def theirs(tokenizer, conversations):
    tokenizer("")  # sets no padding and no truncation
    return [by_the_rules(conversation, tokenizer) for conversation in conversations]


def labels(ids, spans, limit, mended):
    """Their labels of the first ``limit`` ids; -100 is no target."""
    ids = ids[:limit]
    out = np.full(len(ids), -100)
    for start, end in spans:
        if mended and start >= limit:
            continue
        # The length of a text that is cut off at the limit; the -1 is taken after that.
        start, end = min(start + 1, limit) - 1, min(end, limit)
        out[start:end] = ids[start:end]
    return out


def test_the_sample_has_conversations_of_every_sort(conversations, theirs):
    turns = [len(spans) for _, spans in theirs]
    lengths = [len(ids) for ids, _ in theirs]
    assert len(conversations) == COUNT and sum(n > 1 for n in turns) > 200 and max(turns) > 10
    for limit in (512, 1024):
        assert 100 < sum(n > limit for n in lengths) < COUNT


def test_the_text_and_the_first_token_are_llm_zoos(tokenizer, conversations, ours, theirs):
    bos = tokenizer.backend_tokenizer.token_to_id("<s>")
    for conversation, example, (ids, _) in zip(conversations, ours, theirs, strict=True):
        assert example.tokens.tolist() == ids.tolist()
        if conversation.id.endswith("0"):
            text = "".join(s.text for s in render(conversation.messages, FORMATS["phoenix"]))
            assert tokenizer(text).input_ids == ids.tolist()
        assert (ids[0] == bos) == (tokenizer.backend_tokenizer.token_to_id("▁") is not None)


@pytest.mark.parametrize("limit", [None, 512, 1024])
def test_labels_are_llm_zoos_with_the_last_token_mended(ours, theirs, limit):
    differ = 0
    for example, (ids, spans) in zip(ours, theirs, strict=True):
        end = limit or len(ids)
        mine = np.where(example.loss_mask, example.tokens, -100)[:end]
        np.testing.assert_array_equal(mine, labels(ids, spans, end, mended=True))
        unmended = labels(ids, spans, end, mended=False)
        wrong = np.flatnonzero(mine != unmended)
        assert all(ids[a] == ids[spans[0][0]] for a, _ in spans)  # every answer opens with <s>
        if len(wrong):
            differ += 1
            assert wrong.tolist() == [end - 1] and len(ids) > end
            assert mine[end - 1] == -100 and unmended[end - 1] == ids[end - 1]
            assert any(start >= end for start, _ in spans)
    assert differ == 0 if limit is None else differ >= 10


@pytest.mark.parametrize("limit", [512, 1024])
def test_the_rules_measure_cut_off_text_as_the_tokenizer_cuts_it(
    tokenizer, conversations, theirs, limit
):
    """``labels`` above cuts lengths; LLM Zoo has the tokenizer cut. On some, do it their way."""

    def cut(text):
        return tokenizer(text, truncation=True, max_length=limit).input_ids

    checked = 0
    for conversation, (ids, spans) in zip(conversations, theirs, strict=True):
        if len(ids) <= limit or len(spans) > 8 or checked >= 25:
            continue
        checked += 1
        text = SYSTEM
        expected = np.full(limit, -100)
        for message in conversation.messages:
            if message.role == "user":
                text += f"Human: <s>{message.content}</s>"
                continue
            start = len(cut(text + "Assistant: <s>")) - 1
            text += f"Assistant: <s>{message.content}</s>"
            end = len(cut(text))
            expected[start:end] = cut(text)[start:end]
        assert cut(text) == ids[:limit].tolist()
        np.testing.assert_array_equal(labels(ids, spans, limit, mended=False), expected)
    assert checked == 25


def test_what_is_served_is_what_was_trained(tokenizer, conversations, ours):
    chat_format = resolve_format("phoenix", tokenizer)
    for conversation, example in list(zip(conversations, ours, strict=True))[:20]:
        starts = np.flatnonzero(np.diff(example.loss_mask.astype(int), prepend=0) == 1)
        answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        for turn, start in zip(answers, starts, strict=True):
            history = conversation.messages[:turn]
            prompt = encode_prompt(history, tokenizer=tokenizer, chat_format=chat_format)
            assert prompt == example.tokens[: start + 1].tolist()  # up to its <s>
