"""Let a model judge answers: put them in an order, score them, or compare them in pairs.

    python -m eval.judge --questions=questions-en.jsonl --answers=a.jsonl --answers=b.jsonl \\
        --answers=c.jsonl --out=reviews --aspects=general,relevance \\
        --base_url=http://localhost:8000/v1 --model=JUDGE \\
        --max_cost=5.00 --input_price=0.5 --output_price=1.5 --dry_run

Without --dry_run it begins to ask. The judge is any OpenAI-compatible address. It sees the answers
of all models at once (--mode=order, score) or of two (pair), by one aspect: general, relevance,
diversity, coherence, immersion (roleplay questions alone), integrity (ethics).

Judges prefer what stands first. So each question is shown --repeats times in different orders, and
over the questions each model stands equally often in each place (Latin squares); --order=fixed
shows all in the order of --answers, as LLM Zoo did.

A verdict that can't be read is asked for again, --tries times, and never guessed; what stays unread
is written as such, with -1. --out gets reviews.jsonl, for ``eval.score``; judge.json; and
requests.jsonl, every request with its answer and price. While that is there, the same command goes
on where it was stopped or killed, and pays for nothing twice; never more than --max_cost in all.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines.endpoint import CapReached, Endpoint, Request, in_order
from data_pipelines.ledger import Ledger
from data_pipelines.sources import Unusable
from eval import asking, judging
from eval.answers import Answer, Answers, read_answers
from eval.judging import Aspect, Mode, Verdict
from eval.questions import Question, read_questions
from eval.reviews import UNREAD
from eval.score import sha256, write_text
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One review to be had."""

    aspect: Aspect
    question: Question
    answers: tuple[Answer, ...]  # as the judge sees them
    repeat: int


@dataclass
class Job:
    """A run, and what came of it, by the number of the item."""

    endpoint: Endpoint
    mode: Mode
    temperature: float
    max_tokens: int
    tries: int
    seed: int
    verdicts: dict[int, tuple[Verdict | None, str]] = field(default_factory=dict)  # and the text
    failed: dict[int, str] = field(default_factory=dict)
    asked_again: collections.Counter[str] = field(default_factory=collections.Counter)

    async def judge(self, number: int, item: Item) -> None:
        """Asks until there is a verdict, or ``tries`` are used up."""
        n = len(item.answers)
        prompt = judging.to_prompt(item.question, item.answers, item.aspect, self.mode)
        more: tuple[dict[str, str], ...] = ()
        max_tokens, text = self.max_tokens, ""
        for attempt in range(self.tries):
            request = Request(
                messages=(*prompt, *more),
                max_tokens=max_tokens,
                temperature=self.temperature,
                # The same answers in the same order are another review when they come again.
                seed=(self.seed * 1_000_003 + item.repeat * 101 + attempt) % 2**31,
            )
            reply = await self.endpoint.ask(request)
            text = reply.text or reply.refusal
            try:
                self.verdicts[number] = judging.read_verdict(reply, n, self.mode), text
                return
            except Unusable as error:
                reason = error.reason
            self.asked_again[reason] += attempt + 1 < self.tries
            if reason == "cut off":
                max_tokens = 2 * self.max_tokens
            elif reason != "refusal" and reply.text.strip():
                again = judging.AGAIN[self.mode].format(n=n, worst=judging.WORST, best=judging.BEST)
                more = ({"role": "assistant", "content": reply.text},
                        {"role": "user", "content": again})  # fmt: skip
        self.verdicts[number] = None, text


def plan(
    questions: Sequence[Question], answers: Sequence[Answers], aspects: Sequence[Aspect], *,
    mode: Mode, repeats: int, fixed: bool,
) -> Iterator[Item]:  # fmt: skip
    """Every review to be had. Raises InputError where an answer is missing."""
    for aspect in aspects:
        fitting = [q for q in questions if not aspect.categories or q.category in aspect.categories]
        if not fitting:
            raise InputError(
                f"--aspects={aspect.name}: it is for questions of the category"
                f" {' or '.join(aspect.categories)}, and there is none"
            )
        for number, question in enumerate(fitting):
            given = []
            for one in answers:
                if (answer := one.of(question)) is None:
                    raise InputError(
                        f"{one.path}: no answer to question {question.question_id} in"
                        f" {question.lang} ({question.where}); run eval.answers for it"
                    )
                given.append(answer)
            sets = judging.pairs(len(given)) if mode == "pair" else [tuple(range(len(given)))]
            for chosen in sets:
                rows = judging.presentations(len(chosen), number, repeats, fixed=fixed)
                for repeat, row in enumerate(rows):
                    shown = tuple(given[chosen[place]] for place in row)
                    yield Item(aspect=aspect, question=question, answers=shown, repeat=repeat)


async def judge(job: Job, items: Sequence[Item], *, concurrency: int) -> None:
    with tqdm(total=len(items), unit=" reviews", disable=None) as bar:

        async def one(pair: tuple[int, Item]) -> None:
            number, item = pair
            try:
                await job.judge(number, item)
            except CapReached:
                job.failed[number] = "the cap is reached"
            except Unusable as error:
                job.failed[number] = str(error)
            asking.show_cost(bar, job.endpoint.ledger)
            bar.update()

        try:
            await in_order(enumerate(items), one, concurrency=concurrency)
        finally:
            await job.endpoint.close()


def to_record(number: int, item: Item, job: Job, models: Sequence[str]) -> dict[str, Any]:
    """A line of reviews.jsonl, with LLM Zoo's keys."""
    verdict, text = job.verdicts[number]
    values = verdict.values if verdict else (UNREAD,) * len(item.answers)
    question = item.question
    return {
        "review_id": number + 1,
        "reviewer_id": job.endpoint.model,
        "aspect": item.aspect.name,
        "lang": question.lang,
        "question_id": question.question_id,
        "category": question.category,
        "answer_ids": [answer.answer_id for answer in item.answers],
        "models": list(models),
        "metadata": {
            "question": question.text,
            "answers": [answer.text for answer in item.answers],
            "model_ids": [answer.model for answer in item.answers],
        },
        "text": text,
        ("score" if job.mode == "score" else "order"): list(values),
        "how": verdict.how if verdict else "not read",
    }


def write_results(
    out: Path, items: Sequence[Item], job: Job, models: Sequence[str], about: dict[str, Any]
) -> dict[str, Any]:
    """reviews.jsonl and judge.json, whole; returns what is in the latter."""
    records = [to_record(number, items[number], job, models) for number in sorted(job.verdicts)]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    # A judge may send half of a surrogate pair.
    write_text(out / "reviews.jsonl", lines.encode("utf-8", "backslashreplace").decode())
    ledger = job.endpoint.ledger
    report = about | {
        "complete": not job.failed,
        "reviews": len(records),
        "missing": dict(collections.Counter(job.failed.values())),
        "how": dict(collections.Counter(record["how"] for record in records)),
        "asked_again": dict(+job.asked_again),
        "requests": len(ledger),
        "dollars": round(ledger.spent, 6),
        "max_cost": ledger.cap,
    }
    write_text(out / "judge.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def choose_aspects(names: Sequence[str], path: str) -> list[Aspect]:
    known = judging.read_aspects(Path(path) if path else judging.OWN)
    for name in names:
        if name not in known:
            raise InputError(f"--aspects: {name!r} is none of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def main(_: list[str]) -> None:
    args = flags.FLAGS
    if len(args.answers) < 2:
        raise InputError("--answers: give the files of two or more models")
    if args.order == "fixed" and args["repeats"].present:
        raise InputError("--repeats is of no use with --order=fixed: all would be the same")
    questions = read_questions(args.questions, lang=args.lang)
    answers = [read_answers(path) for path in args.answers]
    models = [one.model for one in answers]
    if len(set(models)) < len(models):
        raise InputError(f"--answers: two files are of one model: {', '.join(models)}")
    aspects = choose_aspects(args.aspects, args.aspects_file)
    items = list(
        plan(questions, answers, aspects, mode=args.mode, repeats=args.repeats,
             fixed=args.order == "fixed")
    )  # fmt: skip
    out = Path(args.out)
    about = {
        "judge": args.model, "base_url": args.base_url, "mode": args.mode, "order": args.order,
        "repeats": 1 if args.order == "fixed" else args.repeats, "tries": args.tries,
        "temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed,
        "aspects": {aspect.name: aspect.text for aspect in aspects}, "models": models,
        "files": {path: sha256(path) for path in (*args.questions, *args.answers)},
        "input_price": args.input_price, "output_price": args.output_price,
    }  # fmt: skip
    ledger = Ledger(out / "requests.jsonl", args.max_cost)
    try:
        endpoint = asking.open_endpoint(args.model, ledger)
        prompts = [judging.to_prompt(i.question, i.answers, i.aspect, args.mode) for i in items]
        asking.show_estimate(prompts, args.max_tokens, endpoint)
        if args.dry_run:
            print("dry run: nothing was sent")
            return
        job = Job(endpoint, args.mode, args.temperature, args.max_tokens, args.tries, args.seed)
        asyncio.run(judge(job, items, concurrency=args.concurrency))
        report = write_results(out, items, job, models, about)
    finally:
        ledger.close()
    print(f"{report['reviews']:,} reviews for ${report['dollars']:,.4f}: {out / 'reviews.jsonl'}")
    print(f"read as: {report['how']}; asked again for: {report['asked_again'] or 'none'}")
    asking.finish(job.failed)


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "questions", None, "file of questions; may be repeated", required=True
    )
    flags.DEFINE_multi_string(
        "answers", None, "file of answers of a model; repeat it", required=True
    )
    flags.DEFINE_string("out", None, "folder to write to", required=True)
    flags.DEFINE_string("model", None, "the judge's name at the endpoint", required=True)
    flags.DEFINE_list("aspects", ["general"], "what to judge by, as general,relevance")
    flags.DEFINE_string("aspects_file", "", "TOML file of other aspects, as eval/aspects.toml")
    flags.DEFINE_enum("mode", "order", ["order", "pair", "score"], "what the judge does")
    flags.DEFINE_enum("order", "balanced", ["balanced", "fixed"], "in which answers are shown")
    flags.DEFINE_integer("repeats", 2, "orders in which a question is shown", lower_bound=1)
    flags.DEFINE_integer("tries", 3, "until a verdict can be read", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 1024, "of a verdict, at most", lower_bound=1)
    flags.DEFINE_float("temperature", 0, "of sampling", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "of the requests", lower_bound=0)
    flags.DEFINE_string("lang", "", "language of questions that name none, as en")
    asking.define_flags(required=True)
    cli.run(main)
