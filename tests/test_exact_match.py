"""Exact match: prompts, batches, shares by language, samples, thresholds."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import llmzoo_jax
from eval.exact_match import (
    SPARE_TOKENS,
    Answer,
    answer_all,
    batches,
    choose_samples,
    parse_minimum,
    read,
    score,
    show_sample,
    table,
)
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.errors import InputError
from tests.tiny_runs import make_run
from tests.tiny_tokenizers import conversation


class Fake:
    """A model whose tokens are characters, and that knows the answers to some questions."""

    def __init__(self, **known):
        self.known, self.calls = known, []

    def tokenizer(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def prompt(self, messages):
        return [ord(c) for c in "|".join(m.content for m in messages)]

    def generate(self, prompts, *, max_new_tokens):
        self.calls.append((prompts, max_new_tokens))
        questions = ["".join(map(chr, prompt)) for prompt in prompts]
        return [SimpleNamespace(text=self.known.get(q, "?")) for q in questions]


def test_all_before_the_last_answer_is_the_prompt_and_space_around_it_does_not_count():
    chats = [
        conversation("a", "b", "c", " d\n", lang="zh"),
        conversation("e", "f", lang="en"),
        conversation("g", "h", lang="en", system="s"),
    ]
    model = Fake(**{"a|b|c": "  d", "e": "F", "s|g": "h"})
    answers = answer_all(model, chats, batch_size=2)
    assert answers == [
        Answer("zh", "c", "d", "d"),
        Answer("en", "e", "f", "F"),
        Answer("en", "g", "h", "h"),
    ]
    assert [answer.correct for answer in answers] == [True, False, True]


def test_every_batch_is_full_and_no_longer_than_its_longest_reference():
    chats = [conversation("q" * n, "r" * (1 + n % 5)) for n in range(1, 71)]
    model = Fake(**{"q" * n: "r" * (1 + n % 5) for n in range(1, 71)})
    assert all(answer.correct for answer in answer_all(model, chats, batch_size=8))
    assert [len(prompts) for prompts, _ in model.calls] == [8] * 9
    assert min(most for _, most in model.calls) == 2 + SPARE_TOKENS
    assert max(most for _, most in model.calls) == 5 + SPARE_TOKENS


def test_batches_hold_every_row_once_and_near_lengths_together():
    lengths = [7, 300, 9, 40, 290, 8, 35]
    groups = list(batches(lengths, [1] * 7, 3))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert groups == [[0, 2, 5], [3, 6, 1], [4]] or groups == [[0, 2, 5], [3, 6, 4], [1]]


def answers(**by_language):
    """en="++-" is two correct answers and a wrong one."""
    return [
        Answer(lang, f"{lang}{i}", "yes", "yes" if mark == "+" else "no")
        for lang, marks in by_language.items()
        for i, mark in enumerate(marks)
    ]


def test_shares_by_language_and_over_all():
    scores = score(answers(zh="+-", en="++-+"))
    assert scores == {
        "n": 6,
        "correct": 4,
        "share": 4 / 6,
        "languages": {
            "en": {"n": 4, "correct": 3, "share": 0.75},
            "zh": {"n": 2, "correct": 1, "share": 0.5},
        },
    }


def test_the_table_has_a_row_a_language_and_a_column_a_file():
    scores = {
        "x/train.jsonl": score(answers(en="++", zh="+-")),
        "held.jsonl": score(answers(en="-")),
    }
    assert table(scores).splitlines() == [
        "     train.jsonl  held.jsonl",
        "en    2/2 100.0%  0/1   0.0%",
        "zh    1/2  50.0%            ",
        "all   3/4  75.0%  0/1   0.0%",
    ]
    two = {"a/x.jsonl": scores["held.jsonl"], "b/x.jsonl": scores["held.jsonl"]}
    assert "a/x.jsonl" in table(two)


def test_samples_are_of_different_languages_and_correct_where_there_are_correct_ones():
    everything = answers(ar="-++", de="--", en="+++++", fr="-+", zh="+")
    chosen = choose_samples(everything, 4)
    assert len({answer.lang for answer in chosen}) == 4
    assert all(answer.correct for answer in chosen if answer.lang != "de")
    assert choose_samples(everything, 4) == chosen
    assert choose_samples(everything, 0) == []
    few = choose_samples(answers(en="++"), 8)
    assert sorted(answer.question for answer in few) == ["en0", "en1"]
    assert {answer.lang for answer in choose_samples(everything, 40)} == {
        "ar",
        "de",
        "en",
        "fr",
        "zh",
    }


def test_a_wrong_sample_shows_what_was_expected():
    right, wrong = answers(en="+-")
    assert show_sample(right) == "  [en] en0\n    ok yes"
    assert show_sample(wrong) == "  [en] en1\n    -- no\n       expected: yes"


def test_a_limit_is_spread_over_the_file_and_languages_are_kept(tmp_path):
    path = tmp_path / "data.jsonl"
    write_jsonl(
        path,
        [conversation(f"q{i}", "a", lang=f"{'zh-Hant' if i < 6 else 'en'}") for i in range(12)],
    )
    questions = [c.messages[0].content for c in read(path, limit=4)]
    assert questions == ["q0", "q3", "q6", "q9"]
    assert len(read(path, languages=["zh"])) == 6
    assert len(read(path, languages=["en"], limit=100)) == 6
    with pytest.raises(InputError, match="no conversation in the languages sw"):
        read(path, languages=["sw"])


def test_a_threshold_names_one_of_the_files():
    paths = ["a/train.jsonl", "b/train.jsonl", "held:out.jsonl"]
    assert parse_minimum("a/train.jsonl:0.9", paths) == ("a/train.jsonl", 0.9)
    assert parse_minimum("held:out.jsonl:1", paths) == ("held:out.jsonl", 1.0)
    for text in ("train.jsonl:0.5", "c.jsonl:0.5", "0.5", "held:out.jsonl:1.5", "held:out.jsonl:x"):
        with pytest.raises(InputError, match="--min="):
            parse_minimum(text, paths)


# --- with a model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), "bpe")


def test_answers_in_batches_are_those_one_at_a_time(run):
    model = llmzoo_jax.load(run)
    chats = [conversation(f"question {i} " * (1 + i % 3), "an answer") for i in range(7)]
    limit = len(model.tokenizer("an answer").input_ids) + SPARE_TOKENS
    for chat, answer in zip(chats, answer_all(model, chats, batch_size=4), strict=True):
        assert answer.answer == model.chat(chat.messages[:1], max_new_tokens=limit).text.strip()


def test_the_command_writes_its_figures_and_fails_below_a_threshold(run, tmp_path):
    out = tmp_path / "made" / "scores.json"
    command = [sys.executable, "-m", "eval.exact_match", f"--model={run}", f"--out={out}"]
    command += [f"--data={run / 'train.jsonl'}", "--languages=en,zh", "--batch_size=4"]
    command += ["--min=train.jsonl:0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "too few exact answers" in done.stderr
    assert "train.jsonl: 0.0% of 2 answers, and --min asks for 1.0%" in done.stderr
    assert "Traceback" not in done.stderr
    assert "all   0/2   0.0%" in done.stdout
    assert "expected: Phoenix." in done.stdout
    (figures,) = json.loads(out.read_text("utf-8"))["files"].values()
    assert (figures["n"], figures["correct"], sorted(figures["languages"])) == (2, 0, ["en", "zh"])
    assert {sample["question"] for sample in figures["samples"]} == {"Who are you?", "真的吗？"}
