"""What every request of the server goes through: size, key, errors, disconnects, log and counts."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmzoo_jax.errors import InputError
from serving.prometheus import Metrics
from serving.protocol import ApiError
from serving.requests import Closed, QueueFull

T = TypeVar("T")
OPEN = ("/health", "/ready", "/metrics")  # no key is asked for
log = logging.getLogger("serving")


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


# --- bodies and errors --------------------------------------------------------------------------


async def read_body(request: Request, limit: int) -> bytes:
    """ApiError 413 for more than ``limit`` bytes, before they are read where they are announced."""
    too_large = ApiError(f"the body has more than {limit} bytes", status=413, code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def as_api_error(error: Exception) -> ApiError:
    """What the client is told. What nobody expected is logged, and ends this request only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        wait = error.retry_after
        return ApiError(str(error), status=429, code="queue_full", retry_after=wait)
    if isinstance(error, Closed):
        return ApiError("the server is shutting down", status=503, code="closed", retry_after=5)
    if isinstance(error, InputError):
        return ApiError(str(error), code="invalid_value")
    log.error("a request failed", exc_info=error)
    return ApiError("an error of the server; its log says more", status=500, code="internal_error")


def error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def answering(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers errors in OpenAI's form."""

    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except Disconnected:
            return Response(status_code=499)  # nobody sees it but the log
        except Exception as error:
            return error_response(as_api_error(error))

    route.__name__ = handler.__name__
    return route


# --- disconnects --------------------------------------------------------------------------------


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes: then Disconnected."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_until_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, one JSON object each, and [DONE]. ``close`` is called at the end, however
    that comes; an error on the way is the last event."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], None]):
        self.events, self.close = events, close
        self.status_code, self.background = 200, None
        self.body = b""
        self.init_headers({"content-type": "text/event-stream", "cache-control": "no-cache"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except Disconnected:
            scope["state"]["facts"]["disconnected"] = True
        finally:
            self.close()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        last = "[DONE]"
        try:
            async for event in self.events:
                await send(_body(json.dumps(event, ensure_ascii=False)))
        except Exception as error:
            last = json.dumps(as_api_error(error).body())
        await send(_body(last))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(data: str) -> Message:
    return {
        "type": "http.response.body",
        "body": f"data: {data}\n\n".encode(),
        "more_body": True,
    }


# --- around every request -----------------------------------------------------------------------


def observed(
    app: ASGIApp, metrics: Metrics, *, keys: Sequence[str], paths: Sequence[str]
) -> ASGIApp:
    """``app`` with API keys (none: open to all), an id, counts and a line in the log for each
    request. Routes may add to ``scope["state"]["facts"]``, which is logged."""
    secrets = [key.encode() for key in keys]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        started, status = time.monotonic(), 500
        headers = dict(scope["headers"])
        name = headers.get(b"x-request-id", b"").decode("latin-1")[:128] or uuid.uuid4().hex
        facts = {"id": name, "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {})["facts"] = facts

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", name.encode("latin-1")),
                ]
            await send(message)

        try:
            if scope["path"] in OPEN or not secrets or _has_key(headers, secrets):
                await app(scope, receive, counted)
            else:
                error = ApiError("a valid API key is needed", status=401, code="invalid_api_key")
                await error_response(error)(scope, receive, counted)
        finally:
            seconds = time.monotonic() - started
            path = scope["path"] if scope["path"] in paths else "other"
            metrics.http.labels(path, str(status)).inc()
            metrics.request_seconds.labels(path).observe(seconds)
            if scope["path"] not in OPEN:
                log.info("request", extra={"facts": facts | {"status": status, "seconds": seconds}})

    return wrapped


def _has_key(headers: dict[bytes, bytes], secrets: list[bytes]) -> bool:
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    good = [hmac.compare_digest(key.strip(), secret) for secret in secrets]  # all, in equal time
    return kind.lower() == b"bearer" and any(good)


class JsonLines(logging.Formatter):
    """A log record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def start_log() -> None:
    """One line of JSON a record on standard error, the library's and uvicorn's too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("serving", "llmzoo_jax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "serving" else logging.WARNING)
