"""Penalties, filters and draws are those of transformers, and each row's own."""

import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import sampling
from llmzoo_jax.sampling import Params, Penalties

V = 300  # not a multiple of sampling.BLOCK


def params(rows: list[dict]) -> Params:
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    dtypes = dict.fromkeys(off, np.float32) | {"top_k": np.int32, "seed": np.uint32}
    return Params(*(np.array([(off | r)[n] for r in rows], dtypes[n]) for n in Params._fields))


ROWS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.07},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 1},
    {"temperature": 0.3, "top_p": 0.999},
    {"top_p": 1e-6},
    {"temperature": 50.0, "min_p": 0.9},
]


@pytest.mark.parametrize("seed", range(20))
def test_filters_of_a_mixed_batch_give_the_distributions_of_transformers(seed):
    torch = pytest.importorskip("torch")
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(seed).normal(size=(len(ROWS), V)).astype(np.float32) * 3
    p = params(ROWS)
    heat = np.where(p.temperature > 0, p.temperature, 1)[:, None]
    got = np.asarray(sampling.filter_logits(logits / heat, p.top_k, p.top_p, p.min_p), np.float64)
    for i, row in enumerate(ROWS):
        want = torch.from_numpy(logits[i : i + 1])
        if heat[i] != 1:
            want = TemperatureLogitsWarper(float(heat[i, 0]))(None, want)
        for name, warper in (
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
        ):
            if name in row:
                want = warper(row[name])(None, want)
        want = torch.softmax(want.double(), -1)[0].numpy()
        mine = np.exp(got[i] - got[i].max())
        assert np.abs(mine / mine.sum() - want).sum() / 2 <= 1e-5, row  # total variation


def test_a_row_draws_the_same_in_any_batch():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(200, V)).astype(np.float32) * 2
    rows = [ROWS[i % len(ROWS)] | {"seed": int(rng.integers(2**32))} for i in range(200)]
    positions = rng.integers(0, 1000, 200).astype(np.int32)
    together = np.asarray(sampling.choose(logits, positions, params(rows)))
    order = rng.permutation(200)
    moved = sampling.choose(logits[order], positions[order], params([rows[i] for i in order]))
    assert np.array_equal(np.asarray(moved), together[order])
    for i in range(20):
        alone = sampling.choose(logits[i : i + 1], positions[i : i + 1], params(rows[i : i + 1]))
        assert int(alone[0]) == together[i]
    greedy = [i for i, row in enumerate(rows) if row.get("temperature") == 0]
    assert len(greedy) == 20
    assert np.array_equal(together[greedy], logits[greedy].argmax(-1))


@pytest.mark.parametrize("V", [5, 128, 300])
def test_the_greatest_is_the_first_of_equals_however_it_is_found(V):
    rng = np.random.default_rng(V)
    logits = rng.integers(0, 3, (200, V)).astype(np.float32)  # many are equal
    logits[:50] = rng.normal(size=(50, V))
    logits[50, :] = -np.inf
    logits[51:53, : V - 1] = -np.inf
    for find in (sampling._argmax, sampling._argmax_by_blocks):
        assert np.array_equal(find(logits), logits.argmax(-1))


def test_draws_have_the_frequencies_of_the_softmax():
    from scipy.stats import chisquare

    n = 20_000
    logits = np.tile(np.random.default_rng(2).normal(size=V).astype(np.float32), (n, 1))
    drawn = sampling.draw(logits, np.arange(n, dtype=np.int32), np.full(n, 9, np.uint32))
    p = np.exp(logits[0].astype(np.float64))
    observed = np.bincount(np.asarray(drawn), minlength=V)
    assert chisquare(observed, p / p.sum() * n).pvalue > 1e-3


def test_what_has_no_probability_is_never_drawn():
    logits = np.full((500, V), -np.inf, np.float32)
    allowed = np.random.default_rng(3).integers(0, V, 500)
    logits[np.arange(500), allowed] = -5.0
    drawn = sampling.draw(logits, np.zeros(500, np.int32), np.arange(500, dtype=np.uint32))
    assert np.array_equal(np.asarray(drawn), allowed)


def test_penalties_are_those_of_transformers_and_of_openai():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, V)).astype(np.float32)
    prompt, answer = rng.integers(0, V, (3, 20)), rng.integers(0, 10, (3, 30))
    in_prompt = np.zeros((3, V), bool)
    in_prompt[np.arange(3)[:, None], prompt] = True
    counts = np.stack([np.bincount(row, minlength=V) for row in answer]).astype(np.int16)
    penalties = Penalties(
        *np.array([[1.0, 1.7, 0.6], [0.0, 0.5, -1.0], [0.0, 0.25, 1.5]], np.float32)
    )
    got = np.asarray(sampling.penalise(jnp.asarray(logits), in_prompt, counts, penalties))
    assert np.array_equal(got[0], logits[0])
    for i in (1, 2):
        ids = torch.from_numpy(np.concatenate([prompt[i], answer[i]]))[None]
        process = RepetitionPenaltyLogitsProcessor(float(penalties.repetition[i]))
        want = process(ids, torch.from_numpy(logits[i : i + 1]))[0].numpy()
        want = want - penalties.frequency[i] * counts[i] - penalties.presence[i] * (counts[i] > 0)
        np.testing.assert_allclose(got[i], want, rtol=1e-6, atol=1e-6)
