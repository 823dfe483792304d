"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.requests import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "running": ("llmzoo_requests_running", "Requests that are in the batch."),
    "waiting": ("llmzoo_requests_waiting", "Requests that wait for a place in the batch."),
    "pages_used": ("llmzoo_kv_pages_used", "Cache pages that running requests hold."),
    "pages_cached": ("llmzoo_kv_pages_cached", "Cache pages that are kept for their prefixes."),
    "pages_total": ("llmzoo_kv_pages", "Cache pages that there are."),
    "step_seconds": ("llmzoo_step_seconds", "Time that the newest window of steps took."),
}
COUNTERS = {  # tokens a second are rates of these
    "prompt_tokens": ("llmzoo_prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("llmzoo_prompt_tokens_cached", "Tokens of prompts found in the cache."),
    "generated_tokens": ("llmzoo_generated_tokens", "Tokens that were generated."),
    "guessed_tokens": ("llmzoo_guessed_tokens", "Tokens that speculation guessed."),
    "right_tokens": ("llmzoo_guessed_tokens_right", "Guessed tokens that were right."),
    "preemptions": ("llmzoo_preemptions", "Requests put back into the queue for lack of pages."),
    "compilations_after_ready": ("llmzoo_compilations_after_ready", "Should be 0."),
}


class Metrics:
    """Of one server. ``registry`` is what ``/metrics`` shows."""

    def __init__(self, stats: Callable[[], Stats]):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(stats))
        self.http = Counter(
            "llmzoo_http_requests", "HTTP requests by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.finished = Counter(
            "llmzoo_answers", "Answers by what ended them.", ["finish_reason"],
            registry=self.registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "llmzoo_http_request_seconds", "From a request to the end of its answer.", ["path"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "llmzoo_time_to_first_token_seconds", "From a request to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "llmzoo_inter_token_seconds", "Time a token, after the first.",
            buckets=TOKEN_SECONDS, registry=self.registry,
        )  # fmt: skip

    def observe_tokens(self, seconds: float, count: int) -> None:
        """``count`` tokens came at once, after ``seconds`` each."""
        for _ in range(count):
            self.between_tokens.observe(seconds)


class _Engine:
    """The engine's own numbers, read when somebody asks."""

    def __init__(self, stats: Callable[[], Stats]):
        self.stats = stats

    def describe(self) -> list[Metric]:
        return []  # the engine may not have started

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        finished = CounterMetricFamily(
            "llmzoo_engine_requests", "Requests to the engine by what ended them.",
            labels=["finish_reason"],
        )  # fmt: skip
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished
