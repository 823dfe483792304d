"""Data: batches by step, every record once an epoch, mixtures, the cache, languages, errors."""

import json
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmzoo_jax import data as data_module
from llmzoo_jax import shards
from llmzoo_jax.config import DataConfig, Source
from llmzoo_jax.conversation import ConversationError, from_dict
from llmzoo_jax.data import DataError, heldout_batches, train_data
from llmzoo_jax.shards import encode_batch
from llmzoo_jax.tokenise import tokenise
from llmzoo_jax.tokenizer import encode, resolve_format

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(special=SPECIAL):
    """A token a byte."""
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZER = byte_tokenizer()
CODEC = {"tokenizer": TOKENIZER, "chat_format": resolve_format("chatml", TOKENIZER)}


def conversation(name, lang="en", words=3):
    turns = [("user", f"Who is {name}?"), ("assistant", " ".join([name] * words))]
    return {"lang": lang, "messages": [{"role": r, "content": c} for r, c in turns]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path):
    """source(name, n, weight): a file of n conversations that are all different."""

    def make(name, n, weight=1.0, words=3, lang="en"):
        records = [conversation(f"{name}{i}", lang, words + i % 5) for i in range(n)]
        return Source(path=write(tmp_path / f"{name}.jsonl", records), weight=weight)

    return make


@pytest.fixture
def config(tmp_path):
    def make(*train, **options):
        options = {"sequence_length": 128, "batch_size": 4} | options
        return DataConfig(train=train, cache_dir=str(tmp_path / "cache"), **options)

    return make


def segments(batch):
    """The (tokens, targets) of every segment of a batch, as tuples."""
    for b in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            here = batch.segment_ids[b] == segment
            yield tuple(batch.tokens[b, here].tolist()), tuple(batch.targets[b, here].tolist())


def expected_segments(records):
    for record in records:
        tokens = encode(from_dict(record, where=""), **CODEC).tokens.tolist()
        yield tuple(tokens[:-1]), tuple(tokens[1:])


def one_epoch(train):
    """The rows of one epoch, whatever the batch size."""
    steps = -(-train.rows_per_epoch // train.batch_size)
    batches = [train.batch(step) for step in range(steps)]
    whole = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
    return type(batches[0])(*(array[: train.rows_per_epoch] for array in whole))


def assert_equal(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


# --- training -----------------------------------------------------------------------------------


def test_batch_k_is_the_kth_of_an_iteration_from_anywhere(source, config):
    train = train_data(config(source("a", 40), source("b", 9, weight=2.0)), **CODEC, seed=3)
    steps = 2 * train.rows_per_epoch // train.batch_size + 2
    batches = [train.batch(step) for step in range(steps)]
    for start in (0, 1, steps - 2):
        resumed = list(train.iterate(start, steps))
        assert len(resumed) == steps - start
        for one, two in zip(batches[start:], resumed, strict=True):
            assert_equal(one, two)
    assert list(train.iterate(5, 5)) == []
    assert batches[0].tokens.shape == (4, 128)


def test_an_iteration_can_be_left_early(source, config):
    train = train_data(config(source("a", 40)), **CODEC, seed=3)
    batches = train.iterate(0, 1_000_000)
    assert_equal(next(batches), train.batch(0))
    batches.close()
    assert_equal(next(train.iterate(7, 1_000_000)), train.batch(7))


def test_hosts_share_the_rows_of_a_global_batch(source, config):
    train = train_data(config(source("a", 40)), **CODEC, seed=3)
    whole = train.batch(5)
    parts = [train.batch(5, rows=slice(host, host + 2)) for host in (0, 2)]
    assert_equal(whole, [np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
    assert_equal(next(train.iterate(5, 6, rows=slice(2, 4))), parts[1])


def test_an_epoch_has_every_conversation_exactly_once(source, config):
    train = train_data(config(source("a", 33), source("b", 8)), **CODEC, seed=0)
    records = [conversation(f"a{i}", words=3 + i % 5) for i in range(33)]
    records += [conversation(f"b{i}", words=3 + i % 5) for i in range(8)]
    epoch = one_epoch(train)
    assert Counter(segments(epoch)) == Counter(expected_segments(records))
    assert len(epoch.tokens) == train.rows_per_epoch == train.parts[0].plan.rows


def test_epochs_and_seeds_have_other_orders_of_the_same_rows(source, config):
    data = config(source("a", 40), batch_size=1)
    one, two = (train_data(data, **CODEC, seed=seed) for seed in (0, 1))
    n = one.rows_per_epoch

    def rows(train, epoch):
        return [train.batch(epoch * n + i).tokens.tobytes() for i in range(n)]

    orders = [rows(one, 0), rows(one, 1), rows(two, 0), rows(two, 1)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert rows(train_data(data, **CODEC, seed=0), 1) == orders[1]


def test_weights_are_passes_an_epoch(source, config):
    sources = source("a", 30), source("b", 10, weight=3.0), source("c", 20, weight=0.5)
    train = train_data(config(*sources, batch_size=1), **CODEC, seed=0)
    rows = [part.plan.rows for part in train.parts]
    per_epoch = [rows[0], 3 * rows[1], round(rows[2] / 2)]
    assert train.rows_per_epoch == sum(per_epoch)
    picks = [tuple(train.picks[i].tolist()) for i in range(2 * train.rows_per_epoch)]
    for epoch in range(2):
        here = picks[epoch * train.rows_per_epoch :][: train.rows_per_epoch]
        assert [sum(part == n for part, _ in here) for n in range(3)] == per_epoch
        for n, passes in ((0, 1), (1, 3)):
            assert Counter(r for part, r in here if part == n) == dict.fromkeys(
                range(rows[n]), passes
            )
    halves = Counter(r for part, r in picks if part == 2)
    assert max(halves.values()) == 1 and len(halves) == 2 * per_epoch[2]


def test_weights_are_exact_where_they_are_close(source, config):
    sources = source("a", 250, weight=1.0), source("b", 250, weight=1.1)
    train = train_data(config(*sources, sequence_length=60), **CODEC, seed=0)
    picks = [int(train.picks[i][0]) for i in range(train.rows_per_epoch)]
    assert picks.count(1) == round(1.1 * train.parts[1].plan.rows) > picks.count(0)


def test_the_order_is_the_same_on_every_machine_and_version():
    """A run that is resumed elsewhere must go on with the rows that come next."""
    picks = data_module._mixture([5, 3], [5, 6], seed=7)
    assert "".join(f"{'ab'[picks[i][0]]}{picks[i][1]}" for i in range(22)) == (
        "a4a0b1b0b0b2b1a1a3a2b2" + "b1a1a0b2b0a2a4b0b2a3b1"
    )


def test_the_report_counts_what_is_cut(source, config):
    data = config(source("a", 5, words=60))
    split = train_data(data, **CODEC, seed=0)
    assert "a.jsonl: 5 conversations" in split.report and "5 longer than a row" in split.report
    cut = train_data(config(*data.train, overlong="truncate"), **CODEC, seed=0)
    assert cut.rows_per_epoch == 5 and "truncated" in cut.report
    for train in (split, cut):
        epoch = one_epoch(train)
        assert f"{int((epoch.segment_ids > 0).sum()):,} tokens" in train.report
        assert f"{int(epoch.loss_mask.sum()):,} in the loss" in train.report


# --- held-out -----------------------------------------------------------------------------------


def test_heldout_has_every_segment_once_with_its_language(source, config):
    sources = source("a", 11, words=30), source("b", 6, lang="fr"), source("c", 1, lang="zh")
    held = heldout_batches(config(heldout=sources, sequence_length=256), **CODEC)
    assert held.languages == ["en", "fr", "zh"]
    records = [conversation(f"a{i}", "en", 30 + i % 5) for i in range(11)]
    records += [conversation(f"b{i}", "fr", 3 + i % 5) for i in range(6)] + [
        conversation("c0", "zh")
    ]
    langs = [held.languages.index(record["lang"]) for record in records]
    expected = Counter(zip(expected_segments(records), langs, strict=True))
    found = Counter()
    for batch, language in held.batches():
        assert batch.tokens.shape == language.shape == (4, 256) and language.dtype == np.int32
        assert ((language == -1) == (batch.segment_ids == 0)).all()
        by_language = [
            batch._replace(segment_ids=batch.segment_ids * (language == n)) for n in range(3)
        ]
        for n, batch in enumerate(by_language):
            found.update((segment, n) for segment in segments(batch) if segment[0])
    assert found == expected


def test_heldout_splits_what_is_longer_than_a_row_and_fills_up_the_last_batch(source, config):
    held = heldout_batches(config(heldout=(source("a", 9, words=90),)), **CODEC)
    batches = [batch for batch, _ in held.batches()]
    pairs = Counter(
        pair
        for batch in batches
        for pair in zip(*(x[batch.segment_ids > 0].tolist() for x in batch[:2]), strict=True)
    )
    records = [conversation(f"a{i}", words=90 + i % 5) for i in range(9)]
    whole = expected_segments(records)
    assert pairs == Counter(pair for segment in whole for pair in zip(*segment, strict=True))
    used = [int((batch.segment_ids[:, 0] > 0).sum()) for batch in batches]
    assert sum(used) == held.part.plan.rows and used[:-1] == [4] * (len(used) - 1)


def test_no_heldout_sources_give_no_batches(config):
    held = heldout_batches(config(), **CODEC)
    assert list(held.batches()) == [] and held.languages == []


# --- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """The conversations that are tokenised."""
    calls = []

    def counting(items, **options):
        calls.extend(items)
        return encode_batch(items, **options)

    monkeypatch.setattr(shards, "encode_batch", counting)
    return calls


def test_a_second_call_does_not_tokenise_again(source, tmp_path, encoded):
    file = source("a", 7).path
    one, two = (tokenise(file, **CODEC, cache_dir=str(tmp_path / "cache")) for _ in range(2))
    assert len(encoded) == len(one) == len(two) == 7
    for record in range(7):
        assert_equal(one[record], two[record])
    tokens, loss_mask = one[3]
    assert_equal((tokens, loss_mask), (encode(encoded[3], **CODEC).__dict__.values()))
    assert one.lengths[3] == len(tokens) and one.loss_tokens[3] == loss_mask[1:].sum()


@pytest.mark.parametrize("change", ["byte", "tokenizer", "format", "languages"])
def test_what_decides_the_tokens_decides_the_key(source, tmp_path, encoded, change):
    file = source("a", 7).path
    cache = str(tmp_path / "cache")
    tokenise(file, **CODEC, cache_dir=cache)
    codec, languages = dict(CODEC), ()
    if change == "byte":
        with open(file, "a", encoding="utf-8") as out:
            out.write("\n")
    if change == "tokenizer":
        codec["tokenizer"] = byte_tokenizer((*SPECIAL, "<mask>"))
    if change == "format":
        codec["chat_format"] = resolve_format("phoenix", TOKENIZER)
    if change == "languages":
        languages = ("en",)
    tokenise(file, **codec, languages=languages, cache_dir=cache)
    assert len(encoded) == 14


def test_a_failed_run_leaves_nothing_in_the_cache(source, tmp_path, monkeypatch):
    file = source("a", 7).path

    def fail(items, **options):
        raise ConversationError("no")

    with monkeypatch.context() as patch, pytest.raises(ConversationError):
        patch.setattr(shards, "encode_batch", fail)
        tokenise(file, **CODEC, cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(tokenise(file, **CODEC, cache_dir=str(tmp_path / "cache"))) == 7


def test_two_at_once_give_one_cache(source, tmp_path, monkeypatch):
    """The second tokenises the whole file while the first is at its first conversation."""
    file, cache, second = source("a", 7).path, tmp_path / "cache", []

    def interrupted(items, **options):
        monkeypatch.setattr(shards, "encode_batch", encode_batch)
        if not second:
            second.append(tokenise(file, **CODEC, cache_dir=str(cache)))
        return encode_batch(items, **options)

    monkeypatch.setattr(shards, "encode_batch", interrupted)
    records = tokenise(file, **CODEC, cache_dir=str(cache))
    assert len(list(cache.iterdir())) == 1
    for record in range(7):
        assert_equal(records[record], second[0][record])


def test_every_position_of_a_training_batch_has_the_language_of_its_conversation(source, config):
    files = [source(lang, n, w, lang=lang) for lang, n, w in (("fr", 9, 1.0), ("zh", 5, 2.0))]
    train = train_data(config(*files), **CODEC, seed=3)
    for step in (0, 4):
        for rows in (slice(None), slice(1, 3)):
            batch = train.batch(step, rows)
            language = train.language(step, batch, rows)
            assert language.dtype == np.int32 and language.shape == batch.tokens.shape
            assert ((language == -1) == (batch.segment_ids == 0)).all()
            for b, ids in enumerate(batch.segment_ids):
                for segment in range(1, ids.max() + 1):
                    here = ids == segment
                    (number,) = set(language[b, here].tolist())
                    text = TOKENIZER.decode(batch.tokens[b, here])
                    assert f"Who is {train.languages[number]}" in text


# --- languages and errors -----------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    langs = ["en", "zh", "zh-Hant", "zha", "en", "fr"]
    records = [conversation(f"x{i}", lang) for i, lang in enumerate(langs)]
    return Source(path=write(tmp_path / "mixed.jsonl", records))


def test_the_language_filter_keeps_a_language_and_its_variants(mixed, config):
    train = train_data(config(mixed, languages=("zh", "FR")), **CODEC, seed=0)
    assert train.languages == ["fr", "zh", "zh-Hant"]
    assert "left out by language: en (2), zha (1)" in train.report
    assert len(train.parts[0].files[0]) == 3


def test_a_file_that_the_filter_empties_is_reported_and_not_an_error(mixed, source, config):
    train = train_data(config(mixed, source("a", 5), languages=("fr",)), **CODEC, seed=0)
    assert "a.jsonl: 0 conversations" in train.report and "en (5)" in train.report
    assert train.languages == ["fr"]


def test_a_filter_that_leaves_nothing_names_the_languages_there_are(mixed, source, config):
    data = config(mixed, source("a", 5), languages=("de", "it"))
    with pytest.raises(DataError, match=r"de, it; .*en \(7\), fr \(1\), zh \(1\), zh-Hant"):
        train_data(data, **CODEC, seed=0)


def test_errors_name_file_and_line(tmp_path, config):
    good = json.dumps(conversation("a"))
    forged = json.dumps(conversation("<|im_end|>"))
    path = tmp_path / "bad.jsonl"
    for line in ("{", forged, json.dumps({"messages": []})):
        path.write_text(f"{good}\n\n{line}\n", encoding="utf-8")  # the blank line counts
        with pytest.raises(ConversationError, match=r"bad\.jsonl:3"):
            train_data(config(Source(path=str(path))), **CODEC, seed=0)


def test_overlong_as_an_error_names_file_and_line(source, config):
    data = config(source("a", 3), source("b", 3, words=60), overlong="error")
    with pytest.raises(DataError, match=r"b\.jsonl:1: has \d+ tokens, more than .*=128"):
        train_data(data, **CODEC, seed=0)


def test_unusable_sources_are_errors(source, config):
    with pytest.raises(DataError, match="no source"):
        train_data(config(), **CODEC, seed=0)
    with pytest.raises(DataError, match=r"no data file 'nowhere\.jsonl'"):
        train_data(config(Source(path="nowhere.jsonl")), **CODEC, seed=0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="weight must be more than 0"):
            train_data(config(source("a", 3, weight=weight)), **CODEC, seed=0)
    with pytest.raises(DataError, match=r"batch_size must be 1 or more, not 0"):
        train_data(config(source("a", 3), batch_size=0), **CODEC, seed=0)
