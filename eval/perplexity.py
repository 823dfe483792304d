"""How well a model predicts texts, by language: bits per byte, which do not depend on a tokenizer.

    python -m eval.perplexity --model=runs/quickstart-phoenix/export --data=heldout.jsonl
    python -m eval.perplexity --model=DIR --data='tatoeba/tatoeba.*' --limit=200 --out=ppl.json

--data may be repeated and may be a pattern. It takes conversations (their turns), questions, and
records with a text, in JSON Lines; Tatoeba's files; .tsv, of which the first column is read, as
mgsm_sw.tsv; .txt, a text a line, as sw.txt. A text is in the language of its record, else of its
file's name. Texts longer than the model's context are scored in pieces, each token once.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from data_pipelines.language import canonical
from data_pipelines.sources import Unusable, language_of, read_records
from data_pipelines.sources.questions import turns_of
from data_pipelines.sources.records import read_lines
from eval import likelihood, score
from eval.questions import language_of_name
from llmzoo_jax import cli
from llmzoo_jax.errors import InputError

DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Text:
    lang: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of a language. The interval, of 95 %, is over its texts."""

    lang: str
    texts: int
    bytes: int
    tokens: int
    bits_per_byte: float
    low: float
    high: float
    perplexity: float  # of a token, of this tokenizer


def read_texts(path: str, lang: str = "") -> Iterator[Text]:
    """Raises InputError, with file and line, for a record without a text."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1]
    if match := re.fullmatch(r"tatoeba\.\w+-\w+\.(\w+)", name):
        yield from (Text(canonical(match[1]), line) for line in read_lines(path) if line.strip())
    elif ending in (".txt", ".tsv"):
        lang = lang or language_of_name(path)
        for line in read_lines(path):
            text = line.partition("\t")[0] if ending == ".tsv" else line
            if text.strip():
                yield Text(lang, text)
    else:
        for where, record in read_records(path):
            try:
                if isinstance(record, Unusable):
                    raise record
                named = language_of(record, "lang").get("lang")
                yield Text(named or lang or language_of_name(path), _text_of(record))
            except (Unusable, KeyError, TypeError) as error:
                raise InputError(
                    f"{os.path.join(os.path.dirname(path), where)}: no text: {error}"
                ) from error


def _text_of(record: dict[str, Any]) -> str:
    if "messages" in record:
        return "\n\n".join(message["content"] for message in record["messages"])
    return "\n\n".join(turns_of(record))


def measure(
    model: Any, texts: Sequence[Text], *, batch_size: int, max_length: int = 0
) -> list[Perplexity]:
    """By language, the most bits a byte last. ``max_length`` 0 is the model's own."""
    prefix = likelihood.prefix_token(model)
    most = max_length or likelihood.longest(model)
    requests, owner = [], []
    for i, text in enumerate(texts):
        ids = model.tokenizer(text.text, add_special_tokens=False).input_ids
        for piece in likelihood.windows(ids, prefix, most):
            requests.append(piece)
            owner.append(i)
    with tqdm(total=len(requests), unit=" texts", disable=None) as bar:
        scored = likelihood.likelihoods(
            model, requests, batch_size=batch_size, max_length=most, on_done=bar.update
        )
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), int)
    for i, (_, piece), one in zip(owner, requests, scored, strict=True):
        nats[i] -= one.logprob
        tokens[i] += len(piece)
    sizes = np.array([len(text.text.encode()) for text in texts])
    found = []
    for lang in sorted({text.lang for text in texts}):
        own = np.array([text.lang == lang for text in texts])
        found.append(_summary(lang, nats[own], sizes[own], tokens[own]))
    return sorted(found, key=lambda one: one.bits_per_byte)


def _summary(lang: str, nats: np.ndarray, sizes: np.ndarray, tokens: np.ndarray) -> Perplexity:
    n = len(nats)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS)
    bits = (draws @ nats) / (draws @ sizes) / math.log(2)
    low, high = np.percentile(bits, [2.5, 97.5])
    return Perplexity(
        lang=lang,
        texts=n,
        bytes=int(sizes.sum()),
        tokens=int(tokens.sum()),
        bits_per_byte=float(nats.sum() / sizes.sum() / math.log(2)),
        low=float(low),
        high=float(high),
        perplexity=float(np.exp(nats.sum() / tokens.sum())),
    )


def table(rows: Sequence[Perplexity]) -> str:
    head = (
        f"{'language':<10}{'texts':>8}{'bytes':>11}{'bits/byte':>11}{'95 %':>18}{'ppl/token':>12}"
    )
    lines = [
        f"{r.lang:<10}{r.texts:>8,}{r.bytes:>11,}{r.bits_per_byte:>11.4f}"
        f"{f'{r.low:.3f} - {r.high:.3f}':>18}{r.perplexity:>12,.2f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main(_: list[str]) -> None:
    args = flags.FLAGS
    paths = [path for pattern in args.data for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise InputError(f"--data={', '.join(args.data)}: there is no such file")
    texts: list[Text] = []
    for path in paths:
        found = list(read_texts(path, args.lang))
        count = min(args.limit or len(found), len(found))
        texts += [found[i * len(found) // count] for i in range(count)]
    if not texts:
        raise InputError(f"{', '.join(paths)}: there is no text in them")
    import llmzoo_jax

    model = llmzoo_jax.load(args.model, dtype=args.dtype)
    rows = measure(model, texts, batch_size=args.batch_size, max_length=args.max_length)
    print(table(rows))
    if args.out:
        about = {"model": args.model, "dtype": args.dtype, "limit": args.limit,
                 "files": {path: score.sha256(path) for path in paths}}  # fmt: skip
        score.write_json(Path(args.out), about | {"languages": [asdict(row) for row in rows]})
        print(f"written: {args.out}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face folder or run folder", required=True)
    flags.DEFINE_multi_string("data", None, "files of texts; may be repeated", required=True)
    flags.DEFINE_string("lang", "", "language of texts that name none, as en")
    flags.DEFINE_integer("limit", 0, "texts of a file, spread evenly; 0: all", lower_bound=0)
    flags.DEFINE_integer("batch_size", 16, "texts computed together", lower_bound=1)
    flags.DEFINE_integer("max_length", 0, "tokens of a piece; 0: the model's own", lower_bound=0)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to compute in")
    flags.DEFINE_string("out", "", "JSON file to write, if any")
    cli.run(main)
