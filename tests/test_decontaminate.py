"""Evaluation questions are found in what is trained on, in any of their languages."""

import json

import pytest

from data_pipelines.decontaminate import build_index, find, read_questions
from llmzoo_jax.errors import InputError

EN = "A merchant has 48 lamps and sells a third of them before noon. How many lamps are left?"
ZH = "一位商人有四十八盏灯，中午之前卖掉了三分之一，还剩下多少盏灯？"
TH = "พ่อค้ามีโคมไฟ 48 ดวง เขาขายไปหนึ่งในสามก่อนเที่ยง เขาเหลือโคมไฟกี่ดวง"


def write(path, records):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")


@pytest.fixture
def index(tmp_path):
    for lang, text in {"en": EN, "zh": ZH, "th": TH}.items():
        write(
            tmp_path / f"lamps_{lang}.jsonl",
            [{"question_id": 7, "text": text}, {"question_id": 8, "text": "谁？"}],
        )
    return build_index(read_questions(str(tmp_path / "lamps_*.jsonl")))


@pytest.mark.parametrize("text", [EN, ZH, TH])
def test_a_question_is_found_inside_a_longer_message(index, text):
    found = find(index, f"Please help me with this.\n\n{text}\n\nThank you! 谢谢", 0.8)
    assert found and found.question.id == "7" and found.question.text == text
    assert found.overlap == 1


@pytest.mark.parametrize(
    "text",
    [
        EN.upper().replace(" ", "  \n"),
        EN.replace("noon", "midday"),
        ZH.replace("，", ","),
        ZH.replace("一位", "有个"),
        TH.replace(" ", ""),
    ],
)
def test_spelling_and_small_changes_do_not_hide_a_question(index, text):
    assert find(index, text, 0.8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "How many lamps are left?",
        "A merchant has a shop. Before noon, a third of the people of the town come to see it.",
        "一位商人在城里开了一家店，中午之前来了三分之一的客人。",
        "เขาขายโคมไฟที่ตลาดทุกวัน",
    ],
)
def test_text_that_shares_words_or_a_phrase_is_not_a_question(index, text):
    assert find(index, text, 0.8) is None


def test_the_detail_names_the_id_and_the_translated_twins(index):
    detail = str(find(index, TH, 0.8))
    assert detail == (
        "question 7 of lamps_th.jsonl, 100% of its n-grams; twins: lamps_en.jsonl, lamps_zh.jsonl"
    )


def test_the_same_id_in_another_set_is_no_twin(tmp_path):
    write(tmp_path / "a.jsonl", [{"id": 1, "query": EN}])
    write(tmp_path / "b.jsonl", [{"id": 1, "query": ZH}])
    questions = [q for name in "ab" for q in read_questions(str(tmp_path / f"{name}.jsonl"))]
    assert find(build_index(questions), ZH, 0.8).twins == ()


def test_languages_of_one_file_are_twins_and_turns_of_one_question_are_not(tmp_path):
    """As data_pipelines.build writes NAME.questions.jsonl."""
    about = {"question_id": "lamps:7"}
    write(tmp_path / "a.jsonl", [about | {"lang": "en", "turns": [EN, "And after noon?"]},
                                  about | {"lang": "zh", "turns": [ZH]}])  # fmt: skip
    index = build_index(read_questions(str(tmp_path / "a.jsonl")))
    assert str(find(index, EN, 0.8)) == (
        "question lamps:7 of a.jsonl en, 100% of its n-grams; twins: a.jsonl zh"
    )


def test_a_short_question_is_found_only_where_it_is_all_of_a_message(index):
    assert find(index, "谁 ?", 0.8).question.id == "8"
    assert find(index, "你是谁？", 0.8) is None


def test_the_questions_of_one_message_do_not_add_up(tmp_path):
    """Half of one question and half of another are neither."""
    boats = "Seven boats cross the wide river at dawn, each with nine sacks. How many sacks?"
    write(tmp_path / "a.jsonl", [{"text": EN}, {"text": boats}])
    index = build_index(read_questions(str(tmp_path / "a.jsonl")))
    assert find(index, EN[:44] + boats[:38], 0.8) is None


def test_every_format_of_questions_is_read(tmp_path):
    (tmp_path / "m_en.tsv").write_text(f'{EN}\t32\n"To be" or not\t1\n', encoding="utf-8")
    write(tmp_path / "turns.jsonl", [{"question_id": 81, "turns": ["first", "second"]}])
    (tmp_path / "list.json").write_text(json.dumps([{"instruction": "do it"}]), encoding="utf-8")

    def read(name):
        return [(q.id, q.text) for q in read_questions(str(tmp_path / name))]

    assert read("m_*.tsv") == [("1", EN), ("2", '"To be" or not')]
    assert read("turns.jsonl") == [("81", "first"), ("81", "second")]
    assert read("list.json") == [("1", "do it")]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"answer": "x"}', r"record 1 has no question; .* one of text, query"),
        ('{"text": 5}', "record 1 has no question"),
        ('["x"]', "record 1 has no question"),
        ('{"text": ', "neither JSON Lines nor a JSON list"),
        ("", "there is no question"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"q\.jsonl: {message}"):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(InputError, match=r"--questions=.*none\*\.tsv: there is no such file"):
        read_questions(str(tmp_path / "none*.tsv"))


def test_real_questions_are_found_in_all_their_languages(shared_data):
    pattern = str(shared_data / "mgsm" / "mgsm" / "mgsm_*.tsv")
    questions = read_questions(pattern)
    index = build_index(questions)
    assert len({q.version for q in questions}) == 11 and len(questions) == 2750
    for question in questions[::50]:
        found = find(index, f"Solve: {question.text} !", 0.8)
        assert found.question.id == question.id and len(found.twins) == 10
