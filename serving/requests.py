"""What a request to the engine says, and what comes back. Token ids only; no JAX, no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmzoo_jax.errors import InputError

MAX_LOGPROBS = 20  # alternatives a token; OpenAI's own limit
MAX_STOP_IDS = 16
MAX_BIAS = 300  # tokens with a bias; OpenAI's own limit


class Grammar(Protocol):
    """What the next token may be (``serving.grammar``). One a request; it has a state."""

    def mask(self) -> Sequence[int]:
        """The allowed tokens as bits, int32 ``[ceil(V / 32)]``, lowest bit first."""

    def advance(self, token: int) -> None:
        """Takes the token that was chosen."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen, with the names and ranges of OpenAI's and vLLM's APIs.

    Applied in HF's order: repetition penalty (prompt and answer), presence and frequency penalty
    (answer), bias, grammar; then temperature, top-k, top-p, min-p. Temperature 0 is greedy.
    ``logprobs`` asks for the model's own log-probabilities, before all of this, of the chosen token
    and so many alternatives. ``prompt_logprobs`` asks for those of the prompt's tokens, too.
    ``repetition_stop`` n ends an answer whose last tokens are n times the same 1 to 32 tokens.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_stop: int = 0

    def __post_init__(self):
        for name, good, range_ in (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0, up to 10"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("logit_bias", len(self.logit_bias) <= MAX_BIAS, f"up to {MAX_BIAS} tokens"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_IDS,
                f"up to {MAX_STOP_IDS} ids",
            ),
            ("logprobs", 0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            (
                "prompt_logprobs",
                0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS,
                f"0 to {MAX_LOGPROBS}",
            ),
            (
                "repetition_stop",
                self.repetition_stop == 0 or self.repetition_stop >= 2,
                "0 (off), or 2 or more",
            ),
        ):
            if not good:
                raise InputError(f"{name}={getattr(self, name)!r} is out of range: {range_}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """``prompt`` has one token or more. ``deadline`` is a ``time.monotonic()`` after which the
    request ends, wherever it is. ``adapter`` names a LoRA adapter that the engine has. What
    ``continues`` a search that has begun goes before those who wait, and is taken to the end."""

    id: str
    prompt: Sequence[int]
    sampling: Sampling
    deadline: float | None = None
    adapter: str | None = None
    grammar: Grammar | None = None
    continues: bool = False


def check(request: Request, *, context: int, vocab_size: int) -> None:
    """Raises InputError for what such a model can't serve."""
    s = request.sampling
    if not request.prompt:
        raise InputError("the prompt is empty")
    whole = len(request.prompt) + s.max_tokens
    if whole > context:
        raise InputError(
            f"the prompt has {len(request.prompt)} tokens and max_tokens is {s.max_tokens}, "
            f"together {whole}; the context has {context}. Shorten one of the two"
        )
    for name, ids in (
        ("prompt", request.prompt),
        ("logit_bias", s.logit_bias),
        ("stop_token_ids", s.stop_token_ids),
    ):
        if bad := [i for i in ids if not 0 <= i < vocab_size]:
            raise InputError(f"{name}: token id {bad[0]}; the model has 0 to {vocab_size - 1}")


@dataclass(frozen=True)
class Logprob:
    """Of one token: its own, and the likeliest tokens of its place with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Output:
    """What is new of a request. ``finish_reason`` is None while more will come, then "stop" (a stop
    token, which is not among the tokens), "length", "repetition", "abort", "deadline" or "error"
    (``error`` says which). ``prompt_logprobs`` come once, with the first output; the first token
    of a prompt has None."""

    tokens: list[int]
    finish_reason: str | None = None
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    stop_token: int | None = None
    stop_logprob: Logprob | None = None
    cached_tokens: int = 0  # of the prompt, that were in the cache already
    error: str | None = None


OnOutput = Callable[[Output], None]


class QueueFull(Exception):
    """So many requests wait that another one would wait too long. ``retry_after``: seconds."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no more requests: it is shutting down."""


@dataclass(frozen=True)
class Stats:
    """Of an engine, now and since its start (counters)."""

    running: int
    waiting: int
    pages_used: int  # by running requests
    pages_cached: int  # kept for their prefixes, free when needed
    pages_total: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]  # by finish_reason
    preemptions: int
    compilations_after_ready: int
    step_seconds: float  # of the newest window of steps
    guessed_tokens: int = 0  # by speculation
    right_tokens: int = 0  # of them
