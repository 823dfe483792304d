"""Honest figures of reviews: win rates with ties, their intervals, significance, bounds.

Everything is paired and clustered by question: a bootstrap draws questions, with all reviews and
all models of each, since answers to one question are hard or easy, and judged, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.reviews import Review
from llmzoo_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Orders:
    """R reviews of K models as arrays; NaN where a review does not have the model."""

    models: tuple[str, ...]
    rank: np.ndarray  # [R,K], 1 is best
    position: np.ndarray  # [R,K], from 0: where the judge saw it
    length: np.ndarray  # [R,K], characters of the answer
    cluster: np.ndarray  # int[R]: the question, from 0

    @property
    def clusters(self) -> int:
        return int(self.cluster.max()) + 1 if len(self.cluster) else 0

    @property
    def most(self) -> int:
        """Answers in a review, at most."""
        return int((~np.isnan(self.rank)).sum(1).max())

    @property
    def permuted(self) -> bool:
        """Whether each model was seen in more than one position."""
        spread = np.nanmax(self.position, 0) - np.nanmin(self.position, 0)
        return bool((spread > 0).all())

    def standard_length(self) -> np.ndarray:
        """[R,K]: log length, against the mean of the review, in standard deviations."""
        log = np.log(self.length + 1)
        log = log - np.nanmean(log, 1, keepdims=True)
        spread = np.nanstd(log)
        return log / spread if spread > 0 else log


def to_orders(reviews: Sequence[Review], models: Sequence[str] = ()) -> Orders:
    """Of the reviews that were read; ``models`` gives the columns (default: in order of sight)."""
    read = [review for review in reviews if review.read]
    if not read:
        raise InputError(f"{reviews[0].where}: no review of the {len(reviews)} could be read")
    models = tuple(models) or tuple(dict.fromkeys(m for review in read for m in review.models))
    column = {model: k for k, model in enumerate(models)}
    questions = {q: c for c, q in enumerate(dict.fromkeys(r.question_id for r in read))}
    rank, position, length = (np.full((len(read), len(models)), np.nan) for _ in range(3))
    for r, review in enumerate(read):
        for i, model in enumerate(review.models):
            rank[r, column[model]] = review.order[i]
            position[r, column[model]] = i
            length[r, column[model]] = len(review.answers[i]) if review.answers else np.nan
    return Orders(
        models=models,
        rank=rank,
        position=position,
        length=length,
        cluster=np.array([questions[review.question_id] for review in read]),
    )


def pair_scores(orders: Orders) -> np.ndarray:
    """[R,K,K]: 1 where the first is before the second, 1/2 where they are equal, 0; else NaN."""
    rank = orders.rank
    scores = 0.5 + 0.5 * np.sign(rank[:, None, :] - rank[:, :, None])
    diagonal = np.arange(rank.shape[1])
    scores[:, diagonal, diagonal] = np.nan
    return scores


def review_scores(orders: Orders) -> np.ndarray:
    """[R,K]: the mean of ``pair_scores`` over the other models of the review."""
    scores = pair_scores(orders)
    seen = ~np.isnan(scores)
    count = seen.sum(2)
    return np.where(count, np.nansum(scores, 2) / np.maximum(count, 1), np.nan)


# --- the bootstrap ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def _cluster_sums(values: np.ndarray, cluster: np.ndarray, clusters: int):
    """Sums and counts [C,...] of what is not NaN in ``values[R,...]``."""
    sums = np.zeros((clusters, *values.shape[1:]))
    counts = np.zeros_like(sums)
    np.add.at(sums, cluster, np.nan_to_num(values))
    np.add.at(counts, cluster, ~np.isnan(values))
    return sums, counts


def draws(clusters: int, *, seed: int, count: int = 2000) -> np.ndarray:
    """[B,C]: how often each question is drawn in each of B draws of C, with replacement."""
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), count)


def bootstrap(
    values: np.ndarray, orders: Orders, weights: np.ndarray, level: float = 0.95
) -> list[Interval]:
    """Means of ``values[R,M]`` with percentile intervals from ``draws``."""
    means = boot_means(values, orders, weights)
    sums, counts = _cluster_sums(values, orders.cluster, orders.clusters)
    middle = sums.sum(0) / counts.sum(0)
    tail = 100 * (1 - level) / 2
    # A mean over C draws has C - 1 degrees of freedom, and the bootstrap's spread C: mended here.
    C = max(orders.clusters, 2)
    means = middle + (means - middle) * np.sqrt(C / (C - 1))
    low, high = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    return [
        Interval(float(m), float(a), float(b)) for m, a, b in zip(middle, low, high, strict=True)
    ]


def boot_means(values: np.ndarray, orders: Orders, weights: np.ndarray) -> np.ndarray:
    """[B,M]: the means in each draw."""
    sums, counts = _cluster_sums(values, orders.cluster, orders.clusters)
    with np.errstate(invalid="ignore"):
        return (weights @ sums) / (weights @ counts)


# --- significance -------------------------------------------------------------------------------


def sign_flip(values: np.ndarray, orders: Orders, *, seed: int, count: int = 20_000) -> np.ndarray:
    """p-values [M] that the differences ``values[R,M]`` have mean 0: two-sided, by flipping the
    sign of all differences of a question (exact up to the number of flips)."""
    sums, _ = _cluster_sums(values, orders.cluster, orders.clusters)
    if not len(sums):
        return np.ones(values.shape[1])
    flips = np.random.default_rng(seed).integers(0, 2, (count, len(sums)), dtype=np.int8) * 2.0 - 1
    seen, drawn = np.abs(sums.sum(0)), np.abs(flips @ sums)
    return (1 + (drawn >= seen - 1e-9).sum(0)) / (1 + count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all that are given together (Holm 1979): below 0.05 is significant in the sense
    that any of them is wrongly so with a probability of at most 5 %."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = running
    return adjusted


# --- what stayed unread -------------------------------------------------------------------------


def bounds(reviews: Sequence[Review], models: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The least and the highest win rate that each model could have if all reviews had been read:
    with all unread ones lost, and with all won."""
    result = {}
    for model in models:
        won = count = unread = 0.0
        for review in reviews:
            if model not in review.models:
                continue
            if not review.read:
                unread += 1
                continue
            own = review.ranks[model]
            others = [rank for name, rank in review.ranks.items() if name != model]
            won += sum(0.5 + 0.5 * (rank > own) - 0.5 * (rank < own) for rank in others) / len(
                others
            )
            count += 1
        total = count + unread
        result[model] = (won / total, (won + unread) / total) if total else (0.0, 1.0)
    return result
