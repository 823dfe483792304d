"""Formats of LLM Zoo, of MultilingualSIFT, and of benchmarks, seeds and translations."""

import json

import pytest

from data_pipelines.sources import (
    Dropped,
    llmzoo,
    mgsm,
    multilingual_sift,
    questions,
    seeds,
    sharegpt,
    tatoeba,
)
from llmzoo_jax.conversation import Conversation

ABOUT = {"kind": "conversation", "source": "test", "license": "CC0-1.0"}


def write(path, records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def turns(item):
    return [(message.role, message.content) for message in item.messages]


def test_llmzoo_takes_kind_and_language_from_the_record(tmp_path):
    talk = [{"from": "Human", "value": "a"}, {"from": "gpt", "value": "b"}]
    records = [
        {"id": "1", "type": "instruction", "lang": "sw", "conversations": talk},
        {"id": "2", "type": "user_centered_instruction", "language": "bn", "conversations": talk},
        {"id": "3", "conversations": talk},
        {"id": "4", "type": "poem", "conversations": talk},
        {"id": "5", "lang": "Swahili!", "conversations": talk},
    ]
    path = write(tmp_path / "data.json", records)
    *found, odd, spoken = llmzoo.conversations(path, lang="en", **ABOUT)
    assert [(c.lang, c.kind) for c in found] == [
        ("sw", "multilingual_instruction"), ("bn", "user_centered_instruction"),
        ("en", "conversation"),
    ]  # fmt: skip
    assert turns(found[0]) == [("user", "a"), ("assistant", "b")]
    assert (odd.reason, spoken.reason) == ("unknown type", "unknown language")
    named = list(llmzoo.conversations(path, types={"poem": "conversation"}, **ABOUT))
    assert [type(item) for item in named] == [Dropped, Dropped, Conversation, Conversation, Dropped]


def test_multilingual_sift_takes_the_language_from_the_file_name(tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write(tmp_path / "alpaca-gpt4-arabic.json", [{"id": "1", "conversations": talk}])
    (found,) = multilingual_sift.conversations(path, **ABOUT)
    assert found.lang == "ar" and turns(found) == [("user", "a"), ("assistant", "b")]
    record = {"question_id": 7, "text": "Warum?", "category": "generic"}
    path = write(tmp_path / "questions_Deutsch.jsonl", [record], lines=True)
    (asked,) = multilingual_sift.conversations(path, **ABOUT)
    assert (asked.question_id, asked.lang, asked.turns) == ("vicuna-80:7", "de", ("Warum?",))
    with pytest.raises(ValueError, match="must end with one of arabic"):
        multilingual_sift.conversations(str(tmp_path / "alpaca.json"), **ABOUT)


def test_questions_of_all_benchmarks_and_their_twins(tmp_path):
    records = [
        {"question_id": 1, "text": "Why?", "category": "generic", "lang": "en"},
        {"question_id": 71, "text": "为什么？", "category": "generic", "lang": "zh"},
        {"id": 2, "query": "Wo?", "label": "fermi"},
        {"question_id": 3, "turns": ["One?", "Two?"], "reference": ["1", "2"]},
        {"text": "no id"},
        {"question_id": 4},
    ]
    path = write(tmp_path / "de100.jsonl", records, lines=True)
    found = list(questions.conversations(path, benchmark="b", parallel=70, **ABOUT))
    assert [q.question_id for q in found[:4]] == ["b:1", "b:1", "b:2", "b:3"]
    assert [q.lang for q in found[:4]] == ["en", "zh", "de", "de"]
    assert found[2].category == "fermi" and found[2].turns == ("Wo?",)
    assert found[3].turns == ("One?", "Two?") and found[3].reference == ("1", "2")
    assert [q.reason for q in found[4:]] == ["no id", "no text"]


def test_every_instance_of_a_seed_is_a_conversation(tmp_path):
    records = [
        {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"},
                                              {"input": "", "output": "0"}]},
        {"instruction": "x", "instances": []},
    ]  # fmt: skip
    path = write(tmp_path / "x.jsonl", records, lines=True)
    first, second, none = seeds.conversations(path, lang="en", **ABOUT)
    assert turns(first) == [("user", "Add.\n1 1"), ("assistant", "2")]
    assert turns(second) == [("user", "Add."), ("assistant", "0")]
    assert (first.id, second.id) == ("x.jsonl:1", "x.jsonl:1/2")
    assert none == Dropped("x.jsonl:2", "no turns", "'instances' is [], not a list of turns")


def test_mgsm_is_questions_with_a_reference(tmp_path):
    path = tmp_path / "mgsm_th.tsv"
    path.write_text('1 "and" 1?\t2\nno answer\n', encoding="utf-8")
    asked, broken = mgsm.conversations(str(path), **ABOUT)
    assert (asked.question_id, asked.lang, asked.turns) == ("mgsm:1", "th", ('1 "and" 1?',))
    assert asked.reference == ("2",) and broken.reason == "wrong number of cells"


def test_tatoeba_is_translated_both_ways(tmp_path):
    (tmp_path / "tatoeba.cmn-eng.cmn").write_text("你好\n再见\u2028\n\n", encoding="utf-8")
    english = tmp_path / "tatoeba.cmn-eng.eng"
    english.write_text("Hello.\nBye.\nx\n", encoding="utf-8")
    into, out_of, empty = tatoeba.conversations(str(english), **ABOUT)
    assert into.lang == "en" and out_of.lang == "zh"
    assert turns(into) == [
        ("user", "Translate this sentence from Chinese into English:\n你好"),
        ("assistant", "Hello."),
    ]
    assert turns(out_of)[1] == ("assistant", "再见\u2028")
    assert (empty.where, empty.reason) == ("tatoeba.cmn-eng.cmn:3", "empty turn")
    english.write_text("Hello.\n", encoding="utf-8")
    with pytest.raises(ValueError, match="one ends before line 2"):
        list(tatoeba.conversations(str(english), **ABOUT))


def test_sharegpt_reads_rows_of_a_table_that_have_no_tools_and_no_choice(tmp_path):
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    record = {"conversations": talk, "tools": None, "chosen": None}
    odd = {"conversations": talk, "tools": ["x"]}
    found, broken = sharegpt.conversations(
        write(tmp_path / "x.json", [record, odd]), lang="en", **ABOUT
    )
    assert turns(found) == [("user", "a"), ("assistant", "b")] and broken.reason == "no text"
