"""A local chat-completions server that misbehaves by plan, and keeps the books.

What it answers is a function of the request alone, so two runs that ask the same get the same. A
``fate`` says what happens to a request that has been seen so many times before.
"""

import collections
import hashlib
import json
import random
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_pipelines.endpoint import key_of
from data_pipelines.generation.languages import NAMES, SCRIPTS

HTTP = ("429", "500", "slow", "broken")  # of the first sending only
CONTENT = ("cut off", "wrong language", "empty", "refusal", "echo", "not JSON")
ENGLISH = "This is the answer that you asked for, and it is of the kind which the people are with."


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    key: str
    body: dict
    time: float
    fate: str
    prompt_tokens: int  # billed; 0 where it was refused
    completion_tokens: int


def well(body, times):
    return "good"


def badly(body, times):
    """About two of five requests meet with something."""
    number = int(key_of(body)[:8], 16) % 25
    if number < len(HTTP):
        return "good" if times else HTTP[number]
    return dict(enumerate(CONTENT, len(HTTP))).get(number, "good")


class FakeEndpoint:
    """``with FakeEndpoint(fate) as server:``; ``server.log`` is every request, in order."""

    def __init__(self, fate=well, *, delay=0.0, slow=0.45, retry_after="0", usage=True, error=None,
                 says=None):  # fmt: skip
        self.fate, self.delay, self.slow, self.usage = fate, delay, slow, usage
        self.retry_after, self.error = retry_after, error  # error: (status, text) of all requests
        self.says = says or content  # (body, fate) -> text, finish reason
        self.log = []
        self.authorization = set()
        self.in_flight = self.most_in_flight = 0
        self._times = collections.Counter()
        self._lock = threading.Lock()

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                fake.answer(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, request, client_address):
                pass  # the client hung up, as a killed one does

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def billed(self, input_price, output_price):
        """Dollars, at prices a million tokens."""
        return sum(
            seen.prompt_tokens * input_price + seen.completion_tokens * output_price
            for seen in list(self.log)
        ) / 1e6  # fmt: skip

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        key = key_of(body)
        with self._lock:
            self.authorization.add(handler.headers.get("Authorization"))
            fate = self.fate(body, self._times[key])
            self._times[key] += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            limit = body.get("max_tokens") or body["max_completion_tokens"]
            reply, finish = self.says(body, fate)
            # As a tokenizer does: a token has three bytes or so, a message a few of its own.
            prompt = sum(len(m["content"].encode()) // 3 + 8 for m in body["messages"])
            completion = limit if fate == "cut off" else min(limit, len(reply.encode()) // 3 + 1)
            refused = self.error is not None or fate in ("429", "500")
            bill = (0, 0) if refused else (prompt, completion)
            self.log.append(Seen(key, body, time.monotonic(), fate, *bill))
        time.sleep(self.slow if fate == "slow" else self.delay)
        with self._lock:
            self.in_flight -= 1
        if self.error is not None:
            self.send(handler, self.error[0], self.error[1].encode())
        elif fate in ("429", "500"):
            self.send(handler, int(fate), b'{"error": {"message": "not now"}}')
        elif fate == "broken":
            self.send(handler, 200, b'{"choices": [{"mess')
        else:
            choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": finish}
            usage = {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}
            full = {"choices": [choice]} | (usage if self.usage else {})
            self.send(handler, 200, json.dumps(full).encode())

    def send(self, handler, status, data):
        handler.send_response(status)
        if status == 429:
            handler.send_header("Retry-After", self.retry_after)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


# --- what it says -------------------------------------------------------------------------------

LETTERS = {  # to make words of
    "LATIN": [a + b for a in "bdgklmnrsw" for b in "aeiou"],
    "ARABIC": list("ابتثجحخدذرزسشصضطعغفقكلمنهوي"),
    "CJK": [chr(0x4E00 + 37 * i) for i in range(500)],
}


def words(draw, lang, count):
    """A text of nonsense in the letters of a language."""
    letters = LETTERS[next(iter(SCRIPTS[lang]))]
    return " ".join("".join(draw.choices(letters, k=3)) for _ in range(count))


def content(body, fate):
    """The answer's text, and why it ends."""
    system = body["messages"][0]["content"]
    asked = body["messages"][-1]["content"]
    named = {lang: system.find(name) for lang, name in NAMES.items() if name in system}
    lang = min(named, key=named.get, default="en")
    draw = random.Random(hashlib.sha256(json.dumps(body).encode()).digest())
    reply = words(draw, lang, 15)
    if system.startswith("You translate tasks"):
        task = json.loads(asked)
        translated = {"instruction": reply, "input": task["input"] and words(draw, lang, 4)}
        if fate == "wrong language":
            translated["instruction"] = ENGLISH
        reply = json.dumps(task if fate == "echo" else translated)
    elif system.startswith("You invent tasks"):
        triplets = [
            {key: words(draw, lang, count) for key, count in
             (("role", 3), ("instruction", 9), ("input", draw.choice((0, 5))))}
            for _ in range(4)
        ]  # fmt: skip
        if fate == "echo":
            triplets[1] = triplets[0]
            triplets[2] = {"task": "?"}
        reply = "```json\n" + json.dumps(triplets) + "\n```"
    elif fate == "wrong language":
        reply = ENGLISH if lang != "en" else words(draw, "zh", 9)
    elif fate == "echo":
        reply = asked
    if fate == "not JSON":
        reply = reply[: len(reply) // 2] if "{" in reply else reply
    if fate == "refusal":
        reply = "I'm sorry, but I can't help with that."
    if fate == "end":
        reply = "[END]"
    if fate == "empty":
        reply = " \n"
    return reply, "length" if fate == "cut off" else "stop"
