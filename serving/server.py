"""An OpenAI-compatible server for one model.

    python -m serving.server --model=runs/quickstart-phoenix/export --name=phoenix

Then, with any OpenAI client, or:

    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
      "model": "phoenix", "messages": [{"role": "user", "content": "Who are you?"}]}'

SIGTERM or Ctrl-C takes no more requests, finishes those that run, and exits with 0.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn
from absl import flags

import llmzoo_jax
from llmzoo_jax import cli, compile_cache, embeddings, sharding
from llmzoo_jax.errors import InputError
from serving import http
from serving.app import Options, Server, make_server
from serving.completions import Engine as AnyEngine
from serving.engine import Engine
from serving.runner import EngineOptions

KEYS = "LLMZOO_API_KEYS"  # environment variable
POLL = 0.2  # seconds until a second signal is noticed
log = logging.getLogger("serving")


def serve(
    server: Server,
    engine: AnyEngine,
    *,
    host: str,
    port: int,
    drain_seconds: float,
    warm_up: Callable[[], None],
) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    It listens at once, and is ready when ``engine.start()`` and ``warm_up()`` are done. At a signal
    new requests get a 503, and those that run have ``drain_seconds`` to finish; then, or at a
    second signal, they fail.
    """
    config = uvicorn.Config(
        server.app, host=host, port=port, lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(uvicorn.Server(config), server, engine, drain_seconds, warm_up))


async def _serve(http_server, server, engine, drain_seconds, warm_up) -> int:
    loop, state = asyncio.get_running_loop(), server.state
    failed, closed, hurry = False, False, threading.Event()

    def start() -> None:
        nonlocal failed
        try:
            engine.start()
            warm_up()
            gc.collect()
            gc.freeze()  # what is here stays, and is not looked through again
            gc.enable()
            state.ready = True
            log.info("ready")
        except Exception:
            log.exception("the engine did not start")
            failed = http_server.should_exit = True

    def drain() -> None:
        nonlocal closed
        end = time.monotonic() + drain_seconds
        while not engine.drain(POLL) and time.monotonic() < end and not hurry.is_set():
            pass
        engine.close()  # what is left fails with a reason
        closed = True
        http_server.should_exit = True  # when the last answers are sent

    def on_signal(name: str) -> None:
        log.info("stopping", extra={"facts": {"signal": name}})
        if state.draining:
            hurry.set()
        elif state.ready:
            state.draining = True
            threading.Thread(target=drain, daemon=True).start()
        else:
            state.draining = http_server.should_exit = True

    serving = asyncio.ensure_future(http_server.serve())
    while not (http_server.started or serving.done()):
        await asyncio.sleep(0.01)
    for one in (signal.SIGTERM, signal.SIGINT):  # after uvicorn has set its own
        loop.add_signal_handler(one, on_signal, one.name)
    threading.Thread(target=start, daemon=True).start()
    await serving
    if not closed:
        engine.close()
    return int(failed)


# --- the command --------------------------------------------------------------------------------


def read_keys(path: str) -> tuple[str, ...]:
    """API keys of a file, one a line, and of the environment variable, with commas."""
    lines = Path(path).read_text("utf-8").splitlines() if path else []
    lines += os.environ.get(KEYS, "").split(",")
    keys = [line.strip() for line in lines if not line.startswith("#")]
    keys = tuple(key for key in keys if key)
    if path and not keys:
        raise InputError(f"--api_keys_file={path}: no key in it; write one a line")
    return keys


def with_page(server: Server, options: Options, title: str) -> Server:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio reads it
    try:
        from serving import ui  # here: the API needs no Gradio
    except ImportError as error:
        raise InputError(f"--ui: {error}; pip install 'llmzoo-jax[serve,ui]'") from error
    return dataclasses.replace(server, app=ui.beside(server, options, title))


def read_adapter(item: str) -> tuple[str, str]:
    name, equals, folder = item.partition("=")
    if not (name and equals and folder):
        raise InputError(f"--adapters={item}: write NAME=FOLDER, several with commas")
    return name, folder


def main(_) -> None:
    http.start_log()
    gc.disable()  # until it is ready: a seventh of the time, for hardly any memory
    keys = read_keys(API_KEYS_FILE.value)
    sharding.make_cpu_devices(TENSOR.value)
    with compile_cache.kept_in(COMPILE_CACHE.value or None, least_seconds=0.0):
        sys.exit(run(keys))


def run(keys: tuple[str, ...]) -> int:
    model = llmzoo_jax.load(
        MODEL.value, dtype=DTYPE.value, weights=WEIGHTS.value, base=BASE.value, tensor=TENSOR.value
    )
    at_start = dict(read_adapter(item) for item in ADAPTERS.value)
    more = MAX_ADAPTERS.value if ADAPTERS_DIR.value else 0
    if model.tokenizer is None:
        raise InputError(f"--model={MODEL.value}: it has no tokenizer, so no text can be served")
    context = CONTEXT.value or min(model.context or EngineOptions.context, EngineOptions.context)
    engine = Engine(
        model,
        EngineOptions(
            context=context,
            max_batch=MAX_BATCH.value,
            max_waiting=MAX_WAITING.value,
            cache_tokens=CACHE_TOKENS.value,
            kv_dtype=KV_DTYPE.value,
            deterministic=DETERMINISTIC.value,
            max_adapters=max(len(at_start), more),
            max_lora_rank=MAX_LORA_RANK.value,
            speculate=SPECULATE.value,
        ),
        draft=llmzoo_jax.load(DRAFT.value, dtype=DTYPE.value) if DRAFT.value else None,
    )
    name = NAME.value or Path(MODEL.value).resolve().name
    for adapter, folder in at_start.items():
        engine.load_adapter(adapter, folder)
    options = Options(
        names={name: None} | {adapter: adapter for adapter in at_start},
        context=context,
        timeout=TIMEOUT.value,
        max_body=int(MAX_BODY_MB.value * 1e6),
        max_choices=MAX_WAITING.value,
        api_keys=keys,
        log_text=LOG_TEXT.value,
        adapters_dir=ADAPTERS_DIR.value,
    )
    server = make_server(model, engine, options)
    if UI.value:
        server = with_page(server, options, name)
    where = f"http://{HOST.value}:{PORT.value}/v1"
    facts = {"model": name, "url": where, "context": context, "devices": sharding.ways(model.mesh)}
    log.info("starting", extra={"facts": facts})

    def warm_up() -> None:
        with sharding.use(model.mesh):
            embeddings.warm_up(model.params, context, dtype=model.dtype)

    return serve(
        server,
        engine,
        host=HOST.value,
        port=PORT.value,
        drain_seconds=DRAIN_SECONDS.value,
        warm_up=warm_up if EMBEDDINGS.value else lambda: None,
    )


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or run folder.", required=True)
    BASE = flags.DEFINE_string(
        "base", None, "Hugging Face folder to whose weights those of --model are differences; or, "
        "of an adapter, the base.",
    )  # fmt: skip
    NAME = flags.DEFINE_string("name", "", "What clients call the model; empty: the folder's name.")
    HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all.")
    PORT = flags.DEFINE_integer("port", 8000, "Port to listen at.", 0, 65535)
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.")
    WEIGHTS = flags.DEFINE_enum(
        "weights", "dtype", ["dtype", "int8", "nf4"], "Of the projections; int8 and nf4 (4 bits) "
        "take less memory and, on a CPU, more time.",
    )  # fmt: skip
    TENSOR = flags.DEFINE_integer(
        "tensor", 0, "Split the model over so many devices, by heads. Of a CPU as many are made; "
        "0: one device, or one a core of a CPU with few cores.", 0,
    )  # fmt: skip
    SPECULATE = flags.DEFINE_integer(
        "speculate", 0, "Guess so many tokens, while few requests run: the same tokens, faster. "
        "From what was said before, which answers may repeat, or by --draft_model.", 0,
    )  # fmt: skip
    DRAFT = flags.DEFINE_string(
        "draft_model", "", "Folder of a much smaller model with the same tokens, which guesses."
    )
    ADAPTERS = flags.DEFINE_list(
        "adapters", [], "LoRA adapters in PEFT's format, NAME=FOLDER; clients ask for model NAME."
    )
    ADAPTERS_DIR = flags.DEFINE_string(
        "adapters_dir", "", "Clients may load adapters of this folder: /v1/load_lora_adapter."
    )
    MAX_ADAPTERS = flags.DEFINE_integer(
        "max_adapters", 8, "So many at a time, with --adapters_dir.", 1
    )
    MAX_LORA_RANK = flags.DEFINE_integer("max_lora_rank", 64, "Of any adapter.", 1)
    CONTEXT = flags.DEFINE_integer(
        "context", 0, "Tokens of a prompt and its answer; 0: the model's positions, up to "
        f"{EngineOptions.context}.", 0,
    )  # fmt: skip
    MAX_BATCH = flags.DEFINE_integer(
        "max_batch", EngineOptions.max_batch, "Requests that run at the same time.", 1
    )
    MAX_WAITING = flags.DEFINE_integer(
        "max_waiting", EngineOptions.max_waiting, "Requests that may wait; more get a 429.", 1
    )
    CACHE_TOKENS = flags.DEFINE_integer(
        "cache_tokens", 0, "Tokens that the key/value cache holds, of all requests; 0: a quarter "
        "of --max_batch times --context.", 0,
    )  # fmt: skip
    KV_DTYPE = flags.DEFINE_enum("kv_dtype", "model", ["model", "int8"], "Of the cache.")
    DETERMINISTIC = flags.DEFINE_bool(
        "deterministic", False, "The same shapes whatever runs: bit-identical logits, slower. "
        "Requests wait until there is room for all of max_tokens.",
    )  # fmt: skip
    TIMEOUT = flags.DEFINE_float("timeout", 600.0, "Seconds that a request may take.", 0.001)
    DRAIN_SECONDS = flags.DEFINE_float(
        "drain_seconds", 30.0, "How long requests may run on after SIGTERM.", 0.0
    )
    MAX_BODY_MB = flags.DEFINE_float("max_body_mb", 4.0, "Larger requests get a 413.", 0.001)
    API_KEYS_FILE = flags.DEFINE_string(
        "api_keys_file", "", f"A key a line, one of which clients must send; also ${KEYS}, with "
        "commas. None: open to all.",
    )  # fmt: skip
    EMBEDDINGS = flags.DEFINE_bool(
        "embeddings", True, "Compile /v1/embeddings at the start, not at its first request."
    )
    COMPILE_CACHE = flags.DEFINE_string(
        "compile_cache", "", "Folder of compiled programs: the next start on this machine reads "
        "them; empty: JAX_COMPILATION_CACHE_DIR, or none.",
    )  # fmt: skip
    UI = flags.DEFINE_bool("ui", False, "A page to chat, at /ui.")
    LOG_TEXT = flags.DEFINE_bool("log_text", False, "Write prompts and answers into the log, too.")
    cli.run(main)
