"""Win rates, their intervals, significance, bounds, and agreement, against counts by hand."""

import numpy as np
import pytest

from eval import ranking
from eval.agreement import agree, consistency, kappa
from eval.ranking import bounds, holm, review_scores, sign_flip, to_orders
from eval.reviews import Review


def review(number, order, models=("a", "b", "c"), **more):
    return Review(question_id=number, models=models, order=order, where=f"r:{number}", **more)


REVIEWS = [review(1, (1, 2, 2)), review(2, (2, 1, 3)), review(2, (1, 1, 1)), review(3, (-1,) * 3)]


def test_a_tie_is_half_a_win():
    orders = to_orders(REVIEWS)
    assert review_scores(orders).tolist() == [[1, 0.25, 0.25], [0.5, 1, 0], [0.5, 0.5, 0.5]]
    weights = ranking.draws(orders.clusters, seed=0)
    values = [one.value for one in ranking.bootstrap(review_scores(orders), orders, weights)]
    assert values == pytest.approx([2 / 3, 1.75 / 3, 0.25])


def test_models_that_a_review_lacks_are_left_out_of_it():
    pairs = [review(1, (1, 2), ("a", "b")), review(1, (2, 1), ("c", "a")),
             review(2, (1, 1), ("c", "b"))]  # fmt: skip
    orders = to_orders(pairs, ("a", "b", "c"))
    assert np.nanmean(review_scores(orders), 0).tolist() == [1, 0.25, 0.25]
    assert not orders.permuted and orders.most == 2


def test_intervals_are_over_questions_and_not_over_reviews():
    """Ten reviews of a question that say the same are worth one."""
    rng = np.random.default_rng(0)
    orders = [(1, 2) if rng.random() < 0.6 else (2, 1) for _ in range(50)]
    once = to_orders([review(i, order, ("a", "b")) for i, order in enumerate(orders)])
    tenfold = to_orders([review(i, order, ("a", "b")) for i, order in enumerate(orders)
                         for _ in range(10)])  # fmt: skip
    widths = []
    for one in (once, tenfold):
        weights = ranking.draws(one.clusters, seed=0)
        interval = ranking.bootstrap(review_scores(one), one, weights)[0]
        widths.append(interval.high - interval.low)
    assert widths[0] == pytest.approx(widths[1])
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(0.24 / 50), rel=0.15)


def test_sign_flips_are_the_exact_test_of_few_questions():
    orders = to_orders([review(i, (1, 2), ("a", "b")) for i in range(6)])
    p = sign_flip(np.ones((6, 1)), orders, seed=0)
    assert p[0] == pytest.approx(2 / 64, abs=0.004)
    assert sign_flip(np.zeros((6, 1)), orders, seed=0)[0] == 1.0


def test_holm_is_that_of_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_bounds_take_what_is_unread_for_lost_and_for_won():
    found = bounds(REVIEWS, ("a", "b", "c"))
    assert found["a"] == pytest.approx((2 / 4, 3 / 4))
    assert found["c"] == pytest.approx((0.75 / 4, 1.75 / 4))


# --- agreement ----------------------------------------------------------------------------------


def test_kappa_is_that_of_the_textbook():
    table = np.array([[20, 5, 0], [10, 15, 0], [0, 0, 0]])  # Cohen's kappa of the 2 x 2 part: 0.4
    assert kappa(table[None], 1.0 - np.eye(3))[0] == pytest.approx(0.4)


def test_judges_agree_on_what_both_have_reviewed():
    orders = [(1, 2, 3), (2, 1, 3), (1, 1, 3), (3, 2, 1)]
    one = [review(i, order, judge="one") for i, order in enumerate(orders)]
    same = [review(i, order, judge="two") for i, order in enumerate(orders)]
    other = [review(i, tuple(4 - rank for rank in order), judge="two")
             for i, order in enumerate([(1, 2, 3), (2, 1, 3)])]  # fmt: skip
    found = agree(one, same)
    assert (found.judges, found.questions, found.pairs) == (("one", "two"), 4, 12)
    assert found.same == 1.0 and found.kappa.value == 1.0 and found.tau == pytest.approx(1.0)
    found = agree(one, other)
    assert found.questions == 2 and found.same == 0.0
    assert found.tau == -1.0 and found.kappa_weighted.value < 0
    assert agree(one, [review(9, (1, 2, 3))]) is None


def test_models_are_matched_by_name_whatever_the_order_of_sight():
    one = [review(1, (1, 2, 3), judge="one")]
    turned = [review(1, (3, 1, 2), ("c", "a", "b"), judge="two")]
    assert agree(one, turned).same == 1.0


def test_a_judge_who_follows_the_position_is_not_consistent():
    shown = [review(1, (1, 2), ("a", "b")), review(1, (1, 2), ("b", "a"))]
    assert consistency(shown) == 0.0
    assert consistency([shown[0], review(1, (2, 1), ("b", "a"))]) == 1.0
    assert consistency(shown[:1]) is None
