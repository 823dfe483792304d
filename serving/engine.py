"""The engine: many requests at once through one model, token ids in, token ids out.

One thread runs rounds: it takes in new requests while there are slots and pages, fills the pages
of their prompts a part at a time, and decodes a window of steps for all rows that are ready. The
tokens of a request depend on its prompt, its parameters and its seed, and on nothing else.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from typing import Any

import jax

from llmzoo_jax.errors import InputError
from llmzoo_jax.inference import Model
from serving import adapters, steps
from serving.pages import Page, PagePool
from serving.requests import Closed, OnOutput, Output, QueueFull, Request, Stats, check
from serving.rows import Row
from serving.runner import EngineOptions, Runner
from serving.speculation import Draft, look_up

log = logging.getLogger(__name__)


class Engine:
    """``start()``, then ``submit()`` from any thread; ``on_output`` is called in the engine's."""

    def __init__(
        self, model: Model, options: EngineOptions | None = None, *, draft: Model | None = None
    ):
        self.options = o = options or EngineOptions()
        if model.context is not None and o.context > model.context:
            raise InputError(f"context={o.context}: the model has {model.context} positions")
        if len(model.stop_ids) > steps.OWN_STOP_IDS:
            raise InputError(f"the model has {len(model.stop_ids)} stop tokens, {model.stop_ids}")
        self.model = model
        self.pool = PagePool(o.num_pages, o.page_size)
        self.ready = False
        self._runner = Runner(model, o)
        self._draft = None if draft is None else Draft(draft, model, o)
        self._waiting: collections.deque[Row] = collections.deque()
        self._running: list[Row] = []  # in the order in which they came in
        self._slots = list(range(o.max_batch))[::-1]
        self._rows: dict[str, Row] = {}  # all of them
        self._aborted: dict[str, str] = {}  # id -> why
        self._wake = threading.Condition()
        self._closing = self._closed = False
        self._thread: threading.Thread | None = None
        self._counts = collections.Counter()
        self._finished = collections.Counter()
        self._step_seconds = self._seconds_a_step = 0.0
        self._compiled = 0
        self._adapters = adapters.Loaded(o.max_adapters)

    # --- from any thread ---

    def start(self) -> None:
        """Compiles all programs, unless they wait for their first use, then takes requests."""
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        if self.options.compile_at == "start":
            self._runner.warm_up()
            if self._draft is not None:
                self._draft.warm_up()
        self.ready = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Raises InputError for what can't be served, QueueFull, Closed."""
        check(request, context=self.options.context, vocab_size=self.model.config.vocab_size)
        self._adapters.check(request.adapter)
        own = () if request.sampling.ignore_eos else self.model.stop_ids
        row = Row(
            request, on_output, (*own, *request.sampling.stop_token_ids), list(request.prompt)
        )
        with self._wake:
            if self._closed or (self._closing and not request.continues):
                raise Closed("the server is shutting down")
            if request.id in self._rows:
                raise InputError(f"a request with the id {request.id} is there already")
            if len(self._waiting) >= self.options.max_waiting and not request.continues:
                raise QueueFull(len(self._waiting), self._retry_after())
            row.adapter, row.salt = self._adapters.find(request.adapter)
            self._rows[request.id] = row
            (self._waiting.appendleft if request.continues else self._waiting.append)(row)
            self._wake.notify()

    def abort(self, id: str, reason: str = "abort") -> None:
        """Ends a request soon; its last output says ``reason``. Nothing if it has ended."""
        with self._wake:
            if id in self._rows:
                self._aborted[id] = reason
                self._wake.notify()

    def load_adapter(self, name: str, folder: str) -> None:
        """A PEFT folder, for requests whose ``adapter`` is ``name``. Raises InputError."""
        weights = adapters.read(folder, self.model.config, rank=self.options.max_lora_rank)
        with self._wake:
            busy = {row.adapter for row in self._rows.values()}
            slot = self._adapters.free_slot(name, busy)
            self._runner.put_adapter(slot, weights)
            self._adapters.add(name, slot)

    def unload_adapter(self, name: str) -> None:
        """New requests for it are refused; those that run end as they began."""
        with self._wake:
            self._adapters.remove(name)

    @property
    def adapters(self) -> list[str]:
        return self._adapters.names

    def stats(self) -> Stats:
        with self._wake:
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                pages_used=self.pool.used,
                pages_cached=self.pool.cached,
                pages_total=self.pool.total,
                prompt_tokens=self._counts["prompt"],
                cached_tokens=self._counts["cached"],
                generated_tokens=self._counts["generated"],
                finished=dict(self._finished),
                preemptions=self._counts["preemptions"],
                compilations_after_ready=self._compiled,
                step_seconds=self._step_seconds,
                guessed_tokens=self._counts["guessed"],
                right_tokens=self._counts["right"],
            )

    def drain(self, seconds: float) -> bool:
        """Takes no new requests, and waits for those it has; whether all have ended."""
        end = time.monotonic() + seconds
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            return self._wake.wait_for(lambda: not self._rows, end - time.monotonic())

    def close(self) -> None:
        """Ends: what still runs is aborted, and the thread with it."""
        with self._wake:
            self._closing = self._closed = True
            self._aborted.update(dict.fromkeys(self._rows, "abort"))
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self.ready:
            jax.monitoring.unregister_event_duration_listener(self._on_event)
        self.ready = False

    # --- in the engine's thread ---

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._rows or self._closing)
                if self._closing and not self._rows:
                    self._wake.notify_all()
                    return
            try:
                self._round()
            except Exception as error:
                log.exception("a round of the engine failed")
                self._fail_all(error)

    def _round(self) -> None:
        self._drop_ended()
        with self._wake:
            self._admit()
        if self._begins():
            self._decode(list(self._running), pending=False, begins=True)
            return
        pending = self._prefill()
        ready = [row for row in self._running if self._is_filled(row)]
        for row in [r for r in ready if r.request.sampling.max_tokens == 0]:
            self._finish(row, Output([], "length"))
            ready.remove(row)
        if ready:
            self._decode(ready, pending=pending)

    def _drop_ended(self) -> None:
        """Rows that were aborted, or whose deadline has passed."""
        now = time.monotonic()
        with self._wake:
            ended = {self._rows[id]: why for id, why in self._aborted.items() if id in self._rows}
            self._aborted.clear()
            for row in self._rows.values():
                if row.request.deadline is not None and row.request.deadline < now:
                    ended.setdefault(row, "deadline")
        for row, why in ended.items():
            self._finish(row, Output([], why))

    def _admit(self) -> None:
        """Takes in those who wait, in order, while there is a slot and there are pages."""
        size = self.options.page_size
        while self._waiting and self._slots:
            row = self._waiting[0]
            # In deterministic mode nobody is preempted: filling what was decoded can change a bit.
            need = -(-(len(row.tokens) + row.left * self.options.deterministic) // size)
            found: list[Page] = []
            caching = self.options.prefix_cache and row.request.sampling.prompt_logprobs is None
            if caching:
                # The last token is read by a step of decoding, and so belongs to no found page.
                found = self.pool.find(row.tokens[:-1], row.salt)
            if need - len(found) > self.pool.available - (1 if self._running else 0):
                self.pool.release(found)
                return
            self._waiting.popleft()
            row.pages = found + [self.pool.take() for _ in range(need - len(found))]
            row.published = row.filled = 0
            cached = len(found) * size
            if caching and (end := self.pool.find_end(row.pages, row.tokens[:-1], row.salt)):
                page = row.pages[(len(row.tokens) - 1) // size]
                self._runner.copy_page(end.number, page.number)
                page.written = True
                cached = len(row.tokens) - 1
            if not (row.started or row.request.continues):
                row.cached_tokens = cached
                self._counts["prompt"] += len(row.tokens)
                self._counts["cached"] += cached
                if row.request.sampling.prompt_logprobs is not None:
                    row.prompt_logprobs = [None] * len(row.tokens)
            # Published before it is written: whoever finds it computes later, or writes it itself.
            self._publish(row)
            row.slot = self._slots.pop()
            if row.penalised:
                self._runner.set_counts(row)
            self._running.append(row)

    def _publish(self, row: Row, *, ended: bool = False) -> None:
        """Its pages; where it has ended, the last one, too, which need not be full."""
        if self.options.prefix_cache:
            # What a step of decoding writes may differ from what filling would, in the last bit.
            known = len(row.request.prompt if self.options.deterministic else row.tokens) - 1
            row.published = self.pool.publish_all(
                row.pages, row.tokens[:known], row.salt, row.published, ended=ended
            )

    def _is_filled(self, row: Row) -> bool:
        size = self.options.page_size
        need = -(-(len(row.tokens) - 1) // size)
        while row.filled < need and row.pages[row.filled].written:
            row.filled += 1
        return row.filled >= need

    def _begins(self) -> bool:
        """Whether there is one row, and what it has to read before its first token is in one page:
        a step of its own reads that, and the weights once."""
        if self.options.deterministic or len(self._running) != 1:
            return False
        (row,), size = self._running, self.options.page_size
        s, last = row.request.sampling, len(row.tokens) - 1
        return (
            not self._is_filled(row)
            and row.filled == last // size
            and s.max_tokens > 0
            and s.prompt_logprobs is None
        )

    def _prefill(self) -> bool:
        """Fills some pages; whether more of them wait."""
        size = self.options.page_size
        todo: list[tuple[Row, int]] = []
        scored = None
        for row in self._running:
            if self._is_filled(row):
                continue
            wants = row.request.sampling.prompt_logprobs is not None and not row.started
            for n in range(row.filled, -(-(len(row.tokens) - 1) // size)):
                if row.pages[n].written:
                    continue
                full = not self._runner.fits([*todo, (row, n)], scored=wants)
                if full or (scored is not None and scored != wants):
                    self._runner.fill(todo, scored)
                    return True
                scored = wants
                row.pages[n].written = True
                todo.append((row, n))
        if todo:
            self._runner.fill(todo, scored)
        return False

    def _decode(self, ready: list[Row], *, pending: bool, begins: bool = False) -> None:
        o = self.options
        limit = min(self._steps_in_time(), max(row.left for row in ready))
        # Prompts and first tokens are waited for; a grammar must see each token before the next.
        if pending or any(not row.started or row.request.grammar is not None for row in ready):
            limit = 1
        guessing = o.speculate and not (pending or begins) and len(ready) <= o.speculate_rows
        ready = self._grow(ready, max(limit, o.speculate + 1) if guessing else limit)
        began = time.monotonic()
        guess = look_up if self._draft is None else self._draft.guess
        guesses = guess(ready, o.speculate) if guessing else None
        if begins:
            window = self._runner.begin(ready[0])
        elif guesses is None:
            window = self._runner.decode(ready, limit)
            self._seconds_a_step = (time.monotonic() - began) / limit
        else:
            window = self._runner.verify(ready, guesses)
            self._counts["guessed"] += sum(map(len, guesses))
            self._counts["right"] += int((window.tokens[1:, : len(ready)] >= 0).sum())
        self._step_seconds = time.monotonic() - began
        for column, row in enumerate(ready):
            before = len(row.tokens)
            output = row.take(window, column)
            self._counts["generated"] += len(row.tokens) - before
            for page in row.pages[: -(-(len(row.tokens) - 1) // o.page_size)]:
                page.written = True
            if row.request.grammar is not None:
                output = row.advance(output, before)
            if output is None:
                continue
            if output.finish_reason is not None:
                self._finish(row, output)
            else:
                self._publish(row)
                self._say(row, output)
        if guesses is not None and self._draft is not None:
            self._draft.follow(ready, guesses)

    def _steps_in_time(self) -> int:
        """Of a window that ends soon enough for those who come while it runs."""
        wanted = self.options.window_seconds / max(self._seconds_a_step, 1e-9)
        return max(1, min(self.options.window, int(wanted)))

    def _grow(self, ready: list[Row], steps_ahead: int) -> list[Row]:
        """Gives every row the pages of its next steps. Where there are none left, the row that came
        last waits again, with what it has."""
        size = self.options.page_size
        for row in list(ready):
            if row.slot < 0:
                continue
            need = -(-(len(row.tokens) + min(steps_ahead, row.left) - 1) // size)
            while len(row.pages) < need and row.slot >= 0:
                if self.pool.available:
                    row.pages.append(self.pool.take())
                else:
                    self._preempt(self._running[-1])
        return [row for row in ready if row.slot >= 0]

    def _preempt(self, row: Row) -> None:
        with self._wake:
            self._counts["preemptions"] += 1
            self._leave(row)
            self._waiting.appendleft(row)

    def _leave(self, row: Row) -> None:
        if row.slot >= 0:
            self._running.remove(row)
            self._slots.append(row.slot)
            row.slot = -1
        self.pool.release(row.pages)
        row.pages = []

    def _finish(self, row: Row, output: Output) -> None:
        with self._wake:
            if row.slot >= 0:
                self._publish(row, ended=row.started)
                self._leave(row)
            else:
                self._waiting.remove(row)
            del self._rows[row.request.id]
            self._finished[output.finish_reason] += 1
            self._wake.notify_all()
            self._say(row, output)  # now, so that what continues it is there before it is gone

    def _say(self, row: Row, output: Output) -> None:
        try:
            row.on_output(row.say(output))
        except Exception:
            log.exception("whoever waits for request %s failed", row.request.id)
            self.abort(row.request.id)

    def _fail_all(self, error: Exception) -> None:
        """Nothing on the device can be trusted: every request that has rows there ends."""
        with self._wake:
            running = list(self._running)
        for row in running:
            self._finish(row, Output([], "error", error=f"{type(error).__name__}: {error}"))
        self.pool.forget()
        self._runner.reset()
        if self._draft is not None:
            self._draft.reset()

    # --- helpers ---

    def _retry_after(self) -> int:
        return max(1, round(len(self._waiting) / self.options.max_batch * 10 * self._step_seconds))

    def _on_event(self, name: str, seconds: float, **_: Any) -> None:
        here = threading.current_thread() is self._thread
        if here and name == "/jax/core/compile/backend_compile_duration":
            self._compiled += 1
