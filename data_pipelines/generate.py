"""Write conversations with a model, through any OpenAI-compatible endpoint.

    python -m data_pipelines.generate --recipe=post_translation --data=in.jsonl \\
        --languages=zh:0.3,ar:0.2,sw:0.5 --out=cache/translated \\
        --base_url=http://localhost:8000/v1 --model=NAME \\
        --max_cost=5.00 --input_price=0.5 --output_price=1.5 --dry_run

Without --dry_run it begins to ask. Recipes:
  post_translation  translates instruction and input of --data into a sampled language, then answers
  post_answering    answers --data for the people of a language; translates what is in another one
  user_centered     invents (role, instruction, input) for --count conversations, and answers them
  chat              simulated users and an assistant talk, about --data, or --count times

--out gets conversations.jsonl, dropped.jsonl (every drop, with its reason), report.json, and
requests.jsonl: every request with its answer and price. That file is never rewritten; while it is
there, what was answered once is not asked again. So a run that was stopped or killed continues
with the same command and ends with the same conversations.jsonl.

--max_cost is the most that all runs with this --out may cost together. A request is sent only if
it fits in the worst case. Where no more fits, the run writes what is done and exits with 3; the
same command with a higher --max_cost goes on.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines.endpoint import Endpoint, Limits
from data_pipelines.generation import (
    Estimate,
    Job,
    Options,
    Record,
    chat,
    post_answering,
    post_translation,
    read_instructions,
    user_centered,
)
from data_pipelines.generation.languages import check_known
from data_pipelines.ledger import Ledger
from data_pipelines.sources import Dropped
from llmzoo_jax import cli
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.errors import InputError

RECIPES = {
    "post_translation": post_translation,
    "post_answering": post_answering,
    "user_centered": user_centered,
    "chat": chat,
}
CAP_REACHED = 3  # exit code


def parse_languages(text: str) -> dict[str, float]:
    """``"zh:0.3,sw"`` as weights; a language without one has 1."""
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        lang, _, weight = part.partition(":")
        check_known(lang)
        try:
            weights[lang] = float(weight or 1)
        except ValueError as error:
            raise InputError(f"--languages: {part!r} is not LANG:WEIGHT, such as sw:0.5") from error
        if not 0 < weights[lang] < float("inf"):
            raise InputError(f"--languages: the weight in {part!r} must be above 0")
    if not weights:
        raise InputError("--languages: name at least one, such as --languages=zh:0.3,ar:0.2,sw:0.5")
    return weights


def read_data(path: str, lang: str, count: int) -> tuple[list[Record], list[Dropped]]:
    """The first ``count`` records of use (0: all), and those before them that are of none."""
    records: list[Record] = []
    dropped: list[Dropped] = []
    for item in read_instructions(path, lang):
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            records.append(item)
        if count and len(records) == count:
            break
    if not records:
        raise InputError(f"--data={path}: no instruction in it; it needs JSON Lines with"
                         " 'instruction' and 'input', or with 'messages'")  # fmt: skip
    return records, dropped


def write_results(out: Path, job: Job, unread: list[Dropped], recipe: str) -> dict[str, Any]:
    """Writes the three files of results whole, and returns what is in report.json."""
    conversations = [job.conversations[place] for place in sorted(job.conversations)]
    dropped = unread + [job.dropped[place] for place in sorted(job.dropped)]
    write_jsonl(out / "conversations.jsonl", conversations)
    lines = (json.dumps(dataclasses.asdict(d), ensure_ascii=False) + "\n" for d in dropped)
    write_text(out / "dropped.jsonl", "".join(lines))
    ledger = job.endpoint.ledger
    report = {
        "recipe": recipe,
        "model": job.endpoint.model,
        "complete": not job.unfinished,
        "conversations": len(conversations),
        "unfinished": job.unfinished,
        "languages": dict(collections.Counter(c.lang for c in conversations).most_common()),
        "dropped": dict(collections.Counter(d.reason for d in dropped).most_common()),
        "asked_again": dict(job.rejected.most_common()),
        "answers": len(ledger),
        "dollars": round(ledger.spent, 6),
        "max_cost": ledger.cap,
    }
    write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # backslashreplace: the detail of a drop may quote half of a surrogate pair
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def show_estimate(estimate: Estimate, endpoint: Endpoint, out: Path) -> None:
    ledger = endpoint.ledger
    worst = endpoint.cost(estimate.prompt_tokens, estimate.completion_tokens)
    print(
        f"at most {estimate.requests:,} requests, {estimate.prompt_tokens:,} prompt tokens and"
        f" {estimate.completion_tokens:,} answer tokens: ${worst:,.4f}, and more for answers that"
        f" have to be asked for again\n{out / 'requests.jsonl'}: {len(ledger):,} answers are there,"
        f" ${ledger.spent:,.4f} is spent; the cap is ${ledger.cap:,.4f}"
    )
    if ledger.spent + worst > ledger.cap:
        print("the cap may be reached before the end")


async def generate(
    recipe: str, endpoint: Endpoint, options: Options, records: list[Record], *,
    concurrency: int, total: int,
) -> Job:  # fmt: skip
    """Runs a recipe with a progress bar; raises what ``Endpoint.ask`` raises for good."""
    module = RECIPES[recipe]
    with tqdm(total=total, unit="conversation", disable=None) as bar:
        job = Job(endpoint, options, module.KIND, concurrency)

        def progress() -> None:
            ledger = endpoint.ledger
            spent = f"${ledger.spent:.4f} of ${ledger.cap:.2f}"
            bar.set_postfix(spent=spent, dropped=len(job.dropped), refresh=False)
            bar.update(len(job.conversations) - bar.n)

        job.progress = progress
        try:
            await module.run(job, records)
        finally:
            await endpoint.close()
    return job


def api_key_of(variable: str) -> str:
    if variable and not os.environ.get(variable):
        raise InputError(f"--api_key_env={variable}: this environment variable is not set")
    return os.environ[variable] if variable else ""


def check_flags(args: flags.FlagValues) -> None:
    if args["data_language"].present and not args.data:
        raise InputError("--data_language is of no use without --data")
    if args["turns"].present and args.recipe != "chat":
        raise InputError("--turns is for --recipe=chat alone")
    if args.recipe.startswith("post_") and not args.data:
        raise InputError(f"--recipe={args.recipe} needs instructions: give --data=FILE.jsonl")
    if not args.data and not args.count:
        raise InputError("say how many conversations with --count=N")


def main(_: list[str]) -> None:
    args = flags.FLAGS
    check_flags(args)
    options = Options(
        languages=parse_languages(args.languages), count=args.count, turns=args.turns,
        seed=args.seed, max_tokens=args.max_tokens, temperature=args.temperature, tries=args.tries,
        source=f"{args.model} ({args.recipe})", license=args.license,
    )  # fmt: skip
    limits = Limits(
        input_price=args.input_price, output_price=args.output_price,
        requests_per_minute=args.requests_per_minute, timeout=args.timeout, attempts=args.attempts,
        first_pause=args.first_pause,
    )  # fmt: skip
    records, unread = [], []
    if args.data:
        records, unread = read_data(args.data, args.data_language, args.count)
    estimate = RECIPES[args.recipe].estimate(options, records)
    out = Path(args.out)
    api_key = "" if args.dry_run else api_key_of(args.api_key_env)
    ledger = Ledger(out / "requests.jsonl", args.max_cost)
    try:
        endpoint = Endpoint(
            args.base_url, args.model, ledger, limits, api_key=api_key,
            token_limit_key=args.token_limit_key,
        )  # fmt: skip
        show_estimate(estimate, endpoint, out)
        if args.dry_run:
            print("dry run: nothing was sent")
            return
        run = generate(
            args.recipe, endpoint, options, records,
            concurrency=args.concurrency, total=len(records) or args.count,
        )  # fmt: skip
        report = write_results(out, asyncio.run(run), unread, args.recipe)
    finally:
        ledger.close()
    print(json.dumps(report, indent=2, ensure_ascii=False))
    if report["dropped"].get("no answer"):
        print("some requests got no answer: the same command asks for them again")
    if report["unfinished"]:
        print(
            f"stopped at the cap of ${args.max_cost:,.4f}: {report['conversations']:,} are written"
            "; the same command with a higher --max_cost goes on"
        )
        sys.exit(CAP_REACHED)


if __name__ == "__main__":
    flags.DEFINE_enum("recipe", None, sorted(RECIPES), "how conversations are made", required=True)
    flags.DEFINE_string("data", "", "JSON or JSON Lines with instruction and input, or messages")
    flags.DEFINE_string("data_language", "en", "language of --data's records without 'lang'")
    flags.DEFINE_string("languages", None, "languages and weights: zh:0.3,ar:0.2", required=True)
    flags.DEFINE_integer("count", 0, "conversations at most; 0: all of --data", lower_bound=0)
    flags.DEFINE_string("out", None, "folder to write to", required=True)
    flags.DEFINE_string("base_url", None, "up to /v1: http://localhost:8000/v1", required=True)
    flags.DEFINE_string("model", None, "the model's name at the endpoint", required=True)
    flags.DEFINE_string("api_key_env", "", "environment variable that has the API key, if any")
    flags.DEFINE_float("max_cost", None, "dollars, at most", lower_bound=0, required=True)
    flags.DEFINE_float(
        "input_price", None, "dollars a million prompt tokens; 0 where it costs nothing",
        lower_bound=0, required=True,
    )  # fmt: skip
    flags.DEFINE_float(
        "output_price", None, "dollars a million answer tokens", lower_bound=0, required=True
    )
    flags.DEFINE_integer("concurrency", 8, "requests under way at a time", lower_bound=1)
    flags.DEFINE_float("requests_per_minute", 500, "rate limit", lower_bound=0.01)
    flags.DEFINE_float("timeout", 120, "seconds for an answer", lower_bound=0.01)
    flags.DEFINE_integer("attempts", 8, "sendings of a request until an answer", lower_bound=1)
    flags.DEFINE_float("first_pause", 1, "seconds before the second sending", lower_bound=0)
    flags.DEFINE_integer("tries", 3, "answers asked for until one is of use", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 1024, "tokens of an answer", lower_bound=1)
    flags.DEFINE_enum(
        "token_limit_key", "max_tokens", ["max_tokens", "max_completion_tokens"],
        "what the endpoint calls it",
    )  # fmt: skip
    flags.DEFINE_float("temperature", 0.7, "of sampling", lower_bound=0)
    flags.DEFINE_integer("turns", 3, "messages of the user in a chat, at most", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "another seed gives other conversations", lower_bound=0)
    flags.DEFINE_string("license", "", "licence of every conversation that is written")
    flags.DEFINE_bool("dry_run", False, "show what it may cost, and send nothing")
    cli.run(main)
