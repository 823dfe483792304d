"""A client of OpenAI-compatible chat completions that cannot spend more than it may.

``Endpoint.ask`` gives the answer to a request, from the ledger where it was answered before.
Otherwise it waits its turn (rate limit), waits until the worst case of the request fits under the
cap, sends it, and tries again with growing pauses after 408, 409, 429, 5xx, time-outs and broken
connections. ``in_order`` works through many items, some at a time.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from data_pipelines.ledger import Ledger
from data_pipelines.sources import Unusable
from llmzoo_jax.errors import InputError

# Tokens that are on top of the bytes of the text. No token of a byte-level or byte-fallback
# tokenizer is less than a byte, so both together are an upper bound of the prompt's tokens.
TOKENS_A_MESSAGE, TOKENS_A_REQUEST = 16, 128
RETRIED = (408, 409, 429)  # and 500 to 599
TOO_LATE = (408, 504, 524)  # said by a proxy: the model behind it may go on, and bill
FATAL = {
    401: "the API key is missing or wrong: name its environment variable with --api_key_env",
    402: "the account has no credit",
    403: "the API key may not use this model",
    404: "check --base_url (it often ends with /v1) and --model",
}


class CapReached(Exception):
    """The worst case of the next request does not fit under the cap any more."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    input_price: float  # dollars a million tokens
    output_price: float
    requests_per_minute: float = 500.0
    timeout: float = 120.0  # seconds for a whole answer
    attempts: int = 8  # how often a request is sent until the endpoint answers
    first_pause: float = 1.0  # seconds; doubles with each attempt, up to ...
    longest_pause: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Request:
    messages: tuple[dict[str, str], ...]  # {"role", "content"}
    max_tokens: int
    temperature: float = 0.7
    seed: int = 0  # another seed is another request: a new answer to the same messages


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    finish_reason: str  # "stop", "length", "content_filter", ...
    refusal: str = ""


def key_of(body: dict[str, Any]) -> str:
    """Hex SHA-256 of what is sent: model, messages and parameters."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def prompt_bound(messages: Iterable[dict[str, str]]) -> int:
    """More tokens than any usual tokenizer makes of the messages."""
    # surrogatepass: a model's answer may hold half a pair, and become part of the next prompt
    sizes = (len(m["content"].encode("utf-8", "surrogatepass")) for m in messages)
    return TOKENS_A_REQUEST + sum(TOKENS_A_MESSAGE + size for size in sizes)


class Endpoint:
    """A model behind ``base_url``. ``api_key`` is sent, and neither shown nor stored."""

    def __init__(
        self,
        base_url: str,
        model: str,
        ledger: Ledger,
        limits: Limits,
        *,
        api_key: str = "",
        token_limit_key: str = "max_tokens",
    ):
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"--base_url={base_url}: begin it with http:// or https://")
        self.model, self.ledger, self.limits = model, ledger, limits
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._api_key = api_key
        self._token_limit_key = token_limit_key
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # `limits.timeout` is for the whole answer, not for a piece of it
            limits=httpx2.Limits(max_connections=None),
        )
        self._asking: dict[str, asyncio.Event] = {}
        self._settled = asyncio.Condition()  # something in flight became spent or free
        self._next_turn = 0.0
        self._margin = 0  # prompt tokens that the endpoint counted beyond the bound
        self.capped = False
        self.failures = 0  # requests in a row that got no answer at all

    async def close(self) -> None:
        await self._client.aclose()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        limits = self.limits
        dollars = prompt_tokens * limits.input_price + completion_tokens * limits.output_price
        return dollars / 1e6

    async def ask(self, request: Request) -> Answer:
        """Raises CapReached, Unusable("no answer", ...) for a request that cannot be had, and
        InputError where no request can."""
        body = {
            "model": self.model,
            "messages": list(request.messages),
            self._token_limit_key: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        key = key_of(body)
        while key in self._asking:  # the same request is under way: it is paid once
            await self._asking[key].wait()
        if self.ledger.answer(key) is None:
            self._asking[key] = asyncio.Event()
            try:
                await self._pay(key, body, request)
            finally:
                self._asking.pop(key).set()
        stored = self.ledger.answer(key)
        return Answer(**{name: stored[name] for name in ("text", "finish_reason", "refusal")})

    async def _pay(self, key: str, body: dict[str, Any], request: Request) -> None:
        """Sends a request until its answer is in the ledger."""
        why = ""
        for attempt in range(self.limits.attempts):
            bound = self.cost(prompt_bound(request.messages) + self._margin, request.max_tokens)
            await self._turn()
            number = await self._reserve(key, bound)
            pause = min(self.limits.first_pause * 2**attempt, self.limits.longest_pause)
            # Between half and the whole, so that many do not come back at once.
            pause *= 0.5 + 0.5 * random.Random(f"{key}{attempt}").random()
            try:
                async with asyncio.timeout(self.limits.timeout):
                    response = await self._client.post(self._url, json=body)
                if response.is_success:
                    self._store(number, key, bound, request, response.json())
                    self.failures = 0
                    return
                why = f"HTTP {response.status_code}"
                late = response.status_code in TOO_LATE
                (self.ledger.lost if late else self.ledger.free)(number, why)
                self._refuse(response)
                pause = max(pause, self._hold(response))
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
                why = f"no connection ({error})"
                self.ledger.free(number, why)
            except (TimeoutError, httpx2.RequestError) as error:  # it may have been answered
                why = f"no answer ({type(error).__name__}, timeout {self.limits.timeout:g} s)"
                self.ledger.lost(number, why)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                why = f"not a chat completion ({error!r:.200})"
                self.ledger.lost(number, why)
            finally:
                async with self._settled:
                    self._settled.notify_all()
            if attempt + 1 < self.limits.attempts:
                await asyncio.sleep(pause)
        self.failures += 1
        if self.failures >= 10:
            raise InputError(
                f"{self._url}: {self.failures} requests in a row without an answer, the last:"
                f" {why}; see to the endpoint, then run the same command again"
            )
        raise Unusable("no answer", f"{why}, after {self.limits.attempts} attempts")

    async def _turn(self) -> None:
        start = max(time.monotonic(), self._next_turn)
        self._next_turn = start + 60 / self.limits.requests_per_minute
        await asyncio.sleep(start - time.monotonic())

    async def _reserve(self, key: str, bound: float) -> int:
        """Waits for others to turn out cheaper than they might have been, if that can help."""
        async with self._settled:
            while not self.capped and not self.ledger.fits(bound):
                if not self.ledger.in_flight:
                    self.capped = True
                    self._settled.notify_all()
                    break
                await self._settled.wait()
            if self.capped:
                raise CapReached
            return self.ledger.sent(key, bound)

    def _refuse(self, response: httpx2.Response) -> None:
        """Raises where sending it again would not help."""
        status = response.status_code
        if status in RETRIED or status >= 500:
            return
        said = " ".join(response.text.split())
        said = (said.replace(self._api_key, "***") if self._api_key else said)[:300]
        if status in FATAL:
            raise InputError(f"{self._url}: HTTP {status}: {FATAL[status]}. It said: {said}")
        raise Unusable("refused by the endpoint", f"HTTP {status}: {said}")

    def _hold(self, response: httpx2.Response) -> float:
        """The seconds of Retry-After; after 429 nobody else's turn comes earlier either."""
        seconds = retry_after(response.headers.get("retry-after", ""))
        if response.status_code == 429:
            self._next_turn = max(self._next_turn, time.monotonic() + seconds)
        return seconds

    def _store(self, number: int, key: str, bound: float, request: Request, reply: Any) -> None:
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        content = {
            "text": message.get("content") or "",
            "finish_reason": choice.get("finish_reason") or "",
            "refusal": message.get("refusal") or "",
        }
        for name, value in content.items():
            if not isinstance(value, str):
                raise TypeError(f"{name} is {type(value).__name__}, not a string")
        cost = bound
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if all(type(count) is int and count >= 0 for count in counts):
            cost = self.cost(*counts)
            # A server's own long system prompt: every bound from here on includes it.
            self._margin = max(self._margin, counts[0] - prompt_bound(request.messages))
            content["usage"] = dict(zip(("prompt", "completion"), counts, strict=True))
        self.ledger.answered(number, key, cost, content)


def retry_after(value: str) -> float:
    """Seconds, of a header that has seconds or a date; 0 of anything else."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass  # a date, then
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


T = TypeVar("T")


async def in_order(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], *, concurrency: int
) -> None:
    """``await work(item)`` for all items, begun in order, ``concurrency`` at a time.

    An item is finished before its worker takes another, so that a stop leaves few half done. The
    first exception stops all and is raised.
    """
    rest = iter(items)

    async def worker() -> None:
        for item in rest:
            await work(item)

    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
