"""What a terminal shows of an answer: lines that fit and cut no grapheme, blocks as they come, no
control characters; and how messages are read."""

import io
import itertools
import sys

import pytest
import regex
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from serving.terminal import LABEL, Drawn, Plain, printable, read_message
from serving.terminal_markdown import Markdown, split_finished, wrap

SCRIPTS = {
    "English": "The quick brown fox jumps over the lazy dog, twice.",
    "Chinese": "今天天气很好，我们去公园散步吧。然后“回家”吃饭。",
    "Japanese": "今日はとても天気がいいので、公園へ行きましょう。",
    "Korean": "오늘은 날씨가 좋아서 공원에 가고 싶습니다.",
    "Thai": "สวัสดีครับวันนี้อากาศดีมากน้ำใจดีที่สุดในโลก",
    "Arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "Persian": "می‌خواهم به خانه بروم و کتاب بخوانم.",
    "Hebrew": "שלום עולם, מה שלומך היום?",
    "Hindi": "नमस्ते दुनिया, आज मौसम बहुत अच्छा है।",
    "emoji": "👩‍👩‍👧‍👦🇫🇷🇩🇪👍🏽 family 👩‍🚀 flags 🏳️‍🌈 e\u0301e\u0301",
}


@pytest.mark.parametrize("language", SCRIPTS)
@pytest.mark.parametrize("width", [3, 7, 20, 200])
def test_lines_fit_and_cut_no_grapheme_and_lose_only_spaces(language, width):
    text = SCRIPTS[language]
    lines = [line.plain for line in wrap(Text(text), width)]
    assert all(cell_len(line) <= width for line in lines)
    joined = list(itertools.chain.from_iterable(regex.findall(r"\X", line) for line in lines))
    expected = [one for one in regex.findall(r"\X", text) if not one.isspace()]
    assert [one for one in joined if not one.isspace()] == expected


def test_lines_end_between_words_and_never_begin_with_a_full_stop():
    lines = [line.plain for line in wrap(Text("hello big world"), 9)]
    assert lines == ["hello big", "world"]
    lines = [line.plain for line in wrap(Text("天气很好。去吧"), 8)]
    assert lines == ["天气很", "好。去吧"]


TEXT = """# Title

A paragraph
of two lines with <b>HTML</b>.

- one
- two

  more of two

```python
print(1)

print(2)
```

| a | b |
|---|---|
| 1 | 2 |

The end"""


@pytest.mark.parametrize("size", [1, 3, 7])
def test_blocks_that_are_finished_never_change(size):
    """However the text comes, its finished blocks and the rest are the text, in order."""
    rest, finished = "", []
    for at in range(0, len(TEXT), size):
        done, rest = split_finished(rest + TEXT[at : at + size])
        finished += [done] if done else []
    assert "\n".join([*finished, rest]) == TEXT
    assert len(finished) == 4  # the table may go on
    assert any(block.count("print") == 2 for block in finished)


def drawn(text, width=60):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(Markdown(text))
    return console.file.getvalue()


def test_markdown_keeps_lines_and_html():
    shown = drawn(TEXT)
    assert "A paragraph" in shown.splitlines()[2]
    assert "of two lines with <b>HTML</b>." in shown.splitlines()[3]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_terminal_ends_with_the_whole_answer_drawn_once(size):
    console = Console(file=io.StringIO(), width=60, height=12, color_system=None)
    screen = Drawn(console)
    screen.begin()
    for at in range(0, len(TEXT), size):
        screen.show(TEXT[at : at + size])
        screen.split_at = 0.0  # as if time had passed
    screen.end(" (stopped)")
    words = console.file.getvalue().split()
    assert words[0] == LABEL.strip()
    for word in ("Title", "paragraph", "print(1)", "print(2)", "end", "(stopped)"):
        assert words.count(word) == 1, word


def test_plain_text_comes_in_whole_graphemes_and_all_of_it(capsys, monkeypatch):
    text = "".join(SCRIPTS.values())
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", lambda piece: pieces.append(piece))
    screen = Plain()
    screen.begin()
    for character in text:
        screen.show(character)
    screen.end("")
    monkeypatch.undo()
    shown = "".join(pieces)
    assert shown == f"{LABEL}{text}\n"
    ends = set(itertools.accumulate(map(len, regex.findall(r"\X", f"{LABEL}{text}\n"))))
    assert set(itertools.accumulate(map(len, filter(None, pieces)))) <= ends


def test_an_answer_cannot_control_the_terminal():
    assert printable("a\x1b[2Jb\r\x07\x9bc\td\n") == "a[2Jbc\td\n"
    joined = "می‌خواهم 👩‍🚀 \u200f"
    assert printable(joined) == joined


def test_a_backslash_continues_a_message_on_the_next_line():
    lines, prompts = ["one\\", "two \\", "three"], []

    def ask(prompt):
        prompts.append(prompt)
        return lines.pop(0)

    assert read_message(ask) == "one\ntwo \nthree"
    assert prompts == ["you: ", "...: ", "...: "]
