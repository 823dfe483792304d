"""One shard of a file of conversations: encoded, and written to the cache; by other processes, too.

``write_shard`` is all that an engine must call; ``tokenise.py`` cuts files into shards and reads
what was written.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llmzoo_jax.byte_tokens import byte_lengths, byte_mask
from llmzoo_jax.conversation import ChatFormat, Conversation, from_dict, in_languages, read_jsonl
from llmzoo_jax.errors import InputError
from llmzoo_jax.tokenizer import (
    Example,
    checked_segments,
    encode,
    has_tokens,
)

BATCH = 64  # conversations that are encoded at once


@dataclass(frozen=True)
class Codec:
    """How conversations become records."""

    tokenizer: Any
    chat_format: ChatFormat
    languages: tuple[str, ...]  # to keep (BCP-47); empty = all


@dataclass(frozen=True)
class Shard:
    """Whole lines of a file, and where their records are kept."""

    path: str
    start: int  # byte
    size: int  # bytes
    line: int  # the number of the first line, from 1
    out: str  # without .array_record and .npz

    @property
    def finished(self) -> bool:
        return os.path.isfile(f"{self.out}.npz")


def write_shard(shard: Shard, codec: Codec) -> None:
    """Encodes a shard. Each file is written beside its place and renamed: one is whole or is not,
    and of two processes that write the same one, both write the same bytes."""
    columns: list[tuple[int, int, str, int]] = []  # length, loss tokens, language, line
    left_out: Counter[str] = Counter()
    conversations = _kept(shard, codec, left_out)
    os.makedirs(os.path.dirname(shard.out), exist_ok=True)
    temporary = f"{shard.out}.{uuid.uuid4().hex}.tmp"
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        try:
            while batch := list(itertools.islice(conversations, BATCH)):
                lines, items = zip(*batch, strict=True)
                examples = encode_batch(
                    items,
                    tokenizer=codec.tokenizer,
                    chat_format=codec.chat_format,
                    where=[f"{shard.path}:{line}" for line in lines],
                )
                for line, item, example in zip(lines, items, examples, strict=True):
                    tokens, mask = example.tokens, example.loss_mask
                    writer.write(tokens.astype("<i4").tobytes() + mask.tobytes())
                    loss_tokens = int(np.count_nonzero(mask[1:]))  # the first is no target
                    columns.append((len(tokens), loss_tokens, item.lang, line))
        finally:
            writer.close()
        os.replace(temporary, f"{shard.out}.array_record")
        lengths, loss_tokens, lang, lines = zip(*columns, strict=True) if columns else ((),) * 4
        names, lang = np.unique(np.array(lang, str), return_inverse=True)
        with open(temporary, "wb") as file:
            np.savez(
                file,
                lengths=np.array(lengths, np.int32),
                loss_tokens=np.array(loss_tokens, np.int32),
                lang=lang.astype(np.int32),
                lines=np.array(lines, np.int64),
                names=json.dumps({"languages": names.tolist(), "left_out": left_out}),
            )
        os.replace(temporary, f"{shard.out}.npz")
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.remove(temporary)


def _kept(shard: Shard, codec: Codec, left_out: Counter) -> Iterator[tuple[int, Conversation]]:
    """(line, conversation) of those that the languages keep, read as by ``read_jsonl``."""
    with open(shard.path, "rb") as file:
        file.seek(shard.start)
        text = io.BytesIO(file.read(shard.size))
    for number, line in enumerate(text, shard.line):
        try:
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not line.strip():
                continue
            record = json.loads(line)
        except ValueError:
            deque(read_jsonl(shard.path), maxlen=0)  # says where, and what to do
            raise
        item = from_dict(record, where=f"{shard.path}:{number}")
        if codec.languages and not in_languages(item.lang, codec.languages):
            left_out[item.lang] += 1
        else:
            yield number, item


def encode_batch(
    items: Sequence[Conversation],
    *,
    tokenizer: Any,
    chat_format: ChatFormat,
    where: Sequence[str],
) -> list[Example]:
    """``encode`` of each, with one call of the tokenizer for all: the same arrays, the same errors.

    The conversations must be as ``from_dict`` gives them: the order of messages is not checked
    again.
    """
    rendered = [
        checked_segments(item.messages, tokenizer, chat_format, at, False)
        for item, at in zip(items, where, strict=True)
    ]
    texts = ["".join(segment.text for segment in segments) for segments in rendered]
    lengths = byte_lengths(tokenizer, len(tokenizer))
    if lengths is not None:  # then the tokenizer need not say where tokens begin and end
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        examples = []
        coded = backend.encode_batch_fast(texts, add_special_tokens=False)
        for item, at, segments, one in zip(items, where, rendered, coded, strict=True):
            tokens = np.array(one.ids, np.int32)
            mask = byte_mask(tokens, segments, lengths)
            if mask is None:
                example = encode(item, tokenizer=tokenizer, chat_format=chat_format, where=at)
            else:
                example = Example(tokens, mask)
            examples.append(example)
        return examples
    coded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    characters = set().union(*(message.content for item in items for message in item.messages))
    size = len(tokenizer)
    representable = all(has_tokens(tokenizer, size, character) for character in characters)
    unk_id, unk = tokenizer.unk_token_id, tokenizer.unk_token
    examples = []
    for item, at, segments, text, ids, offsets in zip(
        items, where, rendered, texts, coded.input_ids, coded.offset_mapping, strict=True
    ):
        tokens = np.array(ids, np.int32)
        spans = np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(ids))
        starts, stops = spans[::2], spans[1::2]
        unknown = np.flatnonzero(tokens == unk_id) if unk_id is not None else ()
        if not representable or any(text[starts[i] : stops[i]] != unk for i in unknown):  # rare
            examples.append(encode(item, tokenizer=tokenizer, chat_format=chat_format, where=at))
            continue
        if len(tokens):  # the spans leave no gaps, as in `encode`
            starts[1:] = np.minimum(starts[1:], np.maximum.accumulate(stops[:-1]))
            starts[0] = 0
        trained = np.repeat(
            [segment.train for segment in segments], [len(segment.text) for segment in segments]
        )
        before = np.zeros(len(text) + 1, np.int32)  # trained characters before each position
        np.cumsum(trained, out=before[1:])
        examples.append(Example(tokens, before[stops] > before[starts]))
    return examples


# --- processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(codec: Codec, workers: int) -> Iterator[Callable[[Shard], None]]:
    """A function that writes a shard in one of ``workers`` processes, to be called by threads.

    They are fresh interpreters that import this module alone; multiprocessing's would also import
    the program that was started, such as llmzoo_jax.train, and JAX with it.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are parallel
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-c", "from llmzoo_jax.shards import _work; _work()"]
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) for _ in range(workers)
    ]
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()

    def write(shard: Shard) -> None:
        process = idle.get()
        try:
            process.stdin.write(pickle.dumps(shard))
            process.stdin.flush()
            error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError) as ended:
            raise RuntimeError(
                f"tokenising {shard.path}: a worker process ended with exit code {process.wait()};"
                " what is finished is kept, so the same command goes on from there"
            ) from ended
        finally:
            idle.put(process)
        if error:
            raise error

    try:
        message = pickle.dumps(codec)
        for process in processes:
            process.stdin.write(message)
            idle.put(process)
        yield write
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # what it did not read is of no use
                process.stdin.close()


def _work() -> None:
    """A worker process: takes a codec and then shards, and answers each with its error or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    gc.set_threshold(1_000_000)  # a batch has a tuple for each token; none is in a cycle
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    codec = pickle.load(sys.stdin.buffer)
    while True:
        try:
            shard = pickle.load(sys.stdin.buffer)
        except EOFError:  # the process that started this one has ended
            return
        try:
            write_shard(shard, codec)
            error = None
        except (InputError, OSError) as raised:
            error = raised
        pickle.dump(error, answers)
