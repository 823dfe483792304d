"""Simulated judges with known strengths: do the estimates of ``eval.score`` find them again?

    python -m eval.simulation --simulations=1000

Judges order four models, or compare pairs, on 70 questions, with ties, a bias for what stands first
and for what is long, and reviews of one question that depend on each other. With a permuted order
95 % intervals must hold the truth in 93 to 97 % of simulations; LLM Zoo's fixed order, read as it
reads it, must not, and the table says how far off it is.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from absl import flags
from tqdm import tqdm

from eval import ranking
from eval.ranking import Orders
from eval.strengths import bradley_terry, plackett_luce
from llmzoo_jax import cli


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Effects on the log of a worth, as ``eval.strengths`` has them."""

    strengths: tuple[float, ...] = (0.1, -0.4, 0.0, 0.3)
    first: float = 0.8  # the first position beside the last; evenly less from one to the next
    length: float = 0.4  # of one standard deviation of the log length
    ties: tuple[float, ...] = (0.0, 0.3, -0.2, 0.5)  # log delta of sets of 1, 2, 3, 4
    alike: float = 0.5  # how often a review of a question repeats the draws of its first review


Design = Literal["permuted", "pairs", "fixed"]


def simulate(judge: Judge, rng: np.random.Generator, *, questions: int, design: Design) -> Orders:
    """Reviews of ``questions``: four of each in a Latin square; each pair in both orders; or one of
    each in the order of the models."""
    K = len(judge.strengths)
    if design == "pairs":
        shown = list(itertools.permutations(range(K), 2))
    else:
        shifts = range(K) if design == "permuted" else (0,)
        shown = [tuple((place + shift) % K for place in range(K)) for shift in shifts]
    V, N = len(shown), len(shown[0])
    models = np.tile(np.array(shown), (questions, 1))  # [R,N], the model at each position
    question = np.repeat(np.arange(questions), V)
    length = rng.normal(size=(questions, K))
    standard = np.take_along_axis(length[question], models, 1)
    standard = standard - standard.mean(1, keepdims=True)
    standard = standard / standard.std()
    place = judge.first * (0.5 - np.arange(N) / (N - 1))
    worths = np.array(judge.strengths)[models] + place + judge.length * standard
    noise = rng.random((questions, V, N))
    same = rng.random((questions, V, 1)) < judge.alike
    noise = np.where(same, noise[:, :1], noise).reshape(-1, N)
    rank, position, characters = (np.full((questions * V, K), np.nan) for _ in range(3))
    np.put_along_axis(rank, models, _draw(worths, np.array(judge.ties), noise), 1)
    np.put_along_axis(position, models, np.broadcast_to(np.arange(N) * 1.0, models.shape), 1)
    own = np.take_along_axis(length[question], models, 1)
    np.put_along_axis(characters, models, np.exp(own + 6), 1)
    return Orders(
        models=tuple(f"model {k}" for k in range(K)),
        rank=rank,
        position=position,
        length=characters,
        cluster=question,
    )


def _draw(worths: np.ndarray, ties: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Orders [R,K] of Davidson-Luce, by one uniform number ``noise[R,K]`` for each choice."""
    R, K = worths.shape
    sizes = range(1, min(K, len(ties)) + 1)
    subsets = [s for size in sizes for s in itertools.combinations(range(K), size)]
    member = np.zeros((len(subsets), K))
    for row, subset in zip(member, subsets, strict=True):
        row[list(subset)] = 1
    size = member.sum(1)
    weight = np.exp((worths @ (member / size[:, None]).T) + ties[size.astype(int) - 1])
    rank, left, place = np.zeros((R, K)), np.ones((R, K), bool), np.ones(R)
    for step in range(K):
        possible = (member[None] <= left[:, None, :]).all(2)
        share = np.cumsum(np.where(possible, weight, 0.0), 1)
        total = share[:, -1:]
        index = (share <= noise[:, step : step + 1] * total).sum(1).clip(max=len(subsets) - 1)
        chosen = (member[index] > 0) & left & (total > 0)
        rank = np.where(chosen, place[:, None], rank)
        place += chosen.sum(1)
        left &= ~chosen
    return rank


def true_win_rates(judge: Judge, *, questions: int = 100_000, seed: int = 7) -> np.ndarray:
    """What the win rates of a permuted design are in the long run."""
    orders = simulate(judge, np.random.default_rng(seed), questions=questions, design="permuted")
    return np.nanmean(ranking.review_scores(orders), 0)


@dataclass
class Tally:
    """Of one way to estimate, over simulations: which intervals [K,3] held the truth [K]."""

    held: list[np.ndarray] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)
    wrong: list[bool] = field(default_factory=list)

    def note(self, intervals: Sequence[tuple[float, float, float]], truth: np.ndarray) -> None:
        values = np.array(intervals)
        self.held.append((values[:, 1] <= truth) & (truth <= values[:, 2]))
        self.errors.append(values[:, 0] - truth)
        self.wrong.append(bool(values[:, 0].argmax() != truth.argmax()))

    def summary(self) -> dict[str, float]:
        """The share of 95 % intervals that hold the truth; the mean error of the model that is
        treated worst; how often another model than the best comes out first."""
        return {
            "coverage": float(np.mean(self.held)),
            "worst_bias": float(max(np.mean(self.errors, 0), key=abs)),
            "wrong_best": float(np.mean(self.wrong)),
        }


def coverage(
    judge: Judge, *, simulations: int, questions: int, seed: int
) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(seed)
    truth, rates = np.array(judge.strengths), true_win_rates(judge)
    truth = truth - truth.mean()
    tallies: dict[str, Tally] = defaultdict(Tally)
    both = {"positions": True, "length": True}
    for _ in tqdm(range(simulations), unit=" simulations", disable=None, delay=2):
        orders = {
            design: simulate(judge, rng, questions=questions, design=design)
            for design in ("permuted", "pairs", "fixed")
        }
        weights = ranking.draws(questions, seed=int(rng.integers(2**31)), count=1000)
        for name, fit in (
            ("Plackett-Luce, permuted orders", plackett_luce(orders["permuted"], **both)),
            ("Bradley-Terry, permuted pairs", bradley_terry(orders["pairs"], **both)),
            ("Plackett-Luce, fixed order", plackett_luce(orders["fixed"])),
        ):
            tallies[name].note(fit.strength_intervals(), truth)
        for design, name in (("permuted", "permuted orders"), ("fixed", "fixed order")):
            scores = ranking.review_scores(orders[design])
            found = ranking.bootstrap(scores, orders[design], weights)
            intervals = [(one.value, one.low, one.high) for one in found]
            tallies[f"win rate, {name}"].note(intervals, rates)
    return {name: tally.summary() for name, tally in tallies.items()}


def main(_: list[str]) -> None:
    args = flags.FLAGS
    judge = Judge(first=args.first, length=args.length)
    result = coverage(judge, simulations=args.simulations, questions=args.questions, seed=args.seed)
    print(
        f"{args.simulations} simulations of {args.questions} questions; strengths"
        f" {judge.strengths}; the first position is worth {judge.first:+g} beside the last, a"
        f" standard deviation of length {judge.length:+g}\n"
    )
    print(f"{'':<32}{'95 % holds':>12}{'worst bias':>12}{'wrong best':>12}")
    for name, one in result.items():
        share, bias, wrong = one["coverage"], one["worst_bias"], one["wrong_best"]
        print(f"{name:<32}{share:>12.1%}{bias:>+12.3f}{wrong:>12.1%}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    flags.DEFINE_integer("simulations", 1000, "how often", lower_bound=1)
    flags.DEFINE_integer("questions", 70, "in each", lower_bound=2)
    flags.DEFINE_float("first", 0.8, "what the first position is worth beside the last")
    flags.DEFINE_float("length", 0.4, "what a standard deviation of length is worth")
    flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0)
    flags.DEFINE_string("out", "", "JSON file to write, if any")
    cli.run(main)
