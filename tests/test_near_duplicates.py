"""Near duplicates: what is alike is found in any script, what is not stays, and always the same."""

import random
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.near_duplicates import (
    HASHES,
    RECALL,
    band_keys,
    find,
    jaccard,
    ngrams,
    normalise,
    rows_of,
)  # fmt: skip

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyz ",
    "han": "".join(map(chr, range(0x4E00, 0x4E00 + 800))),
    "thai": "".join(map(chr, [*range(0xE01, 0xE2F), *range(0xE30, 0xE39)])),
    "cyrillic": "".join(map(chr, range(0x430, 0x450))) + " ",
}


def some_text(rng, alphabet, length):
    return "".join(rng.choices(ALPHABETS[alphabet], k=length))


def changed(rng, text, alphabet, places):
    """``text`` with other characters in so many places."""
    characters = list(text)
    for place in rng.sample(range(len(text)), places):
        characters[place] = rng.choice(ALPHABETS[alphabet])
    return "".join(characters)


def run(texts, threshold=0.8):
    grams = [ngrams(normalise(text)) for text in texts]
    keys = np.stack([band_keys(g, threshold) for g in grams])
    return list(find(keys, np.array([len(g) for g in grams]), grams.__getitem__, threshold))


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("length", [120, 600, 6000])
def test_a_text_with_few_changes_is_found_in_any_script_and_at_any_length(alphabet, length):
    rng = random.Random(f"{alphabet} {length}")
    texts = [some_text(rng, alphabet, length) for _ in range(10)]
    copies = [changed(rng, text, alphabet, length // 100) for text in texts]  # Jaccard about 0.9
    matches = run(texts + copies)
    assert [(m.record, m.of) for m in matches] == [(10 + i, i) for i in range(10)]
    assert all(0.8 <= m.jaccard < 1 for m in matches)


def test_texts_below_the_threshold_stay():
    rng = random.Random(2)
    texts = [some_text(rng, "latin", 400) for _ in range(20)]
    # One change in 15 characters spoils every third 5-gram: Jaccard about 0.5 to 0.6.
    texts += [changed(rng, text, "latin", 27) for text in texts]
    grams = [ngrams(normalise(text)) for text in texts]
    assert all(0.4 < jaccard(grams[i], grams[20 + i]) < 0.8 for i in range(20))
    assert not run(texts)
    assert len(run(texts, threshold=0.4)) == 20


def test_every_match_has_the_jaccard_index_that_sets_give():
    rng = random.Random(3)
    text = some_text(rng, "cyrillic", 300)
    other = changed(rng, text, "cyrillic", 4)
    (match,) = run([text, other])

    def grams(text):
        text = normalise(text)
        return {text[i : i + 5] for i in range(len(text) - 4)}

    a, b = grams(text), grams(other)
    assert match.jaccard == pytest.approx(len(a & b) / len(a | b), abs=1e-12)


def test_recall_at_the_threshold_is_what_is_promised():
    """Pairs of random sets at a Jaccard index of 0.8, hashed as texts are."""
    rng = np.random.default_rng(4)
    found, pairs = 0, 400
    for _ in range(pairs):
        values = rng.integers(0, 2**63, 500, dtype=np.uint64)
        a, b = np.sort(values[:450]), np.sort(values[50:])  # 400 of 500 in both
        assert jaccard(a, b) == 0.8
        found += bool((band_keys(a, 0.8) == band_keys(b, 0.8)).any())
    assert found >= 0.97 * pairs


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.95, 1.0])
def test_bands_give_the_recall_with_as_many_rows_as_can_be(threshold):
    def recall(rows):
        return 1 - (1 - threshold**rows) ** (HASHES // rows)

    rows = rows_of(threshold)
    assert recall(rows) >= RECALL
    assert rows == HASHES or recall(rows + 1) < RECALL


def test_a_text_that_is_dropped_excludes_no_other():
    """A is near B and B near C, but A is not near C: C stays, as B is gone."""
    rng = random.Random(5)
    a = some_text(rng, "latin", 1000)
    b = a[:900] + some_text(rng, "latin", 100)
    c = some_text(rng, "latin", 100) + b[100:]
    grams = [ngrams(normalise(x)) for x in (a, b, c)]
    assert jaccard(grams[0], grams[1]) >= 0.7 <= jaccard(grams[1], grams[2])
    assert jaccard(grams[0], grams[2]) < 0.7
    assert [(m.record, m.of) for m in run([a, b, c], 0.7)] == [(1, 0)]


def test_case_spaces_width_and_punctuation_make_no_difference():
    assert normalise("Ｈello,  World!\n") == normalise("hello world") == "helloworld"
    assert normalise("สวัสดี ครับ") == "สวัสดีครับ"  # marks stay
    assert normalise("12 + 7") != normalise("12 - 7")


def test_texts_of_no_or_few_characters_have_ngrams_too():
    assert len(ngrams("")) == 0
    assert len(ngrams("好")) == len(ngrams("abcde")) == 1
    assert len(ngrams("abcdef")) == 2
    assert len(ngrams("aaaaaaaaa")) == 1
    assert run(["好", "好", "坏"])[0].record == 1


def test_another_process_gives_the_same_keys():
    code = (
        "from data_pipelines.near_duplicates import *\n"
        "print(band_keys(ngrams(normalise('The same text, in the same process or not. 你好')), .8))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "[" in outputs.pop()
