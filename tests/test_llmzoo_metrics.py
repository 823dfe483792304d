"""metric.json and ordering.txt, as LLM Zoo wrote them."""

import json

import pytest

from eval.llmzoo_metrics import metric, metric_text, ordering_text
from eval.reviews import Review, order_of_scores, read_reviews
from llmzoo_jax.errors import InputError

MODELS = ("gpt-3.5-turbo", "a", "b")


def reviews(*orders, scores=(), categories=()):
    return [
        Review(question_id=i, models=MODELS, order=order, where=f"r:{i}",
               score=scores[i] if scores else (),
               category=categories[i] if categories else "generic")
        for i, order in enumerate(orders)
    ]  # fmt: skip


def test_the_first_model_is_the_reference():
    found = metric(reviews((1, 2, 3), (2, 1, 2), (1, 1, 3), (1, 1, 1)), horizontal=False)
    assert list(found) == ["a", "b"]
    assert found["a"] == {
        "winning": {"gpt3.5": 1, "tie": 2, "model": 1, "%model": 0.25},
        "order": {"gpt3.5": 1.25, "model": 1.25},
        "score": {"gpt3.5": 8.75, "model": 8.75, "%model": 1.0},
    }
    rows = [("Model", "Ranking Score", "Rank"), ("a", "1.25", "1"), ("turbo", "1.25", "1"),
            ("b", "2.25", "3")]  # fmt: skip
    text = "".join("".join(cell.ljust(30) for cell in row) + "\n" for row in rows)
    assert ordering_text(found, horizontal=False) == text


def test_horizontally_all_models_are_alike():
    found = metric(reviews((1, 2, 3), (3, 1, 1)), horizontal=True)
    assert found == {
        "gpt-3.5-turbo": {"order": 2.0, "score": (10 + 10 / 3) / 2},
        "a": {"order": 1.5, "score": 7.5},
        "b": {"order": 2.0, "score": (10 / 3 + 10) / 2},
    }
    assert ordering_text(found, horizontal=True).split("\n")[1].split() == ["a", "1.5", "1"]
    assert metric_text(found).startswith('{\n    "gpt-3.5-turbo": {\n        "order": 2.0,')


def test_coding_and_math_do_not_count_and_what_was_not_read_does():
    categories = ("generic", "coding", "math", "generic")
    orders = ((1, 2, 3), (3, 2, 1), (3, 2, 1), (-1, -1, -1))
    found = metric(reviews(*orders, categories=categories), horizontal=True)
    assert found["b"] == {"order": 1.5, "score": 10 / 3 / 2}  # flattered by half


def test_scores_are_summed_where_the_judge_gave_scores():
    scores = [(8.0, 9.0, 7.0), (6.0, 6.0, 7.0)]
    found = metric(reviews(*map(order_of_scores, scores), scores=scores), horizontal=False)
    assert found["a"] == {
        "winning": {"gpt3.5": 0, "tie": 1, "model": 1, "%model": 0.5},
        "score": {"gpt3.5": 7.0, "model": 7.5, "%model": 15 / 14},
    }


def test_files_of_other_models_and_empty_ones_are_errors():
    other = Review(question_id=9, models=("x", "y"), order=(1, 2), where="r:9")
    with pytest.raises(InputError, match="r:9: reviews x, y"):
        metric([*reviews((1, 2, 3)), other], horizontal=True)
    with pytest.raises(InputError, match="coding or math"):
        metric(reviews((1, 2, 3), categories=("math",)), horizontal=True)
    with pytest.raises(InputError, match="no review"):
        metric(reviews((-1, -1, -1)), horizontal=False)


def test_the_released_files_come_out_byte_for_byte(shared_data):
    files = sorted((shared_data / "llmzoo").rglob("review.jsonl"))
    assert len(files) == 10
    for file in files:
        found = metric(read_reviews(str(file)), horizontal=False)
        assert metric_text(found).encode() == (file.parent / "metric.json").read_bytes()
        text = ordering_text(found, horizontal=False)
        assert text.encode() == (file.parent / "ordering.txt").read_bytes()
        assert json.loads(metric_text(found)) == found
