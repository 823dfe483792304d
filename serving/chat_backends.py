"""Who answers in a chat: a model in this process, or an endpoint with OpenAI's API."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from llmzoo_jax.conversation import Message
from llmzoo_jax.errors import InputError

if TYPE_CHECKING:
    from llmzoo_jax.inference import Model

CONNECT_SECONDS, SILENT_SECONDS = 10, 600  # until there is a connection, and between two lines
TOO_LONG = ("context_length_exceeded", "maximum context length")  # OpenAI's and ours; vLLM's


class ContextFull(InputError):
    """The messages are longer than the model's context."""


class EndpointError(InputError):
    """The endpoint can't be reached, or did not answer as one with OpenAI's API does."""


@dataclass(frozen=True)
class Answer:
    """How an answer ended: its length in tokens (None: not known), and whether it was cut."""

    tokens: int | None
    cut: bool


class Backend(Protocol):
    def answer(
        self, messages: Sequence[Message], show: Callable[[str], None], *, attempt: int
    ) -> Answer:
        """Calls ``show`` with each piece of the answer. ``attempt``: how often the same was asked
        before; another seed is used for it. ContextFull before anything is shown."""

    def interrupt(self) -> None:
        """Called by a signal handler: ``answer`` is to call ``show``, or end, as soon as it can."""


class Local:
    """``model``, with ``context`` tokens at most for a prompt and the ``max_new_tokens`` of its
    answer; ``sampling`` are the other options of ``Model.chat``."""

    def __init__(self, model: Model, *, context: int, max_new_tokens: int, **sampling: Any):
        self.model, self.room = model, context - max_new_tokens
        self.options = {"max_new_tokens": max_new_tokens} | sampling

    def answer(
        self, messages: Sequence[Message], show: Callable[[str], None], *, attempt: int
    ) -> Answer:
        if (length := len(self.model.prompt(messages))) > self.room:
            raise ContextFull(
                f"this message makes a prompt of {length:,} tokens, and there is room for "
                f"{self.room:,}; write a shorter one, or start with a smaller --max_new_tokens"
            )
        again = {"seed": self.options.get("seed", 0) + attempt} if attempt else {}
        result = self.model.chat(messages, on_text=show, **self.options | again)
        return Answer(len(result.tokens), result.finish_reason == "length")

    def interrupt(self) -> None:
        """It shows something every few tokens."""


class Endpoint:
    """The model ``name`` at ``url`` (``http://localhost:8000/v1``). ``options`` go into the body of
    each request; ``count`` asks for the number of tokens."""

    def __init__(
        self, url: str, *, name: str = "", api_key: str = "", count: bool = False, **options: Any
    ):
        self.url, self.headers = url.rstrip("/"), {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.connection: http.client.HTTPConnection | None = None
        self.options = options | ({"stream_options": {"include_usage": True}} if count else {})
        self.name = name or self._first_model()

    def answer(
        self, messages: Sequence[Message], show: Callable[[str], None], *, attempt: int
    ) -> Answer:
        body = {
            "model": self.name,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "stream": True,
        }
        again = {"seed": self.options.get("seed", 0) + attempt} if attempt else {}
        tokens = reason = None
        with self._request("POST", "/chat/completions", body | self.options | again) as response:
            for event in _events(response):
                if event.get("error"):
                    raise EndpointError(_message(event))
                if event.get("usage"):
                    tokens = event["usage"].get("completion_tokens")
                for choice in event.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
                    show(choice.get("delta", {}).get("content") or "")
        if reason is None:
            show("")  # it may have been interrupted
            raise EndpointError(f"{self.url} closed the connection in the middle of the answer")
        return Answer(tokens, reason == "length")

    def interrupt(self) -> None:
        """Ends the connection: what waits for its next line gets none, and the server is free."""
        sock = self.connection.sock if self.connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _first_model(self) -> str:
        with self._request("GET", "/models") as response:
            try:
                return json.load(response)["data"][0]["id"]
            except (ValueError, LookupError, TypeError) as error:
                raise EndpointError(
                    f"{self.url}/models lists no model; name one with --model"
                ) from error

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise EndpointError(f"--url={self.url}: it should look like http://localhost:8000/v1")
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=CONNECT_SECONDS)
        data = None if body is None else json.dumps(body).encode()
        try:
            self.connection = connection
            connection.connect()
            connection.sock.settimeout(SILENT_SECONDS)
            connection.request(method, parts.path + path, data, self.headers)
            response = connection.getresponse()
            if response.status != 200:
                message = _error_text(response, self.url)
                long = any(part in message for part in TOO_LONG)
                raise (ContextFull if long else EndpointError)(message)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            self.connection = None
            connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of server-sent events, up to [DONE]."""
    for line in response:
        field, _, data = line.decode("utf-8", "replace").strip().partition(":")
        if field != "data":
            continue
        if (data := data.strip()) == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise EndpointError(f"the endpoint sent what is no JSON: {data[:200]}") from error
        if isinstance(event, dict):
            yield event


def _error_text(response: http.client.HTTPResponse, url: str) -> str:
    text = response.read(10_000).decode("utf-8", "replace")
    try:
        text = _message(json.loads(text))
    except ValueError:
        text = " ".join(text.split())[:300]  # a page of a proxy, say
    hint = {
        401: "; name the variable that has the API key with --api_key_env",
        404: "" if url.endswith("/v1") else "; most such URLs end in /v1",
    }.get(response.status, "")
    return f"{response.status} {response.reason}: {text or 'no explanation'}{hint}"


def _message(body: Any) -> str:
    """The message in an error body, whose form differs: OpenAI's, or FastAPI's."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)
    message = error.get("message") or error.get("detail") or json.dumps(error, ensure_ascii=False)
    code = error.get("code")
    return f"{message} ({code})" if isinstance(code, str) and code else str(message)
