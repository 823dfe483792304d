"""A server process with an engine that needs no compilation: RUN PORT DRAIN_SECONDS DELAY."""

import dataclasses
import logging
import sys

import llmzoo_jax
from serving import http
from serving.app import make_server
from serving.server import serve
from tests.fake_engine import FakeEngine
from tests.live_server import DEFAULTS


def main():
    run, port, drain_seconds, delay = sys.argv[1:]
    http.start_log()
    model = llmzoo_jax.load(run)
    tokens = model.tokenizer("one two three " * 20, add_special_tokens=False).input_ids
    engine = FakeEngine(lambda request: tokens, delay=float(delay))
    options = dataclasses.replace(DEFAULTS, context=1000)
    code = serve(
        make_server(model, engine, options),
        engine,
        host="127.0.0.1",
        port=int(port),
        drain_seconds=float(drain_seconds),
        warm_up=lambda: None,
    )
    logging.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    main()
