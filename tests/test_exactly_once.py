"""Exactly once, anywhere: the global batches are the same whatever hosts, kills and workers do."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmzoo_jax.config import DataConfig, Source
from llmzoo_jax.conversation import write_jsonl
from llmzoo_jax.data import mix, train_data
from llmzoo_jax.tokenise import DataError, Records
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format, save_tokenizer
from tests.tiny_tokenizers import SENTENCES, conversation, tiny

HOSTS = (1, 2, 4, 8)


def records(path, lengths, first):
    """A tokenised file in which no token comes twice, from ``first`` on."""
    starts = first + np.cumsum(lengths) - lengths
    data = [
        np.arange(start, start + n, dtype="<i4").tobytes() + (np.arange(n) % 3 == 1).tobytes()
        for start, n in zip(starts, lengths, strict=True)
    ]
    return Records(
        path=path,
        lengths=np.array(lengths, np.int32),
        loss_tokens=np.array(lengths, np.int32) // 3,
        lang=np.zeros(len(lengths), np.int32),
        lines=np.arange(1, len(lengths) + 1),
        languages=["en"],
        left_out={},
        data=data,
    )


@st.composite
def mixtures(draw, weights=(0.3, 0.5, 1.0, 1.0, 1.7, 2.0)):
    """A mixture of made-up files; an epoch is some rows or a few dozen."""
    lengths = st.lists(st.integers(2, 40), min_size=1, max_size=12)
    files = draw(st.lists(st.tuples(lengths, st.sampled_from(weights)), min_size=1, max_size=4))
    config = DataConfig(
        train=tuple(Source(path=str(i), weight=weight) for i, (_, weight) in enumerate(files)),
        sequence_length=draw(st.integers(3, 24)),
        batch_size=draw(st.sampled_from([8, 16])),
    )
    firsts = itertools.accumulate((sum(n) for n, _ in files), initial=1)
    made = [records(str(i), n, first) for i, ((n, _), first) in enumerate(zip(files, firsts))]  # noqa: B905
    return mix(made, config, seed=draw(st.integers(0, 2**31)))


def equal(one, two):
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def joined(parts):
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


@settings(max_examples=4, deadline=None)
@given(mixtures(), st.integers(0, 1000))
def test_hosts_together_have_the_global_batch(train, step):
    whole = train.batch(step)
    for hosts in HOSTS:
        parts = [train.batch(step, train.rows_of(host, hosts)) for host in range(hosts)]
        assert [len(part.tokens) for part in parts] == [train.batch_size // hosts] * hosts
        assert equal(joined(parts), whole)


RUNS = st.lists(st.tuples(st.sampled_from(HOSTS), st.integers(0, 2)), min_size=1, max_size=3)


@settings(max_examples=4, deadline=None)
@given(mixtures(), st.integers(0, 50), RUNS)
def test_a_run_goes_on_after_kills_and_on_other_hosts_with_the_batches_that_come_next(
    train, start, runs
):
    """Of each run, all that is kept is the number of steps that are done."""
    step = start
    for hosts, steps in runs:
        ahead = [
            train.iterate(step, step + 1_000_000, train.rows_of(host, hosts))
            for host in range(hosts)
        ]
        for _ in range(steps):
            assert equal(joined([next(batches) for batches in ahead]), train.batch(step))
            step += 1
        for batches in ahead:  # it is killed; what was made ahead is lost
            batches.close()


@settings(max_examples=20, deadline=None)
@given(mixtures(), st.integers(1, 3))
def test_each_record_is_seen_as_often_as_its_weight_says(train, epochs):
    """Every pair of a record, exactly once an epoch at weight 1; otherwise passes follow on."""
    steps = -(-epochs * train.rows_per_epoch // train.batch_size)
    batches = joined([train.batch(step) for step in range(steps)])
    tokens, targets, _, segments, _ = (x[: epochs * train.rows_per_epoch] for x in batches)
    assert (targets[segments > 0] == tokens[segments > 0] + 1).all()
    seen = Counter(tokens[segments > 0].tolist())
    pairs = 0
    for part in train.parts:
        rows = part.plan.rows
        passes = epochs * max(1, round(part.weight * rows)) / rows
        for file in part.files:
            for record in range(len(file)):
                for token in file[record][0][:-1].tolist():
                    assert seen[token] in {int(passes // 1), int(-(-passes // 1))}
                    assert seen[token] == epochs or part.weight != 1
                    pairs += seen[token]
    assert pairs == seen.total()  # and nothing else


def test_a_batch_that_hosts_cannot_share_equally_is_an_error():
    config = DataConfig(train=(Source(path="0"),), sequence_length=8, batch_size=12)
    train = mix([records("0", [5, 9], 1)], config, seed=0)
    assert train.rows_of(3, 4) == slice(9, 12)
    with pytest.raises(DataError, match="batch_size 12 can't be shared equally by 8 hosts"):
        train.rows_of(0, 8)
    with pytest.raises(ValueError, match="host"):
        train.rows_of(4, 4)


@pytest.mark.parametrize("workers", [3])
def test_worker_processes_change_nothing(workers):
    config = DataConfig(
        train=(Source(path="0"), Source(path="1", weight=0.5)), sequence_length=24, batch_size=8
    )
    lengths = np.random.default_rng(0).integers(2, 40, 60).tolist()
    train = mix([records("0", lengths, 1), records("1", lengths, 10_000)], config, seed=5)
    rows = train.rows_of(1, 2)
    expected = [train.batch(step, rows) for step in range(7, 18)]
    made = list(train.iterate(7, 18, rows, workers=workers))
    assert len(made) == len(expected)
    assert all(map(equal, made, expected))


# --- with real processes ------------------------------------------------------------------------


def digests(batch):
    """A name for each row of a batch."""
    rows = zip(*batch, strict=True)
    return [hashlib.sha256(b"".join(x.tobytes() for x in row)).hexdigest()[:12] for row in rows]


def load(folder):
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    sources = (Source(path=f"{folder}/a.jsonl"), Source(path=f"{folder}/b.jsonl", weight=2.0))
    config = DataConfig(
        train=sources, sequence_length=64, batch_size=8, cache_dir=f"{folder}/cache"
    )
    chat_format = resolve_format("phoenix", tokenizer)
    return train_data(config, tokenizer=tokenizer, chat_format=chat_format, seed=11)


def start_host(folder, **options):
    """A host in a process and a session of its own, so that its workers can be killed with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.test_exactly_once", json.dumps({"folder": folder} | options)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
        start_new_session=True,
    )


def main(folder, host, hosts, start, stop, workers):
    """What a host does: prints the rows that it has at each step."""
    train = load(folder)
    for batch in train.iterate(start, stop, train.rows_of(host, hosts), workers=workers):
        print(json.dumps(digests(batch)), flush=True)


def test_two_hosts_are_killed_and_one_goes_on_with_two_workers(tmp_path):
    folder = str(tmp_path)
    tokenizer = tiny("bpe")
    chat_format = resolve_format("phoenix", tokenizer)
    save_tokenizer(tokenizer, f"{folder}/tokenizer", chat_format=chat_format)
    for name, texts in (("a", SENTENCES), ("b", SENTENCES[:3])):
        write_jsonl(
            f"{folder}/{name}.jsonl", [conversation(f"{name} {x}", y) for x in texts for y in texts]
        )
    train = load(folder)
    expected = [digests(train.batch(step)) for step in range(20)]

    hosts = [
        start_host(folder, host=host, hosts=2, start=2, stop=1_000_000, workers=0)
        for host in range(2)
    ]
    try:
        found = [
            [row for host in hosts for row in json.loads(host.stdout.readline())] for _ in range(7)
        ]
    finally:
        for host in hosts:
            os.killpg(host.pid, signal.SIGKILL)
            host.communicate()
    assert found == expected[2:9]
    alone = start_host(folder, host=0, hosts=1, start=9, stop=20, workers=2)
    out, _ = alone.communicate(timeout=100)
    assert alone.returncode == 0
    assert [json.loads(line) for line in out.splitlines()] == expected[9:]


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
