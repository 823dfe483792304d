"""Raw data: each format becomes conversations, and nothing vanishes without a count."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines import build as build_module
from data_pipelines.build import RECIPES, RawSource, build, clean, content_hash, table
from data_pipelines.sources import Dropped, alpaca, messages, sharegpt, xpersona, zh_or_en
from llmzoo_jax.conversation import KINDS, Conversation, Message, read_jsonl

ABOUT = {"kind": "conversation", "source": "test", "license": "CC0-1.0"}


def write(path, records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def turns(item):
    return [(message.role, message.content) for message in item.messages]


def chat(*contents, system=None, **fields):
    """A conversation of user and assistant, in turns."""
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    head = [] if system is None else [Message("system", system)]
    body = [Message(role, content) for role, content in zip(roles, contents, strict=True)]
    return Conversation(messages=(*head, *body), **fields)


# --- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [False, True])
def test_sharegpt_reads_lists_and_lines(tmp_path, lines):
    record = {"id": "7", "conversations": [
        {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}  # fmt: skip
    path = write(tmp_path / "chats.json", [record, record], lines)
    found = list(sharegpt.conversations(path, lang="en", **ABOUT))
    assert [turns(item) for item in found] == [[("user", "hi"), ("assistant", "hello")]] * 2
    assert [item.id for item in found] == ["chats.json:1", "chats.json:2"]
    assert found[0].lang == "en" and found[0].license == "CC0-1.0" and found[0].source == "test"


def test_sharegpt_reads_tool_calls_and_preferences(tmp_path):
    pairs = [("human", "2+2?"), ("function_call", "add"), ("observation", "4"), ("gpt", "Four.")]
    calls = [{"from": role, "value": text} for role, text in pairs]
    records = [
        {"conversations": calls, "tools": '[{"name": "add"}]'},
        {"conversations": calls, "tools": "[]"},
        {"conversations": calls[:1], "chosen": calls[3], "rejected": calls[1]},
    ]
    path = write(tmp_path / "x.json", records)
    called, plain, chosen = sharegpt.conversations(path, lang="en", **ABOUT)
    assert turns(plain) == [
        ("user", "2+2?"), ("assistant", "add"), ("tool", "4"), ("assistant", "Four.")
    ]  # fmt: skip
    assert turns(called) == [
        ("system", 'You can call these tools: [{"name": "add"}]'),
        *turns(plain),
    ]
    assert turns(chosen) == [("user", "2+2?"), ("assistant", "Four.")]


def test_alpaca_joins_instruction_and_input(tmp_path):
    records = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {
            "instruction": "你好",
            "input": "",
            "output": "好",
            "history": [["a", "b"]],
            "system": "s",
        },
    ]
    first, second = alpaca.conversations(
        write(tmp_path / "x.json", records), lang=zh_or_en, **ABOUT
    )
    assert turns(first) == [("user", "Add.\n2 2"), ("assistant", "4")] and first.lang == "en"
    assert turns(second) == [
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "你好"), ("assistant", "好")
    ]  # fmt: skip
    assert second.lang == "zh"


def test_messages_reads_content_parts_and_loss_weights(tmp_path):
    def part(role, text, key, **more):
        return {"role": role, "content": [{"type": "text", key: text}], **more}

    records = [
        {"messages": [part("user", "a", "value", loss_weight=0.0),
                      part("assistant", "b", "value", loss_weight=0.0),
                      part("user", "c", "text"),
                      part("assistant", "d", "text", loss_weight=1.0)]},
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "e"},
                      {"role": "assistant", "content": "f"}]},
    ]  # fmt: skip
    first, second = messages.conversations(write(tmp_path / "x.json", records), lang="en", **ABOUT)
    assert [m.train for m in first.messages] == [None, False, None, None]
    assert [m.content for m in first.messages] == list("abcd")
    assert turns(second) == [("system", "s"), ("user", "e"), ("assistant", "f")]


def test_xpersona_takes_the_language_from_the_file_name(tmp_path):
    record = {"persona": ["p", "q"], "dialogue": [["a", "b"], ["c", "d"]]}
    (found,) = xpersona.conversations(write(tmp_path / "Jp_persona_x.json", [record]), **ABOUT)
    assert found.lang == "ja"
    assert turns(found) == [
        ("system", "p\nq"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"x\.json: the name must start with one of En"):
        xpersona.conversations(str(tmp_path / "x.json"), **ABOUT)


@pytest.mark.parametrize(
    "read, record, reason",
    [
        (sharegpt, {"conversations": []}, "no turns"),
        (sharegpt, {"items": []}, "no turns"),
        (sharegpt, {"conversations": [{"from": "human"}]}, "no text"),
        (sharegpt, {"conversations": ["hi"]}, "not an object"),
        (sharegpt, {"conversations": [{"from": "bard", "value": "x"}]}, "unknown role"),
        (sharegpt, "no object", "not an object"),
        (alpaca, {"instruction": "x"}, "no text"),
        (alpaca, {"instruction": "x", "output": 4}, "no text"),
        (alpaca, {"instruction": "x", "output": "y", "history": [["a"]]}, "no text"),
        (messages, {"messages": [{"role": "critic", "content": "x"}]}, "unknown role"),
        (messages, {"messages": [{"role": "user", "content": None}]}, "no text"),
        (messages, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "unsupported content"),
        (messages, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
         "unsupported content"),
        (messages, {"messages": [{"role": "assistant", "content": "x", "loss_weight": 0.5}]},
         "unsupported loss_weight"),
        (messages, {"messages": [{"role": "user", "content": ["x"]}]}, "not an object"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_dropped_with_a_reason(tmp_path, read, record, reason):
    good = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "instruction": "a",
        "output": "b",
    }
    path = write(tmp_path / "x.json", [record, good], lines=True)
    dropped, kept = read.conversations(path, lang="en", **ABOUT)
    assert (dropped.where, dropped.reason) == ("x.json:1", reason)
    assert turns(kept) == [("user", "a"), ("assistant", "b")]


def test_a_broken_line_is_dropped_and_a_byte_order_mark_is_not_text(tmp_path):
    line = json.dumps({"instruction": "a", "output": "b"})
    path = tmp_path / "x.jsonl"
    path.write_text(f"\ufeff{line}\n\n{line[:-3]}\n{line}\n", encoding="utf-8")
    found = list(alpaca.conversations(str(path), lang="en", **ABOUT))
    assert [type(item) for item in found] == [Conversation, Dropped, Conversation]
    assert (found[1].where, found[1].reason) == ("x.jsonl:3", "not JSON")
    assert found[2].id == "x.jsonl:4"


def test_a_broken_list_names_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"instruction": "a", "output": "b"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        list(alpaca.conversations(str(path), lang="en", **ABOUT))


# --- cleaning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dirty, kept, reason",
    [
        (chat("a", "b"), 2, None),
        (chat("a", "b", system="s"), 3, None),
        (chat("a", "b", system=" "), 2, None),
        (chat("a", "b", "c"), 2, "trimmed"),
        (chat("a", "b", "c", " \n"), 2, "trimmed"),
        (chat("a", "b", "", "d", "e", "f"), 2, "trimmed"),
        (chat("a"), 0, "no answer"),
        (chat("a", system="s"), 0, "no answer"),
        (chat("", "b"), 0, "empty turn"),
        (chat("a", ""), 0, "empty turn"),
        (chat("a", "I am {{name}}."), 0, "placeholder"),
        (chat("a", "b</s>c"), 0, "special token"),
        (chat("a<unk>", "b", system="s"), 0, "special token"),
        (chat("a", "b", "<s>"), 2, "trimmed"),  # the bad turn is not kept anyway
        (chat("a", "b", "c {{ user }}", "d <sup>"), 4, None),
        (Conversation(messages=(Message("assistant", "a"),)), 0, "malformed"),
        (Conversation(messages=(*chat("a", "b").messages, Message("assistant", "c"))), 0,
         "malformed"),
        (chat("a", "\ud800"), 0, "malformed"),
    ],
)  # fmt: skip
def test_cleaning_keeps_what_can_be_trained_on_and_says_what_it_does_not(dirty, kept, reason):
    conversation, note = clean(dirty)
    assert (len(conversation.messages) if conversation else 0) == kept
    assert (note.reason if note else None) == reason


# --- building -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """Two sources of which the second repeats some of the first; the folder; what they hold."""
    raw = tmp_path / "raw" / "set"
    raw.mkdir(parents=True)
    records = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(300)]
    dirt = [{"instruction": "x", "output": ""}, {"instruction": "x"}]
    write(raw / "a.json", records + records[:20] + dirt)
    write(raw / "b_1.json", records[100:150], lines=True)
    write(raw / "b_2.json", [{"instruction": "other", "output": f"{i}"} for i in range(50)])
    row = {"read": alpaca.conversations, "about": {"lang": "en", **ABOUT}}
    return (RawSource("a", files="set/a.json", **row), RawSource("b", files="set/b_*.json", **row))


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir()}


def test_every_record_is_kept_or_counted(recipe, tmp_path):
    out = tmp_path / "out"
    a, b = build(recipe, shared=str(tmp_path / "raw"), out=str(out), heldout=0.1)
    assert (a.read, b.read) == (322, 100)
    assert a.dropped == {"duplicate": 20, "empty turn": 1, "no text": 1}
    assert b.dropped == {"duplicate": 50}
    for built in (a, b):
        assert built.read == len(built.train) + len(built.heldout) + built.dropped.total()
    lines = (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    notes = [json.loads(line) for line in lines]
    assert len(notes) == 72 and all(sorted(n) == ["detail", "reason", "where"] for n in notes)
    assert {"where": "b_1.json:1", "reason": "duplicate", "detail": "of a.json:101"} in notes
    lines = table([a, b]).splitlines()
    assert lines[1].split()[:6] == ["a", "322", "300", "0", str(len(a.train)), str(len(a.heldout))]
    assert lines[3].split()[:3] == ["all", "422", "350"]


def test_no_conversation_is_on_both_sides_and_a_tenth_is_held_out(recipe, tmp_path):
    build(recipe, shared=str(tmp_path / "raw"), out=str(tmp_path / "out"), heldout=0.1)
    sides = {
        side: {
            content_hash(c) for n in "ab" for c in read_jsonl(tmp_path / f"out/{n}.{side}.jsonl")
        }
        for side in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert len(sides["train"] | sides["heldout"]) == 350
    assert 0.06 < len(sides["heldout"]) / 350 < 0.14


def test_the_side_depends_on_the_text_alone(recipe, tmp_path):
    both, one = tmp_path / "both", tmp_path / "one"
    build(recipe, shared=str(tmp_path / "raw"), out=str(both), heldout=0.1)
    build(recipe[1:], shared=str(tmp_path / "raw"), out=str(one), heldout=0.1)
    held = {content_hash(c) for n in "ab" for c in read_jsonl(both / f"{n}.heldout.jsonl")}
    assert {content_hash(c) for c in read_jsonl(one / "b.heldout.jsonl")} <= held


def test_building_again_writes_the_same_files(recipe, tmp_path):
    def run(heldout):
        build(recipe, shared=str(tmp_path / "raw"), out=str(tmp_path / "out"), heldout=heldout)
        return digests(tmp_path / "out")

    first = run(0.1)
    assert sorted(first) == ["a.heldout.jsonl", "a.train.jsonl", "b.heldout.jsonl", "b.train.jsonl",
                             "dropped.jsonl"]  # fmt: skip
    assert sorted(run(0.0)) == ["a.train.jsonl", "b.train.jsonl", "dropped.jsonl"]
    assert run(0.1) == first


def test_what_is_missing_or_wrong_is_named(recipe, tmp_path):
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere: no such folder; .* raw data, in set$"):
        build(recipe, shared="nowhere", out=out, heldout=0.1)
    (tmp_path / "raw/set/a.json").unlink()
    with pytest.raises(ValueError, match=r"it has no set/a\.json"):
        build(recipe, shared=raw, out=out, heldout=0.1)
    with pytest.raises(ValueError, match=r"--heldout=1\.5"):
        build(recipe, shared=raw, out=out, heldout=1.5)


def test_the_command_explains_itself():
    def run(*args):
        command = [sys.executable, "-m", "data_pipelines.build", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)

    shown = run("--help").stdout
    assert "--recipe" in shown and "--heldout" in shown and "dropped.jsonl" in shown
    failed = run("--shared=nowhere")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "--shared=nowhere: no such folder" in failed.stderr


# --- real data ----------------------------------------------------------------------------------

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY / "../shared/data"


@pytest.mark.parametrize("row", RECIPES["real"], ids=lambda row: row.name)
def test_recipes_have_a_kind_a_source_and_a_licence(row):
    assert row.about["kind"] in KINDS and row.about["source"] and row.about["license"]
    assert "lang" in row.about or row.read is xpersona.conversations


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_the_real_data_is_read_whole(tmp_path):
    result = build(RECIPES["real"], shared=str(SHARED), out=str(tmp_path), heldout=0.1)
    by_name = {built.name: built for built in result}
    assert {name: built.read for name, built in by_name.items()} == {
        "sharegpt_zh": 1000, "alpaca_en": 999, "alpaca_zh": 1000, "identity": 91, "v1_sft": 500,
        "glaive_en": 300, "glaive_zh": 300, "dpo_zh": 300, "xpersona": 2670, "fastchat_dummy": 500,
    }  # fmt: skip
    for built in result:
        kept = len(built.train) + len(built.heldout)
        assert built.read == kept + built.dropped.total()
        assert 0.05 < len(built.heldout) / kept < 0.2
        for side in ("train", "heldout"):  # and what is written can be read
            written = list(read_jsonl(tmp_path / f"{built.name}.{side}.jsonl"))
            assert len(written) == len(getattr(built, side))
    assert by_name["alpaca_en"].dropped == {"duplicate": 14}
    assert by_name["alpaca_zh"].dropped == {"duplicate": 8}
    assert by_name["sharegpt_zh"].dropped == {"no answer": 1}
    assert by_name["sharegpt_zh"].trimmed == 7
    assert Counter(by_name["xpersona"].languages()) == {
        "en": 1000, "id": 484, "ko": 300, "ja": 275, "fr": 249, "zh": 222, "it": 140
    }  # fmt: skip
    assert build_module.table(result).count("\n") == len(result) + 1
