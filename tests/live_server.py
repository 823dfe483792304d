"""A server on a free port of this machine, in a thread, with clients."""

import contextlib
import dataclasses
import http.client
import json
import threading
import time

import openai
import uvicorn

from serving.app import Options, make_server

NAME = "phoenix-tiny"
DEFAULTS = Options(names={NAME: None}, context=256, timeout=60.0, max_body=200_000, max_choices=64)


@dataclasses.dataclass(frozen=True)
class Live:
    host: str
    port: int
    server: object
    engine: object
    model: object

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    def client(self, **options):
        options = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path, body, headers=()):
        """(status, headers, JSON or text) of a request whose body may be anything."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        connection.request(method, path, None if body is None else data, dict(headers))
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers.get("content-type", "")
        return response.status, response.headers, json.loads(text) if is_json else text

    def get(self, path):
        return self.post(path, None)

    def events(self, path, body):
        """The objects of a streamed answer; its last event must be [DONE]."""
        _, headers, text = self.post(path, body | {"stream": True})
        assert headers["content-type"].startswith("text/event-stream"), text
        lines = [line for line in text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]", lines[-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextlib.contextmanager
def live(model, engine, *, around=lambda server, options: server.app, **options):
    """``options`` are those of ``serving.app.Options`` that differ from DEFAULTS; ``around`` gives
    the app that is served."""
    options = dataclasses.replace(DEFAULTS, **({"names": dict(DEFAULTS.names)} | options))
    server = make_server(model, engine, options)
    engine.start()
    server.state.ready = True
    app = around(server, options)
    config = uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False)
    uv = uvicorn.Server(config)
    thread = threading.Thread(target=uv.run, daemon=True)
    thread.start()
    until(lambda: uv.started)
    host, port = uv.servers[0].sockets[0].getsockname()
    try:
        yield Live(host, port, server, engine, model)
    finally:
        engine.close()
        uv.should_exit = True
        thread.join(timeout=30)


def until(happened, seconds=20.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
