"""An endpoint as who answers: what it is asked, its errors, and an answer that is stopped."""

import contextlib
import http.server
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

import llmzoo_jax
from llmzoo_jax.conversation import Message
from serving.chat_backends import ContextFull, Endpoint, EndpointError
from tests.fake_engine import FakeEngine
from tests.live_server import NAME, live, until
from tests.tiny_runs import make_run

QUESTION = [Message("user", "Who are you?")]
TEXT = "Phénix. 你好 🙂 สวัสดี مرحبا"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))


def engine_of(model, text, **options):
    return FakeEngine(
        lambda request: model.tokenizer(text).input_ids, stop_ids=model.stop_ids, **options
    )


def ask(endpoint, messages=QUESTION, attempt=0):
    pieces = []
    answer = endpoint.answer(messages, pieces.append, attempt=attempt)
    return "".join(pieces), answer


def test_an_answer_comes_in_pieces_with_its_length(model):
    engine = engine_of(model, TEXT)
    with live(model, engine) as server:
        endpoint = Endpoint(f"{server.url}/v1/", count=True, temperature=0.5, seed=3)
        assert endpoint.name == NAME
        text, answer = ask(endpoint)
        assert text == TEXT
        assert answer.tokens == len(model.tokenizer(TEXT).input_ids)
        assert not answer.cut
        how = engine.seen[0].sampling
        assert (how.temperature, how.seed, how.top_p) == (0.5, 3, 1.0)
        ask(endpoint, attempt=2)
        assert engine.seen[1].sampling.seed == 5
        assert ask(Endpoint(f"{server.url}/v1", max_tokens=2))[1].cut


def test_errors_are_the_endpoints_own_words(model):
    with live(model, engine_of(model, TEXT), api_keys=("secret",)) as server:
        url = f"{server.url}/v1"
        with pytest.raises(
            EndpointError, match=r"401 Unauthorized: a valid API key is needed.*env"
        ):
            Endpoint(url)
        endpoint = Endpoint(url, api_key="secret", temperature=-1.0)
        with pytest.raises(EndpointError, match=r"temperature=-1\.0 is out of range"):
            ask(endpoint)
        with pytest.raises(EndpointError, match="there is no model 'x' here, but phoenix-tiny"):
            ask(Endpoint(url, api_key="secret", name="x"))
        with pytest.raises(ContextFull, match="the context is 256"):
            ask(Endpoint(url, api_key="secret", max_tokens=256))
        with pytest.raises(EndpointError, match=r"404 .*URLs end in /v1"):
            Endpoint(f"{server.url}/v2", api_key="secret", name=NAME).answer(
                QUESTION, print, attempt=0
            )


@pytest.mark.parametrize(
    ("url", "told"),
    [("localhost:8000", "should look like http"), ("http://127.0.0.1:9/v1", "refused")],
)
def test_an_address_without_an_endpoint_is_said(url, told):
    with pytest.raises(EndpointError, match=told):
        Endpoint(url)


@contextlib.contextmanager
def saying(*lines):
    """An endpoint that answers every POST with these lines, and closes the connection."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            for line in lines:
                self.wfile.write(line.encode() + b"\n")

        def log_message(self, *args):
            """Nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", name="m")
    finally:
        server.shutdown()
        server.server_close()


def event(text=None, reason=None):
    delta = {} if text is None else {"content": text}
    return "data:" + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]})


def test_other_servers_forms_of_a_stream_are_read():
    role = 'data: {"choices": [{"delta": {"role": "assistant", "content": null}}]}'
    usage = 'data: {"choices": [], "usage": {"completion_tokens": 4}}'
    last = event(reason="length")
    with saying(": ping", "", "event: x", role, event("a\r"), event("b"), last, usage) as endpoint:
        text, answer = ask(endpoint)
    assert (text, answer.tokens, answer.cut) == ("a\rb", 4, True)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([event("half")], "closed the connection in the middle"),
        (
            [event("half"), 'data: {"error": {"message": "it broke", "code": "x"}}'],
            r"it broke \(x\)",
        ),
        (["data: {"], "no JSON: {"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(lines, told):
    with saying(*lines) as endpoint, pytest.raises(EndpointError, match=told):
        ask(endpoint)


def test_interrupt_ends_the_wait_and_frees_the_slot(model):
    engine = engine_of(model, TEXT * 50, delay=0.2)
    with live(model, engine) as server:
        endpoint = Endpoint(f"{server.url}/v1")
        threading.Timer(0.5, endpoint.interrupt).start()
        with pytest.raises(EndpointError):
            ask(endpoint)
        until(lambda: not engine.live, 5)
        assert engine.finished == {"abort": 1}


def test_ctrl_c_in_a_terminal_stops_the_servers_answer_and_the_chat_goes_on(model, tmp_path):
    engine = engine_of(model, TEXT * 100, delay=0.05)
    with live(model, engine) as server:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [
                sys.executable, "-m", "serving.chat", f"--url={server.url}/v1",
                "--max_new_tokens=150", f"--history={tmp_path / 'state' / 'lines'}",
            ],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        os.close(theirs)
        seen = b""

        def wait_for(text):
            nonlocal seen
            end = time.monotonic() + 60
            while text not in seen:
                assert time.monotonic() < end, seen
                if select.select([ours], [], [], 1)[0]:
                    seen += os.read(ours, 4096)
            seen = seen.partition(text)[2]

        try:
            wait_for(b"you: ")
            os.write(ours, b"one \\\ntwo\n")
            wait_for(b"model: ")
            wait_for("你好".encode())
            process.send_signal(signal.SIGINT)
            wait_for(b"(stopped)")
            until(lambda: not engine.live, 5)
            assert engine.finished == {"abort": 1}
            assert "one \ntwo" in model.tokenizer.decode(engine.seen[0].prompt)
            wait_for(b"you: ")
            os.write(ours, b"!exit\n")
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(ours)
    lines = (tmp_path / "state" / "lines").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == ["one \ntwo", "!exit"]
    assert (tmp_path / "state" / "lines").stat().st_mode & 0o77 == 0
