"""Text on top of the engine, for asyncio: prompts become requests, tokens become text.

The engine calls back from its own thread, once a window of tokens; here each such output becomes a
``Delta``. A stop string, a deadline, a closed ``Answer`` abort what the engine still does for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from llmzoo_jax.byte_tokens import token_bytes
from llmzoo_jax.conversation import Message
from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from llmzoo_jax.text_stream import TextStream
from serving import grammar
from serving.beam_search import BeamOptions, Search
from serving.prometheus import Metrics
from serving.protocol import ApiError, ChatRequest, CompletionRequest, beams, sampling
from serving.requests import Logprob, OnOutput, Output, Request, Sampling, Stats

T = TypeVar("T")
ENDED_EARLY = {  # an answer that has no end of its own
    "deadline": (504, "deadline_exceeded", "the answer was not ready in time"),
    "abort": (503, "aborted", "the server is shutting down"),
    "error": (500, "engine_error", "the engine failed"),
}


def ended_early(reason: str, message: str | None = None) -> ApiError:
    status, code, default = ENDED_EARLY[reason]
    return ApiError(message or default, status=status, code=code, retry_after=1)


class Engine(Protocol):
    """What is used of ``serving.engine.Engine``."""

    def start(self) -> None: ...
    def submit(self, request: Request, on_output: OnOutput) -> None: ...
    def abort(self, id: str) -> None: ...
    def load_adapter(self, name: str, folder: str) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def stats(self) -> Stats: ...
    def drain(self, seconds: float) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Token:
    """A token with its log-probability, and the likeliest of its place: (id, log-probability).
    ``logprob`` is None for the first token of a prompt."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """What is new of one choice. ``tokens`` are given where log-probabilities were asked for,
    ``prompt`` those of the prompt, once, ``stop`` the one that ended it, which is not in its text
    and not counted."""

    choice: int
    text: str
    tokens: list[Token]
    prompt: list[Token] | None = None
    finish_reason: str | None = None
    stop: Token | None = None


@dataclass(eq=False)
class Choice:
    """One request to the engine, and its text so far."""

    stream: TextStream
    prompt: Sequence[int]
    echo: str
    abort: Callable[[], None] = lambda: None
    finish_reason: str | None = None
    cached_tokens: int = 0
    logprob: float = 0.0
    last: float = 0.0  # when the newest output came

    @property
    def mean_logprob(self) -> float:
        return self.logprob / max(1, self.stream.count)


@dataclass(eq=False)
class Answer:
    """All choices of an HTTP request: of each prompt in turn. Iterate ``deltas()`` once, and
    ``close()``, whatever happens."""

    choices: list[Choice]
    group: int  # choices a prompt
    outputs: asyncio.Queue
    timer: asyncio.TimerHandle
    metrics: Metrics
    keep_stop: bool
    started: float

    def close(self) -> None:
        """Aborts what is not finished."""
        self.timer.cancel()
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.abort()

    @property
    def usage(self) -> dict[str, Any]:
        firsts = range(0, len(self.choices), self.group)
        prompt = sum(len(self.choices[i].prompt) for i in firsts)
        cached = sum(min(c.cached_tokens for c in self.choices[i : i + self.group]) for i in firsts)
        answer = sum(choice.stream.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def deltas(self) -> AsyncIterator[Delta]:
        """ApiError where a choice ends without an end of its own."""
        running = len(self.choices)
        while running:
            number, output = await self.outputs.get()
            choice = self.choices[number]
            if choice.finish_reason is not None:
                continue  # surplus, after a stop string
            delta = self._take(number, choice, output)
            if choice.finish_reason is not None:
                running -= 1
                self.metrics.finished.labels(choice.finish_reason).inc()
            if choice.finish_reason in ENDED_EARLY:
                raise ended_early(choice.finish_reason, output.error)
            if delta.text or delta.tokens or delta.prompt or delta.finish_reason:
                yield delta

    def _take(self, number: int, choice: Choice, output: Output) -> Delta:
        stream, prompt, stop = choice.stream, None, None
        self._time(choice, len(output.tokens))
        text, choice.echo = choice.echo, ""
        choice.cached_tokens = max(choice.cached_tokens, output.cached_tokens)
        before = stream.count
        text += stream.feed(output.tokens)
        logprobs = (output.logprobs or [])[: stream.count - before]
        choice.logprob += sum(one.logprob for one in logprobs)
        tokens = list(map(_token, output.tokens, logprobs))
        if output.prompt_logprobs is not None:
            prompt = list(map(_token, choice.prompt, output.prompt_logprobs))
        reason = output.finish_reason
        if stream.stopped_by is not None or reason == "deadline":
            reason = "stop" if stream.stopped_by is not None else reason
            choice.abort()  # the engine may not know
        elif reason == "stop" and output.stop_token is not None:
            if output.stop_logprob is not None:
                stop = _token(output.stop_token, output.stop_logprob)
            if self.keep_stop:
                text += stream.feed([output.stop_token])
        if reason is not None:
            text += stream.finish(whole=reason == "stop")
            choice.finish_reason = reason
        return Delta(number, text, tokens, prompt, reason, stop)

    def _time(self, choice: Choice, count: int) -> None:
        now = time.monotonic()
        if count and choice.last:
            self.metrics.observe_tokens((now - choice.last) / count, count)
        elif count:
            self.metrics.first_token.observe(now - self.started)
        choice.last = now if count else choice.last


def _token(id: int, logprob: Logprob | None) -> Token:
    return Token(id, logprob.logprob, logprob.top) if logprob else Token(id, None, ())


class Completions:
    """The requests of one model to one engine. ``context``: tokens of prompt and answer at most;
    ``max_choices`` answers to one HTTP request."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        metrics: Metrics,
        *,
        context: int,
        timeout: float,
        max_choices: int,
    ):
        self.model, self.engine, self.metrics = model, engine, metrics
        self.context, self.timeout, self.max_choices = context, timeout, max_choices
        self.bytes = token_bytes(model.tokenizer, len(model.tokenizer))
        self.grammars = grammar.Grammars(model)
        # One thread: a long prompt holds up other prompts, not the answers that are streamed.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="text")

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function`` in the thread for slow work on text."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def chat(self, request: ChatRequest, *, adapter: str | None = None) -> Answer:
        """Raises ApiError or InputError for what can't be done, and what ``submit`` raises."""
        prompt = await self.run(self.model.prompt, messages_of(request))
        options = self._stream_options(request)
        return await self._start(
            request,
            [(prompt, "")],
            lambda _: self.model.answer_stream(request.stops, **options),
            adapter,
        )

    async def complete(self, request: CompletionRequest, *, adapter: str | None = None) -> Answer:
        """As ``chat``, for texts or token ids that are continued."""
        rows = await self.run(self.tokenize, request.prompt, "prompt")
        echoes = await self.run(self._echoes, request, rows)
        prompts = list(zip(rows, echoes, strict=True))
        options = self._stream_options(request)
        return await self._start(
            request,
            prompts,
            lambda prompt: self.model.text_stream(prompt, request.stops, **options),
            adapter,
        )

    def _echoes(self, request: CompletionRequest, rows: list[list[int]]) -> list[str]:
        """The texts of the prompts, as given where they were texts; empty without echo."""
        if not request.echo:
            return [""] * len(rows)
        given = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if isinstance(given[0], str) and request.truncate_prompt_tokens is None:
            return given
        special = request.skip_special_tokens is False
        return [self.decode(self._cut(ids, request), special) for ids in rows]

    def tokenize(self, prompt: str | Sequence[Any], name: str) -> list[list[int]]:
        """The tokens of a text, of token ids, or of a list of either."""
        if not isinstance(prompt, str) and not prompt:
            raise ApiError(f"{name} is empty", param=name)
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        rows = []
        for item in [prompt] if one else prompt:
            ids = self.model.tokenizer(item).input_ids if isinstance(item, str) else item
            if not ids:
                raise ApiError(f"{name} is empty: it has no tokens", param=name)
            self.check_ids(ids, name)
            rows.append(ids)
        return rows

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        size = self.model.config.vocab_size
        if min(ids, default=0) < 0 or max(ids, default=0) >= size:
            bad = next(i for i in ids if not 0 <= i < size)
            raise ApiError(f"{name}: token id {bad}; the model has 0 to {size - 1}", param=name)

    def piece(self, id: int) -> bytes:
        """What a token stands for, be it special or not."""
        return self.bytes.text[id] if id < len(self.bytes.text) else b""

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        stream = TextStream(self.model.tokenizer, special=special)
        return stream.feed(ids) + stream.finish(whole=False)

    async def _start(self, request, prompts, make_stream, adapter) -> Answer:
        """Submits every choice, or none. ``prompts``: (tokens, text to echo)."""
        options = beams(request)
        group = (None if options else request.best_of) or request.n or 1
        if len(prompts) * group > self.max_choices:
            count = "n" if request.best_of is None else "best_of"
            raise ApiError(
                f"{len(prompts)} prompts with {group} answers each: at most {self.max_choices} "
                "answers can be asked for at once; send several requests",
                param="prompt" if len(prompts) > self.max_choices else count,
                code="invalid_value",
            )
        loop, outputs, started = asyncio.get_running_loop(), asyncio.Queue(), time.monotonic()
        prompts = [(self._cut(ids, request), echo) for ids, echo in prompts]
        room = self.context - max(len(ids) for ids, _ in prompts)
        how = sampling(request, room=room, seed=random.getrandbits(32))
        self._check(prompts, how)
        make_grammar = await self.run(self.grammars.of, request)
        seconds = min(request.timeout or self.timeout, self.timeout)
        choices: list[Choice] = []
        answer = Answer(
            choices=choices,
            group=group,
            outputs=outputs,
            timer=loop.call_later(seconds, _end, outputs, choices),
            metrics=self.metrics,
            keep_stop=bool(request.include_stop_str_in_output),
            started=started,
        )
        try:
            for number in range(len(prompts) * group):
                ids, echo = prompts[number // group]
                # The same for each prompt where it is given, as if they had come one by one.
                nth = number if request.seed is None else number % group
                one = Request(
                    id=uuid.uuid4().hex,
                    prompt=ids,
                    sampling=replace(how, seed=(how.seed + nth) % 2**32),
                    deadline=started + seconds,
                    adapter=adapter,
                    grammar=make_grammar(),
                )
                choices.append(Choice(make_stream(ids), ids, echo))
                if options is None:
                    choices[-1].abort = partial(self.engine.abort, one.id)
                    self.engine.submit(one, _sender(loop, outputs, number))
                elif len(choices) % group == 0:  # all of this prompt
                    senders = [_sender(loop, outputs, number + 1 - group + i) for i in range(group)]
                    search = self._search(request, one, options, senders)
                    for choice in choices[-group:]:
                        choice.abort = search.abort
                    search.start()
        except BaseException:
            answer.close()
            raise
        return answer

    def _search(self, request, one: Request, options: BeamOptions, senders) -> Search:
        how = one.sampling
        stops = {*(() if how.ignore_eos else self.model.stop_ids), *how.stop_token_ids}
        try:
            return Search(self.engine, one, options, stop_ids=stops, on_outputs=senders)
        except InputError as error:
            count = "n" if request.best_of is None else "best_of"
            param = "max_tokens" if how.max_tokens < 1 else count
            raise ApiError(str(error), param=param, code="invalid_value") from error

    def _cut(self, ids: list[int], request) -> list[int]:
        """Without its beginning, where the request says so."""
        return ids[-request.truncate_prompt_tokens :] if request.truncate_prompt_tokens else ids

    def _check(self, prompts, how: Sampling) -> None:
        self.check_ids(list(how.logit_bias), "logit_bias")
        self.check_ids(how.stop_token_ids, "stop_token_ids")
        for ids, _ in prompts:
            if len(ids) + how.max_tokens > self.context:
                raise ApiError(
                    f"the prompt has {len(ids)} tokens, with max_tokens={how.max_tokens} that is "
                    f"{len(ids) + how.max_tokens}, and the context is {self.context}; shorten one "
                    "of the two",
                    param="max_tokens",
                    code="context_length_exceeded",
                )

    def _stream_options(self, request) -> dict[str, Any]:
        return {
            "special": request.skip_special_tokens is False,
            "keep_stop": bool(request.include_stop_str_in_output),
            "min_tokens": request.min_tokens or 0,
        }


def messages_of(request: Any) -> list[Message]:
    """OpenAI calls the system "developer" in newer models."""
    roles = {"developer": "system"}
    return [Message(roles.get(m.role, m.role), m.text) for m in request.messages]


def _sender(loop, outputs: asyncio.Queue, number: int) -> OnOutput:
    """Takes outputs in the engine's thread, and puts them into the queue in the loop's."""

    def on_output(output: Output) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(outputs.put_nowait, (number, output))

    return on_output


def _end(outputs: asyncio.Queue, choices: list[Choice]) -> None:
    """The deadline has come, whatever the engine is doing."""
    for number in range(len(choices)):
        outputs.put_nowait((number, Output([], finish_reason="deadline")))
