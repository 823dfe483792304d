"""An engine without a model: it answers what a function says, a window of tokens at a time."""

import collections
import threading
import time

from llmzoo_jax.errors import InputError
from serving.requests import Closed, Logprob, Output, QueueFull, Stats

WINDOW = 4


class FakeEngine:
    """``answer(request) -> tokens``, without the stop token that follows them."""

    def __init__(self, answer, *, delay=0.0, places=64, stop_ids=(2,), fail=None):
        self.answer, self.delay, self.places = answer, delay, places
        self.stop_ids, self.fail = stop_ids, fail
        self.seen = []  # requests
        self.aborted = []
        self.live = {}  # id: is it aborted?
        self.finished = collections.Counter()
        self.closed = self.started = False
        self._changed = threading.Condition()

    def start(self):
        self.started = True

    def submit(self, request, on_output):
        if self.closed:
            raise Closed
        if request.adapter == "unknown":
            raise InputError("no adapter 'unknown'")
        with self._changed:
            if len(self.live) >= self.places:
                raise QueueFull(len(self.live), 7)
            self.live[request.id] = False
        self.seen.append(request)
        threading.Thread(target=self._run, args=(request, on_output), daemon=True).start()

    def abort(self, id):
        self.aborted.append(id)
        if id in self.live:
            self.live[id] = True

    def _run(self, request, on_output):
        try:
            for output in self._outputs(request):
                if output.finish_reason:
                    self.finished[output.finish_reason] += 1
                    with self._changed:
                        del self.live[request.id]
                        self._changed.notify_all()
                on_output(output)
        except Exception as error:
            with self._changed:
                self.live.pop(request.id, None)
                self._changed.notify_all()
            on_output(Output([], finish_reason="error", error=str(error)))

    def _outputs(self, request):
        how = request.sampling
        if self.fail is not None:
            raise self.fail
        tokens, stop = list(self.answer(request)), self.stop_ids[0]
        for i, token in enumerate(tokens):
            if token in how.stop_token_ids and i >= how.min_tokens:
                tokens, stop = tokens[:i], token
                break
        ends = len(tokens) <= how.max_tokens and not how.ignore_eos
        tokens = tokens[: how.max_tokens]
        prompt = None
        if how.prompt_logprobs is not None:
            ids = request.prompt
            prompt = [None, *(self._logprob(t, how.prompt_logprobs) for t in ids[1:])]
        for at in range(0, max(1, len(tokens)), WINDOW):
            time.sleep(self.delay)
            if self.live[request.id]:
                yield Output([], finish_reason="abort")
                return
            if request.deadline is not None and time.monotonic() > request.deadline:
                yield Output([], finish_reason="deadline")
                return
            part, last = tokens[at : at + WINDOW], at + WINDOW >= len(tokens)
            reason = ("stop" if ends else "length") if last else None
            yield Output(
                part,
                finish_reason=reason,
                logprobs=None
                if how.logprobs is None
                else [self._logprob(t, how.logprobs) for t in part],
                prompt_logprobs=prompt,
                stop_token=stop if reason == "stop" else None,
                cached_tokens=len(request.prompt) // 2,
            )
            prompt = None

    def _logprob(self, token, count):
        """The chosen token is the likeliest if it is even."""
        others = [t for t in range(100, 100 + count + 1) if t != token][:count]
        top = [(t, -1.0 - i) for i, t in enumerate(others)]
        if count and token % 2 == 0:
            top = [(token, -0.25), *top[:-1]]
        return Logprob(-0.25 if token % 2 == 0 else -1.5, top)

    def stats(self):
        return Stats(
            running=len(self.live), waiting=0, pages_used=len(self.live), pages_cached=0,
            pages_total=100, prompt_tokens=sum(len(r.prompt) for r in self.seen), cached_tokens=0,
            generated_tokens=0, finished=dict(self.finished), preemptions=0,
            compilations_after_ready=0, step_seconds=0.0,
        )  # fmt: skip

    def drain(self, seconds):
        self.closed = True
        with self._changed:
            return self._changed.wait_for(lambda: not self.live, timeout=seconds)

    def close(self):
        self.closed = True
        with self._changed:
            for id in self.live:
                self.live[id] = True
            self._changed.wait_for(lambda: not self.live, timeout=30)
