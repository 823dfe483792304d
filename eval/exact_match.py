"""How often a model gives exactly the answer that the data has. For data with one right answer.

    python -m eval.exact_match --model=DIR --data=heldout.jsonl --data=train.jsonl

Of every conversation, the messages before the last answer are the prompt; the model answers
greedily, and its text, without the space around it, must be that of the last answer. Prints the
shares by file and by language with sample answers, and writes them as JSON with --out. With
--min=heldout.jsonl:0.8 the exit code is 1 where a file's share is lower.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

import llmzoo_jax
from llmzoo_jax import cli
from llmzoo_jax.conversation import Conversation, in_languages, read_jsonl
from llmzoo_jax.errors import InputError

SPARE_TOKENS = 4  # decoded beyond the longest reference: an answer that is longer is wrong anyway


@dataclass(frozen=True)
class Answer:
    """One conversation, answered."""

    lang: str
    question: str  # the last message of the prompt
    reference: str
    answer: str

    @property
    def correct(self) -> bool:
        return self.answer == self.reference


def read(path: str, languages: Sequence[str] = (), limit: int = 0) -> list[Conversation]:
    """The conversations of a file in these languages (all if empty); ``limit`` of them, spread
    evenly over the file, where there are more and it is not 0."""
    found = [c for c in read_jsonl(path) if not languages or in_languages(c.lang, languages)]
    if not found:
        raise InputError(f"{path}: no conversation in the languages {', '.join(languages)}")
    count = min(limit or len(found), len(found))
    return [found[i * len(found) // count] for i in range(count)]


def answer_all(
    model: llmzoo_jax.inference.Model, conversations: Sequence[Conversation], *, batch_size: int
) -> list[Answer]:
    """Greedy answers, in the order of ``conversations``."""
    prompts, limits = [], []
    for conversation in conversations:
        prompts.append(model.prompt(conversation.messages[:-1]))
        reference = conversation.messages[-1].content
        limits.append(len(model.tokenizer(reference, add_special_tokens=False).input_ids))
    texts: list[str] = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="answering", unit=" answers", delay=1, disable=None) as bar:
        for rows in batches([len(prompt) for prompt in prompts], limits, batch_size):
            # A batch that is not full is filled up: another size would be compiled anew.
            filled = [*rows, *rows[-1:] * (batch_size - len(rows))]
            most = max(limits[i] for i in rows) + SPARE_TOKENS
            results = model.generate([prompts[i] for i in filled], max_new_tokens=most)
            for i, result in zip(rows, results, strict=False):
                texts[i] = result.text.strip()
            bar.update(len(rows))
    return [
        Answer(c.lang, c.messages[-2].content, c.messages[-1].content.strip(), text)
        for c, text in zip(conversations, texts, strict=True)
    ]


def batches(lengths: list[int], limits: list[int], size: int) -> Iterator[list[int]]:
    """Indices in groups of up to ``size``. Prompts of about one length are together, so that there
    is little padding, and among those, answers of one length, so that all rows end together."""
    order = sorted(range(len(lengths)), key=lambda i: (-(-lengths[i] // 32), limits[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


# --- figures ------------------------------------------------------------------------------------


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """``{"n", "correct", "share", "languages": {lang: {"n", "correct", "share"}}}``."""
    n, correct = Counter(), Counter()
    for answer in answers:
        n[answer.lang] += 1
        correct[answer.lang] += answer.correct
    by_language = {lang: _share(n[lang], correct[lang]) for lang in sorted(n)}
    return _share(n.total(), correct.total()) | {"languages": by_language}


def _share(n: int, correct: int) -> dict[str, Any]:
    return {"n": n, "correct": correct, "share": correct / n}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Languages as rows, files as columns."""
    titles = dict(zip(scores, short_names(list(scores)), strict=True))
    languages = sorted({lang for one in scores.values() for lang in one["languages"]})
    rows = [["", *titles.values()]]
    for lang in languages:
        rows.append([lang, *(_cell(one["languages"].get(lang)) for one in scores.values())])
    rows.append(["all", *(_cell(one) for one in scores.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].strip().ljust(widths[0]), *row[1:]]) for row in lines)


def short_names(paths: list[str]) -> list[str]:
    """File names, or whole paths where two files have the same name."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(names) else paths


def _cell(one: dict[str, Any] | None) -> str:
    return f"{one['correct']}/{one['n']} {one['share']:6.1%}" if one else ""


def choose_samples(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to ``count`` answers, in languages that are spread over those there are, and from places
    that are spread over the file; of a language that has correct ones, one of these."""
    by_language: dict[str, list[Answer]] = {}
    for answer in answers:
        by_language.setdefault(answer.lang, []).append(answer)
    languages = sorted(by_language)
    step = max(len(languages) / count, 1) if count else 1
    chosen = []
    for i in range(count):
        pool = by_language[languages[int(i * step) % len(languages)]]
        pool = [answer for answer in pool if answer.correct] or pool
        chosen.append(pool[i * len(pool) // count])
    return list(dict.fromkeys(chosen))


def show_sample(answer: Answer) -> str:
    lines = [f"  [{answer.lang}] {_line(answer.question)}"]
    mark = "ok" if answer.correct else "--"
    lines.append(f"    {mark} {_line(answer.answer) or '(nothing)'}")
    if not answer.correct:
        lines.append(f"       expected: {_line(answer.reference)}")
    return "\n".join(lines)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:89] + "…"


# --- thresholds ---------------------------------------------------------------------------------


def parse_minimum(text: str, paths: Sequence[str]) -> tuple[str, float]:
    """``FILE:SHARE`` -> (one of ``paths``, share); FILE is a path or the name of the file."""
    name, colon, share = text.rpartition(":")
    matching = [path for path in paths if name in (path, os.path.basename(path))]
    if not colon or len(matching) != 1:
        raise InputError(
            f"--min={text}: write --min=FILE:SHARE, with FILE one of {', '.join(paths)}"
        )
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"--min={text}: the share is a number from 0 to 1")
    return matching[0], value


# --- the command --------------------------------------------------------------------------------


def main(_) -> None:
    paths = list(dict.fromkeys(DATA.value))
    minima = [parse_minimum(text, paths) for text in MIN.value]
    data = {path: read(path, LANGUAGES.value, LIMIT.value) for path in paths}
    model = llmzoo_jax.load(MODEL.value, dtype=DTYPE.value)
    everything = list(itertools.chain.from_iterable(data.values()))
    answers = iter(answer_all(model, everything, batch_size=BATCH_SIZE.value))
    answered = {path: list(itertools.islice(answers, len(data[path]))) for path in paths}
    scores = {path: score(answered[path]) for path in paths}
    samples = {path: choose_samples(answered[path], SAMPLES.value) for path in paths}

    print(f"exact match of {MODEL.value}\n\n{table(scores)}")
    for path in paths if SAMPLES.value else ():
        print(f"\nsamples of {path}, for each language a correct one if there is one:")
        print("\n".join(map(show_sample, samples[path])))
    if OUT.value:
        files = {
            path: scores[path]
            | {"samples": [vars(one) | {"correct": one.correct} for one in samples[path]]}
            for path in paths
        }
        result = {"model": MODEL.value, "files": files}
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        Path(OUT.value).write_text(text, encoding="utf-8")
    short = [
        f"{path}: {scores[path]['share']:.1%} of {scores[path]['n']} answers, "
        f"and --min asks for {minimum:.1%}"
        for path, minimum in minima
        if scores[path]["share"] < minimum
    ]
    if short:
        raise InputError("too few exact answers\n" + "\n".join(short))


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", None, "Hugging Face folder or run folder.", required=True)
    DATA = flags.DEFINE_multi_string(
        "data", None, "File of conversations (JSON Lines); may be repeated.", required=True
    )
    LANGUAGES = flags.DEFINE_list("languages", [], "Only these, e.g. en,fr; all where empty.")
    LIMIT = flags.DEFINE_integer(
        "limit", 0, "Only so many conversations, spread evenly over a file; 0: all.", lower_bound=0
    )
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Prompts decoded together.", lower_bound=1)
    SAMPLES = flags.DEFINE_integer(
        "samples", 8, "Answers of each file to show, in different languages.", lower_bound=0
    )
    OUT = flags.DEFINE_string("out", None, "JSON file for the figures and the samples.")
    MIN = flags.DEFINE_multi_string(
        "min", [], "FILE:SHARE, e.g. heldout.jsonl:0.8: exit with 1 below it; may be repeated."
    )
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute in.")
    cli.run(main)
