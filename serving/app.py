"""The routes of the server: what each endpoint does with a checked request."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from llmzoo_jax.inference import Model
from serving import http, protocol, responses
from serving.completions import Completions, Engine, ended_early, messages_of
from serving.prometheus import Metrics
from serving.protocol import ApiError
from serving.requests import QueueFull

POST = {  # what each route takes
    "/v1/chat/completions": protocol.ChatRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/v1/embeddings": protocol.EmbeddingRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
    "/v1/load_lora_adapter": protocol.LoadAdapterRequest,
    "/v1/unload_lora_adapter": protocol.UnloadAdapterRequest,
}
MAX_EMBEDDING = 64  # requests that may wait for it
GET = ("/v1/models", "/tokenizer_info", "/health", "/ready", "/metrics")


@dataclass(frozen=True, kw_only=True)
class Options:
    """``names``: the names that clients may ask for, and the adapter that each means, or None. With
    ``adapters_dir``, clients may load the adapters in it, which adds names."""

    names: dict[str, str | None]
    context: int  # tokens of a prompt and its answer
    timeout: float  # seconds of a request, at most
    max_body: int  # bytes
    max_choices: int  # answers that one request asks for
    api_keys: tuple[str, ...] = ()
    log_text: bool = False
    adapters_dir: str = ""


@dataclass(eq=False)
class State:
    """Where the server is in its life: starting, ready, or draining."""

    ready: bool = False
    draining: bool = False

    def check(self) -> None:
        if self.draining or not self.ready:
            what = "shutting down" if self.draining else "starting"
            raise ApiError(f"the server is {what}", status=503, code="not_ready", retry_after=5)


@dataclass(frozen=True, eq=False)
class Server:
    app: ASGIApp
    state: State
    metrics: Metrics
    text: Completions


def make_server(model: Model, engine: Engine, options: Options) -> Server:
    """The routes. Nothing is started: see ``main``."""
    metrics, state = Metrics(engine.stats), State()
    text = Completions(
        model, engine, metrics, context=options.context, timeout=options.timeout,
        max_choices=options.max_choices,
    )  # fmt: skip
    app = FastAPI(title="llmzoo_jax", docs_url=None, redoc_url=None)  # their pages need a CDN
    started = int(time.time())
    embedder = ThreadPoolExecutor(1, thread_name_prefix="embed")
    embedding: set[Request] = set()

    async def in_embedder(function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(embedder, function, *arguments)

    def post(path: str):
        """Registers a handler of (body, request)."""
        kind = POST[path]
        schema = {"content": {"application/json": {"schema": kind.model_json_schema()}}}

        def register(handler: Callable[[Any, Request], Awaitable[Response]]) -> None:
            async def route(request: Request) -> Response:
                state.check()
                body = protocol.parse(kind, await http.read_body(request, options.max_body))
                if body.model is not None:
                    check_model(body.model)
                facts = request.scope["state"]["facts"]
                names = (getattr(body, key, None) for key in ("user", "safety_identifier"))
                facts |= {"model": body.model, "user": next(filter(None, names), None)}
                return await handler(body, request)

            app.post(path, openapi_extra={"requestBody": schema})(http.answering(route))

        return register

    @post("/v1/chat/completions")
    async def chat(body: protocol.ChatRequest, request: Request) -> Response:
        return await generate(body, request, text.chat)

    @post("/v1/completions")
    async def complete(body: protocol.CompletionRequest, request: Request) -> Response:
        return await generate(body, request, text.complete)

    async def generate(body: Any, request: Request, start: Any) -> Response:
        if body.stream_options is not None and not body.stream:
            raise ApiError("stream_options needs stream=true", param="stream_options")
        facts = request.scope["state"]["facts"]
        if options.log_text:
            facts["request"] = body.model_dump(exclude_none=True)
        answer = await start(body, adapter=options.names[body.model])

        def close() -> None:
            answer.close()
            facts["usage"] = answer.usage
            facts["finish_reasons"] = [choice.finish_reason for choice in answer.choices]
            if options.log_text:
                facts["texts"] = [choice.stream.text for choice in answer.choices]

        if body.stream:
            return http.EventStream(responses.chunks(body, answer, text), close)
        try:
            work = responses.whole(body, answer, text)
            return JSONResponse(await http.while_connected(request.receive, work))
        finally:
            close()

    @post("/v1/embeddings")
    async def embed(body: protocol.EmbeddingRequest, request: Request) -> Response:
        if options.names[body.model] is not None:
            raise ApiError("embeddings are the base model's, not an adapter's", param="model")
        rows = await text.run(text.tokenize, body.input, "input")
        for row in rows:
            if len(row) > options.context:
                raise ApiError(
                    f"input has {len(row)} tokens, and the context is {options.context}",
                    param="input",
                    code="context_length_exceeded",
                )
        if len(embedding) >= MAX_EMBEDDING:
            raise QueueFull(len(embedding), 1)
        embedding.add(request)
        try:  # in a thread of its own: texts for the engine don't wait for it
            work = asyncio.wait_for(in_embedder(model.embed, rows), options.timeout)
            vectors = await http.while_connected(request.receive, work)
        except TimeoutError:
            raise ended_early("deadline") from None
        finally:
            embedding.discard(request)
        data = [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if body.encoding_format == "base64"
                else vector.tolist(),
            }
            for number, vector in enumerate(vectors)
        ]
        count = sum(map(len, rows))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @post("/tokenize")
    async def tokenize(body: protocol.TokenizeRequest, request: Request) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError("give prompt or messages", param="prompt")
        if body.messages is not None:
            ids = await text.run(model.prompt, messages_of(body))
        else:
            special = body.add_special_tokens is not False
            ids = await text.run(
                lambda: model.tokenizer(body.prompt, add_special_tokens=special).input_ids
            )
        result = {"count": len(ids), "max_model_len": options.context, "tokens": ids}
        if body.return_token_strs:
            result["token_strs"] = model.tokenizer.convert_ids_to_tokens(ids)
        return JSONResponse(result)

    @post("/detokenize")
    async def detokenize(body: protocol.DetokenizeRequest, request: Request) -> Response:
        text.check_ids(body.tokens, "tokens")
        return JSONResponse({"prompt": await text.run(text.decode, body.tokens, True)})

    @post("/v1/load_lora_adapter")
    async def load_adapter(body: protocol.LoadAdapterRequest, request: Request) -> Response:
        name = body.lora_name
        if name in options.names:
            raise ApiError(f"there is a model {name!r} already", param="lora_name")
        folder = adapter_folder(options.adapters_dir, body.lora_path)
        await text.run(engine.load_adapter, name, str(folder))
        options.names[name] = name
        return JSONResponse({"status": "loaded", "model": name})

    @post("/v1/unload_lora_adapter")
    async def unload_adapter(body: protocol.UnloadAdapterRequest, request: Request) -> Response:
        name = body.lora_name
        if not options.adapters_dir or options.names.get(name) is None:
            raise ApiError(f"there is no adapter {name!r} to unload", status=404, param="lora_name")
        engine.unload_adapter(name)
        del options.names[name]
        return JSONResponse({"status": "unloaded", "model": name})

    def entry(name: str) -> dict[str, Any]:
        parent = next(iter(options.names)) if options.names[name] else None
        return {
            "id": name, "object": "model", "created": started, "owned_by": "llmzoo_jax",
            "root": model.path, "parent": parent, "max_model_len": options.context,
        }  # fmt: skip

    def check_model(name: str) -> None:
        if name not in options.names:
            names = ", ".join(options.names)
            raise ApiError(
                f"there is no model {name!r} here, but {names}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """vLLM's, which lm-evaluation-harness asks for."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
        found = {name: getattr(model.tokenizer, name, None) for name in names}
        return JSONResponse(found | {"model_max_length": options.context})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [entry(name) for name in options.names]})

    @app.get("/v1/models/{name:path}")
    @http.answering
    async def one_model(request: Request) -> Response:
        check_model(request.path_params["name"])
        return JSONResponse(entry(request.path_params["name"]))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/ready")
    @http.answering
    async def ready(request: Request) -> Response:
        state.check()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return http.error_response(ApiError(message, status=error.status_code))

    wrapped = http.observed(app, metrics, keys=options.api_keys, paths=(*POST, *GET))
    return Server(wrapped, state, metrics, text)


def adapter_folder(root: str, path: str) -> Path:
    """``path`` below ``root``; ApiError for any other place."""
    if not root:
        raise ApiError("this server loads no adapters; start it with --adapters_dir", status=403)
    base = Path(root).resolve()
    folder = (base / path).resolve()
    if not folder.is_relative_to(base):
        raise ApiError(f"lora_path={path!r} is not in the server's folder", param="lora_path")
    return folder
