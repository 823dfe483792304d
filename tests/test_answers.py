"""Questions of any benchmark are answered, here or at an address, and once each."""

import json
import subprocess
import sys

import pytest

import llmzoo_jax
from eval.answers import AnswerFile, answer_locally, batches, read_answers
from eval.questions import Question, read_questions
from llmzoo_jax.errors import InputError
from tests.fake_endpoint import FakeEndpoint, badly
from tests.stand_in_judge import write_questions
from tests.tiny_runs import make_run

SAMPLING = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}
ABOUT = {"model_id": "tiny", "metadata": {"seed": 3}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llmzoo_jax.load(make_run(tmp_path_factory.mktemp("run"), "bpe"))


def questions(*turns):
    return [Question(question_id=n, turns=t, lang="en") for n, t in enumerate(turns, 1)]


ASKED = questions(
    ("Who are you?",), ("你好，世界！今天天气怎么样？",), ("Write.", "Again."), ("A?",),
    ("The quick brown fox jumps over the lazy dog, 1234 times.",), ("One.", "Two."), ("B?",),
)  # fmt: skip


def answer(model, path, asked=ASKED, **sampling):
    file = AnswerFile(path, ABOUT, asked)
    try:
        answer_locally(model, file, batch_size=2, **SAMPLING | sampling)
    finally:
        file.close()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- questions ----------------------------------------------------------------------------------


def test_all_forms_of_questions_are_read(tmp_path):
    forms = {
        "questions-en.jsonl": {"question_id": 1, "text": "What?", "category": "generic"},
        "zh100.jsonl": {"id": 1, "label": "math", "query": "什么？"},
        "questions_Arabic.jsonl": {"question_id": 1, "text": "ماذا؟", "category": "x"},
        "mt.jsonl": {"question_id": "q1", "turns": ["a", "b"], "lang": "sw", "reference": ["c"]},
    }
    for name, record in forms.items():
        (tmp_path / name).write_text(json.dumps(record))
    found = read_questions([str(tmp_path / name) for name in forms])
    assert [q.lang for q in found] == ["en", "zh", "ar", "sw"]
    assert [q.category for q in found] == ["generic", "math", "x", ""]
    assert found[3].turns == ("a", "b") and found[3].reference == ("c",)


def test_a_line_that_is_no_question_and_a_second_one_are_named(tmp_path):
    path = tmp_path / "en.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": 2}\n')
    with pytest.raises(InputError, match=r"en.jsonl:2: not a question: no text"):
        read_questions([str(path)])
    path.write_text('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n')
    with pytest.raises(InputError, match=r"en.jsonl:2: question 1 \(en\) is in .*en.jsonl:1"):
        read_questions([str(path)])


def test_the_released_questions_and_answers_fit_together(shared_data):
    folder = shared_data / "llmzoo" / "llmzoo" / "eval"
    ours = read_questions([str(folder / f"questions/questions-{x}.jsonl") for x in ("en", "zh")])
    ten = read_questions([str(p) for p in sorted((folder / "questions/multilingual").glob("*"))])
    sift = sorted((shared_data / "multilingual-sift").rglob("questions_*.jsonl"))
    twelve = read_questions([str(path) for path in sift])
    mt = shared_data / "fastchat" / "fastchat/llm_judge/data/mt_bench/question.jsonl"
    bench = read_questions([str(mt)], lang="en")
    assert [len(x) for x in (ours, ten, twelve, bench)] == [140, 1000, 960, 80]
    assert len({q.lang for q in ten}) == 10 and len({q.lang for q in twelve}) == 12
    assert all(len(q.turns) == 2 for q in bench)
    for path in sorted((folder / "answers").glob("*.jsonl")):
        answers = read_answers(str(path))
        assert sum(answers.of(question) is not None for question in ours) in (70, 140)


# --- a model here -------------------------------------------------------------------------------


def test_batches_keep_turns_and_lengths_together():
    found = list(batches(ASKED, [9, 30, 1, 2, 40, 2, 3], 2))
    assert found == [[3, 6], [0, 1], [4], [2, 5]]


def test_answers_are_in_the_order_of_the_questions_and_in_llm_zoos_form(model, tmp_path):
    records = answer(model, tmp_path / "a.jsonl")
    assert [record["question_id"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert len({record["answer_id"] for record in records}) == 7
    assert {record["model_id"] for record in records} == {"tiny"}
    assert all(len(record["turns"]) == 2 for record in records if "turns" in record)
    assert sum("turns" in record for record in records) == 2
    read = read_answers(str(tmp_path / "a.jsonl"))
    assert read.model == "tiny" and read.of(ASKED[2]).turns == tuple(records[2]["turns"])


def test_a_run_that_was_stopped_goes_on_to_the_same_answers(model, tmp_path):
    whole = answer(model, tmp_path / "whole.jsonl")
    path = tmp_path / "part.jsonl"

    class Killed(Exception):
        pass

    class Dying:
        calls = 0
        prompt, format, tokenizer = model.prompt, model.format, model.tokenizer

        def generate(self, *args, **kwargs):
            Dying.calls += 1
            if Dying.calls == 3:
                raise Killed
            return model.generate(*args, **kwargs)

    with pytest.raises(Killed):
        answer(Dying(), path)
    done = path.read_text(encoding="utf-8")
    assert len(done.splitlines()) == 4
    path.write_text(done + '{"answer_id": "torn', encoding="utf-8")
    calls = []
    original = model.generate

    class Counting(Dying):
        def generate(self, *args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs)

    assert answer(Counting(), path) == whole
    assert len(calls) == 3  # one of the last single turns, and two turns


def test_greedy_answers_are_those_of_chat(model, tmp_path):
    records = answer(model, tmp_path / "a.jsonl", temperature=0.0)
    for question, record in zip(ASKED, records, strict=True):
        if len(question.turns) == 1:
            chat = [{"role": "user", "content": question.turns[0]}]
            assert record["text"] == model.chat(chat, max_new_tokens=6).text.strip()


def test_other_settings_are_not_mixed_into_a_file(model, tmp_path):
    answer(model, tmp_path / "a.jsonl")
    about = {"model_id": "tiny", "metadata": {"seed": 4}}
    with pytest.raises(InputError, match=r"a.jsonl:1: was answered otherwise \(seed: 3, not 4\)"):
        AnswerFile(tmp_path / "a.jsonl", about, ASKED)


# --- an address ---------------------------------------------------------------------------------


def command(*options):
    return [sys.executable, "-m", "eval.answers", *options]


def test_an_address_that_misbehaves_answers_all_and_is_paid_once(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = write_questions(tmp_path / "q.jsonl", 30)
    with FakeEndpoint(badly) as server:
        options = command(
            f"--questions={path}", f"--out={tmp_path}/a.jsonl", f"--base_url={server.url}",
            "--model=far", "--max_cost=5", "--input_price=2", "--output_price=8", "--timeout=0.4",
            "--first_pause=0.01", "--requests_per_minute=1000000", "--max_tokens=50",
        )  # fmt: skip
        first = subprocess.run(options, capture_output=True, text=True)
        asked = len(server.log)
        again = subprocess.run(options, capture_output=True, text=True)
        assert len(server.log) == asked  # nothing is asked twice
    assert first.returncode == again.returncode == 0, first.stderr
    assert "at most 30 requests" in first.stdout and "30 of 30 questions" in again.stdout
    answers = read_answers(f"{tmp_path}/a.jsonl")
    assert all(answers.of(q) is not None for q in read_questions([str(path)]))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--max_cost=3",), "--max_cost is of no use without --base_url"),
        (("--base_url=http://x/v1",), "--base_url needs --max_cost"),
        (("--base_url=x", "--max_cost=1", "--input_price=0", "--output_price=0"), "begin it with"),
    ],
)
def test_flags_that_do_not_fit_are_named(tmp_path, options, message):
    path = write_questions(tmp_path / "q.jsonl", 2)
    run = subprocess.run(
        command(f"--questions={path}", f"--out={tmp_path}/a.jsonl", "--model=m", *options),
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and message in run.stderr
