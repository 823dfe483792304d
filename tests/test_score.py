"""The command, on the released reviews and on our own."""

import json
import subprocess
import sys

import pytest

from eval import score
from eval.questions import Question, read_questions
from eval.reviews import Review, read_reviews
from llmzoo_jax.errors import InputError

TEXTS = {
    "en": ("The rain falls from the clouds because water vapour cools and makes heavy drops.",) * 2,
    "zh": ("因为水蒸气在高空冷却后凝结成小水滴，越来越重，最后就变成雨落到地面上来。",
           "It rains because the vapour of the water cools down and falls out of the clouds."),
}  # fmt: skip


def command(*options):
    run = subprocess.run(
        [sys.executable, "-m", "eval.score", *map(str, options)], capture_output=True, text=True
    )
    return run


def review(number, models, order, *, lang="en", aspect="general", judge="j", **more):
    return Review(question_id=number, models=models, order=order, lang=lang, aspect=aspect,
                  judge=judge, answers=TEXTS[lang], where=f"r:{number}", declared=("a", "b"),
                  **more)  # fmt: skip


def both_ways(lang="en", **more):
    """a is better in two of three questions, whatever stands first."""
    found = []
    for number in range(1, 31):
        order = (2, 1) if number % 3 == 0 else (1, 2)
        found += [review(number, ("a", "b"), order, lang=lang, **more),
                  review(number, ("b", "a"), order[::-1], lang=lang, **more)]  # fmt: skip
    return found


# --- the release --------------------------------------------------------------------------------


def test_the_command_writes_the_released_files_byte_for_byte(shared_data, tmp_path):
    folder = shared_data / "llmzoo" / "llmzoo" / "eval"
    for part, lang in (("en/coherence", "en"), ("zh/immersion", "zh")):
        reviews = folder / "reviews" / "review_output" / part
        options = (f"--reviews={reviews}/review.jsonl", f"--out={tmp_path}/{lang}",
                   f"--questions={folder}/questions/questions-{lang}.jsonl")  # fmt: skip
        run = command(*options, "--reparse=better")
        assert run.returncode == 0, run.stderr
        assert "FIXED ORDER" in run.stdout
        for name in ("metric.json", "ordering.txt"):
            assert (tmp_path / lang / name).read_bytes() == (reviews / name).read_bytes()
    scored = json.loads((tmp_path / "en" / "score.json").read_text())
    (group,) = scored["groups"]
    assert (group["reviews"], group["unread"], group["permuted"]) == (70, 0, False)
    assert group["models"][0]["model"] == "gpt-3.5-turbo"


def test_reparsing_as_released_leaves_out_what_it_could_not_read(shared_data):
    path = shared_data / "llmzoo/llmzoo/eval/reviews/review_output/en/coherence/review.jsonl"
    reviews = score.reparse(read_reviews(str(path)), "released")
    group = score.score_group(reviews, seed=0)
    assert group["unread"] == 3
    low, high = group["models"][0]["bounds"]
    assert low < group["models"][0]["win_rate"]["value"] < high and high - low > 0.04


# --- our own ------------------------------------------------------------------------------------


def test_a_group_has_rates_intervals_pairs_position_and_language():
    group = score.score_group(both_ways(), seed=0)
    a, b = group["models"]
    assert (a["model"], b["model"]) == ("a", "b") and group["permuted"]
    assert a["win_rate"]["value"] == pytest.approx(2 / 3)
    assert 0.48 < a["win_rate"]["low"] < 2 / 3 < a["win_rate"]["high"] < 0.85
    (pair,) = group["pairs"]
    assert (pair["won"], pair["tied"], pair["lost"]) == (40, 0, 20)
    assert group["consistency"] == 1.0
    first = group["position"]["first_over_last"]
    assert first["value"] == pytest.approx(0, abs=1e-6)
    assert group["position"]["fixed_order_misleads"]["a"] == pytest.approx(0, abs=1e-6)


def test_a_judge_who_likes_the_first_is_found_out():
    reviews = []
    for number in range(1, 41):
        swayed = number % 4 > 0
        for models in (("a", "b"), ("b", "a")):
            best = models[0] if swayed else "a"
            reviews.append(review(number, models, tuple(1 + (m != best) for m in models)))
    group = score.score_group(reviews, seed=0)
    position = group["position"]
    assert position["first_over_last"]["low"] > 0.5 and group["consistency"] == 0.25
    assert position["fixed_order_misleads"]["a"] > 0.2  # a is the first of the files
    assert group["models"][0]["win_rate"]["value"] == pytest.approx(0.625)


def test_an_answer_in_another_language_than_the_question_is_counted():
    group = score.score_group(both_ways("zh"), seed=0)
    rows = {row["model"]: row for row in group["models"]}
    # Texts are by place, so half of the first reviews of a question show a the Chinese one.
    assert rows["a"]["wrong_language"] == 0 and rows["b"]["wrong_language"] == 30
    assert rows["a"]["answers"] == 30


def test_groups_are_by_judge_aspect_and_language_and_tests_are_counted_over_all():
    reviews = [*both_ways(), *both_ways("zh"), *both_ways(aspect="coherence"),
               *both_ways(judge="human")]  # fmt: skip
    scored = score.score(reviews)
    names = [(g["judge"], g["aspect"], g["lang"]) for g in scored["groups"]]
    assert names == [("j", "general", "en"), ("j", "general", "zh"), ("j", "coherence", "en"),
                     ("human", "general", "en"), ("j", "general", "all")]  # fmt: skip
    assert scored["tests"] == 5
    p = [pair["p"] for g in scored["groups"] for pair in g["pairs"]]
    holm = [pair["p_holm"] for g in scored["groups"] for pair in g["pairs"]]
    assert all(a >= b for a, b in zip(holm, p, strict=True)) and max(holm) > max(p)
    (agreement,) = scored["agreement"]
    assert agreement["same"] == 1.0 and agreement["questions"] == 30
    assert "human" in score.table(scored)


def test_each_group_gets_llm_zoos_files_in_its_folder(tmp_path):
    reviews = [*both_ways(), *both_ways("zh")]
    folders = score.write_llmzoo(reviews, tmp_path, horizontal=True)
    assert folders == [tmp_path, tmp_path / "en" / "general", tmp_path / "zh" / "general"]
    metric = json.loads((tmp_path / "zh" / "general" / "metric.json").read_text())
    assert metric["a"]["order"] == pytest.approx(4 / 3)
    three = review(1, ("a", "c"), (1, 2))
    assert score.write_llmzoo([*reviews, three], tmp_path, horizontal=True) == []


# --- the questions ------------------------------------------------------------------------------


def question(number, category="generic", lang="en"):
    return Question(
        question_id=number, turns=("?",), category=category, lang=lang, where=f"q:{number}"
    )


def test_reviews_are_taken_by_ascending_question():
    reviews = [review(n, ("a", "b"), (1, 2)) for n in (10, 9, 2)]
    asked = [question(n) for n in (9, 2, 10)] + [question(3, "roleplay")]
    assert [r.question_id for r in score.select(reviews, asked)] == [2, 9, 10]


def test_a_question_without_a_review_is_named():
    reviews = [review(n, ("a", "b"), (1, 2)) for n in (1, 2)]
    with pytest.raises(InputError, match=r"no review of question 3 \(q:3\)"):
        score.select(reviews, [question(n) for n in (1, 2, 3)])
    with pytest.raises(InputError, match="none of the reviewed questions"):
        score.select(reviews, [question(1, lang="fr")])


def test_the_command_names_what_is_wrong(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"id": 1, "text": "?", "lang": "en"}\n')
    (tmp_path / "r.jsonl").write_text('{"question_id": 1}\n')
    run = command(f"--reviews={tmp_path}/r.jsonl", f"--questions={tmp_path}/q.jsonl",
                  f"--out={tmp_path}/out")  # fmt: skip
    assert run.returncode == 1 and "r.jsonl:1: not a review" in run.stderr
    assert read_questions([f"{tmp_path}/q.jsonl"])
