"""Shares in proportion to weights, within floors and caps; and all the axes of a table at once.

``shares`` is water-filling: every value gets ``level * weight``, but never less than its floor nor
more than its cap, at the one level at which all of it adds up. The level is solved for exactly, not
searched. ``balance`` does so for several groupings of the same cells in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from llmzoo_jax.errors import InputError

TOLERANCE = 1e-9  # of sums of shares, relative to the whole


def fill(weights: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
    """``clip(level * weights, low, high)``, float64[n], at the level where it adds up to ``total``.

    A weight of 0 gets its ``low``. Raises InputError where no level reaches the total.
    """
    high = np.where(weights > 0, high, low)
    weights = np.where(weights > 0, weights, 1.0)
    if low.sum() > total * (1 + TOLERANCE):
        raise InputError(f"the floors add up to {low.sum():.6g}, more than {total:.6g}")
    if high.sum() < total * (1 - TOLERANCE):
        raise InputError(f"the caps leave room for {high.sum():.6g} of {total:.6g}")
    starts, ends = low / weights, high / weights  # the levels at which each leaves its bounds
    points = np.unique(np.concatenate([starts, ends]))

    def at(level: float) -> np.ndarray:
        return np.where(level >= ends, high, np.where(level <= starts, low, level * weights))

    below, above = 0, len(points)  # the sum grows with the level: find the last point within total
    while above - below > 1:
        middle = (below + above) // 2
        if at(points[middle]).sum() <= total:
            below = middle
        else:
            above = middle
    # From this point to the next the sum is linear in the level, which is thus known.
    result = at(points[below])
    free = (starts <= points[below]) & (ends > points[below])
    if free.any():
        level = (total - result[~free].sum()) / weights[free].sum()
        result = np.where(free, np.clip(level * weights, low, high), result)
    return result


def shares(
    weights: Mapping[str, float],
    *,
    floors: Mapping[str, float] | None = None,
    caps: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """``{name: share}`` that add up to 1, in proportion to the weights within floors and caps.

    Raises InputError where that cannot be: it names the floors or caps that are in the way.
    """
    names = list(weights)
    low = np.array([(floors or {}).get(name, 0.0) for name in names], float)
    high = np.array([(caps or {}).get(name, 1.0) for name in names], float)
    for name, least, most in zip(names, low, high, strict=True):
        if not 0 <= least <= most:
            raise InputError(f"{name}: the floor {least:g} is not from 0 to the cap {most:g}")
    values = np.array([weights[name] for name in names], float)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise InputError("weights must be 0 or more, and not all of them 0")
    values /= values.max()
    return dict(zip(names, fill(values, low, high, 1.0).tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Grouping:
    """A partition of cells, and the bounds on the sum of each group."""

    group: np.ndarray  # int64[cells]
    low: np.ndarray  # float64[groups]
    high: np.ndarray  # float64[groups]


ROUNDS = 20_000  # of projections; most need a few dozen, and some pause for thousands
ROUNDS_IN_VAIN = 1000  # where not all bounds can be kept


def balance(
    amounts: np.ndarray, groupings: Sequence[Grouping], *, total: float
) -> tuple[np.ndarray, bool]:
    """Amounts float64[cells] that add up to ``total`` and keep the bounds of every grouping; and
    whether they do keep all of them. The last grouping's are kept in any case.

    Of all such amounts these are the nearest to ``amounts`` (all above 0) in relative entropy: each
    grouping in turn scales its groups to ``fill``, and takes back its own earlier scaling before it
    does (Dykstra's cyclic projections). Where bounds contradict each other that never settles.
    """
    base = np.log(amounts)
    scales = [np.zeros(len(amounts)) for _ in groupings]  # logarithms
    result = before = np.zeros(len(amounts))
    for _ in range(ROUNDS if can_be(groupings, total) else ROUNDS_IN_VAIN):
        for number, grouping in enumerate(groupings):
            others = base + sum(s for i, s in enumerate(scales) if i != number)
            largest = others.max()
            others = np.exp(np.maximum(others - largest, -500))  # of contradictions: no zeros
            sums = np.bincount(grouping.group, others, len(grouping.low))
            filled = fill(sums / sums.max(), grouping.low, grouping.high, total)
            factor = np.maximum(filled, 1e-200) / sums
            scales[number] = np.log(factor)[grouping.group] - largest
            result = others * factor[grouping.group]
        # Without a change and out of bounds it only pauses: the scalings still grow.
        still = np.abs(result - before).max() <= TOLERANCE * total
        if still and all(_within(result, grouping, total) for grouping in groupings):
            return result, True
        before = result
    return result, all(_within(result, grouping, total) for grouping in groupings)


def can_be(groupings: Sequence[Grouping], total: float) -> bool:
    """Whether any amounts add up to ``total`` and keep all bounds: a linear programme."""
    cells = np.arange(len(groupings[0].group))
    ones = np.ones(len(cells))
    sums = scipy.sparse.vstack(
        [scipy.sparse.csr_matrix((ones, (g.group, cells)), (len(g.low), len(cells)))
         for g in groupings]
    )  # fmt: skip
    low, high = (np.concatenate([getattr(g, side) for g in groupings]) for side in ("low", "high"))
    slack = TOLERANCE * total
    result = scipy.optimize.linprog(
        np.zeros(len(cells)),
        A_ub=scipy.sparse.vstack([sums, -sums]),
        b_ub=np.concatenate([high + slack, slack - low]),
        A_eq=ones[None],
        b_eq=[total],
    )
    return result.success


def _within(amounts: np.ndarray, grouping: Grouping, total: float) -> bool:
    sums = np.bincount(grouping.group, amounts, len(grouping.low))
    slack = 1e-6 * total
    return bool((sums >= grouping.low - slack).all() and (sums <= grouping.high + slack).all())
