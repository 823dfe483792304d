"""Strengths of models from orders with ties: Plackett-Luce, Bradley-Terry; maximum likelihood.

An order is a row of choices: which answer, or which set of equal ones, is the best of those that
are left. A set S is chosen with a probability proportional to ``delta[len(S)]`` times the geometric
mean of the worths of its members (Davidson-Luce: Firth, Kosmidis and Turner 2019); of two answers
this is Bradley-Terry with ties of Davidson (1970), and without ties it is Plackett-Luce. The log of
a worth is the strength of the model, plus the effect of the position in which the judge saw the
answer, plus that of its length. ``delta`` is fitted, too, so ties cost no information.

Standard errors are clustered (sandwich) by question: the reviews of a question are not independent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from eval.ranking import Orders

RIDGE = (
    1e-2  # a normal prior of sd 10 on every effect: one who always wins has no infinite strength
)
ITERATIONS, CLOSE = 100, 1e-9


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Effects on the log of a worth. Strengths and positions sum to 0 each."""

    models: tuple[str, ...]
    strengths: np.ndarray  # [K]
    positions: np.ndarray  # [N]; zeros where they were not fitted
    length: float  # of one standard deviation of the log length; 0 where it was not fitted
    ties: np.ndarray  # [D] log delta of sets of 1 (0), 2, ... D; -inf where none was seen
    covariance: np.ndarray  # [P,P] of strengths, positions, length, in this order; clustered
    clusters: int

    def interval(self, weights: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
        """Estimate, lower and upper end of ``weights[P]`` times the effects."""
        effects = np.concatenate([self.strengths, self.positions, [self.length]])
        error = np.sqrt(max(weights @ self.covariance @ weights, 0.0))
        half = student.ppf(0.5 + level / 2, max(self.clusters - 1, 1)) * error
        middle = float(weights @ effects)
        return middle, middle - half, middle + half

    def strength_intervals(self, level: float = 0.95) -> list[tuple[float, float, float]]:
        rows = np.eye(len(self.covariance))[: len(self.models)]
        return [self.interval(row, level) for row in rows]

    @property
    def position_interval(self) -> tuple[float, float, float]:
        """What the first position is worth beside the last one."""
        weights = np.zeros(len(self.covariance))
        K, N = len(self.models), len(self.positions)
        weights[K], weights[K + N - 1] = 1.0, -1.0
        return self.interval(weights)

    @property
    def length_interval(self) -> tuple[float, float, float]:
        return self.interval(np.eye(len(self.covariance))[-1])


@dataclass(frozen=True)
class _Stage:
    """S choices among r answers, A alternatives; the D sizes of sets follow the answers."""

    features: np.ndarray  # [S,r+D,P]
    sets: np.ndarray  # [A,r+D]: 1 / size for its members, and 1 at its size
    chosen: np.ndarray  # [S] index of the alternative
    cluster: np.ndarray  # [S]


def plackett_luce(orders: Orders, *, positions: bool = False, length: bool = False) -> Fit:
    """Fitted to whole orders. ``positions`` and ``length`` say which effects are fitted."""
    return _fit(orders, _rows(orders), positions=positions, length=length)


def bradley_terry(orders: Orders, *, positions: bool = False, length: bool = False) -> Fit:
    """Fitted to all pairs in the orders, as if each had been compared alone."""
    return _fit(orders, _pairs(orders), positions=positions, length=length)


def win_rates(fit: Fit) -> np.ndarray:
    """Of each model, the mean over the others of P(win) + P(tie) / 2 that the fit says for answers
    of one length and without any effect of the position."""
    return _win_rates(fit.strengths, fit.ties)


def fixed_order_shift(fit: Fit) -> np.ndarray:
    """How much higher each win rate would be if model k always stood in position k than it is when
    all stand equally often in all positions: the error that a fixed order makes."""
    places = fit.positions
    difference = places[:, None] - places[None, :]
    apart = difference[~np.eye(len(places), dtype=bool)]  # of any two positions
    rates = [_win_rates(fit.strengths, fit.ties, more) for more in apart]
    return _win_rates(fit.strengths + places, fit.ties) - np.mean(rates, 0)


def win_rate_intervals(fit: Fit, level: float = 0.95) -> list[tuple[float, float, float]]:
    """``win_rates`` with intervals, by the delta method."""
    K, step = len(fit.models), 1e-5
    middle, result = win_rates(fit), []
    slopes = np.stack(
        [(_win_rates(fit.strengths + step * row, fit.ties) - middle) / step for row in np.eye(K)], 1
    )
    quantile = student.ppf(0.5 + level / 2, max(fit.clusters - 1, 1))
    for k in range(K):
        variance = slopes[k] @ fit.covariance[:K, :K] @ slopes[k]
        half = quantile * np.sqrt(max(variance, 0.0))
        result.append((float(middle[k]), float(middle[k] - half), float(middle[k] + half)))
    return result


def _win_rates(strengths: np.ndarray, ties: np.ndarray, more: float = 0.0) -> np.ndarray:
    """``more`` is added to each difference of a model and another one."""
    K = len(strengths)
    tie = np.exp(ties[1]) if len(ties) > 1 else 0.0
    difference = np.clip(strengths[:, None] - strengths[None, :] + more, -500, 500)
    odds = np.exp(difference / 2)  # sqrt of worth i over worth j
    scores = (odds + tie / 2) / (odds + 1 / odds + tie)
    np.fill_diagonal(scores, 0.0)
    return scores.sum(1) / max(K - 1, 1)


# --- the data of a fit --------------------------------------------------------------------------

_Row = tuple[int, list[int], list[int]]  # review, models, ranks


def _rows(orders: Orders) -> list[_Row]:
    return [
        (r, list(np.flatnonzero(seen)), orders.rank[r, seen].astype(int).tolist())
        for r, seen in enumerate(~np.isnan(orders.rank))
    ]


def _pairs(orders: Orders) -> list[_Row]:
    found = []
    for r, models, ranks in _rows(orders):
        for a, b in itertools.combinations(range(len(models)), 2):
            found.append((r, [models[a], models[b]], [ranks[a], ranks[b]]))
    return found


def _stages(
    orders: Orders, rows: list[_Row], features: np.ndarray
) -> tuple[list[_Stage], list[int]]:
    """``features[R,K,P]``, in whose last axis the sizes of sets come last; and these sizes."""
    sizes = sorted({ranks.count(rank) for _, _, ranks in rows for rank in ranks} | {1})
    D, P = len(sizes) - 1, features.shape[-1]
    by_count: dict[int, list[tuple[int, list[int], tuple[int, ...]]]] = {}
    for r, models, ranks in rows:
        for rank in sorted(set(ranks)):
            left = [i for i, other in enumerate(ranks) if other >= rank]
            if len(left) > 1:
                best = tuple(j for j, i in enumerate(left) if ranks[i] == rank)
                by_count.setdefault(len(left), []).append((r, [models[i] for i in left], best))
    stages = []
    for count, choices in sorted(by_count.items()):
        subsets = [s for size in sizes for s in itertools.combinations(range(count), size)]
        number = {subset: i for i, subset in enumerate(subsets)}
        sets = np.zeros((len(subsets), count + D))
        for row, subset in zip(sets, subsets, strict=True):
            row[list(subset)] = 1 / len(subset)
            if len(subset) > 1:
                row[count + sizes.index(len(subset)) - 1] = 1.0
        reviews = np.array([r for r, _, _ in choices])
        models = np.array([m for _, m, _ in choices])
        own = features[reviews[:, None], models]  # [S,r,P]
        size = np.broadcast_to(np.eye(P)[P - D :], (len(choices), D, P))
        stages.append(
            _Stage(
                features=np.concatenate([own, size], axis=1),
                sets=sets,
                chosen=np.array([number[best] for _, _, best in choices]),
                cluster=orders.cluster[reviews],
            )
        )
    return stages, sizes


def _fit(orders: Orders, rows: list[_Row], *, positions: bool, length: bool) -> Fit:
    R, K = orders.rank.shape
    N = orders.most
    sizes = len({ranks.count(rank) for _, _, ranks in rows for rank in ranks} | {1})
    P = K + N + 1 + sizes - 1
    features = np.zeros((R, K, P))
    features[:, :, :K] = np.eye(K)
    if positions:
        seen = ~np.isnan(orders.position)
        r, k = np.nonzero(seen)
        features[r, k, K + orders.position[seen].astype(int)] = 1.0
    if length:
        features[:, :, K + N] = np.nan_to_num(orders.standard_length())
    stages, sizes = _stages(orders, rows, features)
    effects, hessian, scores = _newton(stages, P, orders.clusters)
    C = orders.clusters
    meat = scores.T @ scores * (C / max(C - 1, 1))
    inverse = np.linalg.inv(hessian)
    covariance = inverse @ meat @ inverse
    ties = np.full(sizes[-1], -np.inf)
    ties[0] = 0.0
    for size, value in zip(sizes[1:], effects[K + N + 1 :], strict=True):
        ties[size - 1] = value
    return Fit(
        models=orders.models,
        strengths=effects[:K],
        positions=effects[K : K + N],
        length=float(effects[K + N]),
        ties=ties,
        covariance=covariance[: K + N + 1, : K + N + 1],
        clusters=C,
    )


def _newton(stages: list[_Stage], P: int, clusters: int):
    """The effects [P], minus the Hessian there [P,P], and the scores of clusters [C,P]."""
    effects = np.zeros(P)
    value, gradient, hessian, scores = _likelihood(stages, effects, clusters)
    for _ in range(ITERATIONS):
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while True:  # the likelihood is concave: a shorter step never fails for ever
            new = _likelihood(stages, effects + scale * step, clusters)
            if new[0] >= value - 1e-12 * abs(value) or scale < 1e-6:
                break
            scale /= 2
        effects = effects + scale * step
        done = new[0] - value < CLOSE * (1 + abs(value))
        value, gradient, hessian, scores = new
        if done:
            break
    return effects, hessian, scores


def _likelihood(stages: list[_Stage], effects: np.ndarray, clusters: int):
    """Penalised log-likelihood, its gradient, minus its Hessian, and the scores of clusters."""
    P = len(effects)
    value, hessian = -0.5 * RIDGE * effects @ effects, RIDGE * np.eye(P)
    scores = np.zeros((clusters, P))
    for stage in stages:
        worths = stage.features @ effects  # [S,r+D], logarithms
        utilities = worths @ stage.sets.T  # [S,A]
        top = utilities.max(1, keepdims=True)
        odds = np.exp(utilities - top)
        total = odds.sum(1, keepdims=True)
        shares = odds / total
        S = len(stage.chosen)
        value += (utilities[np.arange(S), stage.chosen] - top[:, 0] - np.log(total[:, 0])).sum()
        mean = shares @ stage.sets  # [S,r+D]
        surprise = stage.sets[stage.chosen] - mean
        np.add.at(scores, stage.cluster, np.einsum("si,sip->sp", surprise, stage.features))
        square = np.einsum("sa,ai,aj->sij", shares, stage.sets, stage.sets, optimize=True)
        square -= mean[:, :, None] * mean[:, None, :]
        half = square @ stage.features  # [S,r+D,P]
        hessian += np.tensordot(stage.features, half, axes=([0, 1], [0, 1]))
    return value, scores.sum(0) - RIDGE * effects, hessian, scores
