"""Byte-level tokenizers: which text a token stands for is known without asking the tokenizer.

Its tokens are the bytes of the text, in order, so their lengths add up to it. That costs next to
nothing, where offsets cost a tokenizer about as much as a seventh of its work.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from llmzoo_jax.conversation import Segment


@functools.lru_cache(maxsize=8)
def byte_lengths(tokenizer: Any, size: int) -> np.ndarray | None:
    """How many bytes of text each token stands for, int64[V], in a tokenizer of all bytes; None in
    another. ``size`` is the tokenizer's: it changes as tokens are added."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    step = state["pre_tokenizer"] or {}
    last = step.get("pretokenizers", [step])[-1]
    vocabulary = tokenizer.get_vocab()
    complete = vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    if state["normalizer"] or last.get("type") != "ByteLevel" or not complete:
        return None
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # each character is a byte
    for number, token in tokenizer.added_tokens_decoder.items():
        lengths[number] = len(token.content.encode())
    return lengths


def byte_mask(
    tokens: np.ndarray, segments: Sequence[Segment], lengths: np.ndarray | None
) -> np.ndarray | None:
    """The loss mask of ``encode`` from ``byte_lengths``. None where these are None, or don't add up
    to the text, as when the tokenizer adds a space."""
    sizes = [len(segment.text.encode("utf-8", "surrogatepass")) for segment in segments]
    if lengths is None or int(lengths[tokens].sum()) != sum(sizes):
        return None
    stops, at = np.cumsum(lengths[tokens]), 0  # bytes
    mask = np.zeros(len(tokens), bool)
    for segment, size in zip(segments, sizes, strict=True):
        if segment.train and size:  # from the token of its first byte to that of its last
            first, last = np.searchsorted(stops, [at, at + size - 1], side="right")
            mask[first : last + 1] = True
        at += size
    return mask
