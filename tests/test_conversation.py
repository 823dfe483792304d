"""Conversations: what is malformed says where; training and serving have one text."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmzoo_jax.conversation import (
    FORMATS,
    KINDS,
    ChatFormat,
    Conversation,
    ConversationError,
    Message,
    check_messages,
    from_dict,
    read_jsonl,
    render,
    to_dict,
    write_jsonl,
)

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


@st.composite
def conversations(draw, tools=False):
    """Any conversation that `check_messages` accepts."""
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(texts)))
        while tools and draw(st.booleans()):
            messages.append(Message("assistant", draw(texts), draw(st.sampled_from([None, False]))))
            messages.append(Message("tool", draw(texts)))
        messages.append(Message("assistant", draw(texts), draw(st.sampled_from([None, True]))))
    names = {name: draw(st.text(st.characters(codec="utf-8"))) for name in ("id", "lang", "source")}
    return Conversation(messages=tuple(messages), kind=draw(st.sampled_from(KINDS)), **names)


def text_of(segments, train=None):
    return "".join(s.text for s in segments if train is None or s.train == train)


# --- reading and writing ------------------------------------------------------------------------


@given(conversations(tools=True))
def test_json_round_trip(conversation):
    record = json.loads(json.dumps(to_dict(conversation)))
    assert from_dict(record, where="x") == conversation


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([], "expected an object, not list"),
        ({}, "empty conversation"),
        ({"messages": []}, "empty conversation"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": [USER, ANSWER], "kinds": "x"}, "unknown key 'kinds'; did you mean 'kind'?"),
        ({"messages": [USER, ANSWER], "zzz": "x"}, "unknown key 'zzz'; there are messages, id"),
        ({"messages": [USER, ANSWER], "kind": "chat"}, "unknown kind 'chat'; use one of multi"),
        ({"messages": [USER, ANSWER], "id": 3}, "'id' must be a string, not int"),
        ({"messages": ["hi"]}, "turn 1: expected an object, not str"),
        ({"messages": [{"content": "hi"}]}, "turn 1 has no 'role'"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no 'content'"),
        ({"messages": [USER | {"name": "x"}]}, "turn 1: unknown key 'name'"),
        ({"messages": [USER, ANSWER | {"train": 1}]}, "turn 2: 'train' must be true or false"),
        ({"messages": [USER | {"train": True}, ANSWER]}, "turn 1 (user): only assistant turns"),
        ({"messages": [{"role": "human", "content": "x"}]}, "use one of system, user, assistant"),
        ({"messages": [USER, ANSWER | {"content": " \n"}]}, "turn 2 (assistant): empty content"),
        ({"messages": [USER, ANSWER | {"content": None}]}, "turn 2 (assistant): content must be a"),
        ({"messages": [USER, ANSWER | {"content": "\ud83d"}]}, "turn 2 (assistant): the text has"),
        ({"messages": [ANSWER]}, "turn 1 (assistant): the first turn must be the user's"),
        ({"messages": [USER, USER, ANSWER]}, "turn 2 (user): the user's turn follows the user's"),
        ({"messages": [USER, ANSWER, ANSWER]}, "turn 3 (assistant): the assistant's turn follows"),
        ({"messages": [USER, ANSWER, USER]}, "turn 3 (user): the conversation ends without"),
        ({"messages": [USER, ANSWER, {"role": "system", "content": "x"}]}, "turn 3 (system): a sy"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "turn 2 (tool): the tool's turn"),
        ({"messages": [USER, ANSWER | {"train": False}]}, "no turn is trained"),
    ],
)
def test_a_malformed_record_is_an_error_that_names_the_place_and_the_turn(record, says):
    with pytest.raises(ConversationError) as error:
        from_dict(record, where="data.jsonl:7")
    assert str(error.value).startswith("data.jsonl:7: ") and says in str(error.value)


def test_unhashable_and_odd_roles_are_named():
    for role in (["user"], None, 3):
        record = {"messages": [{"role": role, "content": "x"}]}
        with pytest.raises(ConversationError, match="unknown role"):
            from_dict(record, where="x")


def test_a_prompt_must_end_where_the_model_speaks():
    check_messages([Message("user", "x")], generation_prompt=True)
    with pytest.raises(ConversationError, match=r"turn 2 \(assistant\): the last message must be"):
        check_messages([Message("user", "x"), Message("assistant", "y")], generation_prompt=True)


def test_jsonl_round_trip_and_atomic_writing(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    written = [from_dict({"id": str(i), "messages": [USER, ANSWER]}, where="x") for i in range(3)]
    assert write_jsonl(path, iter(written)) == 3
    assert list(read_jsonl(path)) == written

    def broken():
        yield written[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert list(read_jsonl(path)) == written
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


LINE = json.dumps({"messages": [USER, ANSWER]}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ": no conversation in this file"),
        (b"\n \n", ": no conversation in this file"),
        (LINE + b'\n{"messages": [}\n', ":2: not JSON: Expecting value (line 2, column 15)"),
        (LINE + b"\n\n" + LINE[:30], ":3: not JSON: "),
        (LINE + b'\n{"id": "\xff"}', ":2: not UTF-8 at byte 9"),
        (LINE + b"\n[1]\n", ":2: expected an object, not list"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConversationError) as error:
        list(read_jsonl(path))
    assert str(error.value).startswith(f"{path}{says}")


def test_a_missing_file_is_an_error_that_says_what_to_give(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConversationError, match="give the path of a JSON Lines file"):
            next(read_jsonl(path))


def test_reading_takes_a_byte_order_mark_windows_lines_and_line_separators_in_text(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(
        {"messages": [USER, ANSWER | {"content": "a\u2028b\x85c"}]}, ensure_ascii=False
    )
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + LINE + b"\r\n")
    first, second = read_jsonl(path)
    assert first.messages[1].content == "a\u2028b\x85c" and second.messages[1].content == "hello"


def test_reading_streams(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + b"\nbroken\n")
    assert next(read_jsonl(path)).messages[1].content == "hello"


# --- formats ------------------------------------------------------------------------------------

SYSTEM = Message("system", "Be kind.")
TURNS = [Message("user", "A"), Message("assistant", "B"), Message("user", "C")]
PHOENIX = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the human's questions.\n\n"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives"
    " helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = (
    "Below is an instruction that describes a task."
    " Write a response that appropriately completes the request.\n\n"
)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


# What each format's publisher writes; [ ] stand around what is trained.
PUBLISHED = {
    "phoenix": (PHOENIX, "Human: <s>A</s>Assistant: [<s>B</s>]Human: <s>C</s>Assistant: <s>"),
    "alpaca": (
        ALPACA,
        "### Instruction:\nA\n\n### Response:[B</s>]\n\n### Instruction:\nC\n\n### Response:",
    ),
    "vicuna": (VICUNA, "USER: A ASSISTANT:[ B</s>]USER: C ASSISTANT:"),
    "llama-2": ("", "<s>[INST] A [/INST]{ B </s>}<s>[INST] C [/INST]"),
    "llama-3": (
        "",
        f"{header('user')}A<|eot_id|>{header('assistant')}[B<|eot_id|>]{header('user')}C<|eot_id|>"
        f"{header('assistant')}",
    ),
    "chatml": (
        "",
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n[B<|im_end|>]\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n",
    ),
}
WITH_SYSTEM = {
    "phoenix": "Be kind.\n\nHuman: <s>A</s>",
    "alpaca": "Be kind.\n\n### Instruction:\nA\n\n",
    "vicuna": "Be kind. USER: A ",
    "llama-2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nA [/INST]",
    "llama-3": f"{header('system')}Be kind.<|eot_id|>{header('user')}A<|eot_id|>",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_writes_what_its_publisher_writes(name):
    system, expected = PUBLISHED[name]
    opening, closing = "{}" if name == "llama-2" else "[]"
    segments = render(TURNS, FORMATS[name], generation_prompt=True)
    shown = "".join(opening + s.text + closing if s.train else s.text for s in segments)
    assert shown == system + expected
    given_system = text_of(render([SYSTEM, TURNS[0]], FORMATS[name]))
    assert given_system == WITH_SYSTEM[name]


@given(conversations(), st.sampled_from(sorted(FORMATS)))
def test_the_text_before_every_answer_is_the_text_that_is_served(conversation, name):
    messages, chat_format = conversation.messages, FORMATS[name]
    whole = text_of(render(messages, chat_format))
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = text_of(render(messages[:turn], chat_format, generation_prompt=True))
            assert whole.startswith(prompt)
            answered = text_of(render(messages[: turn + 1], chat_format))
            assert whole.startswith(answered) and answered.startswith(prompt)
            rest = answered.removeprefix(prompt)
            content = message.content.strip() if chat_format.strip else message.content
            assert rest.strip(" ").startswith(content.strip(" "))
            assert any(stop in rest.removeprefix(content) for stop in chat_format.stop)


@given(conversations(tools=True), st.sampled_from(["llama-3", "chatml"]))
def test_exactly_the_trained_answers_and_their_ends_are_trained(conversation, name):
    chat_format = FORMATS[name]
    contents = [m.content for m in conversation.messages if m.trained]
    contents = [c.strip() if chat_format.strip else c for c in contents]
    expected = "".join(content + chat_format.stop[0] for content in contents)
    assert text_of(render(conversation.messages, chat_format), train=True) == expected


def test_a_turn_that_the_format_lacks_is_an_error_that_names_it():
    tool = [*TURNS[:2], Message("tool", "42"), Message("assistant", "B")]
    with pytest.raises(ConversationError, match="phoenix cannot write a turn of the tool"):
        render(tool, FORMATS["phoenix"])
    with pytest.raises(ConversationError, match="llama-2 cannot write a turn of the assistant"):
        render([SYSTEM, TURNS[1]], FORMATS["llama-2"])


def test_a_format_whose_parts_disagree_is_refused():
    phoenix = dataclasses.asdict(FORMATS["phoenix"])
    for change in ({"prompt": "AI: "}, {"trained": ("<x>", "")}, {"trained": ("", "<x>")}):
        with pytest.raises(ValueError, match="phoenix: prompt, trained and assistant disagree"):
            ChatFormat(**phoenix | change)


def test_only_the_standard_library_is_imported():
    code = (
        "import sys; before = set(sys.modules); import llmzoo_jax.conversation;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'llmzoo_jax'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
