"""One page about an evaluation, from what answers, judge and score have written.

    python -m eval.report --scores=scores/score.json --reviews=reviews/reviews.jsonl \\
        --judge=reviews/judge.json --out=report

--out gets report.html, which loads nothing from elsewhere and has a light and a dark theme, and its
figures as PNG: win rates by aspect and language with intervals, bars, a radar chart. The page also
says which differences are significant, what the judge's love of first places and of length is worth
and how far LLM Zoo's fixed order would have misled, how far judges agree, which answers are in the
wrong language, examples side by side, what it cost, and everything needed to repeat it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from data_pipelines.language import count_scripts, main_script
from eval import report_figures
from eval.reviews import Review, read_reviews
from eval.score import ALL, write_text
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError

FEW = 30  # questions below which an interval is of little worth
RIGHT_TO_LEFT = {"Arab", "Hebr", "Thaa"}
PACKAGES = ("llmzoo-jax", "jax", "numpy", "scipy")


def read_json(path: str) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); give the file that eval wrote") from error


def direction(text: str) -> str:
    """Of a text, by the script of most of its letters: an Arabic answer that begins with a Latin
    word is from right to left all the same."""
    counts = count_scripts(text)
    return "rtl" if counts and main_script(counts)[0] in RIGHT_TO_LEFT else "ltr"


def facts(
    scored: Mapping[str, Any],
    reviews: Sequence[Review],
    judged: Sequence[Mapping[str, Any]],
    *,
    title: str,
    examples: int,
    now: float,
) -> dict[str, Any]:
    """Everything that the page shows."""
    groups = scored["groups"]
    if not groups:
        raise InputError("score.json has no groups; run eval.score again")
    judge = groups[0]["judge"]  # of several, the first is shown in full
    own = [group for group in groups if group["judge"] == judge]
    models = list(dict.fromkeys(row["model"] for group in own for row in group["models"]))
    aspects = list(dict.fromkeys(group["aspect"] or "reviews" for group in own))
    langs = list(dict.fromkeys(group["lang"] for group in own))
    by = {(group["aspect"] or "reviews", group["lang"]): group for group in own}
    overall = {
        aspect: by.get((aspect, ALL)) or next(g for (a, _), g in by.items() if a == aspect)
        for aspect in aspects
    }
    matrix = {
        model: {
            aspect: {lang: _rate(by.get((aspect, lang)), model) for lang in langs}
            for aspect in aspects
        }
        for model in models
    }
    values = {
        model: [(_rate(overall[aspect], model) or {}).get("value") for aspect in aspects]
        for model in models
    }
    return {
        "title": title,
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        "models": models,
        "aspects": aspects,
        "langs": langs,
        "judge": judge,
        "judges": list(dict.fromkeys(group["judge"] for group in groups)),
        "colours": report_figures.COLOURS,
        "matrix": matrix,
        "bars": [(aspect, _ranked(group)) for aspect, group in overall.items()],
        "radar": report_figures.radar(values, aspects),
        "radar_axes": aspects,
        "radar_values": values,
        "pairs": [
            {"aspect": aspect} | pair for aspect, g in overall.items() for pair in g["pairs"]
        ],
        "tests": scored["tests"],
        "positions": list(overall.items()),
        "languages": [
            {"lang": g["lang"]} | row
            for g in own
            if g["lang"] != ALL and (g["aspect"] or "reviews") == aspects[0]
            for row in g["models"]
            if "answers" in row
        ],
        "agreement": scored["agreement"],
        "attention": attention(own),
        "reviews": sum(g["reviews"] for g in groups if g["lang"] != ALL),
        "questions": len({(r.lang, r.question_id) for r in reviews})
        or max(group["questions"] for group in own),
        "examples": choose(reviews, examples),
        "judged": judged,
        "dollars": sum(one["dollars"] for one in judged),
        "about": scored.get("about", {}),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _rate(group: Mapping[str, Any] | None, model: str) -> dict[str, Any] | None:
    rows = group["models"] if group else ()
    return next((row["win_rate"] for row in rows if row["model"] == model), None)


def _ranked(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(group["models"], key=lambda row: -row["win_rate"]["value"])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


def attention(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the figures."""
    found = []
    fixed = [group for group in groups if not group["permuted"]]
    if fixed:
        found.append(
            f"In {len(fixed)} of {len(groups)} groups all answers stand in one fixed order: what"
            " the judge likes about first places can't be told from what it likes about a model."
        )
    unread = sum(group["unread"] for group in groups if group["lang"] != ALL)
    total = sum(group["reviews"] for group in groups if group["lang"] != ALL)
    if unread:
        found.append(
            f"{unread} of {total} reviews could not be read; the bounds of each model say what they"
            " could change at most."
        )
    small = [group for group in groups if group["questions"] < FEW]
    if small:
        found.append(
            f"{len(small)} of {len(groups)} groups have fewer than {FEW} questions: their intervals"
            " are wide, and themselves uncertain."
        )
    for group in groups:
        if group["consistency"] is not None and group["consistency"] < 0.6:
            found.append(
                f"{group['aspect'] or 'reviews'}, {group['lang']}: when the order is another, the"
                f" judge says the same of {group['consistency']:.0%} of pairs only."
            )
    return found


def choose(reviews: Sequence[Review], count: int) -> list[dict[str, Any]]:
    """Reviews to show, of languages and aspects in turn, each from another place of the file."""
    parts: dict[tuple[str, str], list[Review]] = {}
    for review in reviews:
        if review.answers:
            parts.setdefault((review.lang, review.aspect), []).append(review)
    keys = sorted(parts, key=lambda key: (key[1], key[0]))
    step = max(len(keys) / count, 1) if count else 1
    shown = []
    for i in range(min(count, sum(map(len, parts.values())))):
        part = parts[keys[int(i * step) % len(keys)]]
        review = part[i * len(part) // count]
        sides = sorted(
            zip(review.models, review.answers, review.order, review.score or review.order,
                strict=True),
            key=lambda side: (side[2], side[0]),
        )  # fmt: skip
        shown.append(
            {
                "review": review,
                "dir": direction(review.question),
                "sides": [
                    {"model": model, "text": text, "rank": rank, "score": score,
                     "dir": direction(text or review.question)}
                    for model, text, rank, score in sides
                ],
            }
        )  # fmt: skip
    return shown


def page(values: Mapping[str, Any]) -> str:
    import jinja2

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(values)


def main(_: list[str]) -> None:
    args = flags.FLAGS
    scored = read_json(args.scores)
    reviews = [review for path in args.reviews for review in read_reviews(path)]
    judged = [read_json(path) for path in args.judge]
    values = facts(
        scored, reviews, judged, title=args.title, examples=args.examples, now=time.time()
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    names = report_figures.draw(values, out)
    write_text(out / "report.html", page(values))
    print(f"written: {', '.join(str(out / name) for name in ('report.html', *names))}")


if __name__ == "__main__":
    flags.DEFINE_string("scores", None, "score.json of eval.score", required=True)
    flags.DEFINE_multi_string("reviews", [], "reviews, for examples; may be repeated")
    flags.DEFINE_multi_string("judge", [], "judge.json of eval.judge, for cost; may be repeated")
    flags.DEFINE_string("out", None, "folder to write to", required=True)
    flags.DEFINE_string("title", "Evaluation", "of the page")
    flags.DEFINE_integer("examples", 6, "questions to show with their answers", lower_bound=0)
    cli.run(main)
