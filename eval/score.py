"""From reviews to figures: LLM Zoo's own, and honest ones beside them.

    python -m eval.score --reviews=review.jsonl --questions=questions-en.jsonl --out=scores

Writes LLM Zoo's metric.json and ordering.txt as its release has them (--horizontal: all models
alike; else the first is the reference), and score.json, for ``eval.report``: win rates with ties,
strengths (Plackett-Luce and Bradley-Terry, with ties), both with 95 % intervals over questions;
every pair of models with a p-value, corrected for all that are tested (Holm); what position and
length are worth to the judge; bounds for what could not be read; answers in the wrong language;
and, with the reviews of several judges or people, how far they agree.

Several files, aspects, languages and judges may be given: --reviews=a.jsonl --reviews=b.jsonl. Each
group then has its own folder, LANG/ASPECT, as in the release.

--reparse reads the orders from the texts again, with LLM Zoo's parser or with a better one; without
it, the stored ones count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.language import mismatch
from eval import llmzoo_metrics, ranking, strengths
from eval.agreement import agree, consistency
from eval.questions import Question, read_questions
from eval.ranking import Interval, Orders
from eval.reviews import UNREAD, Review, read_better, read_released, read_reviews
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError

ALL = "all"  # languages together


def reparse(reviews: Sequence[Review], parser: str) -> list[Review]:
    """The reviews with orders read from their texts by the "released" or the "better" parser."""
    result = []
    for review in reviews:
        if review.score:
            raise InputError(f"{review.where}: --reparse is for orders; this review has scores")
        n = len(review.models)
        if parser == "released":
            order = read_released(review.text, n)
            if 0 in order:
                order = (UNREAD,) * n
        else:
            reading = read_better(review.text, n)
            order = reading.order if reading else (UNREAD,) * n
        result.append(dataclasses.replace(review, order=order))
    return result


def select(reviews: Sequence[Review], questions: Sequence[Question]) -> list[Review]:
    """The reviews of these questions, by ascending id.

    Raises InputError where a question has no review, though others of its category have: a mean
    over those that happen to be there is none over the benchmark.
    """
    by_key: dict[tuple[str, str], list[Review]] = {}
    for review in reviews:
        by_key.setdefault((review.lang, str(review.question_id)), []).append(review)
    asked = [q for q in questions if q.key in by_key]
    if not asked:
        raise InputError(
            f"{reviews[0].where}: none of the reviewed questions, as {reviews[0].question_id} in"
            f" {reviews[0].lang}, is among --questions, as {questions[0].question_id} in"
            f" {questions[0].lang} ({questions[0].where})"
        )
    parts = {(q.lang, q.category) for q in asked}
    missing = [q for q in questions if (q.lang, q.category) in parts and q.key not in by_key]
    if missing:
        raise InputError(
            f"{reviews[0].where.rpartition(':')[0]}: no review of question"
            f" {missing[0].question_id} ({missing[0].where}) and {len(missing) - 1} others; judge"
            " them, or give --questions with those alone that were judged"
        )
    asked.sort(key=lambda q: (isinstance(q.question_id, str), q.question_id))
    return [review for question in asked for review in by_key[question.key]]


# --- one group ----------------------------------------------------------------------------------


def score_group(reviews: Sequence[Review], *, seed: int) -> dict[str, Any]:
    """Everything about the reviews of one judge, aspect and language; Holm's correction, which is
    over all groups, is not in it yet."""
    names = [model for review in reviews for model in (*review.declared, *review.models)]
    orders = ranking.to_orders(reviews, tuple(dict.fromkeys(names)))
    weights = ranking.draws(orders.clusters, seed=seed)
    has_length = not np.isnan(orders.length).all() and np.nanstd(orders.standard_length()) > 0
    scores = ranking.review_scores(orders)
    plain = strengths.plackett_luce(orders, positions=orders.permuted)
    pairwise = strengths.bradley_terry(orders, positions=orders.permuted)
    levelled = None
    if has_length:
        levelled = strengths.plackett_luce(orders, positions=orders.permuted, length=True)
    columns = {
        "mean_rank": ranking.bootstrap(orders.rank, orders, weights),
        "win_rate": ranking.bootstrap(scores, orders, weights),
        "strength": _intervals(plain.strength_intervals()),
        "bradley_terry": _intervals(pairwise.strength_intervals()),
    }
    if levelled:
        columns["length_controlled"] = _intervals(strengths.win_rate_intervals(levelled))
    limits = ranking.bounds(reviews, orders.models)
    languages = wrong_language(reviews)
    models = [
        {"model": model, "bounds": limits[model]}
        | {name: dataclasses.asdict(values[k]) for name, values in columns.items()}
        | languages.get(model, {})
        for k, model in enumerate(orders.models)
    ]
    return {
        "judge": reviews[0].judge,
        "aspect": reviews[0].aspect,
        "questions": len({(r.lang, r.question_id) for r in reviews}),
        "reviews": len(reviews),
        "unread": sum(not review.read for review in reviews),
        "permuted": orders.permuted,
        "consistency": consistency(reviews),
        "models": models,
        "pairs": score_pairs(orders, weights, seed=seed),
        "position": _position(plain, orders) if orders.permuted else None,
        "length": _one(levelled.length_interval) if levelled else None,
    }


def _intervals(rows: Sequence[tuple[float, float, float]]) -> list[Interval]:
    return [Interval(*row) for row in rows]


def _one(row: tuple[float, float, float]) -> dict[str, float]:
    return dataclasses.asdict(Interval(*row))


def _position(fit: strengths.Fit, orders: Orders) -> dict[str, Any]:
    """What standing first is worth, and by how much the order of the columns, had it been the only
    one, would have shifted each win rate."""
    result: dict[str, Any] = {
        "first_over_last": _one(fit.position_interval),
        "effects": fit.positions.tolist(),
    }
    if len(fit.positions) == len(fit.models):
        shift = strengths.fixed_order_shift(fit)
        result["fixed_order_misleads"] = dict(zip(fit.models, shift.tolist(), strict=True))
    return result


def score_pairs(orders: Orders, weights: np.ndarray, *, seed: int) -> list[dict[str, Any]]:
    """Every pair: counts of reviews; the difference of their scores, paired by question."""
    scores = ranking.pair_scores(orders)
    pairs = list(itertools.combinations(range(len(orders.models)), 2))
    pairs = [pair for pair in pairs if not np.isnan(scores[:, *pair]).all()]
    differences = np.stack([2 * scores[:, a, b] - 1 for a, b in pairs], axis=1)  # -1, 0, 1
    intervals = ranking.bootstrap(differences, orders, weights)
    p_values = ranking.sign_flip(differences, orders, seed=seed)
    result = []
    for (a, b), difference, interval, p in zip(
        pairs, differences.T, intervals, p_values, strict=True
    ):
        counts = [int((difference == value).sum()) for value in (1, 0, -1)]
        result.append(
            {"models": (orders.models[a], orders.models[b])}
            | dict(zip(("won", "tied", "lost"), counts, strict=True))
            | {"difference": dataclasses.asdict(interval), "p": float(p)}
        )
    return result


def wrong_language(reviews: Sequence[Review]) -> dict[str, dict[str, Any]]:
    """Of each model: answers, their mean length, and how many are surely in another language than
    the question. Of each question one review counts."""
    found: dict[str, Counter] = {}
    seen = set()
    for review in reviews:
        for model, answer in zip(review.models, review.answers, strict=False):
            key = (review.lang, review.question_id, model)
            if key in seen:
                continue
            seen.add(key)
            one = found.setdefault(model, Counter())
            one["answers"] += 1
            one["characters"] += len(answer)
            one["empty"] += not answer.strip()
            one["wrong_language"] += mismatch(review.lang, [answer]) is not None
    return {
        model: {
            "answers": one["answers"],
            "empty": one["empty"],
            "mean_length": one["characters"] / one["answers"],
            "wrong_language": one["wrong_language"],
        }
        for model, one in found.items()
    }


# --- all groups ---------------------------------------------------------------------------------


def group(reviews: Sequence[Review]) -> dict[tuple[str, str, str], list[Review]]:
    """By judge, aspect and language; with several languages, also all of them together."""
    groups: dict[tuple[str, str, str], list[Review]] = {}
    for review in reviews:
        groups.setdefault((review.judge, review.aspect, review.lang), []).append(review)
    for judge, aspect in dict.fromkeys(key[:2] for key in groups):
        parts = [part for key, part in groups.items() if key[:2] == (judge, aspect)]
        if len(parts) > 1:
            groups[judge, aspect, ALL] = [review for part in parts for review in part]
    return groups


def score(reviews: Sequence[Review], *, seed: int = 0) -> dict[str, Any]:
    """What is in score.json, but for where it came from."""
    groups = group(reviews)
    scored = [{"lang": key[2]} | score_group(part, seed=seed) for key, part in groups.items()]
    pairs = [pair for one in scored for pair in one["pairs"]]
    for pair, p in zip(pairs, ranking.holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = p
    judges = list(dict.fromkeys(review.judge for review in reviews))
    by_judge = {judge: [r for r in reviews if r.judge == judge] for judge in judges}
    found = [agree(by_judge[a], by_judge[b]) for a, b in itertools.combinations(judges, 2)]
    agreements = [dataclasses.asdict(one) for one in found if one]
    return {"groups": scored, "tests": len(pairs), "agreement": agreements}


def table(scored: dict[str, Any]) -> str:
    """The win rates, for the terminal."""
    lines = []
    for one in scored["groups"]:
        name = " · ".join(filter(None, (one["judge"], one["lang"], one["aspect"])))
        unread = f", {one['unread']} not read" if one["unread"] else ""
        order = "permuted" if one["permuted"] else "FIXED ORDER: position bias is not known"
        lines.append(f"{name}: {one['reviews']} reviews of {one['questions']} questions{unread};"
                     f" {order}")  # fmt: skip
        rows = sorted(one["models"], key=lambda row: -row["win_rate"]["value"])
        for row in rows:
            w, s, r = row["win_rate"], row["strength"], row["mean_rank"]
            lines.append(
                f"  {row['model']:<28} win rate {w['value']:.3f} [{w['low']:.3f}, {w['high']:.3f}]"
                f"  strength {s['value']:+.2f} [{s['low']:+.2f}, {s['high']:+.2f}]"
                f"  mean rank {r['value']:.2f}"
            )
        sure = sum(pair["p_holm"] < 0.05 for pair in one["pairs"])
        lines.append(f"  {sure} of {len(one['pairs'])} pairs differ significantly (5 %, Holm,"
                     f" {scored['tests']} tests)")  # fmt: skip
        if one["position"]:
            first = one["position"]["first_over_last"]
            lines.append(f"  the first position over the last: {first['value']:+.2f}"
                         f" [{first['low']:+.2f}, {first['high']:+.2f}]")  # fmt: skip
    for one in scored["agreement"]:
        k = one["kappa"]
        lines.append(f"{' and '.join(one['judges'])}: the same verdict on {one['same']:.0%} of"
                     f" {one['pairs']} pairs, kappa {k['value']:.2f} [{k['low']:.2f},"
                     f" {k['high']:.2f}], Kendall's tau {one['tau']:.2f}")  # fmt: skip
    return "\n".join(lines)


# --- the command --------------------------------------------------------------------------------


def write_llmzoo(reviews: Sequence[Review], out: Path, *, horizontal: bool) -> list[Path]:
    """metric.json and ordering.txt: in ``out`` for one judge and aspect, and in a folder for each
    of several groups. Returns the folders; none for pairs, of which LLM Zoo has no figures."""
    if len({tuple(sorted(review.models)) for review in reviews}) > 1:
        return []
    groups = group(reviews)
    single = {key: part for key, part in groups.items() if key[2] != ALL}
    folders = {}
    if len({key[:2] for key in groups}) == 1:
        folders[out] = reviews
    if len(single) > 1:
        several = len({key[0] for key in groups}) > 1
        for (judge, aspect, lang), part in single.items():
            names = ([judge] if several else []) + [lang, aspect or "reviews"]
            folders[out.joinpath(*(name.replace("/", "-") for name in names))] = part
    for folder, part in folders.items():
        metrics = llmzoo_metrics.metric(part, horizontal=horizontal)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "metric.json", llmzoo_metrics.metric_text(metrics))
        if not part[0].score:
            text = llmzoo_metrics.ordering_text(metrics, horizontal=horizontal)
            write_text(folder / "ordering.txt", text)
    return list(folders)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_known(value), indent=1, ensure_ascii=False) + "\n")


def _known(value: Any) -> Any:
    """NaN, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: _known(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def main(_: list[str]) -> None:
    args = flags.FLAGS
    reviews = [review for path in args.reviews for review in read_reviews(path)]
    questions = read_questions(args.questions, lang=args.lang)
    reviews = select(reviews, questions)
    if args.reparse:
        reviews = reparse(reviews, args.reparse)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folders = write_llmzoo(reviews, out, horizontal=args.horizontal)
    scored = score(reviews, seed=args.seed)
    files = {path: sha256(path) for path in (*args.reviews, *args.questions)}
    about = {"files": files, "reparse": args.reparse or "", "seed": args.seed}
    write_json(out / "score.json", {"about": about} | scored)
    print(table(scored))
    print(f"\nwritten: {out / 'score.json'}")
    if folders:
        print(f"LLM Zoo's metric.json and ordering.txt: in {', '.join(map(str, folders))}")
    else:
        print("no metric.json: the reviews compare different models")


if __name__ == "__main__":
    flags.DEFINE_multi_string("reviews", None, "file of reviews; may be repeated", required=True)
    flags.DEFINE_multi_string("questions", None, "their questions; may be repeated", required=True)
    flags.DEFINE_string("lang", "", "language of questions that name none, as en")
    flags.DEFINE_string("out", None, "folder to write to", required=True)
    flags.DEFINE_bool("horizontal", False, "LLM Zoo's figures with all models alike")
    flags.DEFINE_enum("reparse", None, ["released", "better"], "read the orders from the texts")
    flags.DEFINE_integer("seed", 0, "of bootstrap and significance", lower_bound=0)
    cli.run(main)
