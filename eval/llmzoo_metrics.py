"""LLM Zoo's own figures of reviews: ``metric.json`` and ``ordering.txt``, byte for byte as it wrote
them (``compute_metric_all.py`` and ``summary_ordering.py`` of the release).

For each model, over the questions that are neither coding nor math: the mean rank, and the mean
of 10 / rank. With the first model as the reference, also how often each other one is before it.
What was not read stays in the count of questions, so it lowers a mean rank: kept as it is, for the
sake of the comparison. ``eval.ranking`` has figures without that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from eval.reviews import UNREAD, Review
from llmzoo_jax.errors import InputError

LEFT_OUT = ("coding", "math")
BEST = 10  # the score of rank 1


def metric(reviews: Sequence[Review], *, horizontal: bool) -> dict[str, Any]:
    """``metric.json`` of reviews in ascending order of questions, each of the same models.

    ``horizontal`` has all models alike; without, the first is the reference. Sums are from left to
    right, in float64, as its Python has them.
    """
    models = reviews[0].declared or reviews[0].models
    counted = [review for review in reviews if review.category not in LEFT_OUT]
    n = len(counted)
    if not n:
        raise InputError(f"{reviews[0].where}: all questions are coding or math, which don't count")
    scored = bool(reviews[0].score)
    orders = dict.fromkeys(models, 0)
    scores = dict.fromkeys(models, 0)
    wins = {model: {"gpt3.5": 0, "tie": 0, "model": 0} for model in models[1:]}
    for review in counted:
        if sorted(review.models) != sorted(models):
            raise InputError(
                f"{review.where}: reviews {', '.join(review.models)}, and the first review"
                f" {', '.join(models)}; score files of the same models"
            )
        if UNREAD in review.order:
            continue
        given = dict(zip(review.models, review.score, strict=True)) if scored else {}
        ranks = review.ranks
        for model in models:
            orders[model] += ranks[model]
            scores[model] += given[model] if scored else BEST / ranks[model]
        for model in models[1:]:
            first, own = ranks[models[0]], ranks[model]
            wins[model]["gpt3.5" if first < own else "model" if own < first else "tie"] += 1
    if horizontal:
        return {
            model: ({} if scored else {"order": orders[model] / n}) | {"score": scores[model] / n}
            for model in models
        }
    first = models[0]
    if not scores[first]:
        raise InputError(f"{reviews[0].where}: no review of the file could be read, or all scores"
                         f" of {first} are 0: there is nothing to compare with")  # fmt: skip
    result = {}
    for model in models[1:]:
        ranked = {"order": {"gpt3.5": orders[first] / n, "model": orders[model] / n}}
        result[model] = {
            "winning": wins[model] | {"%model": wins[model]["model"] / n},
            **({} if scored else ranked),
            "score": {
                "gpt3.5": scores[first] / n,
                "model": scores[model] / n,
                "%model": scores[model] / scores[first],
            },
        }
    return result


def metric_text(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics, indent=4) + "\n"


def ordering_text(metrics: dict[str, Any], *, horizontal: bool) -> str:
    """``ordering.txt``: models by mean rank; the reference is called turbo."""
    if horizontal:
        rows = [(model, one["order"]) for model, one in metrics.items()]
    else:
        rows = [(model, one["order"]["model"]) for model, one in metrics.items()]
        rows.append(("turbo", next(iter(metrics.values()))["order"]["gpt3.5"]))
    rows.sort(key=lambda row: row[1])
    lines = [("Model", "Ranking Score", "Rank")]
    for model, mean in rows:
        lines.append((model, mean, 1 + sum(other < mean for _, other in rows)))
    return "".join("".join(f"{cell!s:<30}" for cell in line) + "\n" for line in lines)
