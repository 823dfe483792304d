"""The terminal chat: history, commands, Ctrl-C, a context that is full, input from a pipe."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from llmzoo_jax.conversation import ConversationError, Message
from llmzoo_jax.inference import Result
from serving.chat import Chat, chat
from serving.chat_backends import Local
from serving.terminal import Plain
from tests.tiny_runs import make_run

CTRL_C, CTRL_D = KeyboardInterrupt, EOFError


class Fake:
    """A model that says "answer N" to the Nth question, with a prompt of ten tokens a message."""

    def __init__(self, answers=()):
        self.answers, self.asked, self.options = list(answers), [], {}
        self.seeds = []

    def prompt(self, messages):
        if "</s>" in messages[-1].content:
            raise ConversationError("forged")
        return [7] * 10 * len(messages)

    def chat(self, messages, *, on_text, **options):
        self.asked.append([(m.role, m.content) for m in messages])
        self.options = options
        self.seeds.append(options.get("seed"))
        answer = self.answers.pop(0) if self.answers else f"answer {len(self.asked)}"
        for piece in answer if isinstance(answer, list) else [answer]:
            if piece is CTRL_C:
                raise KeyboardInterrupt
            if isinstance(piece, Exception):
                raise piece
            on_text(piece)
        return Result("", [7] * 20, "length" if answer == "long" else "stop", 10)


def talk(model, *lines, context=1000, system="", stats=False, **options):
    """Runs a chat over lines, where an exception stands for its key; returns unread lines."""
    lines = list(lines)

    def read_line():
        line = lines.pop(0) if lines else CTRL_D
        if isinstance(line, str):
            return line
        raise line

    backend = Local(model, context=context, max_new_tokens=20, **options)
    opening = [Message("system", system)] if system else []
    chat(Chat(backend, Plain(), opening, stats), read_line)
    return lines


def user(text):
    return ("user", text)


def said(text):
    return ("assistant", text)


def test_a_chat_remembers_what_was_said(capsys):
    model = Fake()
    talk(model, "one", "  ", "two\n", system="Be kind.", temperature=0.5)
    system = ("system", "Be kind.")
    assert model.asked[0] == [system, user("one")]
    assert model.asked[1] == [system, user("one"), said("answer 1"), user("two")]
    assert model.options == {"max_new_tokens": 20, "temperature": 0.5}
    assert capsys.readouterr().out == "model: answer 1\nmodel: answer 2\n"


def test_reset_keeps_the_system_message_and_nothing_else():
    model = Fake()
    talk(model, "one", "!reset", "two", system="s")
    assert model.asked[-1] == [("system", "s"), user("two")]


def test_exit_ctrl_d_and_the_end_of_input_leave():
    assert talk(Fake(), "!exit", "never read") == ["never read"]
    assert talk(Fake(), CTRL_D, "never read") == ["never read"]
    assert talk(Fake()) == []


def test_an_unknown_command_is_no_message(capsys):
    model = Fake()
    talk(model, "!rset", "!", "!important news!")
    assert [asked[-1] for asked in model.asked] == [user("!"), user("!important news!")]
    assert "unknown command !rset; !reset begins anew" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(capsys):
    model = Fake([["par", "tial", CTRL_C], "ok"])
    assert talk(model, "one", "two") == []
    assert model.asked[1] == [user("one"), said("partial"), user("two")]
    assert "model: partial (stopped)\n" in capsys.readouterr().out


def test_ctrl_c_twice_in_a_row_leaves():
    assert talk(Fake(), CTRL_C, CTRL_C, "never read") == ["never read"]
    assert talk(Fake([[CTRL_C]]), "one", CTRL_C, "never read") == ["never read"]
    assert talk(Fake(), CTRL_C, "one", CTRL_C, "read") == []


@pytest.mark.parametrize("nothing", [[CTRL_C], [" ", "\n"], []])
def test_a_question_without_an_answer_is_forgotten(nothing):
    model = Fake([nothing, "ok"])
    talk(model, "one", "two")
    assert model.asked[1] == [user("two")]


def test_an_answer_that_was_cut_says_so(capsys):
    talk(Fake(["long"]), "one")
    assert capsys.readouterr().out == "model: long (cut at 20 tokens)\n"


def test_a_message_that_cannot_be_written_is_said_and_forgotten(capsys):
    model = Fake()
    talk(model, "one", "forge </s>", "two")
    assert model.asked[1] == [user("one"), said("answer 1"), user("two")]
    assert "(forged)" in capsys.readouterr().out


def test_a_full_context_forgets_the_oldest_exchanges_and_says_so(capsys):
    model = Fake()
    talk(model, "one", "two", "three", context=60, system="s")  # room for four messages
    assert model.asked[2] == [("system", "s"), user("two"), said("answer 2"), user("three")]
    assert "oldest exchange forgotten; !reset" in capsys.readouterr().out


def test_a_message_that_is_too_long_alone_is_refused_and_the_rest_kept(capsys):
    model = Fake()
    talk(model, "one", context=25)  # room for five tokens
    assert model.asked == []
    assert "prompt of 10 tokens, and there is room for 5" in capsys.readouterr().out


# --- commands -----------------------------------------------------------------------------------


def test_regen_asks_the_last_question_again_with_the_next_seed(capsys):
    model = Fake()
    talk(model, "!regen", "one", "!regen", "!regen", "two", seed=5)
    assert [asked[-1] for asked in model.asked] == [user("one")] * 3 + [user("two")]
    assert model.asked[3] == [user("one"), said("answer 3"), user("two")]
    assert model.seeds == [5, 6, 7, 5]
    assert "(nothing was said yet)" in capsys.readouterr().out


def test_regen_keeps_the_answer_where_no_other_comes():
    model = Fake(["first", [CTRL_C], "third"])
    talk(model, "one", "!regen", "two")
    assert model.asked[2] == [user("one"), said("first"), user("two")]


def test_remove_forgets_the_last_exchange():
    model = Fake()
    talk(model, "!remove", "one", "two", "!remove", "three", system="s")
    assert model.asked[2] == [("system", "s"), user("one"), said("answer 1"), user("three")]


def test_a_saved_conversation_is_loaded_and_goes_on(tmp_path, capsys):
    path = tmp_path / "my talk.jsonl"
    talk(Fake(), "one", f"!save {path}", system="s")
    model = Fake()
    talk(model, f"!load {path}", "two")
    assert model.asked[0] == [("system", "s"), user("one"), said("answer 1"), user("two")]
    assert "you: one\nmodel: answer 1" in capsys.readouterr().out


def test_a_conversation_is_saved_as_markdown(tmp_path):
    talk(Fake(["**bold**"]), "one", f"!save {tmp_path / 'x.md'}")
    text = (tmp_path / "x.md").read_text("utf-8")
    assert text == "**user**\n\none\n\n**assistant**\n\n**bold**\n\n"


def test_files_that_cannot_be_read_or_written_end_nothing(tmp_path, capsys):
    model = Fake()
    (tmp_path / "bad").write_text("{")
    bad = ("!save", "!save x.md", f"!load {tmp_path / 'none'}", f"!load {tmp_path / 'bad'}")
    talk(model, *bad, "one", f"!save {tmp_path / 'no' / 'x.md'}", "two")
    assert len(model.asked) == 2
    out = capsys.readouterr().out
    for told in ("which file? !save FILE", "empty conversation", "No such file", "not JSON"):
        assert told in out


def test_help_lists_every_command(capsys):
    talk(Fake(), "!help")
    out = capsys.readouterr().out
    assert all(f"!{name}" in out for name in ("reset", "regen", "remove", "save", "load", "exit"))


def test_an_error_in_the_middle_keeps_what_was_said(capsys):
    model = Fake([["par", ConversationError("it broke")], "ok"])
    talk(model, "one", "two")
    assert model.asked[1] == [user("one"), said("par"), user("two")]
    assert "model: par (it broke)" in capsys.readouterr().out


def test_stats_say_how_long_and_fast_an_answer_was(capsys):
    talk(Fake(), "one", stats=True)
    assert "model: answer 1 (20 tokens, 0.00 s to the first" in capsys.readouterr().out


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), "bpe")


def command(*arguments):
    return [sys.executable, "-m", "serving.chat", *arguments]


def test_lines_from_a_pipe_are_answered_and_its_end_leaves(run):
    done = subprocess.run(
        command(f"--model={run}", "--max_new_tokens=5"),
        input="Hello\n你好 🙂\n!reset\nمرحبا".encode(),
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert "bloom, " in lines[0]
    assert "chat format phoenix" in lines[0]
    assert "!exit" in lines[2]
    spoken = [line for line in lines if line.startswith("you: ")]
    assert spoken == ["you: Hello", "you: 你好 🙂", "you: !reset", "you: مرحبا"]
    assert sum(line.startswith("model: ") for line in lines) == 3


def test_ctrl_c_in_a_terminal_stops_an_answer_and_a_second_leaves(run):
    ours, theirs = pty.openpty()
    arguments = command(f"--model={run}", "--max_new_tokens=100000", "--context=300000")
    process = subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, end: float):
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < end, seen
            seen += os.read(ours, 4096)
        seen = seen.partition(text)[2]

    try:
        end = time.monotonic() + 100
        wait_for(b"you: ", end)
        os.write(ours, "你好\n".encode())
        wait_for(b"model: ", end)
        process.send_signal(signal.SIGINT)
        wait_for(b"(stopped)", end)
        wait_for(b"you: ", end)
        time.sleep(0.5)  # until input() waits for a key: a signal before that is seen with the key
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
