"""A running request, as the engine keeps it between windows. No JAX."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from serving.pages import Page
from serving.requests import Logprob, OnOutput, Output, Request
from serving.steps import FLOATS, INTS, STOPS, Scores, Window

log = logging.getLogger(__name__)
LONGEST_LOOP = 32  # tokens that ``repetition_stop`` takes for one round


@dataclass(eq=False)
class Row:
    """``tokens`` are prompt and answer. All but the last are, or will be, in ``pages``: the last is
    what the next step reads."""

    request: Request
    on_output: OnOutput
    stop_ids: tuple[int, ...]
    tokens: list[int]
    adapter: int = 0  # its slot
    salt: Hashable = ("adapter", 0)  # keys and values of an adapter are its own
    slot: int = -1
    pages: list[Page] = field(default_factory=list)
    published: int = 0  # pages from the start
    filled: int = 0  # the same, of those that are sure to be written
    cached_tokens: int = 0
    prompt_logprobs: list[Logprob | None] | None = None
    started: bool = False  # something has come out

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def left(self) -> int:
        return self.request.sampling.max_tokens - self.generated

    @property
    def penalised(self) -> bool:
        s = self.request.sampling
        return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def free(self) -> bool:
        """Whether nothing but the model decides its next tokens, so that they can be guessed."""
        s = self.request.sampling
        ruled = self.penalised or s.logit_bias or self.request.grammar is not None
        return not ruled and self.generated >= s.min_tokens

    def pack(self, into: np.ndarray) -> None:
        """Its line of ``steps.pack_rows``."""
        s = self.request.sampling
        ints = {
            "last": self.tokens[-1],
            "position": len(self.tokens) - 1,
            "slot": self.slot,
            "active": 1,
            "left": self.left,
            "min_left": s.min_tokens - self.generated,
            "seed": np.uint32(s.seed).view(np.int32),
            "top_k": min(s.top_k, 2**31 - 1),
            "logprobs": s.logprobs is not None,
            "adapter": self.adapter,
        }
        floats = {
            "temperature": s.temperature,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "repetition": s.repetition_penalty,
            "presence": s.presence_penalty,
            "frequency": s.frequency_penalty,
        }
        into[: len(INTS)] = [ints[name] for name in INTS]
        values = np.array([floats[name] for name in FLOATS], np.float32)
        into[len(INTS) : STOPS.start] = values.view(np.int32)
        into[STOPS.start : STOPS.start + len(self.stop_ids)] = self.stop_ids
        numbers = [page.number for page in self.pages]
        into[STOPS.stop : STOPS.stop + len(numbers)] = numbers

    def take(self, window: Window, column: int) -> Output | None:
        """Takes what the window has for it; None if it has nothing new to say."""
        s = self.request.sampling
        new: list[int] = []
        logprobs: list[Logprob] = []
        reason, stop, stop_logprob = None, None, None

        def logprob(step: int) -> Logprob:
            ids, values = window.top_ids[step, column], window.top_logprobs[step, column]
            return Logprob(float(window.logprobs[step, column]), top(ids, values, s.logprobs))

        for i, token in enumerate(window.tokens[:, column].tolist()):
            if token < 0 or reason is not None:
                break
            if token in self.stop_ids and self.generated + 1 > s.min_tokens:
                reason, stop = "stop", token
                stop_logprob = None if s.logprobs is None else logprob(i)
                break
            self.tokens.append(token)
            new.append(token)
            if s.logprobs is not None:
                logprobs.append(logprob(i))
            if self.left <= 0:
                reason = "length"
            if s.repetition_stop and loops(self.tokens[-self.generated :], s.repetition_stop):
                reason = "repetition"
        if not new and reason is None:
            return None
        return self.say(
            Output(
                new,
                reason,
                logprobs if s.logprobs is not None else None,
                stop_token=stop,
                stop_logprob=stop_logprob,
            )
        )

    def advance(self, output: Output | None, before: int) -> Output | None:
        """Moves its grammar on over the tokens from ``before``; an error of it ends the request,
        not the engine."""
        if output is None:
            return None
        try:
            for token in self.tokens[before:]:
                self.request.grammar.advance(token)
        except Exception as error:
            log.exception("the grammar of request %s failed", self.request.id)
            return dataclasses.replace(output, finish_reason="error", error=f"grammar: {error}")
        return output

    def say(self, output: Output) -> Output:
        """``output``, with what comes once if it is the first one."""
        if self.started:
            return output
        self.started = True
        return dataclasses.replace(
            output, prompt_logprobs=self.prompt_logprobs, cached_tokens=self.cached_tokens
        )

    def take_scores(self, scores: Scores, block: int, start: int) -> None:
        """The log-probabilities of the prompt's tokens that follow those of one page."""
        n = self.request.sampling.prompt_logprobs
        if n is None or self.prompt_logprobs is None:
            return
        for i in range(scores.logprobs.shape[1]):
            place = start + i + 1
            if place < len(self.request.prompt):
                self.prompt_logprobs[place] = Logprob(
                    float(scores.logprobs[block, i]),
                    top(scores.top_ids[block, i], scores.top_logprobs[block, i], n),
                )


def top(ids: np.ndarray, logprobs: np.ndarray, n: int) -> list[tuple[int, float]]:
    return list(zip(ids[:n].tolist(), logprobs[:n].tolist(), strict=True))


def loops(tokens: list[int], times: int) -> bool:
    """Whether ``tokens`` end with ``times`` times the same tokens, one to LONGEST_LOOP of them."""
    for n in range(1, min(LONGEST_LOOP, len(tokens) // times) + 1):
        end = tokens[-n * times :]
        if end == end[-n:] * times:
            return True
    return False
