"""A whole evaluation of small models: answers, a judge that misbehaves, scores, a page."""

import hashlib
import json
import subprocess
import sys

import pytest

from llmzoo_jax.export import export
from tests.stand_in_judge import moody, stand_in
from tests.tiny_runs import make_run

ASKED = {
    "en": ["Who are you?", "What is rain?", "Tell me a story.", "How are you?", "What is two?"],
    "zh": ["你是谁？", "什么是雨？", "讲个故事。", "你好吗？", "二是什么？"],
    "ar": ["من أنت؟", "ما هو المطر؟", "احكِ لي قصة.", "كيف حالك؟", "ما هو اثنان؟"],
}


def quality(text):
    """As a judge with whims of its own would see it; always the same of the same text."""
    return float(int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) % 9)


def run(module, *options):
    command = [sys.executable, "-m", f"eval.{module}", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_questions_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    questions = []
    for lang, texts in ASKED.items():
        path = tmp_path / f"{lang}.jsonl"
        lines = [{"id": i, "query": text, "label": "generic"} for i, text in enumerate(texts, 1)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        questions.append(f"--questions={path}")
    answers = []
    for name, kind, seed in (
        ("phoenix", "bpe", 0),
        ("chimera", "sentencepiece", 1),
        ("old", "bpe", 2),
    ):
        folder = export(make_run(tmp_path / "runs" / name, kind, seed=seed), tmp_path / name)
        out = tmp_path / "answers" / f"{name}.jsonl"
        run("answers", f"--model={folder}", *questions, f"--out={out}", "--max_tokens=12")
        answers.append(f"--answers={out}")
    with stand_in(moody, first=1.5, quality=quality) as server:
        said = run(
            "judge", *questions, *answers, f"--out={tmp_path}/reviews", "--model=stand-in",
            f"--base_url={server.url}", "--aspects=general,relevance,coherence", "--max_cost=5",
            "--input_price=2", "--output_price=8", "--max_tokens=200", "--timeout=0.4",
            "--first_pause=0.01", "--requests_per_minute=1000000", "--tries=4",
        )  # fmt: skip
    assert "90 reviews" in said
    said = run("score", f"--reviews={tmp_path}/reviews/reviews.jsonl", *questions,
               f"--out={tmp_path}/scores")  # fmt: skip
    assert "the first position over the last: +" in said
    assert (tmp_path / "scores" / "ar" / "coherence" / "ordering.txt").is_file()
    run("report", f"--scores={tmp_path}/scores/score.json", f"--out={tmp_path}/report",
        f"--reviews={tmp_path}/reviews/reviews.jsonl", f"--judge={tmp_path}/reviews/judge.json",
        "--title=Three small models")  # fmt: skip
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<h1>Three small models</h1>" in page and 'dir="rtl">من أنت؟' in page
    for text in ("fixed order would mislead", "Holm", "stand-in", "SHA-256", "phoenix"):
        assert text in page
    for name in ("matrix.png", "bars.png", "radar.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
