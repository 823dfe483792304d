"""The numbers of a report are those of the data, and its page stands on its own."""

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from data_pipelines import language
from data_pipelines.report import count_dropped, measure, page, read_identification, write
from llmzoo_jax.conversation import Message, write_jsonl
from llmzoo_jax.errors import InputError
from llmzoo_jax.packing import plan
from llmzoo_jax.tokenizer import encode, resolve_format
from tests.tiny_tokenizers import SENTENCES, conversation, tiny

LENGTH = 100
ENGLISH, CHINESE, ARABIC = SENTENCES[0], SENTENCES[1], SENTENCES[5]


def chats():
    about = {"kind": "conversation", "source": "web", "license": "CC0-1.0"}
    own = {"kind": "user_centered_instruction", "source": "own <b>&", "license": ""}
    return [
        conversation(ENGLISH, "Yes.", id="en-1", lang="en", **about),
        conversation(ENGLISH, "Yes.", id="en-2", lang="en", **own),  # the same text
        conversation(ENGLISH, ENGLISH, "And?", ENGLISH, id="en-3", lang="en", **about),
        conversation(CHINESE, CHINESE * 4, id="zh-1", lang="zh", **about),
        conversation(ARABIC, ARABIC, id="ar-1", lang="ar", **own),
        conversation("?", "a </s> b", id="bad-1", lang="en", **about),
        conversation("?", "b </s> c", "?", "d", id="bad-2", lang="en", **about),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_jsonl(folder / "a.jsonl", chats()[:4])
    write_jsonl(folder / "b.jsonl", chats()[4:])
    (folder / "dropped.jsonl").write_text(
        '{"where": "x:1", "reason": "no answer", "detail": "d1"}\n'
        '{"where": "x:2", "reason": "duplicate", "detail": "d2"}\n'
        '{"where": "x:3", "reason": "no answer", "detail": "d3"}\n'
    )
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    tokenizer = tiny("bpe")
    chat_format = resolve_format("phoenix", tokenizer)
    measured = measure(paths, tokenizer=tokenizer, chat_format=chat_format, length=LENGTH)
    about = {"data": paths, "tokenizer": "tiny", "format": "phoenix", "length": LENGTH}
    dropped = count_dropped([str(folder / "dropped.jsonl")])
    return {"about": about} | measured | {"dropped": dropped}


@pytest.fixture(scope="module")
def examples():
    tokenizer = tiny("bpe")
    chat_format = resolve_format("phoenix", tokenizer)
    return {
        c.id: encode(c, tokenizer=tokenizer, chat_format=chat_format)
        for c in chats()
        if "bad" not in c.id
    }


def test_tokens_and_loss_tokens_are_those_of_training(report, examples):
    total = report["total"]
    assert total["conversations"] == 7
    assert total["tokens"] == sum(len(e.tokens) for e in examples.values())
    assert total["loss_tokens"] == sum(int(e.loss_mask[1:].sum()) for e in examples.values())
    assert report["by"]["language"]["zh"]["tokens"] == len(examples["zh-1"].tokens)


@pytest.mark.parametrize("axis", ["language", "kind", "source", "license", "file"])
def test_the_parts_of_every_axis_add_up_to_the_total(report, axis):
    for name, number in report["total"].items():
        if isinstance(number, int):
            assert sum(part[name] for part in report["by"][axis].values()) == number


def test_fertility_is_of_the_text_alone(report):
    tokens = len(tiny("bpe")(ARABIC, add_special_tokens=False).input_ids)
    arabic = report["by"]["language"]["ar"]
    assert arabic["tokens_a_character"] == pytest.approx(tokens / len(ARABIC))
    assert arabic["tokens_a_byte"] == pytest.approx(tokens / len(ARABIC.encode()))


def test_truncation_counts_what_a_row_cuts_off(report, examples):
    cut = [e for e in examples.values() if len(e.tokens) > LENGTH + 1]
    total = report["total"]
    assert cut
    assert total["overlong"] == len(cut)
    assert total["lost_tokens"] == sum(len(e.tokens) - LENGTH - 1 for e in cut)
    assert total["lost_loss_tokens"] == sum(int(e.loss_mask[LENGTH + 1 :].sum()) for e in cut)
    assert report["packing"]["truncate"]["lost"] == total["lost_tokens"]


def test_packing_is_that_of_training(report, examples):
    lengths = [len(e.tokens) for e in examples.values()]
    expected = plan(lengths, sequence_length=LENGTH, overlong="split").report
    assert report["packing"]["split"]["efficiency"] == expected.efficiency
    assert report["packing"]["split"]["lost"] == 0
    assert report["lengths"]["quantiles"]["most"] == max(lengths)
    assert sum(b["conversations"] for b in report["lengths"]["histogram"]) == len(lengths)
    for length in lengths:
        assert any(b["from"] <= length <= b["to"] for b in report["lengths"]["histogram"])


def test_duplicates_are_found_across_sources(report):
    assert report["total"]["duplicates"] == 1
    assert report["duplicates"]["examples"] == [
        {"where": "a.jsonl: en-2", "first": "a.jsonl: en-1"}
    ]
    assert report["by"]["source"]["own <b>&"]["duplicates"] == 1


def test_what_cannot_be_encoded_is_counted_by_reason_and_in_no_tokens(report):
    [(reason, found)] = report["unencodable"].items()
    assert "special token" in reason
    assert found["count"] == report["total"]["unencodable"] == 2
    assert "bad-1" in found["example"]
    assert any("2 of 7 conversations cannot be encoded" in text for text in report["attention"])
    assert any("2 of 7 conversations name no licence" in text for text in report["attention"])


def test_dropped_records_are_counted_by_reason(report, tmp_path):
    [counts] = report["dropped"].values()
    assert {reason: one["count"] for reason, one in counts.items()} == {
        "no answer": 2,
        "duplicate": 1,
    }
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"reason": "x"}\n{"why": 1}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: not an object with 'reason'"):
        count_dropped([str(bad)])


class Tags(HTMLParser):
    """Opens and closes in order, and refers to nothing elsewhere."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.refers = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self.refers += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file_and_well_formed(report):
    html = page(report)
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    assert not tags.refers
    assert not re.search(r"url\(|@import|https?:", html)
    assert "prefers-color-scheme: dark" in html
    assert {t for t, _ in tags.seen} & {"script", "iframe", "object"} == set()


def test_the_page_has_the_text_of_the_data_as_text(report):
    """Escaped, isolated from its surroundings, and in its own direction."""
    html = page(report)
    assert "own &lt;b&gt;&amp;" in html
    assert "<b>&" not in html
    assert "<bdi>own" in html
    assert '<div dir="auto" lang="ar">' in html
    assert f"<mark>&lt;s&gt;{ARABIC}&lt;/s&gt;</mark>" in html
    assert not re.search(
        r"(?:margin|padding|border)-(?:left|right)|text-align: ?(?:left|right)", html
    )


def test_a_report_of_nothing_that_can_be_encoded_says_so(tmp_path):
    tool = conversation("?", "!", id="t")
    tool = type(tool)(messages=(*tool.messages[:1], Message("assistant", "</s>")), id="t")
    write_jsonl(tmp_path / "a.jsonl", [tool])
    tokenizer = tiny("bpe")
    chat_format = resolve_format("phoenix", tokenizer)
    measured = measure([str(tmp_path / "a.jsonl")], tokenizer=tokenizer, chat_format=chat_format,
                       length=10)  # fmt: skip
    about = {"data": [], "tokenizer": "", "format": "phoenix", "length": 10}
    write({"about": about, "dropped": {}} | measured, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "1 of 1 conversations cannot be encoded" in html


def test_the_command_writes_page_numbers_and_figures(tmp_path, repository):
    write_jsonl(tmp_path / "a.jsonl", chats()[:5])
    tiny("bpe").save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_pipelines.report", f"--data={tmp_path}/*.jsonl",
               f"--tokenizer={tmp_path / 'tokenizer'}", "--length=100", f"--out={out}"]  # fmt: skip
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "5 conversations in 3 languages" in run.stdout
    names = {
        "report.html",
        "report.json",
        "languages.png",
        "fertility.png",
        "groups.png",
        "lengths.png",
    }
    assert {path.name for path in out.iterdir()} == names
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names if ".png" in name)
    assert json.loads((out / "report.json").read_text("utf-8"))["total"]["conversations"] == 5
    run = subprocess.run([*command[:3], f"--data={tmp_path}/none.jsonl", *command[4:]],
                         cwd=repository, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 1
    assert "error: " in run.stderr


def test_the_accuracy_of_language_identification_is_in_the_report(report, tmp_path):
    sentences = ["Съешь же ещё этих мягких французских булок, да выпей чаю."] * 10
    row = language.measure("ru", sentences)
    found = {"summary": language.summary([row]), "languages": [dataclasses.asdict(row)]}
    (tmp_path / "accuracy.json").write_text(json.dumps(found), encoding="utf-8")
    text = page(report | {"identification": read_identification(str(tmp_path / "accuracy.json"))})
    assert row.right == 1.0
    assert re.search(r"<bdi>ru</bdi></th><td>10</td><td>100\.0%</td>", text)
    (tmp_path / "accuracy.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"--identification=.*accuracy\.json"):
        read_identification(str(tmp_path / "accuracy.json"))
