"""What ``eval.answers`` and ``eval.judge`` share: flags of an endpoint, its estimate, its end."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines.endpoint import Endpoint, Limits, prompt_bound
from data_pipelines.ledger import Ledger
from llmzoo_jax.errors import InputError

CAP_REACHED = 3  # exit code, as of data_pipelines.generate
_MINE = ("api_key_env", "max_cost", "input_price", "output_price", "concurrency",
         "requests_per_minute", "timeout", "attempts", "first_pause", "token_limit_key",
         "dry_run")  # fmt: skip


def define_flags(*, required: bool) -> None:
    flags.DEFINE_string("base_url", None, "up to /v1: http://localhost:8000/v1", required=required)
    flags.DEFINE_string("api_key_env", "", "environment variable that has the API key, if any")
    flags.DEFINE_float("max_cost", None, "dollars that all runs with this --out may cost",
                       lower_bound=0, required=required)  # fmt: skip
    flags.DEFINE_float("input_price", None, "dollars a million prompt tokens; 0: free",
                       lower_bound=0, required=required)  # fmt: skip
    flags.DEFINE_float("output_price", None, "dollars a million answer tokens",
                       lower_bound=0, required=required)  # fmt: skip
    flags.DEFINE_integer("concurrency", 8, "requests under way at a time", lower_bound=1)
    flags.DEFINE_float("requests_per_minute", 500, "rate limit", lower_bound=0.01)
    flags.DEFINE_float("timeout", 120, "seconds for an answer", lower_bound=0.01)
    flags.DEFINE_integer("attempts", 8, "sendings of a request until an answer", lower_bound=1)
    flags.DEFINE_float("first_pause", 1, "seconds before the second sending", lower_bound=0)
    flags.DEFINE_enum("token_limit_key", "max_tokens", ["max_tokens", "max_completion_tokens"],
                      "what the endpoint calls it")  # fmt: skip
    flags.DEFINE_bool("dry_run", False, "show what it may cost, and send nothing")


def refuse_flags(needed: str) -> None:
    """Raises for a flag of the endpoint where there is none: it would be ignored."""
    for name in _MINE:
        if flags.FLAGS[name].present:
            raise InputError(f"--{name} is of no use without {needed}")


def open_endpoint(model: str, ledger: Ledger) -> Endpoint:
    """From the flags."""
    args = flags.FLAGS
    for name in ("max_cost", "input_price", "output_price"):
        if args[name].value is None:
            raise InputError(f"--base_url needs --{name} (0 where it costs nothing)")
    if args.api_key_env and not args.dry_run and not os.environ.get(args.api_key_env):
        raise InputError(f"--api_key_env={args.api_key_env}: this variable is not set")
    limits = Limits(
        input_price=args.input_price,
        output_price=args.output_price,
        requests_per_minute=args.requests_per_minute,
        timeout=args.timeout,
        attempts=args.attempts,
        first_pause=args.first_pause,
    )
    key = os.environ.get(args.api_key_env, "") if args.api_key_env else ""
    return Endpoint(args.base_url, model, ledger, limits, api_key=key,
                    token_limit_key=args.token_limit_key)  # fmt: skip


def show_estimate(
    prompts: Sequence[tuple[dict[str, Any], ...]], max_tokens: int, endpoint: Endpoint
) -> None:
    """The most that the prompts can cost, if none has to be asked again."""
    tokens, ledger = sum(map(prompt_bound, prompts)), endpoint.ledger
    worst = endpoint.cost(tokens, len(prompts) * max_tokens)
    print(
        f"at most {len(prompts):,} requests, {tokens:,} prompt tokens and"
        f" {len(prompts) * max_tokens:,} answer tokens: ${worst:,.4f}, and more for further turns"
        f" and for what has to be asked again\n{len(ledger):,} answers are paid for,"
        f" ${ledger.spent:,.4f} is spent; the cap is ${ledger.cap:,.4f}"
    )
    if ledger.spent + worst > ledger.cap:
        print("the cap may be reached before the end")


def show_cost(bar: tqdm, ledger: Ledger) -> None:
    bar.set_postfix(spent=f"${ledger.spent:.4f} of ${ledger.cap:.2f}", refresh=False)


def finish(failed: Mapping[Any, str]) -> None:
    """Says why some have no answer, and exits with 1, or with 3 where the cap was reached."""
    if not failed:
        return
    for why, count in Counter(failed.values()).most_common(5):
        print(f"{count:,} without an answer: {why}")
    capped = "the cap is reached" in failed.values()
    print("the same command goes on" + (", with a higher --max_cost" if capped else ""))
    sys.exit(CAP_REACHED if capped else 1)
