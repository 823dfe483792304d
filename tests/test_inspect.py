"""What `inspect` shows is what the trainer sees, and can be read in any script."""

import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from data_pipelines.inspect import find, lines, pack, print_row, read, segment_tokens
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.errors import InputError
from llmzoo_jax.tokenizer import encode, resolve_format
from tests.tiny_tokenizers import KINDS, SENTENCES, conversation, tiny

CHATS = [
    conversation(question, answer, id=f"chat-{number}", lang="und")
    for number, (question, answer) in enumerate(pairwise(SENTENCES))
]


def rows_of(kind, *, length=256, conversations=CHATS, **options):
    tokenizer = tiny(kind)
    chat_format = resolve_format("phoenix", tokenizer)
    found = pack(
        conversations, tokenizer=tokenizer, chat_format=chat_format, length=length, **options
    )
    return tokenizer, chat_format, list(found)


def printed(row, tokenizer, *, color=False, width=200):
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None)
    with console.capture() as capture:
        print_row(row, console, tokenizer=tokenizer, color=color)
    return capture.get()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_conversation_is_in_some_row(kind):
    tokenizer, chat_format, rows = rows_of(kind, length=64)
    seen = {}
    for row in rows:
        for number, segment in enumerate(row.segments, 1):
            example, positions, where = segment_tokens(row, number)
            assert positions.tolist() == list(range(len(example.tokens)))
            assert where.stop - where.start == segment.stop - segment.start
            seen.setdefault(segment.conversation.id, {})[segment.start] = example
    for chat in CHATS:
        whole = encode(chat, tokenizer=tokenizer, chat_format=chat_format)
        pieces = [seen[chat.id][start] for start in sorted(seen[chat.id])]
        tokens = np.concatenate([pieces[0].tokens[:1], *(piece.tokens[1:] for piece in pieces)])
        mask = np.concatenate([whole.loss_mask[:1], *(piece.loss_mask[1:] for piece in pieces)])
        assert tokens.tolist() == whole.tokens.tolist()
        assert mask.tolist() == whole.loss_mask.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_whole_characters_and_all_of_the_text(kind):
    """Each of the ten scripts, emoji with joiners too; no line has half of a character."""
    tokenizer, _, rows = rows_of(kind, length=16384)
    [row] = rows
    for number, segment in enumerate(row.segments, 1):
        example, positions, _ = segment_tokens(row, number)
        parts = list(lines(example, positions, tokenizer))
        assert sum(len(part.tokens) for _, part in parts) == len(example.tokens)
        assert [p for p, _ in parts] == np.cumsum(
            [0, *(len(part.tokens) for _, part in parts[:-1])]
        ).tolist()
        text = "".join(tokenizer.decode(part.tokens.tolist()) for _, part in parts)
        assert "\ufffd" not in text
        for message in segment.conversation.messages:  # a line may lose the space it begins with
            assert "".join(message.content.split()) in "".join(text.split())


def test_answers_are_marked_and_questions_are_not():
    chat = conversation("你好吗？", "สวัสดีครับ", "كيف حالك؟", "أنا بخير", id="c")
    tokenizer, _, [row] = rows_of("bpe", conversations=[chat])
    marked = "".join(re.findall(r"⟦(.*?)⟧", printed(row, tokenizer), flags=re.DOTALL))
    text = re.sub(r"\n\s*\d+ ", "", marked)
    assert "<s>สวัสดีครับ</s>" in text
    assert "<s>أنا بخير</s>" in text
    assert "你好吗" not in text
    assert "كيف" not in text


def test_colours_say_the_same_as_brackets():
    tokenizer, _, [row] = rows_of("bpe", length=16384)
    colored = printed(row, tokenizer, color=True)
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", colored, flags=re.DOTALL))
    marked = "".join(re.findall(r"⟦(.*?)⟧", printed(row, tokenizer), flags=re.DOTALL))
    assert green
    assert "".join(green.split()) == "".join(marked.split())


def test_the_heading_counts_positions_segments_targets_and_padding():
    tokenizer, _, rows = rows_of("bpe", length=512)
    row = rows[0]
    text = printed(row, tokenizer)
    used = int((row.batch.segment_ids > 0).sum())
    trained = int(row.batch.loss_mask.sum())
    assert (
        f"512 positions: {used} in {len(row.segments)} segments, {trained} with a trained target,"
        f" {512 - used} padding" in text
    )
    for number, segment in enumerate(row.segments, 1):
        assert f"segment {number}  {segment.conversation.id} · und · conversation" in text


def test_a_conversation_longer_than_a_row_takes_several():
    long = conversation("?", " ".join(SENTENCES), id="long")
    tokenizer, _, rows = rows_of("bpe", conversations=[long], length=50)
    assert len(rows) > 3
    pairs = rows[0].segments[0].pairs
    assert f"pairs 0-49 of {pairs}" in printed(rows[0], tokenizer)


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match="--row=99: there are 1 rows, from 0 on"):
        rows_of("bpe", length=16384, number=99)


def test_a_conversation_is_found_by_id_and_else_by_number(tmp_path):
    path = str(tmp_path / "chats.jsonl")
    write_jsonl(path, [*CHATS, conversation("no", "id"), conversation("a", "b", id="2")])
    assert find(path, "chat-3") == CHATS[3]
    assert find(path, "1") == CHATS[0]
    assert find(path, "2").messages[0].content == "a"
    with pytest.raises(InputError, match=r"no conversation 'chat-33' .* did you mean 'chat-3'"):
        find(path, "chat-33")
    assert read(path, limit=2) == CHATS[:2]


def test_the_command_prints_a_row(tmp_path, repository):
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, CHATS)
    tiny("bpe").save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "data_pipelines.inspect", f"--data={path}",
               f"--tokenizer={tmp_path / 'tokenizer'}"]  # fmt: skip
    run = subprocess.run(
        [*command, "--length=16384"], cwd=repository, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "row 0 of 1" in run.stdout
    assert "\x1b" not in run.stdout
    run = subprocess.run(
        [*command, "--conversation=chat-2", "--color=always"],
        cwd=repository, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "\x1b[32m" in run.stdout
    run = subprocess.run(
        [*command, "--conversation=nobody"], cwd=repository, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "no conversation 'nobody'" in run.stderr
