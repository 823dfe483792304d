"""How likely a model finds given texts: for perplexity, and for lm-evaluation-harness.

A request is a context and a continuation, in token ids. Requests whose tokens are the same but for
the last one share a row, as the choices of a multiple-choice question do; rows of about one length
are computed together, and logits only where a continuation is: never ``[B,T,V]``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmzoo_jax import models, sharding
from llmzoo_jax.errors import InputError

CHUNK = 256  # positions whose logits are there at once
BUCKET = 32  # row lengths have few sizes, so that little is compiled

Tokens = Sequence[int]


class Likelihood(NamedTuple):
    logprob: float  # natural logarithm, of the whole continuation
    greedy: bool  # whether greedy decoding would have written it


def likelihoods(
    model: Any,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    max_length: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Likelihood]:
    """Of each ``(context, continuation)``; ``model`` is what ``llmzoo_jax.load`` gives.

    Contexts that are too long for ``max_length`` positions lose their beginning. ``on_done`` is
    told how many requests each batch has answered. Raises InputError for an empty context or
    continuation, and for a continuation that is too long itself.
    """
    by_row: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(
                f"request {i + 1}: {len(context)} tokens of context and {len(continuation)} to"
                f" score; it needs 1 or more of each, and at most {max_length} to score"
            )
        row = (*context, *continuation)[:-1][-max_length:]
        by_row.setdefault(row, []).append(i)
    results: list[Likelihood | None] = [None] * len(requests)
    rows = sorted(by_row, key=lambda row: (-len(row), row))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    most = max(
        (sum(len(requests[i][1]) for row in batch for i in by_row[row]) for batch in batches),
        default=0,
    )
    for batch in batches:
        asked = [(r, i) for r, row in enumerate(batch) for i in by_row[row]]
        targets = [requests[i][1] for _, i in asked]
        spans = [
            (r, len(batch[r]) - len(target)) for (r, _), target in zip(asked, targets, strict=True)
        ]
        scored = _batch(model, batch, spans, targets, (batch_size, most))
        for (_, i), one in zip(asked, scored, strict=True):
            results[i] = one
        on_done(len(asked))
    return results  # type: ignore[return-value]  (each request is in one row)


def _batch(
    model: Any,
    batch: Sequence[Tokens],
    spans: Sequence[tuple[int, int]],
    targets: Sequence[Tokens],
    sizes: tuple[int, int],
) -> list[Likelihood]:
    """``spans`` has, for each target, its row and the position before its first token. ``sizes``
    are the rows and the scored tokens of all batches, so that only another length is compiled."""
    batch_size, most = sizes
    T = bucket(max(map(len, batch)))
    tokens = np.zeros((batch_size, T), np.int32)
    for row, ids in zip(tokens, batch, strict=False):
        row[: len(ids)] = ids
    counts = [len(target) for target in targets]
    N = -(-most // CHUNK) * CHUNK
    rows, positions, wanted = (np.zeros(N, np.int32) for _ in range(3))
    rows[: sum(counts)] = np.repeat([row for row, _ in spans], counts)
    positions[: sum(counts)] = np.concatenate(
        [np.arange(first, first + count) for (_, first), count in zip(spans, counts, strict=True)]
    )
    wanted[: sum(counts)] = list(itertools.chain.from_iterable(targets))
    with sharding.use(model.mesh):
        logprobs, best = jax.device_get(
            _score(model.params, tokens, rows, positions, wanted, dtype=model.dtype)
        )
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(logprobs[: sum(counts)].astype(np.float64), starts)
    greedy = np.logical_and.reduceat(best[: sum(counts)], starts)
    return [Likelihood(float(a), bool(b)) for a, b in zip(sums, greedy, strict=True)]


@functools.partial(sharding.jit, static_argnames=("dtype",))
def _score(params, tokens, rows, positions, targets, *, dtype: str):
    """float32 and bool ``[N]``: log-probabilities of ``targets[N]``, each after the token at
    ``positions[N]`` of ``rows[N]`` of ``tokens[B,T]``, and whether no other token has a higher."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = models.packed_mask(jnp.ones_like(tokens))
    x, _ = params.hidden(tokens, mask, places, dtype=jnp.dtype(dtype))  # [B,T,D]
    x = x[rows, positions]  # [N,D]

    def chunk(part):
        hidden, wanted = part
        logits = params.logits(hidden)  # [CHUNK,V]
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), picked >= logits.max(-1)

    parts = (x.reshape(-1, CHUNK, x.shape[-1]), targets.reshape(-1, CHUNK))
    return jax.tree.map(lambda y: y.reshape(-1), lax.map(chunk, parts))


def bucket(n: int) -> int:
    """``n``, rounded up to a multiple of an eighth of a power of two: at most an eighth more."""
    step = max(BUCKET, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def windows(tokens: Tokens, prefix: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """A text in pieces of up to ``longest`` tokens, each scored once: ``(context, continuation)``.
    The first has the token ``prefix`` as its context; the last one as much as fits."""
    tokens, done = list(tokens), 0
    while done < len(tokens):
        end = min(done + longest, len(tokens))
        start = max(end - longest, 0) if done else 0
        before = [tokens[start - 1]] if start else [prefix]
        yield before + tokens[start:done], tokens[done:end]
        done = end


def prefix_token(model: Any) -> int:
    """What the first token of a text is scored after: BOS, else EOS."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.path} has no tokenizer: texts can't be scored")
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise InputError(f"{model.path}: its tokenizer has neither a BOS nor an EOS token")
    return token


def longest(model: Any, default: int = 2048) -> int:
    """Positions that a text may take: the model's, else what its tokenizer names, else the default
    (ALiBi sets no limit)."""
    named = getattr(model.tokenizer, "model_max_length", None) or default
    return model.context or (named if named < 1e9 else default)
