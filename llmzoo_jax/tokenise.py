"""Tokenised conversations of files: encoded once, by several processes, and kept by content.

A file is cut at line ends into shards of some MB. Each shard is encoded by itself and written to
the cache as ``N.array_record`` (tokens and masks) and ``N.npz`` (the rest of ``Records``), the
latter last: a shard that has it is finished. So a build that was stopped goes on where it was, no
more than a few conversations a process are in memory at once, and the bytes that are written
depend on the file, the tokenizer and the format alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tqdm import tqdm

from llmzoo_jax.conversation import ChatFormat, read_jsonl
from llmzoo_jax.errors import InputError
from llmzoo_jax.shards import Codec, Shard, processes, write_shard
from llmzoo_jax.tokenizer import fingerprint

CACHE_VERSION = 2  # of the content of a cache folder; raise it with any change of it
SHARD_BYTES = 8 << 20  # of JSON Lines; more where a file would give over MAX_SHARDS
MAX_SHARDS = 256  # each is a file that readers keep open


class DataError(InputError):
    """A data file or its share of the mixture is unusable; the message names it."""


@dataclass(frozen=True, eq=False)
class Records:
    """The tokenised conversations of one file, in the order of the file."""

    path: str  # the conversations
    lengths: np.ndarray  # int32[n], tokens
    loss_tokens: np.ndarray  # int32[n], tokens that are targets of the loss
    lang: np.ndarray  # int32[n], index into languages
    lines: np.ndarray  # int64[n], line in the file, from 1
    languages: list[str]  # sorted
    left_out: dict[str, int]  # conversations by language that the language filter left out
    data: Sequence[bytes]  # the tokens of a record, and its loss mask

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, record: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32[n] and loss mask bool[n] of a record."""
        data, n = self.data[record], int(self.lengths[record])
        return np.frombuffer(data, "<i4", n), np.frombuffer(data, bool, n, offset=4 * n)

    def where(self, record: int) -> str:
        return f"{self.path}:{self.lines[record]}"


# Writes shards with ``write_shard``, and gives an item for each that is finished, in their order.
Engine = Callable[[Sequence[Shard], Codec], Iterator[Any]]


def tokenise(path: str, **options) -> Records:
    """``tokenise_all`` of one file."""
    return tokenise_all([path], **options)[0]


def tokenise_all(
    paths: Sequence[str],
    *,
    tokenizer: Any,
    chat_format: ChatFormat,
    languages: Sequence[str] = (),
    cache_dir: str,
    workers: int | None = None,
    engine: Engine | None = None,
) -> list[Records]:
    """Reads files of conversations (JSON Lines) and encodes each of them; once.

    The result is kept in ``cache_dir/KEY``, where KEY depends on the bytes of the file, on the
    tokenizer, the chat format and the languages; later calls only load it. ``languages`` keeps
    conversations in these (BCP-47; "zh" takes "zh-Hant" too), and the others are counted.
    ``workers`` are processes; None is one for each core, but none that has less than a shard to do.
    An ``engine`` writes the shards in their place, on other machines, say; the bytes are the same.

    Raises ConversationError with file and line where a conversation is malformed or there is none,
    DataError where a file is missing.
    """
    codec = Codec(tokenizer, chat_format, tuple(sorted(languages)))
    encoding = fingerprint(tokenizer, chat_format)
    files = [_shards(path, encoding, codec.languages, cache_dir) for path in paths]
    missing = {shard.out: shard for file in files for shard in file if not shard.finished}
    _write(list(missing.values()), codec, workers, engine)
    return [_load(path, shards) for path, shards in zip(paths, files, strict=True)]


def _shards(path: str, encoding: str, languages: Sequence[str], cache_dir: str) -> list[Shard]:
    """Cuts a file, and finds its folder in the cache, in one reading."""
    if not os.path.isfile(path):
        raise DataError(f"no data file {path!r}")
    at_least = max(SHARD_BYTES, -(-os.path.getsize(path) // MAX_SHARDS))
    content, pieces, start, line = hashlib.sha256(), [], 0, 1
    with open(path, "rb") as file:
        while piece := file.read(at_least) + file.readline():
            content.update(piece)
            pieces.append((start, len(piece), line))
            start += len(piece)
            line += piece.count(b"\n")
    parts = (str(CACHE_VERSION), str(SHARD_BYTES), content.hexdigest(), encoding, *languages)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    outs = (os.path.join(cache_dir, key, f"{number:05}") for number in itertools.count())
    return [Shard(path, *piece, out) for piece, out in zip(pieces, outs, strict=False)]


def _load(path: str, shards: Sequence[Shard]) -> Records:
    arrays, names = [], []
    for shard in shards:
        with np.load(f"{shard.out}.npz") as index:
            arrays.append(dict(index))
            names.append(json.loads(str(arrays[-1].pop("names"))))
    left_out = sum((Counter(name["left_out"]) for name in names), Counter())
    if not left_out and not any(len(array["lengths"]) for array in arrays):
        next(read_jsonl(path))  # says that there is no conversation
    languages = sorted({language for name in names for language in name["languages"]})
    for array, name in zip(arrays, names, strict=True):
        numbers = [languages.index(language) for language in name["languages"]]
        array["lang"] = np.array(numbers, np.int32)[array["lang"]]
    full = [
        f"{shard.out}.array_record"
        for shard, array in zip(shards, arrays, strict=True)
        if len(array["lengths"])
    ]
    return Records(
        path=path,
        languages=languages,
        left_out=dict(left_out),
        data=ArrayRecordDataSource(full) if full else (),
        **{key: np.concatenate([array[key] for array in arrays]) for key in arrays[0]},
    )


def _write(shards: list[Shard], codec: Codec, workers: int | None, engine: Engine | None) -> None:
    """Writes shards, by the engine, in this process or in ``workers`` others. After an error of the
    data, nothing is kept of that file, as another one will take its place."""
    todo = sum(shard.size for shard in shards)
    if workers is None:
        workers = min(_cores(), todo // SHARD_BYTES)
    workers = min(workers, len(shards))
    done = iter(shards)
    try:
        with contextlib.ExitStack() as stack:
            bar = tqdm(
                total=todo, desc="tokenising", unit="B", unit_scale=True, delay=2, disable=None
            )
            stack.enter_context(bar)
            if engine and shards:
                results = engine(shards, codec)
            elif workers > 1:
                pool = stack.enter_context(ThreadPoolExecutor(workers))
                results = pool.map(stack.enter_context(processes(codec, workers)), shards)
            else:
                results = (write_shard(shard, codec) for shard in shards)
            for shard in done:
                next(results)
                bar.update(shard.size)
    except InputError:
        shutil.rmtree(os.path.dirname(shard.out), ignore_errors=True)
        raise


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
