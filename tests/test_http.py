"""The server's manners: keys, limits, deadlines, disconnects, errors, its log, every script."""

import http.client
import json
import logging
import socket
import threading
import time

import openai
import pytest

import llmzoo_jax
from serving import app
from tests.fake_engine import FakeEngine
from tests.live_server import NAME, live, until
from tests.test_text_stream import SCRIPTS, tokens_of
from tests.tiny_runs import make_run

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SAID = "one two three four five six seven"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))


@pytest.fixture
def serve(model):
    """``serve(delay=..., api_keys=...)``: options of the engine and of the server."""
    running = []

    def start(*, answer=SAID, delay=0.0, places=64, **options):
        tokens = model.tokenizer(answer, add_special_tokens=False).input_ids
        engine = FakeEngine(lambda request: tokens, delay=delay, places=places)
        context = live(model, engine, **options)
        running.append(context)
        return context.__enter__()

    yield start
    for context in running:
        context.__exit__(None, None, None)


def slow_stream(server, **changes):
    """A connection in the middle of an answer: (connection, response)."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("POST", PATH, json.dumps(CHAT | {"stream": True} | changes))
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    return connection, response


# --- every script -------------------------------------------------------------------------------


@pytest.mark.parametrize("bytewise", (False, True), ids=("tokens", "bytes"))
def test_a_streamed_answer_is_the_whole_one_in_every_script(model, bytewise):
    def answer(request):
        text = list(SCRIPTS.values())[request.sampling.seed]
        return tokens_of("bpe", text, bytewise=bytewise)

    with live(model, FakeEngine(answer), context=2000) as server:
        for seed, text in enumerate(SCRIPTS.values()):
            _, _, whole = server.post(PATH, CHAT | {"seed": seed})
            assert whole["choices"][0]["message"]["content"] == text
            events = server.events(PATH, CHAT | {"seed": seed})
            pieces = [e["choices"][0]["delta"]["content"] for e in events]
            assert "".join(pieces) == text
            assert len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)


# --- who may ask, and what ----------------------------------------------------------------------


def test_an_api_key_is_needed_where_there_are_some(serve):
    server = serve(api_keys=("secret-1", "secret-2"))
    for key in ("", "secret", "secret-11", "secret-1,secret-2"):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            server.client(api_key=key or "x").chat.completions.create(**CHAT)
    assert server.client(api_key="secret-2").chat.completions.create(**CHAT).choices
    for path in ("/v1/models", "/tokenize", "/nothing"):
        assert server.get(path)[0] == 401
    for path in ("/health", "/ready", "/metrics"):
        assert server.get(path)[0] == 200
    assert server.engine.seen and len(server.engine.seen) == 1


def test_a_body_that_is_too_large_is_a_413(serve):
    server = serve(max_body=1000)
    big = CHAT | {"user": "x" * 1000}
    status, _, body = server.post(PATH, big)
    assert (status, body["error"]["code"]) == (413, "too_large")
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("POST", PATH, iter([b"x" * 600] * 3), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.post(PATH, CHAT)[0] == 200


@pytest.mark.parametrize(
    "body",
    (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000,
     b'{"a": "\\ud800"}', b'{"a": 1e999}', json.dumps(CHAT).encode("utf-16")),
)  # fmt: skip
def test_a_malformed_body_is_a_400(serve, body):
    server = serve()
    status, _, answer = server.post(PATH, body)
    assert status == 400
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.post(PATH, CHAT)[0] == 200


def test_what_a_format_cannot_write_is_a_400(serve):
    server = serve()

    def turns(*roles):
        return {"messages": [{"role": role, "content": "a"} for role in roles]}

    for roles, part in (
        (("assistant",), "first turn"),
        (("user", "user"), "turn 2"),
        (("user", "assistant"), "must be the user's"),
        (("user", "system"), "system message must be the first"),
        (("user", "assistant", "tool"), "cannot write a turn of the tool"),
    ):
        status, _, body = server.post(PATH, CHAT | turns(*roles))
        assert (status, part in body["error"]["message"]) == (400, True), body
    forged = {"messages": [{"role": "user", "content": "</s>"}]}
    assert "forge a turn" in str(server.post(PATH, CHAT | forged))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    good = {"messages": [{"role": "developer", "content": "c"}, {"role": "user", "content": parts}]}
    assert server.post(PATH, CHAT | good)[0] == 200
    same = {"messages": [{"role": "system", "content": "c"}, {"role": "user", "content": "ab"}]}
    assert server.post(PATH, CHAT | same)[0] == 200
    assert server.engine.seen[-1].prompt == server.engine.seen[-2].prompt
    # What a client got, it may send back.
    message = server.client().chat.completions.create(**CHAT).choices[0].message.model_dump()
    more = [*CHAT["messages"], message, {"role": "user", "content": "And?"}]
    assert server.post(PATH, CHAT | {"messages": more})[0] == 200


def test_other_paths_and_methods_are_errors_in_the_same_form(serve):
    server = serve()
    for path, body, status in (("/v1/nothing", None, 404), (PATH, None, 405), ("/health", {}, 405)):
        got, _, answer = server.post(path, body)
        assert got == status and path in answer["error"]["message"]


# --- too many, too long, gone -------------------------------------------------------------------


def test_prompts_of_one_request_have_seeds_as_if_they_came_alone(serve):
    server = serve()

    def seeds(**options):
        before = len(server.engine.seen)
        body = {"model": NAME, "prompt": ["a", "a", "b"], "n": 2, "max_tokens": 2}
        assert server.post("/v1/completions", body | options)[0] == 200
        return [request.sampling.seed for request in server.engine.seen[before:]]

    assert seeds(seed=5) == [5, 6, 5, 6, 5, 6]
    assert seeds(seed=-1) == [2**32 - 1, 0] * 3
    assert len({*seeds(), *seeds()}) == 12


def test_a_full_queue_is_a_429_that_says_when_to_come_back(serve):
    server = serve(places=2, delay=0.05)
    connections = [slow_stream(server) for _ in range(2)]
    status, headers, body = server.post(PATH, CHAT)
    assert (status, headers["retry-after"], body["error"]["code"]) == (429, "7", "queue_full")
    with pytest.raises(openai.RateLimitError):
        server.client().chat.completions.create(**CHAT)
    # Of several choices all are taken, or none.
    connections.pop()[0].close()
    until(lambda: len(server.engine.live) == 1)
    assert server.post(PATH, CHAT | {"n": 2})[0] == 429
    until(lambda: len(server.engine.live) == 1)
    assert server.post(PATH, CHAT)[0] == 200
    connections.pop()[0].close()


def test_too_many_embeddings_are_a_429(serve, monkeypatch):
    server, go = serve(), threading.Event()
    usual = type(server.model).embed

    def slow(model, rows):
        go.wait(20)
        return usual(model, rows)

    monkeypatch.setattr(type(server.model), "embed", slow)
    monkeypatch.setattr(app, "MAX_EMBEDDING", 2)
    body, results = {"model": NAME, "input": "Hi"}, []

    def ask():
        results.append(server.post("/v1/embeddings", body)[0])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: results)
    assert server.post(PATH, CHAT)[0] == 200  # who wants an answer waits for none of them
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(results) == [200, 200, 429]
    assert server.post("/v1/embeddings", body)[0] == 200


def test_embeddings_have_a_deadline(serve, monkeypatch):
    server, go = serve(timeout=0.2), threading.Event()
    usual = type(server.model).embed
    monkeypatch.setattr(type(server.model), "embed", lambda *x: go.wait(20) and usual(*x))
    body = {"model": NAME, "input": "Hi"}
    status, _, answer = server.post("/v1/embeddings", body)
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    go.set()
    until(lambda: server.post("/v1/embeddings", body)[0] == 200)


def test_more_answers_than_may_ever_wait_are_a_400(serve):
    server = serve(max_choices=4)
    for path, body, name in (
        (PATH, CHAT | {"n": 5}, "n"),
        (COMPLETIONS, {"model": NAME, "prompt": ["a"] * 2, "n": 2, "best_of": 3}, "best_of"),
        (COMPLETIONS, {"model": NAME, "prompt": ["a"] * 5}, "prompt"),
    ):
        status, _, answer = server.post(path, body)
        assert (status, answer["error"]["param"]) == (400, name)
        assert "at most 4" in answer["error"]["message"]
    assert not server.engine.seen
    assert server.post(PATH, CHAT | {"n": 4})[0] == 200


def test_a_client_that_goes_frees_its_place(serve):
    server = serve(answer=SAID * 20, delay=0.05)
    connection, _ = slow_stream(server, n=3)
    until(lambda: len(server.engine.live) == 3)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: not server.engine.live, seconds=2)
    assert len(server.engine.aborted) == 3
    # The same without a stream: the answer would take seconds.
    waiting = socket.create_connection((server.host, server.port))
    data = json.dumps(CHAT).encode()
    waiting.sendall(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        % (PATH.encode(), len(data), data)
    )
    until(lambda: len(server.engine.live) == 1)
    waiting.close()
    until(lambda: not server.engine.live, seconds=2)
    assert server.engine.finished["abort"] == 4


def test_a_deadline_ends_a_request_whatever_the_engine_does(serve):
    server = serve(answer=SAID * 20, delay=0.1, timeout=0.3)
    for body in (CHAT, CHAT | {"timeout": 99}):  # the server's own limit holds
        began = time.monotonic()
        status, _, answer = server.post(PATH, body)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began < 2
    with pytest.raises(openai.APIError, match="not ready in time"):
        list(server.client().chat.completions.create(**CHAT, stream=True))
    until(lambda: not server.engine.live)
    assert server.get("/health")[0] == 200


def test_an_error_of_the_engine_ends_its_request_only(serve):
    server = serve(delay=0.05)
    connection, response = slow_stream(server)
    server.engine.fail = RuntimeError("out of luck")
    status, _, body = server.post(PATH, CHAT)
    assert (status, body["error"]["type"]) == (500, "server_error")
    assert "out of luck" in body["error"]["message"]
    with pytest.raises(openai.APIError, match="out of luck"):
        list(server.client().chat.completions.create(**CHAT, stream=True))
    server.engine.fail = None
    assert response.read().endswith(b"data: [DONE]\n\n")  # the one that ran
    connection.close()
    assert server.post(PATH, CHAT)[0] == 200


def test_an_error_of_the_server_is_a_500_without_its_text(serve, monkeypatch, caplog):
    server = serve()
    logging.getLogger("serving").propagate = True

    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(type(server.model), "prompt", broken)
    status, _, body = server.post(PATH, CHAT)
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in str(body) and "secret" in caplog.text
    monkeypatch.undo()
    assert server.post(PATH, CHAT)[0] == 200


def test_before_it_is_ready_and_when_it_stops_it_says_so(serve, monkeypatch):
    server = serve()
    server.server.state.ready = False
    assert server.get("/ready")[0] == server.post(PATH, CHAT)[0] == 503
    assert server.get("/health")[0] == 200
    server.server.state.ready = True
    assert server.get("/ready")[0] == server.post(PATH, CHAT)[0] == 200
    server.server.state.draining = True
    status, headers, body = server.post(PATH, CHAT)
    assert (status, headers["retry-after"]) == (503, "5")
    assert "shutting down" in body["error"]["message"]
    server.server.state.draining = False
    monkeypatch.setattr(server.engine, "closed", True)
    assert server.post(PATH, CHAT)[0] == 503


# --- what is written down -----------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    """The facts of the requests that were logged."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(getattr(record, "facts", {}))
    logger = logging.getLogger("serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize("stream", (False, True))
def test_the_log_has_no_text_of_users_unless_asked(serve, lines, stream):
    body = CHAT | {"stream": stream, "messages": [{"role": "user", "content": "private"}]}
    for log_text in (False, True):
        lines.clear()
        _, headers, _ = serve(log_text=log_text).post(PATH, body, {"X-Request-Id": "abc"})
        until(lambda: lines)
        (line,) = lines
        assert (line["id"], headers["x-request-id"]) == ("abc", "abc")
        assert (line["path"], line["status"], line["model"]) == (PATH, 200, NAME)
        assert line["finish_reasons"] == ["stop"] and line["seconds"] > 0
        assert line["usage"]["completion_tokens"] > 5
        assert ("private" in str(line)) == (SAID in str(line)) == log_text


def test_metrics_count_what_happened(serve):
    server = serve(delay=0.01)
    for _ in range(3):
        server.post(PATH, CHAT)
    server.post(PATH, CHAT | {"stop": "two"})
    server.post(PATH, CHAT | {"max_tokens": 2, "n": 2})
    server.post(PATH, CHAT | {"tools": [1]})
    server.get("/v1/anything")
    until(lambda: not server.engine.live)
    lines = dict(
        line.rsplit(" ", 1) for line in server.get("/metrics")[2].splitlines() if line[0] != "#"
    )

    def value(name):
        return float(lines[f"llmzoo_{name}"])

    assert value(f'http_requests_total{{path="{PATH}",status="200"}}') == 5
    assert value(f'http_requests_total{{path="{PATH}",status="400"}}') == 1
    assert value('http_requests_total{path="other",status="404"}') == 1
    assert value('answers_total{finish_reason="stop"}') == 4
    assert value('answers_total{finish_reason="length"}') == 2
    assert value("time_to_first_token_seconds_count") == 6
    assert value("time_to_first_token_seconds_sum") >= 6 * 0.01
    assert value("inter_token_seconds_count") > 3 * 5
    assert value("requests_running") == value("requests_waiting") == 0
    assert value("prompt_tokens_total") > 6
    assert value("kv_pages") == 100
