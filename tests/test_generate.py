"""Decoding gives what transformers gives, and a row's tokens depend on nothing but the row."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import generate as decoding
from llmzoo_jax import sampling as choosing
from llmzoo_jax.errors import InputError
from llmzoo_jax.generate import WINDOW, Sampling, generate
from tests import parity

ROWS, NEW = 20, 64
BLOOM, LLAMA = parity.FAMILIES
SAMPLED = Sampling(max_new_tokens=NEW, temperature=0.9, top_k=30, top_p=0.95, seed=1234)


@functools.cache
def model_of(case):
    return decoding.prepare(parity.our_model(case))


@functools.cache
def random_prompts(case, seed=0):
    """20 prompts of 1 to 40 tokens, so that all tests share their compilations."""
    rng = np.random.default_rng(seed)
    vocab_size = parity.our_config(case).vocab_size
    lengths = [1, 40, *rng.integers(1, 41, ROWS - 2)]
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@functools.cache
def greedy_rows(case):
    """The reference of many tests: greedy, to the end."""
    return generate(model_of(case), random_prompts(case), sampling=Sampling(max_new_tokens=NEW))


jitted_filter = jax.jit(choosing.filter_logits)


def filter_logits(logits, top_k, top_p):
    """The same filters for every row."""
    rows = np.ones(len(logits), np.float32)
    return jitted_filter(
        jnp.asarray(logits), (top_k * rows).astype(np.int32), top_p * rows, 0 * rows
    )


def tokens_of(results):
    return [row.tokens for row in results]


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", parity.FAMILIES)
def test_greedy_tokens_equal_transformers_generate(case, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = parity.to_torch(tmp_path, parity.our_config(case), parity.our_model(case))
    prompts = random_prompts(case)
    width = max(map(len, prompts))
    ids = torch.zeros((ROWS, width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    theirs.generation_config.eos_token_id = None
    want = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[:, width:]
    got = greedy_rows(case)
    assert tokens_of(got) == want.tolist()
    assert {row.finish_reason for row in got} == {"length"}
    assert len({token for row in got for token in row.tokens}) > 10  # not one token for ever


# --- a row depends on nothing but the row -------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "sampling"),
    [
        pytest.param(BLOOM, Sampling(max_new_tokens=NEW), marks=pytest.mark.slow),
        pytest.param(LLAMA, Sampling(max_new_tokens=NEW), marks=pytest.mark.slow),
        (LLAMA, SAMPLED),
    ],
    ids=["bloom greedy", "llama greedy", "llama sampled"],
)
def test_tokens_do_not_depend_on_batch_mates(case, sampling):
    """Row i draws with the seed ``seed + i``: alone it is a batch of one with that seed."""
    model, prompts = model_of(case), random_prompts(case)
    together = tokens_of(generate(model, prompts, sampling=sampling))
    others = random_prompts(case, seed=9)
    mixed = [prompts[i] if i % 2 else others[i] for i in range(ROWS)]
    with_others = tokens_of(generate(model, mixed, sampling=sampling))
    assert with_others[1::2] == together[1::2]
    assert with_others[::2] != together[::2]
    for i in (0, 1, 7):
        own = dataclasses.replace(sampling, seed=sampling.seed + i)
        assert tokens_of(generate(model, [prompts[i]], sampling=own)) == [together[i]]


def test_a_long_batch_mate_changes_nothing():
    """The batch is padded to another bucket, the tokens are the same."""
    model, prompts = model_of(LLAMA), random_prompts(LLAMA)
    together = tokens_of(generate(model, prompts, sampling=SAMPLED))
    longer = [*prompts[:-1], (prompts[1] * 3)[:100]]
    assert tokens_of(generate(model, longer, sampling=SAMPLED))[:-1] == together[:-1]


def test_how_the_cache_grows_changes_nothing(monkeypatch):
    monkeypatch.setattr(decoding, "BUCKET", 128)  # from the start as large as it will be
    rows = generate(model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=NEW))
    assert rows == greedy_rows(LLAMA)


def test_a_batch_of_many_rows_gives_the_same_tokens():
    prompts = random_prompts(BLOOM) * 2  # over 32: the cache is written by a scatter
    rows = generate(model_of(BLOOM), prompts, sampling=Sampling(max_new_tokens=NEW))
    assert rows == greedy_rows(BLOOM) * 2


def test_the_seed_alone_decides_what_is_drawn():
    model, prompts = model_of(LLAMA), random_prompts(LLAMA)
    first = tokens_of(generate(model, prompts, sampling=SAMPLED))
    assert tokens_of(generate(model, prompts, sampling=SAMPLED)) == first
    other = dataclasses.replace(SAMPLED, seed=99)
    different = tokens_of(generate(model, prompts, sampling=other))
    assert all(a != b for a, b in zip(different, first, strict=True))


def test_top_k_1_is_greedy():
    only_best = dataclasses.replace(SAMPLED, top_k=1)
    results = generate(model_of(LLAMA), random_prompts(LLAMA), sampling=only_best)
    assert results == greedy_rows(LLAMA)


def test_a_stacked_model_gives_the_same_tokens_as_a_prepared_one():
    prompts = random_prompts(LLAMA)
    stacked = generate(
        parity.our_model(LLAMA), prompts, sampling=Sampling(max_new_tokens=WINDOW + 3)
    )
    assert tokens_of(stacked) == [row.tokens[: WINDOW + 3] for row in greedy_rows(LLAMA)]


# --- sampling -----------------------------------------------------------------------------------

FILTERED_ROWS = {
    "normal": lambda rng: rng.normal(size=(8, 50)),
    "wide": lambda rng: 10 * rng.normal(size=(8, 50)),
    "peaked": lambda rng: np.array([[40.0, *np.linspace(0, 20, 49)]]),
    "ties": lambda rng: np.round(2 * rng.normal(size=(8, 50))),
    "equal": lambda rng: np.full((2, 50), 7.0),
    "extreme": lambda rng: np.where(
        rng.random((8, 50)) < 0.3, -np.inf, 1e4 * rng.normal(size=(8, 50))
    ),
    "huge": lambda rng: rng.choice([3e38, -3e38, 0.0, 1.0], size=(4, 50)),
}


@pytest.mark.parametrize("kind", FILTERED_ROWS)
def test_filters_equal_those_of_transformers(kind):
    """The same logits stay. Which of several equal ones stays is left to the sort, there as
    here, so rows are compared in order of size."""
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = FILTERED_ROWS[kind](np.random.default_rng(0)).astype(np.float32)
    different = []
    for top_k, top_p in itertools.product(
        (0, 1, 5, 50, 100), (1.0, 0.993, 0.89, 0.513, 0.127, 1e-6)
    ):
        want = torch.from_numpy(logits)
        if top_k:
            want = TopKLogitsWarper(top_k)(None, want)
        if top_p < 1:
            want = TopPLogitsWarper(top_p)(None, want)
        got = np.asarray(filter_logits(logits, top_k, top_p))
        assert ((got == logits) | (got == -np.inf)).all()
        if not np.array_equal(np.sort(got), np.sort(want.numpy())):
            kept = [(np.asarray(x) > -np.inf).sum(-1).tolist() for x in (got, want)]
            different.append(f"top_k {top_k}, top_p {top_p}: kept {kept[0]}, theirs {kept[1]}")
    assert not different


@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "top_p": 0.9}], ids=["all", "filtered"])
def test_sampling_frequencies_match_the_probabilities(filters):
    from scipy.stats import chisquare

    prompt, rows, calls, temperature = [3, 1, 4], 256, 6, 2.5
    positions = np.arange(3)[None]
    logits = parity.forward(
        parity.our_model(LLAMA), np.array([prompt]), np.ones((1, 3), int), positions
    )[:, -1]
    logits = logits / temperature
    if filters:
        logits = filter_logits(logits, filters["top_k"], filters["top_p"])
    p = np.exp(np.asarray(logits[0], np.float64))
    p /= p.sum()
    drawn = np.zeros(len(p), int)
    for call in range(calls):
        sampling = Sampling(max_new_tokens=1, temperature=temperature, seed=call * rows, **filters)
        results = generate(model_of(LLAMA), [prompt] * rows, sampling=sampling)
        drawn += np.bincount([row.tokens[0] for row in results], minlength=len(p))
    assert drawn.sum() == rows * calls
    assert not drawn[p == 0].any()
    common = p * rows * calls >= 5
    if filters:
        assert common.sum() == (p > 0).sum() <= 12
    expected = np.append(p[common], p[~common].sum()) * rows * calls
    observed = np.append(drawn[common], drawn[~common].sum())
    kept = expected > 0
    assert kept.sum() > 5
    result = chisquare(observed[kept], expected[kept] * (observed.sum() / expected.sum()))
    print(f"{result.statistic:.1f} with {kept.sum()} kinds, p = {result.pvalue:.3f}")
    assert result.pvalue > 1e-3


def test_draws_at_different_positions_and_rows_are_independent():
    """At a very high temperature every token is as likely as any other, everywhere."""
    from scipy.stats import chisquare

    uniform = Sampling(max_new_tokens=NEW, temperature=1e6, seed=5)
    prompts = [[1, 2, 3]] * ROWS
    drawn = np.array(tokens_of(generate(model_of(LLAMA), prompts, sampling=uniform)))
    vocab_size = parity.our_config(LLAMA).vocab_size
    assert chisquare(np.bincount(drawn.ravel(), minlength=vocab_size)).pvalue > 1e-3
    for a, b in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        assert (a == b).mean() < 5 / vocab_size


# --- where a row ends ---------------------------------------------------------------------------


def test_a_stop_id_ends_its_row_and_is_not_in_the_tokens():
    full = tokens_of(greedy_rows(LLAMA))
    stop = full[3][WINDOW + 5]  # not at the end of a window
    results = generate(
        model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=NEW),
        stop_ids=[stop],
    )  # fmt: skip
    for row, want in zip(results, full, strict=True):
        if stop in want:
            assert row.tokens == want[: want.index(stop)]
            assert row.finish_reason == "stop"
        else:
            assert row.tokens == want
            assert row.finish_reason == "length"
    assert {row.finish_reason for row in results} == {"stop", "length"}


def test_any_of_several_stop_ids_ends_a_row_even_as_the_first_token():
    full = tokens_of(greedy_rows(LLAMA))[1]
    stops = {full[0], full[-1]}
    (row,) = generate(
        model_of(LLAMA), random_prompts(LLAMA)[1:2], sampling=Sampling(max_new_tokens=NEW),
        stop_ids=[*stops, *stops],
    )  # fmt: skip
    assert row.tokens == []
    assert row.finish_reason == "stop"


@pytest.mark.parametrize("new", [1, 2, WINDOW, WINDOW + 1, 2 * WINDOW + 5, NEW])
def test_max_new_tokens_is_kept_exactly(new):
    results = generate(
        model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=new)
    )
    assert tokens_of(results) == [row[:new] for row in tokens_of(greedy_rows(LLAMA))]
    assert {row.finish_reason for row in results} == {"length"}


def test_a_stop_id_just_after_the_last_token_does_not_count():
    full = tokens_of(greedy_rows(LLAMA))
    row = next(r for r in range(ROWS) if full[r][10] not in full[r][:10])
    for new, reason in ((10, "length"), (11, "stop")):
        result = generate(
            model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=new),
            stop_ids=[full[row][10]],
        )[row]  # fmt: skip
        assert result.tokens == full[row][:10]
        assert result.finish_reason == reason


def test_the_stopped_callback_ends_its_row_only():
    """It sees the tokens so far; a row that it ended gets no more of them."""
    full = tokens_of(greedy_rows(LLAMA))
    seen: dict[tuple, list[int]] = {}
    unwanted = full[5][:3]

    def stopped(row, tokens):
        seen.setdefault(tuple(tokens), []).append(len(tokens))
        return tokens[:3] == unwanted

    results = generate(
        model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=NEW),
        stopped=stopped,
    )  # fmt: skip
    for row, want in zip(results, full, strict=True):
        if want[:3] == unwanted:
            assert row.finish_reason == "stop"
            assert row.tokens == want[: len(row.tokens)]
            assert 3 <= len(row.tokens) <= WINDOW + 1  # noticed at the end of its window
            assert seen[tuple(row.tokens)]  # nothing that the callback has not seen
        else:
            assert row.finish_reason == "length"
            assert row.tokens == want
    assert sum(row.finish_reason == "stop" for row in results) >= 1


def test_on_tokens_streams_growing_prefixes_of_the_result():
    full = tokens_of(greedy_rows(LLAMA))
    stop = full[3][WINDOW + 5]
    streamed: list[list[list[int]]] = [[] for _ in range(ROWS)]
    results = generate(
        model_of(LLAMA), random_prompts(LLAMA), sampling=Sampling(max_new_tokens=NEW),
        stop_ids=[stop], on_tokens=lambda row, tokens: streamed[row].append(list(tokens)),
    )  # fmt: skip
    for result, pieces in zip(results, streamed, strict=True):
        assert pieces[-1] == result.tokens
        assert all(piece == result.tokens[: len(piece)] for piece in pieces)
        lengths = [len(piece) for piece in pieces]
        assert lengths == sorted(lengths)
        assert all(b - a <= WINDOW for a, b in itertools.pairwise(lengths))
        assert stop not in result.tokens
    assert max(map(len, streamed)) > 3  # as it goes, not at the end


def test_bfloat16_decodes():
    results = generate(
        model_of(LLAMA), random_prompts(LLAMA)[:1], sampling=Sampling(max_new_tokens=5),
        dtype="bfloat16",
    )  # fmt: skip
    assert len(results[0].tokens) == 5


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[], [[]], [[1], [], [2]]], ids=str)
def test_an_empty_prompt_is_an_error(prompts):
    with pytest.raises(InputError, match="prompt"):
        generate(model_of(LLAMA), prompts, sampling=Sampling())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_parameter_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=name):
        Sampling(**{name: value})
