"""The page of an evaluation: whole, from itself alone, with each script in its direction."""

import re

import pytest

from eval import report, report_figures, score
from eval.report import attention, choose, direction, facts, page
from eval.reviews import Review
from llmzoo_jax.errors import InputError

TEXTS = {
    "en": ("Rain falls from <b>clouds</b>.", "It is water & falls."),
    "ar": ("GPT: المطر ماء ينزل من السحاب إلى الأرض.", "الماء ينزل من السماء."),
}
JUDGED = {
    "judge": "judge-1", "base_url": "http://x/v1", "temperature": 0.0, "max_tokens": 9, "seed": 0,
    "mode": "order", "order": "balanced", "repeats": 2, "tries": 3, "dollars": 0.125,
    "max_cost": 5.0, "requests": 40, "input_price": 1.0, "output_price": 2.0,
    "how": {"chain": 40}, "asked_again": {"no order": 2}, "aspects": {"general": "Judge."},
    "files": {"q.jsonl": "abc"},
}  # fmt: skip


def reviews(lang="en", aspect="general", judge="judge-1", models=("a", "b"), unread=0):
    found = []
    for number in range(1, 41):
        order = (2, 1) if number % 3 == 0 else (1, 2)
        shown = models if number % 2 else models[::-1]
        order = order if number % 2 else order[::-1]
        found.append(
            Review(question_id=number, models=shown, answers=TEXTS[lang], lang=lang,
                   order=(-1, -1) if number <= unread else order, aspect=aspect, judge=judge,
                   question={"en": "What is rain?", "ar": "ما هو المطر؟"}[lang],
                   text="<i>So.</i>", declared=models, where=f"r:{number}")
        )  # fmt: skip
    return found


ALL = [r for lang in TEXTS for aspect in ("general", "relevance", "coherence")
       for r in reviews(lang, aspect)]  # fmt: skip


@pytest.fixture(scope="module")
def values():
    return facts(score.score(ALL), ALL, [JUDGED], title="A & B", examples=6, now=0.0)


def test_the_page_has_everything_and_loads_nothing(values):
    text = page(values)
    assert "<h1>A &amp; B</h1>" in text and "$0.12" in text and "no order 2" in text
    for heading in ("Win rates", "By aspect", "Aspects and languages", "Which differences are real",
                    "What the judge likes", "The answers", "Examples", "to repeat it"):  # fmt: skip
        assert heading in text
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert "<b>clouds</b>" not in text and "&lt;b&gt;clouds" in text  # answers can't write the page
    assert "<i>So.</i>" not in text


def test_each_text_has_its_language_and_direction(values):
    text = page(values)
    assert '<p lang="ar" dir="rtl">GPT: المطر' in text  # though it begins with a Latin word
    assert '<p lang="en" dir="ltr">It is water &amp; falls.' in text
    assert direction("") == direction("12") == "ltr" and direction("שלום GPT") == "rtl"


def test_the_matrix_has_a_cell_for_each_aspect_and_language(values):
    assert values["langs"] == ["en", "ar", "all"]
    cell = values["matrix"]["a"]["coherence"]["ar"]
    assert cell["low"] < cell["value"] < cell["high"]
    assert page(values).count('<table class="matrix">') == 2
    assert values["reviews"] == 240 and values["questions"] == 80


def test_examples_are_of_all_languages_and_aspects(values):
    shown = [(one["review"].lang, one["review"].aspect) for one in values["examples"]]
    assert len(set(shown)) == 6
    assert [side["rank"] for side in values["examples"][0]["sides"]] == [1, 2]
    assert len(choose(ALL, 2)) == 2 and choose(ALL, 0) == []


def test_what_a_reader_must_know_comes_first():
    fixed = [r for r in reviews(unread=3) if r.models == ("a", "b")]
    scored = score.score(fixed)
    notes = " ".join(attention(scored["groups"]))
    assert "fixed order" in notes and "2 of 20 reviews could not be read" in notes
    assert "fewer than 30 questions" in notes
    text = page(facts(scored, fixed, [], title="T", examples=1, now=0.0))
    assert "not known: the order is fixed" in text and "By aspect" not in text


def test_judges_are_compared_on_the_page():
    both = [*reviews(), *reviews(judge="human")]
    text = page(facts(score.score(both), both, [], title="T", examples=0, now=0.0))
    assert "Do judges agree?" in text and "judge-1, human" in text


def test_the_figures_are_drawn(values, tmp_path):
    names = report_figures.draw(values, tmp_path)
    assert sorted(names) == ["bars.png", "matrix.png", "radar.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
    radar = report_figures.radar({"a": [0.5, 1.0, 0.0], "b": [0.1, None, 0.2]}, ["x", "y", "z"])
    assert [line["name"] for line in radar["lines"]] == ["a"]
    assert report_figures.radar({"a": [0.5, 0.5]}, ["x", "y"]) is None


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "score.json").write_text("{")
    with pytest.raises(InputError, match=r"score.json: not JSON"):
        report.read_json(str(tmp_path / "score.json"))
