"""Do judges agree: with each other, with people, with themselves when the order is another?

Everything is about pairs of models on one question: won, tied, lost. A reviewer with several
reviews of a question has the sign of their mean. People are reviewers like any other, in a file of
reviews of their own.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from eval.ranking import Interval
from eval.reviews import Review

Key = tuple[str, str, str]  # aspect, language, question


@dataclass(frozen=True, kw_only=True)
class Agreement:
    judges: tuple[str, str]
    questions: int
    pairs: int
    same: float  # share of pairs with the same verdict
    kappa: Interval  # Cohen's, of won, tied, lost
    kappa_weighted: Interval  # linear: a tie is half way between the others
    tau: float  # Kendall's tau-b of the orders of a question, mean over those that are no full tie


def verdicts(reviews: Sequence[Review]) -> dict[Key, dict[tuple[str, str], float]]:
    """For each question, of each pair of models by name: 1 where the first is better, 0, or -1."""
    sums: dict[Key, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for review in reviews:
        if not review.read:
            continue
        key = (review.aspect, review.lang, str(review.question_id))
        for a, b in itertools.combinations(sorted(review.models), 2):
            sums[key][a, b].append(float(np.sign(review.ranks[b] - review.ranks[a])))
    return {
        key: {pair: float(np.sign(np.mean(signs))) for pair, signs in pairs.items()}
        for key, pairs in sums.items()
    }


def agree(first: Sequence[Review], second: Sequence[Review], *, seed: int = 0) -> Agreement | None:
    """Of two judges, on what both have reviewed; None where that is nothing."""
    one, two = verdicts(first), verdicts(second)
    tables = []  # [3,3] a question
    taus = []
    for key in sorted(one.keys() & two.keys()):
        pairs = sorted(one[key].keys() & two[key].keys())
        if not pairs:
            continue
        table = np.zeros((3, 3))
        for pair in pairs:
            table[int(one[key][pair]) + 1, int(two[key][pair]) + 1] += 1
        tables.append(table)
        tau = kendalltau(*(_points(side[key], pairs) for side in (one, two))).statistic
        taus += [] if np.isnan(tau) else [float(tau)]
    if not tables:
        return None
    tables = np.array(tables)
    Q = len(tables)
    weights = np.random.default_rng(seed).multinomial(Q, np.full(Q, 1 / Q), 2000)
    drawn = np.tensordot(weights, tables, axes=1)  # [B,3,3]
    total = tables.sum(0)
    kappas = {}
    for name, cost in (("kappa", 1.0 - np.eye(3)), ("weighted", _linear())):
        values = kappa(drawn, cost)
        known = values[~np.isnan(values)]
        ends = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
        kappas[name] = Interval(float(kappa(total[None], cost)[0]), *map(float, ends))
    return Agreement(
        judges=(first[0].judge, second[0].judge),
        questions=Q,
        pairs=int(total.sum()),
        same=float(np.trace(total) / total.sum()),
        kappa=kappas["kappa"],
        kappa_weighted=kappas["weighted"],
        tau=float(np.mean(taus)) if taus else float("nan"),
    )


def _linear() -> np.ndarray:
    place = np.arange(3)
    return np.abs(place[:, None] - place[None, :]) / 2


def _points(verdict: dict[tuple[str, str], float], pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of each model, wins minus losses: its place in the order."""
    points: dict[str, float] = defaultdict(float)
    for a, b in pairs:
        points[a] += verdict[a, b]
        points[b] -= verdict[a, b]
    return [points[model] for model in sorted(points)]


def kappa(tables: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Cohen's kappa of counts ``tables[B,3,3]``: 1 minus the mean cost over that of chance. NaN
    where both judges say the same of everything, so that chance alone would agree."""
    total = tables.sum((1, 2))
    rows, columns = tables.sum(2), tables.sum(1)
    expected = np.einsum("bi,bj,ij->b", rows, columns, cost) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1.0 - (tables * cost).sum((1, 2)) / expected


def consistency(reviews: Sequence[Review]) -> float | None:
    """How often two reviews of a question, by one judge, in different orders, have the same verdict
    on a pair of models; None where no question was reviewed twice."""
    signs: dict[tuple, list[float]] = defaultdict(list)
    for review in reviews:
        if review.read:
            for a, b in itertools.combinations(sorted(review.models), 2):
                key = (review.aspect, review.lang, review.question_id, a, b)
                signs[key].append(float(np.sign(review.ranks[b] - review.ranks[a])))
    same = count = 0
    for values in signs.values():
        for x, y in itertools.combinations(values, 2):
            same += x == y
            count += 1
    return same / count if count else None
