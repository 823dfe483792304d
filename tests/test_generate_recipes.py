"""Recipes against an endpoint that misbehaves: to the end, under the cap, the same after a kill."""

import asyncio
import collections
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.endpoint import Answer, Endpoint, Limits
from data_pipelines.generate import RECIPES, generate, parse_languages, read_data, write_results
from data_pipelines.generation import Options, Record, read_instructions, sample_language
from data_pipelines.generation.checks import check_echo, parse_json, whole
from data_pipelines.generation.languages import NAMES, SCRIPTS, check_language
from data_pipelines.generation.user_centered import NearCopies, load_roles, load_seeds
from data_pipelines.ledger import Ledger
from data_pipelines.sources import Dropped, Unusable
from llmzoo_jax.conversation import KINDS, read_jsonl
from llmzoo_jax.errors import InputError
from tests.fake_endpoint import ENGLISH, FakeEndpoint, badly, well

PRICES = {"input_price": 2.0, "output_price": 8.0}
LANGUAGES = "zh:0.3,ar:0.2,sw:0.5"
DATA = ("post_translation", "post_answering")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "in.jsonl"
    records = [
        {"instruction": f"Describe how thing number {n} is made.", "input": "of wood" * (n % 3 > 0)}
        for n in range(24)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(server, out, recipe, data=None, *, cap=10.0, count=0, languages=LANGUAGES):
    """Runs a recipe in this process; returns what is in report.json."""
    options = Options(languages=parse_languages(languages), count=count, turns=2, max_tokens=200,
                      source=f"m ({recipe})", license="CC0-1.0")  # fmt: skip
    limits = Limits(**PRICES, requests_per_minute=1e6, first_pause=0.01,
                    timeout=0.3 if server.fate is badly else 5.0)  # fmt: skip
    records, unread = read_data(str(data), "en", count) if data else ([], [])
    ledger = Ledger(out / "requests.jsonl", cap)
    try:
        endpoint = Endpoint(server.url, "m", ledger, limits)
        total = len(records) or count
        job = generate(recipe, endpoint, options, records, concurrency=6, total=total)
        return write_results(out, asyncio.run(job), unread, recipe)
    finally:
        ledger.close()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out):
    return [(out / name).read_bytes() for name in ("conversations.jsonl", "dropped.jsonl")]


# --- to the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_to_the_end_whatever_the_endpoint_does(tmp_path, data, recipe):
    given = {"data": data} if recipe in DATA else {"count": 24}
    with FakeEndpoint(badly) as server:
        report = run(server, tmp_path / "out", recipe, **given)
        fates = {seen.fate for seen in server.log}
        bill = server.billed(**PRICES)
    assert len(fates) >= 5, fates  # it did misbehave
    found = list(read_jsonl(tmp_path / "out" / "conversations.jsonl"))
    dropped = lines(tmp_path / "out" / "dropped.jsonl")
    assert report["complete"] and report["conversations"] == len(found)
    assert sum(report["dropped"].values()) == len(dropped)
    assert all(drop["reason"] and drop["where"] for drop in dropped)
    assert bill <= report["dollars"] + 1e-6 and report["dollars"] <= 10
    if recipe != "user_centered":  # there, new ones are invented until there are enough
        assert len(found) + len(dropped) == 24
    assert len(found) >= 16
    kinds = dict(zip(RECIPES, (KINDS[0], KINDS[1], KINDS[2], KINDS[3]), strict=True))
    for conversation in found:
        assert conversation.kind == kinds[recipe] and conversation.license == "CC0-1.0"
        assert conversation.source == f"m ({recipe})"
        assert conversation.lang in ("zh", "ar", "sw")
        for message in conversation.messages:
            check_language(message.content, conversation.lang)
            assert ENGLISH not in message.content and "sorry" not in message.content
    assert len({conversation.id for conversation in found}) == len(found)


def test_a_record_that_gets_no_good_answer_is_dropped_with_the_reason(tmp_path, data):
    def fate(body, times):
        asked = body["messages"][-1]["content"]
        number = int(asked.split("number ")[1].split()[0]) if "number" in asked else 0
        return {1: "cut off", 2: "wrong language", 3: "empty", 4: "refusal", 5: "echo",
                6: "not JSON"}.get(number, "good")  # fmt: skip

    with FakeEndpoint(fate) as server:
        report = run(server, tmp_path / "out", "post_translation", data, languages="sw")
    reasons = ["cut off", "wrong language", "empty", "refusal", "echo", "not JSON"]
    assert [drop["reason"] for drop in lines(tmp_path / "out" / "dropped.jsonl")] == reasons
    assert report["dropped"] == dict.fromkeys(reasons, 1)
    assert report["asked_again"] == dict.fromkeys(reasons, 2)
    assert report["conversations"] == 18
    # What was cut off gets more room, and every try is another request.
    limits = [seen.body["max_tokens"] for seen in server.log if seen.fate == "cut off"]
    assert limits == [200, 400, 400]
    assert len({seen.key for seen in server.log}) == len(server.log)


def test_translation_keeps_whether_there_is_an_input_and_is_what_is_answered(tmp_path, data):
    with FakeEndpoint() as server:
        run(server, tmp_path / "out", "post_translation", data, languages="ar")
        answered = {seen.body["messages"][-1]["content"] for seen in server.log}
    found = list(read_jsonl(tmp_path / "out" / "conversations.jsonl"))
    assert [c.id for c in found] == [f"in.jsonl:{n + 1}:ar" for n in range(24)]  # in data's order
    for number, conversation in enumerate(found):
        user, assistant = conversation.messages
        assert ("\n" in user.content) == bool(number % 3) and user.content in answered
        assert (user.role, assistant.role) == ("user", "assistant")


def test_post_answering_leaves_records_in_their_language(tmp_path):
    path = tmp_path / "in.jsonl"
    records = [
        {"instruction": "Eleza jinsi ya kupika ugali.", "lang": "sw-KE"},
        {"messages": [{"role": "user", "content": "What is rain?"}]},
        {"output": "no instruction"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with FakeEndpoint() as server:
        run(server, tmp_path / "out", "post_answering", path, languages="sw:0.01,zh:0.99")
        assert len(server.log) == 3  # one needs no translation
    first, second = read_jsonl(tmp_path / "out" / "conversations.jsonl")
    assert first.messages[0].content == records[0]["instruction"] and first.lang == "sw"
    assert second.lang == "zh" and second.messages[0].content != "What is rain?"
    assert [drop["reason"] for drop in lines(tmp_path / "out" / "dropped.jsonl")] == ["no text"]


def test_user_centered_has_no_near_copies_and_exactly_the_count(tmp_path):
    with FakeEndpoint(lambda body, times: "echo" if body["seed"] % 2 else "good") as server:
        report = run(server, tmp_path / "out", "user_centered", count=20)
    assert report["conversations"] == 20 - sum(
        drop["reason"] == "echo" for drop in lines(tmp_path / "out" / "dropped.jsonl")
    )
    assert report["dropped"]["near copy"] and report["dropped"]["malformed triplet"]
    asked = [c.messages[0].content for c in read_jsonl(tmp_path / "out" / "conversations.jsonl")]
    near = NearCopies()
    for text in asked:
        assert near.find(text) is None
        near.add(text)


def test_chat_alternates_and_ends_with_an_answer(tmp_path):
    with FakeEndpoint() as server:
        run(server, tmp_path / "out", "chat", count=4)
    for conversation in read_jsonl(tmp_path / "out" / "conversations.jsonl"):
        assert [m.role for m in conversation.messages] == ["user", "assistant"] * 2
    for seen in server.log:  # each side sees the other as its user
        roles = [message["role"] for message in seen.body["messages"][1:]]
        assert roles[-1] == "user" and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_a_chat_ends_when_the_user_has_what_they_need(tmp_path):
    def fate(body, times):
        acts = body["messages"][0]["content"].startswith("You act")
        return "end" if acts and len(body["messages"]) > 3 else "good"

    with FakeEndpoint(fate) as server:
        run(server, tmp_path / "out", "chat", count=3)
    found = list(read_jsonl(tmp_path / "out" / "conversations.jsonl"))
    assert [len(conversation.messages) for conversation in found] == [2, 2, 2]


# --- cap, kill, dry run -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["post_translation", "user_centered"])
def test_a_run_that_met_its_cap_goes_on_with_a_higher_one(tmp_path, data, recipe):
    given = {"data": data} if recipe in DATA else {"count": 24}
    with FakeEndpoint(badly) as server:
        run(server, tmp_path / "whole", recipe, **given)
    with FakeEndpoint(badly) as server:
        cap, done = 0.02, -1
        for _ in range(30):
            stored = answered(tmp_path / "out")
            before = len(server.log)
            report = run(server, tmp_path / "out", recipe, cap=cap, **given)
            assert not stored & {seen.key for seen in server.log[before:]}
            assert server.billed(**PRICES) <= report["dollars"] + 1e-6
            assert report["dollars"] <= cap + 1e-6
            assert report["conversations"] >= done
            done = report["conversations"]
            if report["complete"]:
                break
            cap += 0.04
        assert report["complete"] and cap > 0.05  # it had met the cap
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def answered(out):
    """Keys of the requests whose answer the ledger has, the torn last line of a kill aside."""
    path = out / "requests.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return {event["key"] for event in map(json.loads, whole) if "answer" in event}


def command(server, out, data, *more):
    arguments = (
        "--recipe=post_translation", f"--data={data}", f"--languages={LANGUAGES}", f"--out={out}",
        f"--base_url={server.url}", "--model=m", "--max_cost=5", "--input_price=2",
        "--output_price=8", "--requests_per_minute=100000", "--timeout=0.3", "--first_pause=0.01",
        "--max_tokens=200", "--license=CC0-1.0", "--api_key_env=LLMZOO_TEST_KEY", *more,
    )  # fmt: skip
    return [sys.executable, "-m", "data_pipelines.generate", *arguments]


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("LLMZOO_TEST_KEY", "sk-very-secret")
    return dict(os.environ)


def test_a_killed_run_ends_with_the_same_file_and_pays_nothing_twice(
    tmp_path, data, repository, environment
):
    with FakeEndpoint(badly) as server:
        run(server, tmp_path / "whole", "post_translation", data)
    out = tmp_path / "out"
    with FakeEndpoint(badly, delay=0.1) as server:
        for stop in (15, 35):  # killed twice
            process = subprocess.Popen(
                command(server, out, data, "--concurrency=4"), cwd=repository, env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while len(answered(out)) < stop and time.monotonic() < deadline:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not (out / "conversations.jsonl").exists()
        stored, before = answered(out), len(server.log)
        done = subprocess.run(
            command(server, out, data), cwd=repository, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(stored) >= 35
        assert not stored & {seen.key for seen in server.log[before:]}
        report = json.loads((out / "report.json").read_text())
        assert server.billed(**PRICES) <= report["dollars"] + 1e-6
        assert server.authorization == {"Bearer sk-very-secret"}
    assert results(out) == results(tmp_path / "whole")
    written = b"".join(path.read_bytes() for path in out.iterdir())
    assert b"sk-very-secret" not in written + (done.stdout + done.stderr).encode()


def test_a_dry_run_shows_the_worst_case_and_sends_nothing(tmp_path, data, repository, environment):
    with FakeEndpoint() as server:
        done = subprocess.run(
            command(server, tmp_path / "out", data, "--dry_run"), cwd=repository, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and not server.log
    assert "at most 48 requests" in done.stdout and "nothing was sent" in done.stdout
    assert "the cap is $5.0000" in done.stdout


def test_the_cap_stops_the_command_cleanly(tmp_path, data, repository, environment):
    with FakeEndpoint() as server:
        done = subprocess.run(
            command(server, tmp_path / "out", data, "--max_cost=0.02"), cwd=repository,
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 3 and server.billed(**PRICES) <= 0.02
    assert "the cap may be reached" in done.stdout and "higher --max_cost" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_estimate_is_above_what_a_run_without_faults_costs(tmp_path, data, recipe):
    options = Options(languages=parse_languages(LANGUAGES), count=12, turns=2, max_tokens=200)
    given = {"data": data} if recipe in DATA else {}
    records = read_data(str(data), "en", 12)[0] if recipe in DATA else []
    estimate = RECIPES[recipe].estimate(options, records)
    with FakeEndpoint(well) as server:
        run(server, tmp_path / "out", recipe, count=12, **given)
        assert len(server.log) <= estimate.requests
        assert sum(seen.prompt_tokens for seen in server.log) <= estimate.prompt_tokens
        assert sum(seen.completion_tokens for seen in server.log) <= estimate.completion_tokens


# --- parts --------------------------------------------------------------------------------------


def test_languages_are_drawn_by_weight_and_always_the_same():
    weights = parse_languages("zh:0.3,ar:0.2,sw:0.5")
    drawn = [sample_language(weights, 0, number) for number in range(4000)]
    assert drawn == [sample_language(weights, 0, number) for number in range(4000)]
    for lang, count in collections.Counter(drawn).items():
        assert abs(count / 4000 - weights[lang]) < 0.03
    assert parse_languages("sw, fr:2") == {"sw": 1, "fr": 2}
    for wrong in ("", "xx:1", "sw:much", "sw:0", "sw:-1", "sw:nan"):
        with pytest.raises(InputError, match="language"):
            parse_languages(wrong)


@pytest.mark.parametrize("text, lang", [
    ("Le chat dort sur la table, et il est content de son sort.", "fr"),
    ("De kat zat op de mat of op de stoel, en was de hele dag in het huis.", "nl"),
    ("使用 Python 的 pandas 库可以读取表格数据。", "zh"),
    ("これはペンです。毎日使っています。", "ja"),
    ("```python\nfor the_item in and_of_that: print(the_item)\n```", "zh"),
    ("42", "ar"), ("Извините, поезд опоздал.", "ru"), ("አዲስ አበባ ዋና ከተማ ናት", "am"),
    (ENGLISH, "en"),
])  # fmt: skip
def test_text_in_its_language_passes(text, lang):
    check_language(text, lang)


@pytest.mark.parametrize("text, lang", [
    (ENGLISH, "sw"), (ENGLISH, "zh"), (ENGLISH, "ru"), ("你好，世界，今天好吗", "en"),
    ("这是一个用中文写的回答，里面没有任何日文假名，所以不是日文。", "ja"), ("Привет, мир", "el"),
])  # fmt: skip
def test_text_in_another_language_is_found(text, lang):
    with pytest.raises(Unusable, match="wrong language"):
        check_language(text, lang)


@pytest.mark.parametrize("reason, answer", [
    ("cut off", Answer(text="half of", finish_reason="length")),
    ("refusal", Answer(text="", finish_reason="stop", refusal="no")),
    ("refusal", Answer(text="ok", finish_reason="content_filter")),
    ("refusal", Answer(text="I’m sorry, but I cannot do this.", finish_reason="stop")),
    ("refusal", Answer(text="很抱歉，我无法回答这个问题。", finish_reason="stop")),
    ("empty", Answer(text="\n ", finish_reason="stop")),
    ("malformed", Answer(text="\ud83d", finish_reason="stop")),
])  # fmt: skip
def test_an_answer_that_is_of_no_use_has_a_reason(reason, answer):
    with pytest.raises(Unusable) as error:
        whole(answer)
    assert error.value.reason == reason


def test_answers_that_only_look_like_refusals_pass():
    for text in ("Sorry is a short word.", "I can help with that.", "As a doctor, I see it daily."):
        assert whole(Answer(text=text, finish_reason="stop")) == text


def test_json_is_read_bare_and_fenced_and_nothing_else():
    assert parse_json('{"a": 1}', dict) == parse_json('Here:\n```json\n{"a": 1}\n```', dict)
    for text in ("a", '{"a": ', "[1]", '{"a": "\\ud83d"}'):
        with pytest.raises(Unusable):
            parse_json(text, dict)


def test_an_echo_is_found_and_an_answer_that_begins_alike_is_not():
    asked = "Explain how bread is made at home."
    for text in (asked, "explain  how bread is made, at home!", asked + " Sure!"):
        with pytest.raises(Unusable, match="echo"):
            check_echo(text, asked)
    check_echo(asked + " First mix flour and water, then wait until the dough has risen.", asked)
    check_echo("No.", asked)


def test_near_copies_are_found_among_many():
    near = NearCopies()
    texts = [seed.instruction + " " + seed.input for seed in load_seeds()]
    for text in texts:
        assert near.find(text) is None  # no seed is like another
        near.add(text)
    for text in texts:
        assert near.find(text.upper() + " Please.") == text


def test_roles_and_seeds_are_many_and_each_is_new():
    roles, seeds = load_roles(), load_seeds()
    assert len(roles) >= 40 and len({role.name for role in roles}) == len(roles)
    assert {role.side for role in roles} == {"executor", "submitter"}
    assert len(seeds) >= 30 and len({seed.instruction for seed in seeds}) == len(seeds)
    assert any(not seed.role for seed in seeds) and any(not seed.input for seed in seeds)
    assert all(seed.instruction for seed in seeds)


def test_every_language_has_a_name_of_its_own_and_a_script():
    assert NAMES.keys() == SCRIPTS.keys() and len(NAMES) > 100
    assert len(set(NAMES.values())) == len(NAMES)


def test_what_cannot_be_read_in_the_data_has_a_reason(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"instruction": " "}\nnonsense\n{"messages": []}\n{"instruction": "Hi"}\n')
    *dropped, record = read_instructions(str(path), "en")
    assert all(isinstance(item, Dropped) for item in dropped) and len(dropped) == 3
    assert record == Record("x.jsonl:4", "Hi", "", "en")


def test_options_that_do_not_fit_are_refused(tmp_path, data, repository, environment):
    cases = [
        (["--recipe=post_translation", "--data="], "--data=FILE"),
        (["--turns=3"], "--turns is for --recipe=chat"),
        (["--recipe=chat", "--data=", "--count=0"], "--count=N"),
    ]
    with FakeEndpoint() as server:
        running = [
            subprocess.Popen(
                command(server, tmp_path / "out", data, *arguments), cwd=repository,
                env=environment, stderr=subprocess.PIPE, text=True,
            )
            for arguments, _ in cases
        ]  # fmt: skip
        for process, (_, message) in zip(running, cases, strict=True):
            stderr = process.communicate()[1]
            assert process.returncode == 1 and message in stderr
        assert not server.log
