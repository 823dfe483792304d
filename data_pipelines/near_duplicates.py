"""Near duplicates: MinHash over character n-grams, in bands; every pair is verified. NumPy.

Characters and not words, as Chinese, Japanese, Thai or Khmer have no spaces between words. What is
kept of a text is one key a band (168 bytes at threshold 0.8) and the number of its n-grams; it is
read again only where two texts share a key. The same texts in the same order give the same result
everywhere: nothing is drawn at random.

Sources: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman,
Ullman, "Mining of Massive Datasets", chapter 3 (bands of rows).
"""

from __future__ import annotations

import functools
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

NGRAM = 5  # characters
HASHES = 128  # of a MinHash signature
SAMPLE = 1024  # a signature is of the smallest hashes of a text, so a long text costs no more
RECALL = 0.99  # of pairs exactly at the threshold; more alike ones are found almost surely


@dataclass(frozen=True)
class Match:
    record: int  # index of the later text
    of: int  # index of the earlier one, which is kept
    jaccard: float


class _Keep(dict):
    """For str.translate: letters, marks, numbers and mathematical signs stay, all else goes."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = code if category[0] in "LMN" or category == "Sm" else None
        return self[code]


_KEEP = _Keep()


def normalise(text: str) -> str:
    """``text`` without spaces and punctuation, in one case and one Unicode form (NFKC)."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_KEEP)


def ngrams(text: str, n: int = NGRAM) -> np.ndarray:
    """Hashes of the different n-grams of a *normalised* text, sorted: uint64[k].

    A text shorter than n is one n-gram; an empty one has none.
    """
    encoded = text.encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(encoded, "<u4").astype(np.uint64)
    if not len(points):
        return points
    n = min(n, len(points))
    hashes = np.zeros(len(points) - n + 1, np.uint64)
    for start in range(n):
        hashes = hashes * _BASE + points[start : start + len(hashes)]
    return np.unique(_mix(hashes))


_BASE = np.uint64(0x100000001B3)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection on uint64 in which each bit depends on all (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Hash number i of x is _A[i] * x + _B[i] modulo 2^64.
_A = _mix(np.arange(1, HASHES + 1, dtype=np.uint64)) | np.uint64(1)
_B = _mix(np.arange(HASHES + 1, 2 * HASHES + 1, dtype=np.uint64))


@functools.cache
def rows_of(threshold: float) -> int:
    """The most rows a band with which RECALL of the pairs at ``threshold`` share a key.

    More rows a band are fewer pairs to verify.
    """
    for rows in range(HASHES, 1, -1):
        if 1 - (1 - threshold**rows) ** (HASHES // rows) >= RECALL:
            return rows
    return 1


def band_keys(hashes: np.ndarray, threshold: float) -> np.ndarray:
    """The keys of a text with n-grams ``hashes`` (sorted, not empty), one a band: uint64[bands]."""
    minima = (hashes[:SAMPLE, None] * _A + _B).min(axis=0)  # uint64[HASHES]
    rows = rows_of(threshold)
    bands = HASHES // rows
    keys = np.zeros(bands, np.uint64)
    for row in minima[: bands * rows].reshape(bands, rows).T:
        keys = _mix(keys * _BASE + row)
    return keys


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted arrays without repeats: size of the intersection over that of the union."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def find(
    keys: np.ndarray,
    sizes: np.ndarray,
    ngrams_of: Callable[[int], np.ndarray],
    threshold: float,
) -> Iterator[Match]:
    """Each text that is near an earlier one which is kept, in order.

    keys: uint64[texts, bands] of ``band_keys``; sizes: int[texts], how many n-grams each text has;
    ``ngrams_of`` reads a text again. A text that is yielded is not kept, so it excludes no other.
    """
    shared = np.zeros(keys.shape, bool)  # is the key of this text and band another text's too?
    for band, column in enumerate(keys.T):
        order = np.argsort(column, kind="stable")
        same = column[order[1:]] == column[order[:-1]]
        shared[order[1:][same], band] = shared[order[:-1][same], band] = True
    kept: dict[tuple[int, int], list[int]] = defaultdict(list)
    for record in map(int, np.flatnonzero(shared.any(axis=1))):
        buckets = [(int(b), int(keys[record, b])) for b in np.flatnonzero(shared[record])]
        for other in sorted({other for bucket in buckets for other in kept[bucket]}):
            small, large = sorted((int(sizes[record]), int(sizes[other])))
            if small < threshold * large:  # the Jaccard index is at most small / large
                continue
            if (value := jaccard(ngrams_of(record), ngrams_of(other))) >= threshold:
                yield Match(record, other, value)
                break
        else:
            for bucket in buckets:
                kept[bucket].append(record)
