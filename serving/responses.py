"""Answers in the form of the OpenAI API: whole, or as the events of a stream."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

from serving.completions import Answer, Completions, Delta, Token
from serving.protocol import ChatRequest, CompletionRequest

Body = dict[str, Any]


async def whole(request: Any, answer: Answer, text: Completions) -> Body:
    """The body of an answer that is not streamed."""
    parts: list[list[Delta]] = [[] for _ in answer.choices]
    async for delta in answer.deltas():
        parts[delta.choice].append(delta)
    shown = [(parts[i], choice.finish_reason) for i, choice in _best(request, answer)]
    body = _head(request, chunk=False)
    body["choices"] = [
        _choice(
            request,
            number,
            _joined(number, deltas, reason),
            _offsets(request, text),
            text,
            chunk=False,
        )
        for number, (deltas, reason) in enumerate(shown)
    ]
    return body | {"usage": answer.usage}


async def chunks(request: Any, answer: Answer, text: Completions) -> AsyncIterator[Body]:
    """The events of a streamed answer, but the closing [DONE]."""
    head = _head(request, chunk=True)
    usage = bool(request.stream_options and request.stream_options.include_usage)
    head |= {"usage": None} if usage else {}
    offsets = [_offsets(request, text) for _ in answer.choices]
    if isinstance(request, ChatRequest):
        for number in range(len(answer.choices)):
            first = {"role": "assistant", "content": ""}
            yield head | {"choices": [{"index": number, "delta": first, "finish_reason": None}]}
    async for delta in answer.deltas():
        choice = _choice(request, delta.choice, delta, offsets[delta.choice], text, chunk=True)
        yield head | {"choices": [choice]}
    if usage:
        yield head | {"choices": [], "usage": answer.usage}


def _offsets(request: Any, text: Completions) -> Offsets:
    return Offsets(text, echo=bool(getattr(request, "echo", None)))


def _head(request: Any, *, chunk: bool) -> Body:
    chat = isinstance(request, ChatRequest)
    kind = "chat.completion" if chat else "text_completion"
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind + ".chunk" * (chunk and chat),
        "created": int(time.time()),
        "model": request.model,
    }


def _best(request: Any, answer: Answer) -> Iterable[tuple[int, Any]]:
    """The choices to show: of each prompt's ``best_of`` the ``n`` with the best mean logprob."""
    keep = request.n or 1
    for start in range(0, len(answer.choices), answer.group):
        group = list(enumerate(answer.choices))[start : start + answer.group]
        if keep < answer.group:
            group = sorted(group, key=lambda pair: -pair[1].mean_logprob)[:keep]
        yield from group


def _joined(number: int, deltas: list[Delta], reason: str | None) -> Delta:
    tokens = [token for delta in deltas for token in delta.tokens]
    prompt = next((delta.prompt for delta in deltas if delta.prompt is not None), None)
    stop = deltas[-1].stop if deltas else None
    return Delta(number, "".join(delta.text for delta in deltas), tokens, prompt, reason, stop)


def _choice(
    request: Any, number: int, delta: Delta, offsets: Offsets, text: Completions, *, chunk: bool
) -> Body:
    body: Body = {"index": number, "finish_reason": delta.finish_reason}
    if isinstance(request, CompletionRequest):
        body["text"] = delta.text
        tokens = (delta.prompt or [] if request.echo else []) + delta.tokens
        # As vLLM; lm-evaluation-harness leaves out the last one, which has to be no prompt's.
        tokens += [delta.stop] if delta.stop else []
        asked = request.logprobs is not None
        body["logprobs"] = offsets.logprobs(tokens) if asked else None
    else:
        message = {"content": delta.text}
        body |= {"delta": message} if chunk else {"message": {"role": "assistant"} | message}
        body["logprobs"] = _chat_logprobs(delta.tokens, text) if request.logprobs else None
    if request.prompt_logprobs is not None and delta.prompt is not None:
        body["prompt_logprobs"] = [_by_id(token, text) for token in delta.prompt]
    return body


# --- log-probabilities --------------------------------------------------------------------------


def _chat_logprobs(tokens: list[Token], text: Completions) -> Body:
    return {
        "content": [
            _one(token.id, token.logprob, text)
            | {"top_logprobs": [_one(id, logprob, text) for id, logprob in token.top]}
            for token in tokens
        ]
    }


def _one(id: int, logprob: float | None, text: Completions) -> Body:
    data = text.piece(id)
    shown = data.decode("utf-8", "replace")
    return {"token": shown, "logprob": finite(logprob), "bytes": list(data)}


def _by_id(token: Token, text: Completions) -> Body | None:
    """vLLM's form of ``prompt_logprobs``."""
    if token.logprob is None:
        return None
    pairs = {token.id: token.logprob} | dict(token.top)
    return {
        str(id): {
            "logprob": finite(logprob),
            "decoded_token": text.piece(id).decode("utf-8", "replace"),
        }
        for id, logprob in pairs.items()
    }


def finite(logprob: float | None) -> float | None:
    """JSON has no infinity; -9999.0 is what OpenAI writes."""
    return None if logprob is None else max(logprob, -9999.0)


class Offsets:
    """The log-probabilities of a completion; where each token begins in the text goes on from one
    piece of a stream to the next."""

    def __init__(self, text: Completions, *, echo: bool):
        self._text, self._at = text, 0
        self._strips = echo and text.bytes.strips  # the space that begins a text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def logprobs(self, tokens: list[Token]) -> Body:
        names = [self._name(token.id) for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._offset(token.id) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """The chosen token is always among them."""
        if token.logprob is None:
            return None
        pairs = dict(token.top) | {token.id: token.logprob}
        return {self._name(id): finite(logprob) for id, logprob in pairs.items()}

    def _name(self, id: int) -> str:
        """The text of a token; of a part of a character its bytes, as OpenAI writes them."""
        data = self._text.piece(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _offset(self, id: int) -> int:
        at, special = self._at, self._text.bytes.special
        data = b"" if id in special else self._text.piece(id)
        if self._strips and data:
            self._strips, data = False, data.removeprefix(b" ")
        self._at += len(self._utf8.decode(data))
        return at
