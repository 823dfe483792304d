"""Figures of lm-evaluation-harness through our backend are those of its own ``hf`` backend."""

import json
import os
import random

import pytest

import llmzoo_jax
from eval.harness import evaluate, table
from eval.likelihood import windows
from llmzoo_jax.errors import InputError
from llmzoo_jax.export import export
from tests.tiny_runs import make_run
from tests.tiny_tokenizers import SENTENCES

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'llmzoo-jax[eval]'")

TASKS = ("choice", "choice_normalised", "two", "cloze", "rolling", "until", "chat")
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
{more}
metric_list: [{metrics}]
"""


def write_tasks(folder):
    """Seven tasks of documents in ten scripts, as files; nothing is fetched."""
    draw = random.Random(0)
    documents = []
    for number in range(24):
        words = SENTENCES[number % len(SENTENCES)].split()
        cut = max(1, len(words) // 2)
        others = [" ".join(draw.sample(SENTENCES, 1)[0].split()[:3]) for _ in range(3)]
        choices = [" ".join(words[cut:]) or "x", *others]
        draw.shuffle(choices)
        documents.append({"question": " ".join(words[:cut]), "choices": choices,
                          "label": draw.randrange(4), "page": SENTENCES[number % 10] * 3,
                          "answer": words[-1]})  # fmt: skip
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    choices = "doc_to_choice: choices\ndoc_to_target: label"
    rows = {
        "choice": ("multiple_choice", "{{question}}", choices, "{metric: acc}"),
        "choice_normalised": ("multiple_choice", "Q: {{question}}\\nA:", choices,
                              "{metric: acc_norm}"),
        "two": ("multiple_choice", "{{choices[2]}} {{question}}", "doc_to_choice: "
                "'{{[question, answer]}}'\ndoc_to_target: 1\nnum_fewshot: 2\nfewshot_split: test",
                "{metric: acc}"),
        "cloze": ("loglikelihood", "{{question}}", 'doc_to_target: " {{answer}}"',
                  "{metric: perplexity}, {metric: acc}"),
        "rolling": ("loglikelihood_rolling", "", 'doc_to_target: "{{page}}"',
                    "{metric: word_perplexity}, {metric: bits_per_byte}"),
        "until": ("generate_until", "{{question}}",
                  'doc_to_target: answer\ngeneration_kwargs: {until: ["\\n", "e"], '
                  "max_gen_toks: 8, do_sample: false}", "{metric: exact_match}"),
        "chat": ("generate_until", "{{question}}",
                 "doc_to_target: answer\ngeneration_kwargs: {until: [], max_gen_toks: 6}",
                 "{metric: exact_match}"),
    }  # fmt: skip
    for name, (kind, text, more, metrics) in rows.items():
        filled = CHOICE.format(name=name, kind=kind, text=text, more=more, metrics=metrics,
                               data=data)  # fmt: skip
        (folder / f"{name}.yaml").write_text(filled)
    return folder


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def backends(request, tmp_path_factory):
    from lm_eval.models.huggingface import HFLM

    from eval.harness_backend import Backend

    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    run = make_run(tmp_path_factory.mktemp(request.param), request.param)
    folder = export(run, tmp_path_factory.mktemp("exports") / "export")
    ours = Backend(llmzoo_jax.load(folder), batch_size=8)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    return ours, theirs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def samples(backend, tasks, names, **options):
    found = evaluate(backend, names, include_path=str(tasks), log_samples=True, bootstrap_iters=0,
                     **options)  # fmt: skip
    return found["results"], found["samples"]


@pytest.mark.slow
def test_six_local_tasks_have_the_figures_of_the_hf_backend(backends, tasks):
    names = list(TASKS[:6])
    (ours, mine), (theirs, its) = (samples(backend, tasks, names) for backend in backends)
    for name in names:
        for metric, value in theirs[name].items():
            if isinstance(value, float) and metric != "alias":
                close = 1e-4 if "acc" in metric or "match" in metric else 1e-3
                assert ours[name][metric] == pytest.approx(value, rel=close), (name, metric)
        for one, other in zip(mine[name], its[name], strict=True):
            if name == "until":
                assert one["resps"] == other["resps"]
                continue
            for (a,), (b,) in zip(one["resps"], other["resps"], strict=True):
                a, b = (x if isinstance(x, tuple) else (x, True) for x in (a, b))
                assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1], name
    assert "choice" in table({"results": ours})


@pytest.mark.slow
def test_prompts_in_the_chat_format_are_those_of_the_hf_backend(backends, tasks):
    (_, mine), (_, its) = (
        samples(backend, tasks, ["chat", "choice"], apply_chat_template=True)
        for backend in backends
    )
    for name in ("chat", "choice"):
        for one, other in zip(mine[name], its[name], strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "chat":
                assert one["resps"] == other["resps"]


def test_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (1, 7, 8, 9, 23, 24, 25):
        tokens = list(range(100, 100 + length))
        theirs = get_rolling_token_windows(tokens, 1, 8, 1)
        assert list(windows(tokens, 1, 8)) == [make_disjoint_window(pair) for pair in theirs]


def test_an_unknown_task_and_a_parameter_that_cannot_be_had_are_named(tasks, tmp_path):
    from eval.harness_backend import Backend

    ours = Backend(llmzoo_jax.load(make_run(tmp_path / "run", "bpe")))
    with pytest.raises(InputError, match="no task nothing_like_this"):
        evaluate(ours, ["nothing_like_this"], include_path=str(tasks))
    with pytest.raises(InputError, match="num_beams can't be had"):
        ours._generation({"num_beams": 4, "until": ["x"]})
    with pytest.raises(InputError, match="max_gen_toks=9999"):
        ours._generation({"max_gen_toks": 9999})
