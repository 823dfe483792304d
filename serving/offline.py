"""The engine without a server: many prompts at once from a program, as ``Model.generate``."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Iterator, Sequence
from typing import Any

from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model, Result
from serving.beam_search import BeamOptions, Search
from serving.engine import Engine, EngineOptions
from serving.requests import Output, Request, Sampling

LONGEST = 4096  # tokens of prompt and answer, where nothing else is said


class EngineModel:
    """A model whose ``generate`` runs on an engine: rows of any lengths, none waits for another.
    All else is the model's own. The tokens are the same. The engine starts when it is needed."""

    def __init__(self, model: Model, options: EngineOptions, draft: Model | None = None):
        self._model, self._options, self._draft = model, options, draft
        self._running: Engine | None = None
        self._ids = itertools.count()

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            self._running = Engine(self._model, self._options, draft=self._draft)
            self._running.start()
        return self._running

    def close(self) -> None:
        if self._running is not None:
            self._running.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Result]:
        """As ``Model.generate``."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        outputs: queue.Queue[tuple[int, Output]] = queue.Queue()
        rows, streams, ids = [], [], []
        for i, prompt in enumerate(prompts):
            rows.append(self._tokens(prompt))
            streams.append(self._model.text_stream(rows[i], stops))
            ids.append(f"offline-{next(self._ids)}")
            sampling = Sampling(
                max_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                seed=(seed + i) % 2**32,
            )  # fmt: skip
            request = Request(id=ids[i], prompt=rows[i], sampling=sampling)
            self._engine.submit(request, lambda output, i=i: outputs.put((i, output)))
        new: list[list[int]] = [[] for _ in rows]
        results: dict[int, Result] = {}
        while len(results) < len(rows):
            i, output = outputs.get()
            if i in results:
                continue  # surplus, after a stop string
            new[i] += output.tokens
            stream, reason = streams[i], output.finish_reason
            if reason == "error":
                raise RuntimeError(f"prompt {i + 1}: {output.error}")
            text = None
            if stream is not None:
                stream.feed(output.tokens)
                if stream.stopped_by is not None:
                    self._engine.abort(ids[i])
                    new[i], reason = new[i][: stream.count], "stop"
                if reason is not None:
                    stream.finish(whole=reason == "stop")
                    text = stream.text
            if reason is not None:
                results[i] = Result(text, new[i], reason, len(rows[i]))
        return [results[i] for i in range(len(rows))]

    def beam_search(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: BeamOptions,
        *,
        max_new_tokens: int = 64,
        n: int = 1,
    ) -> list[list[Result]]:
        """The ``n`` likeliest of ``options.beams`` answers to each prompt, the best first."""
        if not 1 <= n <= options.beams:
            raise InputError(f"n={n}: 1 to the {options.beams} beams")
        engine, model = self._engine, self._model
        outputs: queue.Queue[tuple[int, int, Output]] = queue.Queue()
        rows = [self._tokens(prompt) for prompt in prompts]
        for i, row in enumerate(rows):
            if len(row) + max_new_tokens > self._options.context:
                raise InputError(
                    f"prompt {i + 1} has {len(row)} tokens, with max_new_tokens={max_new_tokens} "
                    f"that is more than context={self._options.context}"
                )
            sampling = Sampling(max_tokens=max_new_tokens)
            Search(
                engine,
                Request(id=f"offline-{next(self._ids)}", prompt=row, sampling=sampling),
                options,
                stop_ids=model.stop_ids,
                on_outputs=[lambda output, i=i, j=j: outputs.put((i, j, output)) for j in range(n)],
            ).start()
        results: list[list[Result]] = [[Result(None, [], "", 0)] * n for _ in rows]
        for _ in range(n * len(rows)):
            i, j, output = outputs.get()
            if output.error is not None:
                raise RuntimeError(f"prompt {i + 1}: {output.error}")
            text, stream = None, model.text_stream(rows[i])
            if stream is not None:
                stream.feed(output.tokens)
                stream.finish(whole=output.finish_reason == "stop")
                text = stream.text
            results[i][j] = Result(text, output.tokens, output.finish_reason, len(rows[i]))
        return results

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self._model.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        return [int(token) for token in ids]


@contextlib.contextmanager
def on_engine(
    model: Model, *, max_batch: int, context: int = 0, draft: Model | None = None, **options: Any
) -> Iterator[EngineModel]:
    """``context``: tokens of a prompt and its answer; 0: the model's, up to LONGEST. ``draft``
    guesses, with ``speculate``. ``options``: others of ``EngineOptions``."""
    context = context or min(model.context or LONGEST, LONGEST)
    fixed = {"max_batch": max_batch, "context": context, "max_waiting": 2**31}
    fast = EngineModel(model, EngineOptions(**fixed, compile_at="first_use", **options), draft)
    try:
        yield fast
    finally:
        fast.close()
