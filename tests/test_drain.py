"""SIGTERM under load: every request is finished or fails with a reason, and the exit code is 0."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.live_server import NAME, until
from tests.tiny_runs import make_run

REPOSITORY = Path(__file__).resolve().parent.parent
PATH = "/v1/chat/completions"
REAL = ("--max_batch=4", "--deterministic", "--noembeddings", f"--name={NAME}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), "bpe")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def process(*command, port):
    """A server process that is ready; ``output`` is what it has written at its end."""
    started = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def ready():
        assert started.poll() is None, started.stdout.read()
        with contextlib.suppress(OSError):
            return ask(port, "/ready")[0] == 200

    try:
        until(ready, seconds=120)
        yield started
    finally:
        started.kill()
        started.wait()


def ask(port, path, body=None):
    """(status, text)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def load(port, count, max_tokens):
    """``count`` requests, half of them streamed; their results once the threads have ended."""
    results = []

    def one(number):
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "seed": number}
        body |= {"stream": number % 2 == 0, "max_tokens": max_tokens, "ignore_eos": True}
        results.append((body["stream"], *ask(port, PATH, body)))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def stop(server, port, threads):
    time.sleep(0.3)
    server.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    with contextlib.suppress(OSError):  # it may be gone already
        status, text = ask(port, PATH, {"model": NAME, "messages": []})
        assert status == 503 and "shutting down" in text
    for thread in threads:
        thread.join(timeout=60)
    output, _ = server.communicate(timeout=30)
    assert server.returncode == 0, output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def check_finished(results, count):
    assert len(results) == count
    for streamed, status, text in results:
        assert status == 200
        assert '"finish_reason": "length"' in text if streamed else '"length"' in text
        assert text.endswith("data: [DONE]\n\n") == streamed


def test_requests_that_run_are_finished(run):
    port = free_port()
    with process("tests.serving_worker", run, port, 30, 0.05, port=port) as server:
        threads, results = load(port, 12, 100)
        lines = stop(server, port, threads)
    check_finished(results, 12)
    assert [line["event"] for line in lines].count("request") >= 12


def test_requests_that_take_too_long_fail_with_a_reason(run):
    port = free_port()
    with process("tests.serving_worker", run, port, 0.3, 0.3, port=port) as server:
        threads, results = load(port, 8, 200)
        began = time.monotonic()
        stop(server, port, threads)
        assert time.monotonic() - began < 10
    assert len(results) == 8
    for streamed, status, text in results:
        assert status == (200 if streamed else 503)
        assert "the server is shutting down" in text and '"aborted"' in text


def test_a_second_signal_does_not_wait(run):
    port = free_port()
    with process("tests.serving_worker", run, port, 60, 1.0, port=port) as server:
        threads, results = load(port, 2, 200)
        began = time.monotonic()
        for _ in range(2):
            time.sleep(0.3)
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=15) == 0
        for thread in threads:
            thread.join(timeout=10)
        assert time.monotonic() - began < 10
    assert all("the server is shutting down" in text for *_, text in results)


@pytest.mark.slow
def test_the_command_drains(run):
    port = free_port()
    with process("serving.server", f"--model={run}", f"--port={port}", *REAL, port=port) as server:
        threads, results = load(port, 12, 400)
        stop(server, port, threads)
    check_finished(results, 12)
