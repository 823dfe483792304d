"""The page of a run: from what stands in the folder, whole, and nothing loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

import pytest

from llmzoo_jax import run_page
from llmzoo_jax.goodput import TimeLog
from tests.tiny_runs import STEP, make_run

VOID = {"meta", "line", "path", "circle", "br"}


class Checker(HTMLParser):
    """Every element is closed, and what an attribute names stays in the page."""

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            # HTML lets a list item go unclosed only at its parent's end; ours are all closed.
            assert self.open.pop() == tag


def check(page: str) -> str:
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.outside
    assert "url(" not in page and "<script" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("page") / "a<b", "bpe")
    records = [
        {"step": 10 * n, "loss": 4 / n, "tokens_per_s": 1e4 + n, "loss_tokens_per_s": 6e3,
         "packing": 0.97, "goodput": 0.5, "grad_norm": 1.0, "learning_rate": 1e-5 * n,
         "mfu": 0.412, "skipped": 3,
         "loss_by_language": {"fr": 3.5 / n} | ({"ar": 4.5} if n == 1 else {})}
        for n in range(1, 5)
    ]  # fmt: skip
    records.insert(2, {"step": 20, "heldout_loss": 2.0, "heldout_by_language": {"fr": 2.0}})
    records.append({"step": STEP, "heldout_loss": 2.5, "heldout_by_language": {"fr": 2.5}})
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "data.txt").write_text("train.jsonl: 3 conversations & more\n")
    log = TimeLog(folder, writes=True)
    log.start(0)
    log.spent("steps", 30, 2.0)
    log = TimeLog(folder, writes=True)
    log.start(20)
    log.spent("steps", STEP, 1.0)
    return folder


def test_the_page_has_the_figures_of_the_run(run_dir):
    text = check(run_page.page(run_dir, now=0.0))
    for wanted in (
        "40 steps done", "1.0000 training loss", "2.5000 held-out loss; lowest 2.0000 at 20",
        "97.0% of the rows filled", "41.2% of the peak (MFU)", "10,004 tokens a second",
        "fr 1.8229 2.5000", "ar 4.5000 –", "train.jsonl: 3 conversations &amp; more",
        "3 steps were skipped", "1 restart; steps of 0.7 s were computed again",
        "lowest at step 20 (2.0000) and has risen",
        "data.sequence_length 64 2048", "optim.learning_rate = 2e-05",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert re.search(r"40 \d+\.\d 2\.5000", text)  # the checkpoint, its MB, its held-out loss


def test_text_of_the_run_is_text_and_never_markup(run_dir):
    page = run_page.page(run_dir, now=0.0)
    assert "a&lt;b" in page and "a<b" not in page


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    folder = make_run(tmp_path / "new", "bpe")
    (folder / "metrics.jsonl").write_text("")
    text = check(run_page.page(folder, now=0.0))
    assert "Loss" not in text and "Config" in text


def test_write_makes_picture_and_page(run_dir):
    run_page.write(run_dir)
    assert (run_dir / "loss.png").stat().st_size > 5000
    check((run_dir / "report.html").read_text())


def test_long_lines_are_thinned_and_short_ones_have_dots():
    many = [(n, float(n % 2)) for n in range(10_000)]
    chart = run_page.chart({"a": many, "b": [(0, 1.0), (9999, 2.0)]})
    assert chart.lines[0]["path"].count("L") < run_page.POINTS and not chart.lines[0]["dots"]
    assert [text for _, _, text in chart.lines[1]["dots"]] == ["step 0: 1", "step 9,999: 2"]
    for x, y in re.findall(r"([\d.-]+),([\d.-]+)", chart.lines[0]["path"]):
        assert 0 <= float(x) <= run_page.WIDTH and 0 <= float(y) <= run_page.HEIGHT
    assert run_page.chart({"a": []}) is None
    assert run_page.chart({"a": [(5, 0.0)]}).lines[0]["path"].startswith("M")


@pytest.mark.parametrize(("seconds", "text"), [
    (0.04, "0.0 s"), (9.94, "9.9 s"), (95, "1 min 35 s"), (3600, "1 h 0 min"), (200_000, "2 d 7 h"),
])  # fmt: skip
def test_durations(seconds, text):
    assert run_page.duration(seconds) == text
