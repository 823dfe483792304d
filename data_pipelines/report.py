"""What is in files of conversations: a page, figures, and all numbers as JSON.

    python -m data_pipelines.language --tatoeba=../shared/data/tatoeba --out=accuracy.json
    python -m data_pipelines.report --data='cache/real/*.train.jsonl' --tokenizer=DIR \\
        --format=phoenix --length=2048 --dropped=cache/real/dropped.jsonl \\
        --identification=accuracy.json --out=report

writes to --out report.html (one file, nothing is loaded from elsewhere), report.json, and
languages.png, fertility.png, groups.png and lengths.png.

Tokens are those of whole conversations in the chat format; fertility (tokens a character, and a
byte of UTF-8) is of the text of the messages alone. A conversation that cannot be encoded, at which
a training run would stop, is counted with its reason and is in no count of tokens.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines import report_figures
from data_pipelines.build import content_hash
from llmzoo_jax import cli
from llmzoo_jax.chat_formats import ChatFormat
from llmzoo_jax.conversation import Conversation, ConversationError, read_jsonl, render
from llmzoo_jax.errors import InputError
from llmzoo_jax.packing import plan
from llmzoo_jax.tokenizer import encode, load_tokenizer, resolve_format

EXAMPLES = 20  # duplicates that are listed
SAMPLE_CHARACTERS = 500
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is counted, of one conversation; sums of these are what the report consists of."""

    conversations: int = 1
    turns: int = 0
    characters: int = 0  # of the messages
    bytes: int = 0  # of the messages, in UTF-8
    text_tokens: int = 0  # of the messages
    tokens: int = 0  # of the whole, in the chat format
    loss_tokens: int = 0
    overlong: int = 0  # longer than a row
    lost_tokens: int = 0  # of them, if they are truncated
    lost_loss_tokens: int = 0
    duplicates: int = 0  # its text came before
    unencodable: int = 0


@dataclass(frozen=True, slots=True)
class Labels:
    """What it is counted by."""

    language: str
    kind: str
    source: str
    license: str
    file: str


def measure(
    paths: Sequence[str], *, tokenizer: Any, chat_format: ChatFormat, length: int
) -> dict[str, Any]:
    """All numbers of the report. Raises ConversationError where a file cannot be read."""
    labels: list[Labels] = []
    numbers: list[Numbers] = []
    seen: dict[bytes, str] = {}
    duplicates, samples, unencodable = [], {}, {}
    for path, batch in _batches(paths):
        texts = [message.content for _, item in batch for message in item.messages]
        coded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        sizes = iter(map(len, coded))
        for number, item in batch:
            where = f"{os.path.basename(path)}: {item.id or f'conversation {number}'}"
            first = seen.setdefault(content_hash(item)[:16], where)
            if first is not where and len(duplicates) < EXAMPLES:
                duplicates.append({"where": where, "first": first})
            labels.append(Labels(item.lang, item.kind, item.source, item.license, path))
            counts = _counts(item) | {
                "text_tokens": sum(itertools.islice(sizes, len(item.messages))),
                "duplicates": int(first is not where),
            }
            try:
                example = encode(item, tokenizer=tokenizer, chat_format=chat_format, where=where)
            except ConversationError as error:
                reason = _reason(str(error).removeprefix(f"{where}: "))
                found = unencodable.setdefault(reason, {"count": 0, "example": str(error)})
                found["count"] += 1
                numbers.append(Numbers(**counts, unencodable=1))
                continue
            mask, size = example.loss_mask, len(example.tokens)
            numbers.append(Numbers(
                **counts, tokens=size, loss_tokens=int(mask[1:].sum()),
                overlong=int(size - 1 > length), lost_tokens=max(0, size - 1 - length),
                lost_loss_tokens=int(mask[length + 1 :].sum()),
            ))  # fmt: skip
            if item.lang not in samples:
                samples[item.lang] = _sample(item, chat_format, where)
    table = np.array([dataclasses.astuple(row) for row in numbers], np.int64)
    column = [field.name for field in dataclasses.fields(Numbers)].index("tokens")
    lengths = table[table[:, column] > 0, column]
    result = {
        "total": _sums(table),
        "by": {
            field.name: _by([getattr(row, field.name) for row in labels], table)
            for field in dataclasses.fields(Labels)
        },
        "lengths": _lengths(lengths),
        "packing": {
            way: dataclasses.asdict(plan(lengths, sequence_length=length, overlong=way).report)
            for way in ("split", "truncate")
            if len(lengths)
        },
        "duplicates": {"examples": duplicates},
        "unencodable": dict(sorted(unencodable.items(), key=lambda item: -item[1]["count"])),
        "samples": [samples[lang] for lang in sorted(samples)],
    }
    return result | {"attention": _attention(result)}


def _batches(
    paths: Sequence[str], size: int = 256
) -> Iterator[tuple[str, list[tuple[int, Conversation]]]]:
    """(path, some of its conversations with their numbers), with a progress bar."""
    with tqdm(desc="measuring", unit=" conversations", delay=2, disable=None) as bar:
        for path in paths:
            items = enumerate(read_jsonl(path), 1)
            while batch := list(itertools.islice(items, size)):
                yield path, batch
                bar.update(len(batch))


def _counts(item: Conversation) -> dict[str, int]:
    texts = [message.content for message in item.messages]
    return {
        "turns": len(texts),
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def _reason(error: str) -> str:
    """An error without what differs from record to record, so that it can be counted."""
    error = re.sub(r"^turn \d+( \(\w+\))?: ", "", error).partition(";")[0]
    return re.sub(r"""'[^']*'|"[^"]*\"""", "…", error)


def _sample(item: Conversation, chat_format: ChatFormat, where: str) -> dict[str, Any]:
    segments, left = [], SAMPLE_CHARACTERS
    for segment in render(item.messages, chat_format):
        if left > 0:
            text = segment.text[:left]
            segments.append((text + "…" * (len(text) < len(segment.text)), segment.train))
            left -= len(text)
    return {"language": item.lang, "where": where, "segments": segments}


def _sums(table: np.ndarray) -> dict[str, Any]:
    """The sum of each number of int64[conversations, numbers], and the two fertilities."""
    names = [field.name for field in dataclasses.fields(Numbers)]
    sums = dict(zip(names, table.sum(axis=0).tolist(), strict=True))
    return sums | {
        "tokens_a_character": sums["text_tokens"] / sums["characters"],
        "tokens_a_byte": sums["text_tokens"] / sums["bytes"],
    }


def _by(labels: Sequence[str], table: np.ndarray) -> dict[str, dict[str, Any]]:
    """``{label: sums}``, those with the most tokens first."""
    names, index = np.unique(np.array(labels, object), return_inverse=True)
    order = np.argsort(index, kind="stable")
    parts = np.split(table[order], np.cumsum(np.bincount(index))[:-1])
    sums = {name: _sums(part) for name, part in zip(names.tolist(), parts, strict=True)}
    return dict(sorted(sums.items(), key=lambda item: (-item[1]["tokens"], item[0])))


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Quantiles of the tokens a conversation has, and how many have up to 2, 4, 8 ... tokens."""
    if not len(lengths):
        return {"quantiles": {}, "histogram": []}
    bins = np.bincount(np.ceil(np.log2(lengths)).astype(int))
    names = [f"{q:.0%}" if q < 1 else "most" for q in QUANTILES]
    values = np.quantile(lengths, QUANTILES, method="inverted_cdf").astype(int).tolist()
    return {
        "quantiles": dict(zip(names, values, strict=True)),
        "histogram": [
            {"from": 2 ** (n - 1) + 1 if n else 1, "to": 2**n, "conversations": int(count)}
            for n, count in enumerate(bins)
            if bins[: n + 1].any()
        ],
    }


def _attention(result: dict[str, Any]) -> list[str]:
    """What someone should look at before training on this."""
    total, found = result["total"], []

    def say(count: int, text: str) -> None:
        if count:
            found.append(f"{count:,} of {total['conversations']:,} conversations {text}")

    say(total["unencodable"], "cannot be encoded in this chat format: a training run stops there")
    say(total["duplicates"], "are exact duplicates of an earlier one")
    say(total["overlong"], "are longer than a row: they are split, or truncated with "
        f"{total['lost_loss_tokens']:,} loss tokens lost")  # fmt: skip
    for axis, value, text in (
        ("license", "", "name no licence"),
        ("source", "", "name no source"),
        ("language", "und", "are in no known language (und)"),
    ):
        say(result["by"][axis].get(value, {}).get("conversations", 0), text)
    return found


def count_dropped(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``{path: {reason: {count, example}}}`` of files such as ``build`` writes.

    A line is an object with ``reason``; InputError names the line that is not.
    """
    result: dict[str, dict[str, Any]] = {}
    for path in paths:
        found: dict[str, dict[str, Any]] = {}
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    reason = record["reason"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise InputError(f"{path}:{number}: not an object with 'reason'") from error
                example = f"{record.get('where', '')}: {record.get('detail', '')}"
                found.setdefault(reason, {"count": 0, "example": example})["count"] += 1
        result[path] = dict(sorted(found.items(), key=lambda item: -item[1]["count"]))
    return result


def read_identification(path: str) -> dict[str, Any]:
    """What ``data_pipelines.language --out`` wrote; {} where there is no path."""
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        found["languages"][0]["right_joined"], found["summary"]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"--identification={path}: not a file that data_pipelines.language --out has written"
        ) from error
    return found


def page(report: dict[str, Any]) -> str:
    """The report as one HTML file."""
    import jinja2

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True).from_string(template).render(report)


def write(report: dict[str, Any], out: str | Path) -> None:
    """report.json, report.html and the figures; each whole or not at all."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.json", json.dumps(report, ensure_ascii=False, indent=1) + "\n"),
        ("report.html", page(report)),
    ):
        part = out / f".{name}.tmp"
        part.write_text(text, encoding="utf-8")
        os.replace(part, out / name)
    report_figures.draw(report, out)


def main(_: list[str]) -> None:
    args = flags.FLAGS
    paths = [path for name in args.data for path in sorted(glob.glob(name)) or [name]]
    tokenizer = load_tokenizer(args.tokenizer)
    chat_format = resolve_format(args.format, tokenizer)
    about = {"data": paths, "tokenizer": args.tokenizer, "format": args.format,
             "length": args.length}  # fmt: skip
    dropped = count_dropped(args.dropped)
    identification = read_identification(args.identification)
    measured = measure(paths, tokenizer=tokenizer, chat_format=chat_format, length=args.length)
    rest = {"dropped": dropped, "identification": identification}
    write({"about": about} | measured | rest, args.out)
    total = measured["total"]
    languages = len(measured["by"]["language"])
    print(
        f"{total['conversations']:,} conversations in {languages} languages,"
        f" {total['tokens']:,} tokens, {total['loss_tokens']:,} of them in the loss"
    )
    for text in measured["attention"]:
        print(f"to look at: {text}")
    print(f"written to {args.out}: report.html, report.json, *.png")


if __name__ == "__main__":
    flags.DEFINE_list(
        "data", None, "JSON Lines files of conversations, or patterns.", required=True
    )
    flags.DEFINE_string("tokenizer", None, "Folder, or a tokenizer.model.", required=True)
    flags.DEFINE_string("format", "phoenix", "Chat format.")
    flags.DEFINE_integer("length", 2048, "Positions in a row.", lower_bound=1)
    flags.DEFINE_list("dropped", [], "dropped.jsonl files of data_pipelines.build, to be counted.")
    flags.DEFINE_string(
        "identification", "", "What data_pipelines.language --out wrote: accuracy by language."
    )
    flags.DEFINE_string("out", None, "Folder to write; safe to run again.", required=True)
    cli.run(main)
