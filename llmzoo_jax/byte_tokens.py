"""Which bytes of text a token stands for, known without asking the tokenizer.

The tokens of a byte-level tokenizer are the bytes of the text, in order, so their lengths add up
to it. That costs next to nothing, where offsets cost a tokenizer about a seventh of its work.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TokenBytes:
    """``text[i]`` is what token i adds to a text; ``special`` are the ids of special tokens.
    ``strips``: the tokenizer leaves out a space that begins a text."""

    text: tuple[bytes, ...]
    special: frozenset[int]
    strips: bool


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: Any, size: int) -> TokenBytes:
    """The bytes of every token, joined they are the UTF-8 of ``decode``. For byte-level tokenizers,
    and those whose ``<0x0A>`` are bytes (SentencePiece), and all that have whole characters only.
    ``size`` is the tokenizer's: it changes as tokens are added."""
    backend = tokenizer.backend_tokenizer
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    names = [backend.id_to_token(i) or "" for i in range(size)]
    if '"ByteLevel"' in decoder:
        byte_of = {character: bytes([b]) for b, character in byte_alphabet().items()}
        text = [
            b"".join(map(byte_of.get, name)) if byte_of.keys() >= set(name) else name.encode()
            for name in names
        ]
        return TokenBytes(tuple(text), _special_ids(tokenizer), strips=False)
    # What a token adds to a text, whatever the decoder does at its beginning.
    first = next(i for i, name in enumerate(names) if name.isascii() and name.isalnum())
    base = backend.decode([first])
    pairs = backend.decode_batch([[first, i] for i in range(size)], skip_special_tokens=False)
    text = [pair[len(base) :].encode() for pair in pairs]
    if '"ByteFallback"' in decoder:
        for i, name in enumerate(names):
            if re.fullmatch("<0x[0-9A-F]{2}>", name):
                text[i] = bytes([int(name[3:5], 16)])
    spaced = next((i for i, t in enumerate(text) if t.startswith(b" ") and len(t) > 1), None)
    strips = spaced is not None and not backend.decode([spaced]).startswith(" ")
    return TokenBytes(tuple(text), _special_ids(tokenizer), strips)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)


def byte_alphabet() -> dict[int, str]:
    """The character of each byte in byte-level tokens: GPT-2's ``bytes_to_unicode``."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
