"""Orders read from the texts of judges: as LLM Zoo reads them, and better; never by a guess."""

import json

import pytest

from eval.reviews import (
    Reading,
    ranks_of,
    ranks_of_groups,
    read_better,
    read_released,
    read_reviews,
)
from llmzoo_jax.errors import InputError

NO = (-1, -1, -1)


@pytest.mark.parametrize(
    "text, order",
    [
        ("So: Assistant 2 > Assistant 1 = Assistant 3.", (2, 1, 2)),
        ("Assistant 2 >= Assistant 1 >> Assistant 3", (2, 1, 3)),
        ("Assistant 1 = Assistant 2 = Assistant 3", (1, 1, 1)),
        ("Assistant 1 = Assistant 2 > Assistant 3", (1, 1, 3)),
        ("Assistant 1 > Assistant 2\nAssistant 3 > Assistant 1 > Assistant 2", (2, 3, 1)),
        ("Assistant 1 > Assistant 2 > Assistant 2", (1, 3, 0)),  # its own bug
        ("Assistant 1 > Assistant 4 > Assistant 2", NO),
        ("Assistant 1 < Assistant 2 < Assistant 3", NO),
        ("Assistant 1 > Assistant 2", NO),
        ("All three assistants are equal (=).", NO),
    ],
)
def test_the_released_parser_is_kept_with_its_quirks(text, order):
    assert read_released(text, 3) == order


STATED = [
    ("Assistant 2 > Assistant 1 = Assistant 3", (2, 1, 2)),
    ("Assistant 1 < Assistant 2 < Assistant 3", (3, 2, 1)),
    ("Assistant 1 = Assistant 2 < Assistant 3", (2, 2, 1)),
    ("Assistant 3 >= Assistant 1 >= Assistant 2", (2, 3, 1)),
    ("**Assistant 3** > [Assistant 1] = (Assistant 2)", (2, 2, 1)),
    ("(Assistant 1 = Assistant 3) > Assistant 2", (1, 3, 1)),
    ("assistant 1 ＞ ASSISTANT 2 ＞ Assistant_3", (1, 2, 3)),
    ("Assistant 1 ≥ Assistant 2 ≈ Assistant 3", (1, 2, 2)),
    ("Assistant 1 > Assistant 2, but\nAssistant 2 > Assistant 1 > Assistant 3.", (2, 1, 3)),
    ("At first Assistant 1 > Assistant 2 > Assistant 3.\nThe order: Assistant 3 > Assistant 2 >"
     " Assistant 1.", (3, 2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("text, order", STATED)
def test_a_chain_is_read_in_any_spelling(text, order):
    assert read_better(text, 3) == Reading(order, "chain")


@pytest.mark.parametrize(
    "text",
    [
        "In terms of coherence, all three assistants are equally good (=).",
        "Assistant 1 is fine.\n\nAll three assistants have equivalent coherence ('=').",
        "There is no clear distinction between them, so they are all equal (=) here.",
        "Assistant 1, Assistant 2 and Assistant 3 are equally relevant.",
    ],
)
def test_prose_that_calls_all_equal_is_read(text):
    assert read_better(text, 3) == Reading((1, 1, 1), "all equal")


@pytest.mark.parametrize(
    "text, reading",
    [
        ("Assistant 1 =< Assistant 2", Reading((2, 1), "chain")),
        ("the relevance of Assistant 1 = the relevance of Assistant 2", Reading((1, 1), "chain")),
        ("Assistant 2 is more relevant than Assistant 1.", Reading((2, 1), "comparison")),
        ("Assistant 2 is slightly less coherent than Assistant 1.", Reading((1, 2), "comparison")),
        ("Both assistants are equally diverse.", Reading((1, 1), "all equal")),
        (
            "One has more numbers. Therefore, the diversity of the two assistants is equal (=).",
            Reading((1, 1), "all equal"),
        ),
        (
            "However, both are fine. Therefore, the coherence of both responses is equal (=).",
            Reading((1, 1), "all equal"),
        ),
        (
            "Assistant 1 is fair, while Assistant 2 is more diverse than Assistant 1 overall."
            " While both are of value, Assistant 2 has more to suggest.",
            Reading((2, 1), "comparison"),
        ),
        (
            "Assistant 2 may be slightly more diverse than Assistant 1.\n\nTherefore, the order is:"
            " Assistant 1 =< Assistant 2.",
            Reading((2, 1), "chain"),
        ),
    ],
)
def test_two_are_compared_in_words_and_signs(text, reading):
    assert read_better(text, 2) == reading


def test_who_is_left_out_of_the_only_chain_comes_last():
    assert read_better("So Assistant 2 > Assistant 1.", 3) == Reading((2, 1, 3), "left out")
    assert read_better("So Assistant 2 = Assistant 1.", 4) == Reading((1, 1, 3, 3), "left out")


def test_levels_that_are_given_to_each_are_an_order():
    text = "Assistant 1: Clear. The coherence is high.\nAssistant 2: Its coherence is moderate."
    assert read_better(text, 2) == Reading((1, 2), "levels")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I can't compare these answers.",
        "Assistant 1 > Assistant 2 < Assistant 3",  # both ways
        "Assistant 1 > Assistant 2 > Assistant 2",
        "Assistant 1 > Assistant 2 > Assistant 4",
        "Assistant 1 > Assistant 2. Also Assistant 3 > Assistant 1.",
        "Assistant 1 > Assistant 2 > Assistant 3, or Assistant 2 > Assistant 1 > Assistant 3?\nHm.",
        "All three assistants are equally good, but Assistant 2 is more detailed.",
        "All assistants are good. Assistant 1 and Assistant 2 are equally good.",
        "Not all three assistants are equally good.",
        "Assistant 1 is good.",
    ],
)
def test_what_is_not_said_is_not_guessed(text):
    assert read_better(text, 3) is None


def test_comparisons_that_contradict_each_other_are_not_read():
    text = "Assistant 1 is more clear than Assistant 2. Assistant 2 is more deep than Assistant 1."
    assert read_better(text, 2) is None


def test_ranks_are_those_of_competitions():
    assert ranks_of([9.0, 7.5, 7.5, 1.0]) == (1, 2, 2, 4)
    assert ranks_of_groups([[2, 4], [1], [3]], 4) == (3, 1, 4, 1)


@pytest.mark.parametrize(
    "record, message",
    [
        ("{", "not a review"),
        ({"question_id": 1, "metadata": {}}, "not a review"),
        ({"question_id": 1, "metadata": {"model_ids": ["a", "b"]}, "order": [1]}, "a number for"),
        ({"question_id": 1, "metadata": {"model_ids": ["a", "a"]}, "order": [1, 1]}, "different"),
        ({"question_id": 1, "metadata": {"model_ids": ["a", "b"]}, "order": [1, 3]}, "no ranks"),
        ({"question_id": 1, "metadata": {"model_ids": ["a", "b"]}, "score": [1, "x"]}, "numbers"),
    ],
)
def test_a_line_that_is_no_review_is_named(tmp_path, record, message):
    good = {"question_id": 1, "metadata": {"model_ids": ["a", "b"]}, "order": [1, 2]}
    text = record if isinstance(record, str) else json.dumps(record)
    (tmp_path / "review.jsonl").write_text(json.dumps(good) + "\n" + text + "\n")
    with pytest.raises(InputError, match=rf"review.jsonl:2: .*{message}"):
        read_reviews(str(tmp_path / "review.jsonl"))


def test_scores_become_ranks(tmp_path):
    record = {"question_id": 1, "metadata": {"model_ids": ["a", "b", "c"]}, "score": [7, 9, 7]}
    (tmp_path / "review.jsonl").write_text(json.dumps(record))
    (review,) = read_reviews(str(tmp_path / "review.jsonl"))
    assert review.order == (2, 1, 2) and review.score == (7, 9, 7)


def released(shared_data):
    files = sorted((shared_data / "llmzoo").rglob("review.jsonl"))
    assert files
    return [review for file in files for review in read_reviews(str(file))]


def test_the_released_orders_are_what_the_released_parser_read_or_what_was_filled_in(shared_data):
    reviews = released(shared_data)
    found = [read_released(review.text, len(review.models)) for review in reviews]
    differ = [r for r, order in zip(reviews, found, strict=True) if order != r.order]
    assert len(reviews) == 580 and len(differ) == 8
    assert all(-1 in read_released(r.text, 4) for r in differ)  # filled in by hand


def test_the_better_parser_reads_all_released_reviews_right(shared_data):
    for review in released(shared_data):
        reading = read_better(review.text, len(review.models))
        assert reading is not None and reading.order == review.order, review.where
