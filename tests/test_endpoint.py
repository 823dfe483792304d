"""The client: answers are paid once, never over the cap, whatever the endpoint does."""

import asyncio
import email.utils
import json
import time

import pytest

from data_pipelines.endpoint import (
    CapReached,
    Endpoint,
    Limits,
    Request,
    in_order,
    key_of,
    prompt_bound,
    retry_after,
)
from data_pipelines.ledger import Ledger
from data_pipelines.sources import Unusable
from llmzoo_jax.errors import InputError
from tests.fake_endpoint import FakeEndpoint

PRICES = {"input_price": 2.0, "output_price": 8.0}
FAST = {**PRICES, "requests_per_minute": 1e6, "first_pause": 0.01, "timeout": 5.0}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def request(text="Habari?", max_tokens=50, **more):
    return Request(messages=({"role": "user", "content": text},), max_tokens=max_tokens, **more)


def ask(server, path, requests, *, cap=1.0, concurrency=4, api_key="", **limits):
    """Asks all; returns what came of each request, and the ledger (closed)."""
    ledger = Ledger(path, cap)
    results = {}

    async def run():
        endpoint = Endpoint(server.url, "m", ledger, Limits(**{**FAST, **limits}), api_key=api_key)

        async def one(item):
            number, request = item
            try:
                results[number] = (await endpoint.ask(request)).text
            except (CapReached, Unusable) as error:
                results[number] = error

        try:
            await in_order(list(enumerate(requests)), one, concurrency=concurrency)
        finally:
            await endpoint.close()

    try:
        asyncio.run(run())
    finally:
        ledger.close()
    return [results[number] for number in sorted(results)], ledger


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def worst(*requests):
    return sum(
        prompt_bound(r.messages) * PRICES["input_price"] + r.max_tokens * PRICES["output_price"]
        for r in requests
    ) / 1e6  # fmt: skip


def first_time(fate):
    return lambda body, times: "good" if times else fate


# --- answers ------------------------------------------------------------------------------------


def test_an_answer_costs_what_its_usage_says(tmp_path):
    with FakeEndpoint() as server:
        (text,), ledger = ask(server, tmp_path / "r.jsonl", [request()])
        assert text and len(server.log) == 1
        assert ledger.spent == pytest.approx(server.billed(**PRICES)) and ledger.spent > 0
        body = server.log[0].body
    assert body["model"] == "m" and body["max_tokens"] == 50 and body["messages"][0]["content"]
    sent, answer = events(tmp_path / "r.jsonl")
    assert sent["key"] == answer["key"] == key_of(body)
    assert answer["cost"] < sent["bound"] == pytest.approx(worst(request()))


def test_an_answer_without_usage_costs_the_worst_case(tmp_path):
    with FakeEndpoint(usage=False) as server:
        _, ledger = ask(server, tmp_path / "r.jsonl", [request()])
    assert ledger.spent == pytest.approx(worst(request()))


def test_a_request_is_paid_once_at_the_same_time_and_in_later_runs(tmp_path):
    with FakeEndpoint(delay=0.05) as server:
        first, _ = ask(server, tmp_path / "r.jsonl", [request()] * 3)
        again, ledger = ask(server, tmp_path / "r.jsonl", [request()])
        assert len(server.log) == 1 and {*first, *again} == {first[0]}
        assert ledger.spent == pytest.approx(server.billed(**PRICES))
        other, _ = ask(server, tmp_path / "r.jsonl", [request(seed=1), request("?")])
        assert len(server.log) == 3 and len({*first, *other}) == 3


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["429", "500", "slow", "broken"])
def test_what_can_pass_is_tried_again(tmp_path, fate):
    with FakeEndpoint(first_time(fate), slow=0.6) as server:
        (text,), ledger = ask(server, tmp_path / "r.jsonl", [request()], timeout=0.3)
        assert isinstance(text, str) and len(server.log) == 2
        # What may have been billed counts in full; a refusal costs nothing.
        lost = worst(request()) if fate in ("slow", "broken") else 0
        assert ledger.spent == pytest.approx(lost + events(tmp_path / "r.jsonl")[-1]["cost"])
        assert ledger.spent >= server.billed(**PRICES) - 1e-12


def test_pauses_double_with_a_jitter_that_is_the_same_each_time(tmp_path, monkeypatch):
    sleep, pauses = asyncio.sleep, []

    async def record(seconds):
        if seconds > 0.01:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    with FakeEndpoint(lambda body, times: "500") as server:
        for run in range(2):
            limits = {"attempts": 6, "first_pause": 1.0, "longest_pause": 8.0}
            (error,), ledger = ask(server, tmp_path / f"{run}.jsonl", [request()], **limits)
            assert isinstance(error, Unusable) and error.reason == "no answer"
            assert "HTTP 500" in error.detail and ledger.spent == 0
        assert len(server.log) == 12
    assert pauses[:5] == pauses[5:]
    for pause, whole in zip(pauses, [1, 2, 4, 8, 8], strict=False):
        assert whole / 2 <= pause <= whole


def test_retry_after_is_honoured_and_holds_the_others_too(tmp_path):
    def fate(body, times):
        return "429" if body["seed"] == 0 and not times else "good"

    with FakeEndpoint(fate, retry_after="0.4") as server:
        requests = [request(seed=seed) for seed in range(3)]
        limits = {"requests_per_minute": 60 / 0.1, "concurrency": 2}
        texts, _ = ask(server, tmp_path / "r.jsonl", requests, **limits)
        times = [seen.time for seen in server.log]
    assert all(isinstance(text, str) for text in texts)
    # The second was on its way; the first comes back, and the third begins, when they may.
    assert times[1] - times[0] < 0.39 <= times[2] - times[0]
    assert (
        retry_after("7") == 7 and retry_after("") == retry_after("soon") == retry_after("-1") == 0
    )
    assert 25 < retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30


def test_requests_keep_their_distance_and_their_number(tmp_path):
    requests = [request(seed=seed) for seed in range(8)]
    with FakeEndpoint(delay=0.15) as server:
        ask(server, tmp_path / "a.jsonl", requests, concurrency=3)
        assert server.most_in_flight == 3
    with FakeEndpoint() as server:
        ask(server, tmp_path / "b.jsonl", requests, requests_per_minute=60 / 0.05)
        assert server.log[-1].time - server.log[0].time >= 7 * 0.05 - 0.03


def test_a_request_that_is_refused_for_good_is_sent_once(tmp_path):
    with FakeEndpoint(error=(400, "too long")) as server:
        (error,), ledger = ask(server, tmp_path / "r.jsonl", [request()])
        assert error.reason == "refused by the endpoint" and "too long" in error.detail
        assert len(server.log) == 1 and ledger.spent == 0


def test_an_endpoint_that_never_answers_stops_the_run(tmp_path):
    with (
        FakeEndpoint(lambda body, times: "500") as server,
        pytest.raises(InputError, match="10 requests in a row without an answer"),
    ):
        requests = [request(seed=seed) for seed in range(30)]
        ask(server, tmp_path / "r.jsonl", requests, attempts=1)


def test_the_api_key_is_sent_and_neither_stored_nor_shown(tmp_path):
    key = "sk-very-secret"
    with FakeEndpoint() as server:
        ask(server, tmp_path / "r.jsonl", [request()], api_key=key)
        assert server.authorization == {f"Bearer {key}"}
    assert key not in (tmp_path / "r.jsonl").read_text()
    with (
        FakeEndpoint(error=(401, f"wrong API key {key}")) as server,
        pytest.raises(InputError, match="HTTP 401") as error,
    ):
        ask(server, tmp_path / "r.jsonl", [request("new")], api_key=key)
    assert key not in str(error.value) and "--api_key_env" in str(error.value)
    assert key not in (tmp_path / "r.jsonl").read_text()


# --- the cap ------------------------------------------------------------------------------------


def test_nothing_is_sent_that_does_not_fit_in_the_worst_case(tmp_path):
    with FakeEndpoint() as server:
        cap = worst(request()) * 0.999
        (error,), ledger = ask(server, tmp_path / "r.jsonl", [request()], cap=cap)
        assert isinstance(error, CapReached) and not server.log and ledger.spent == 0
        (text,), _ = ask(server, tmp_path / "r.jsonl", [request()], cap=worst(request()))
        assert isinstance(text, str)


def test_a_request_waits_for_others_to_turn_out_cheaper(tmp_path):
    requests = [request(seed=seed) for seed in range(2)]
    with FakeEndpoint(delay=0.1) as server:
        cap = 1.6 * worst(request())
        texts, _ = ask(server, tmp_path / "r.jsonl", requests, cap=cap, concurrency=2)
        assert server.most_in_flight == 1 and all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_the_bill_never_exceeds_the_cap(tmp_path, share):
    def fate(body, times):
        return ("good", "slow", "429", "broken", "cut off")[(body["seed"] + times) % 5]

    requests = [request("x" * 10 * seed, max_tokens=100, seed=seed) for seed in range(40)]
    cap = share * worst(*requests)
    with FakeEndpoint(fate, slow=0.2) as server:
        results, ledger = ask(server, tmp_path / "r.jsonl", requests, cap=cap, timeout=0.1)
        assert any(isinstance(result, CapReached) for result in results)
        assert any(isinstance(result, str) for result in results)
        assert server.billed(**PRICES) <= ledger.spent + 1e-12 and ledger.spent <= cap


def test_what_was_answered_is_had_when_the_cap_is_reached(tmp_path):
    with FakeEndpoint() as server:
        ask(server, tmp_path / "r.jsonl", [request(seed=5)])
        requests = [request(seed=seed) for seed in range(6)]
        results, _ = ask(server, tmp_path / "r.jsonl", requests, cap=0.0, concurrency=1)
        assert [isinstance(result, str) for result in results] == [False] * 5 + [True]
        assert len(server.log) == 1


def test_a_longer_prompt_than_was_thought_possible_raises_the_bounds(tmp_path):
    """Servers put a system prompt of their own in front."""

    class Longer(FakeEndpoint):
        def send(self, handler, status, data):
            reply = json.loads(data)
            reply["usage"]["prompt_tokens"] += 5000
            super().send(handler, status, json.dumps(reply).encode())

    with Longer() as server:
        requests = [request(seed=seed) for seed in range(2)]
        ask(server, tmp_path / "r.jsonl", requests, concurrency=1)
    first, _, second, _ = events(tmp_path / "r.jsonl")
    assert second["bound"] - first["bound"] > 4500 * PRICES["input_price"] / 1e6


# --- the ledger ---------------------------------------------------------------------------------


def test_what_was_under_way_at_a_kill_is_charged_in_full(tmp_path):
    path = tmp_path / "r.jsonl"
    ledger = Ledger(path, 1.0)
    done, _ = ledger.sent("aa", 0.2), ledger.sent("bb", 0.3)
    free = ledger.sent("cc", 0.1)
    assert ledger.committed == pytest.approx(0.6) and ledger.fits(0.4) and not ledger.fits(0.41)
    ledger.answered(done, "aa", 0.05, {"text": "\ud83d é"})
    ledger.free(free, "HTTP 429")
    ledger.close()
    with open(path, "ab") as file:  # and the kill came in mid-write
        file.write(b'{"answer": 2, "key": "bb", "co')
    ledger = Ledger(path, 1.0)
    assert ledger.spent == pytest.approx(0.35) and len(ledger) == 1
    assert ledger.answer("aa")["text"] == "\ud83d é" and ledger.answer("bb") is None
    assert ledger.sent("bb", 0.3) > 3
    ledger.close()
    assert len(events(path)) == 6


def test_a_ledger_that_was_damaged_or_is_in_use_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"sent": 1, "key": "aa", "bound": 0.1}\nnonsense\n')
    with pytest.raises(InputError, match=r"r\.jsonl:2: not an event"):
        Ledger(path, 1.0)
    ledger = Ledger(tmp_path / "s.jsonl", 1.0)
    with pytest.raises(InputError, match="another run writes to it"):
        Ledger(tmp_path / "s.jsonl", 1.0)
    ledger.close()


def test_the_bound_of_a_prompt_is_above_what_a_byte_level_tokenizer_makes():
    for text in ("", "a", "Ñandú 👩‍👩‍👧 こんにちは", "\ud83d"):
        size = len(text.encode("utf-8", "surrogatepass"))
        assert prompt_bound([{"role": "user", "content": text}]) > size + 3
