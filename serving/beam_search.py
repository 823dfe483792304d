"""Beam search: of all answers that begin likely, the k likeliest, as ``generate(num_beams=k)`` of
transformers 5 finds them.

It stands above the engine: every step asks it for one token of each beam, whose beginning is in the
cache but for a part of a page, and goes on in the engine's thread when the last beam has come back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from llmzoo_jax.errors import InputError
from serving.requests import MAX_LOGPROBS, Closed, OnOutput, Output, Request, Sampling


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """An answer's score is the sum of its tokens' log-probabilities, its stop token's too, over
    ``length ** length_penalty``. ``early_stopping``: True ends when there are ``beams`` whole
    answers, False when those that go on are no better at their present length, "never" when they
    can't become better."""

    beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        if self.beams < 1:
            raise InputError(f"beams={self.beams}: must be 1 or more")
        if not -10 <= self.length_penalty <= 10:
            raise InputError(f"length_penalty={self.length_penalty} is out of range: -10 to 10")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")


class Beam(NamedTuple):
    """``score``: of one that goes on the sum alone."""

    tokens: list[int]
    score: float
    stop_token: int | None = None


class Beams:
    """The search without an engine: ``running`` are extended until ``done``; then ``finished`` has
    the answers, the best first. Follows ``GenerationMixin._beam_search``.

    Raises InputError for more beams than the engine gives alternatives for.
    """

    def __init__(self, options: BeamOptions, *, max_tokens: int, stop_ids: Collection[int]):
        self.options, self.max_tokens, self.stop_ids = options, max_tokens, frozenset(stop_ids)
        # No beam has more than this many of the next beams, and of the answers that end.
        self.alternatives = options.beams + len(self.stop_ids)
        if self.alternatives > MAX_LOGPROBS:
            raise InputError(
                f"{options.beams} beams: with {len(self.stop_ids)} stop tokens there can be "
                f"{MAX_LOGPROBS - len(self.stop_ids)} at most"
            )
        if max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens}: a beam has one token at least")
        self.running = [Beam([], 0.0)]
        self.finished: list[Beam] = []
        self.done = False

    def extend(self, tops: Sequence[Sequence[tuple[int, float]]]) -> None:
        """``tops``: for each running beam the likeliest next tokens and their log-probabilities."""
        o, k = self.options, self.options.beams
        found = [
            (beam.score + logprob, beam, token)
            for beam, top in zip(self.running, tops, strict=True)
            for token, logprob in top
        ]
        found.sort(key=lambda one: -one[0])
        length = len(self.running[0].tokens) + 1
        last = length >= self.max_tokens
        for score, beam, token in found[:k]:
            score /= length**o.length_penalty
            if token in self.stop_ids:
                self.finished.append(Beam(beam.tokens, score, token))
            elif last:
                self.finished.append(Beam([*beam.tokens, token], score))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:k]
        going = [one for one in found if one[2] not in self.stop_ids][:k]
        self.running = [Beam([*beam.tokens, token], score) for score, beam, token in going]
        self.done = last
        if len(self.finished) == k:
            grows = o.early_stopping == "never" and o.length_penalty > 0
            hoped = self.max_tokens if grows else length
            best = self.running[0].score / hoped**o.length_penalty
            self.done |= o.early_stopping is True or best <= self.finished[-1].score


class Engine(Protocol):
    """What is used of ``serving.engine.Engine``."""

    def submit(self, request: Request, on_output: OnOutput) -> None: ...
    def abort(self, id: str) -> None: ...


class Search:
    """The best answers to ``request``, one for each of ``on_outputs``, which are called once. Of
    its sampling ``max_tokens`` counts."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        options: BeamOptions,
        *,
        stop_ids: Collection[int],
        on_outputs: Sequence[OnOutput],
    ):
        self.engine, self.request, self.on_outputs = engine, request, on_outputs
        max_tokens = request.sampling.max_tokens
        self.beams = Beams(options, max_tokens=max_tokens, stop_ids=stop_ids)
        self._step = Sampling(
            max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=self.beams.alternatives
        )
        self._lock = threading.Lock()
        self._ids: list[str] = []
        self._tops: dict[int, list[tuple[int, float]]] = {}
        self._cached_tokens = 0
        self._aborted = self._ended = False

    def start(self) -> None:
        """Raises what ``Engine.submit`` raises."""
        self._ask()

    def abort(self) -> None:
        """Ends it soon; nothing if it has ended."""
        self._aborted = True
        for id in self._ids:
            self.engine.abort(id)

    def _ask(self) -> None:
        r, running = self.request, self.beams.running
        length = len(running[0].tokens)
        self._tops = {}
        self._ids = [f"{r.id}-{length}-{i}" for i in range(len(running))]
        for i, (id, beam) in enumerate(zip(self._ids, running, strict=True)):
            request = Request(
                id=id, prompt=[*r.prompt, *beam.tokens], sampling=self._step, deadline=r.deadline,
                adapter=r.adapter, continues=length > 0,
            )  # fmt: skip
            self.engine.submit(request, functools.partial(self._take, i))
        if self._aborted:  # perhaps before these were there
            self.abort()

    def _take(self, i: int, output: Output) -> None:
        with self._lock:
            if self._ended or output.finish_reason is None:
                return
            if output.finish_reason != "length":
                self._fail(output)
                return
            self._tops[i] = output.logprobs[0].top
            self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
            if len(self._tops) < len(self.beams.running):
                return
            self.beams.extend([self._tops[i] for i in range(len(self.beams.running))])
            if self.beams.done:
                self._say([
                    Output(
                        beam.tokens, "length" if beam.stop_token is None else "stop",
                        stop_token=beam.stop_token, cached_tokens=self._cached_tokens,
                    )
                    for beam in self.beams.finished[: len(self.on_outputs)]
                ])  # fmt: skip
                return
            try:
                self._ask()
            except Closed:
                self._fail(Output([], "abort"))
            except Exception as error:
                self._fail(Output([], "error", error=f"beam search: {error}"))

    def _fail(self, output: Output) -> None:
        self.abort()
        self._say([Output([], output.finish_reason, error=output.error)] * len(self.on_outputs))

    def _say(self, outputs: Sequence[Output]) -> None:
        self._ended = True
        for on_output, output in zip(self.on_outputs, outputs, strict=True):
            on_output(output)
