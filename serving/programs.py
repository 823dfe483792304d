"""The programs of an engine, lowered from shapes alone: for the devices here, or for others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from serving import steps

SCORED_PAGES = 2
TURN = 256  # pages that attention takes at once, at most, where there are thousands of cores
ON_CHIP = 16 * 2**20  # bytes of them on a TPU, so that they need not go back to main memory


def row_sizes(options: Any) -> list[int]:
    """Of how many rows there is a program."""
    return _sizes(options.max_batch, only_largest=options.deterministic)


def block_size(options: Any, platform: str) -> int:
    """Tokens of a page that are filled as one: half of it on a CPU, which takes as long for a place
    without a token as for one with."""
    size = options.page_size
    return size // 2 if platform == "cpu" and size % 2 == 0 else size


def block_counts(options: Any, platform: str) -> list[int]:
    """Of how many blocks there is a program that fills them."""
    blocks = options.prefill_tokens // block_size(options, platform)
    return _sizes(blocks, only_largest=options.deterministic)


def begin_sizes(options: Any, platform: str) -> list[int]:
    """How many tokens of a page a first step reads."""
    if options.deterministic:
        return []
    return sorted({block_size(options, platform), options.page_size})


def most_blocks(options: Any, platform: str, *, scored: bool) -> int:
    """That one call fills. Few where their tokens are scored: that has the logits of all places at
    once."""
    most = block_counts(options, platform)[-1]
    scored_most = SCORED_PAGES * options.page_size // block_size(options, platform)
    return min(scored_most, most) if scored else most


def blocks(options: Any, platform: str, count: int) -> steps.Blocks:
    """Empty ones."""
    tokens = np.zeros((count, block_size(options, platform)), np.int32)
    one = np.zeros(count, np.int32)
    tables = np.zeros((count, options.pages_a_row + 1), np.int32)
    return steps.Blocks(one, one.copy(), tokens, tokens.copy(), tables)


def turn(state: steps.State, platform: str, rows: int) -> int:
    """How many pages attention takes at once."""
    if platform == "cpu":
        return min(32, max(8, 2 * rows))
    pages = state.cache.k[0].values
    page = math.prod(pages.sharding.shard_shape(pages.shape)[1:]) * pages.dtype.itemsize
    most = max(8, ON_CHIP // page) if platform == "tpu" else TURN
    return min(TURN, most, 16 * rows)


def pair_up(
    options: Any, state: steps.State, platform: str, tables: Sequence[Sequence[int]], rows: int
) -> steps.Work:
    """The work of ``rows`` rows, the first of which have the pages of ``tables``."""
    width = turn(state, platform, rows)
    apart = options.deterministic
    lines = -(-rows * (options.pages_a_row + (width if apart else 0)) // width)
    # A row that is not there has no pairs; ``rows`` marks a pair of nobody.
    tables = [*tables, *([[]] * (rows - len(tables)))]
    return steps.pair_up(tables, lines=lines, width=width, apart=apart)


def names(options: Any, *, platform: str, scores: bool) -> list[tuple[Any, ...]]:
    """Of all programs: their kind, and what it has sizes of. Without ``scores``, those that score
    prompts and count tokens are left out."""
    o, rows = options, row_sizes(options)
    found = [("decode", B) for B in rows] + [("begin", T) for T in begin_sizes(o, platform)]
    if o.speculate:
        found += [("verify", B) for B in rows if o.speculate_rows >= B]
    found += [("prefill", R, False) for R in block_counts(o, platform)]
    found += [("copy_page",)] if o.prefix_cache else []
    if scores:
        found += [("prefill", most_blocks(o, platform, scored=True), True), ("set_counts",)]
    return found


def lower(
    name: tuple[Any, ...],
    options: Any,
    config: Any,
    leaves: Sequence[Any],
    state: steps.State,
    *,
    treedef: Any,
    dtype: str,
    platform: str,
    everywhere: jax.sharding.Sharding | None,
) -> jax.stages.Lowered:
    """One of ``names``. ``leaves`` and ``state`` are arrays, or shapes with shardings; what the
    host gives with each call is where ``everywhere`` says. Call it within ``sharding.use``."""
    o, V, static = options, config.vocab_size, {"treedef": treedef, "dtype": dtype}

    def given(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
        )

    match name:
        case ("set_counts",):
            counts = np.int32(0), np.zeros(V, bool), np.zeros(V, np.int16)
            return steps.set_counts.lower(state, *given(counts))
        case ("copy_page",):
            return steps.copy_page.lower(state, *given((np.int32(0), np.int32(0))))
        case ("prefill", R, scored):
            args = given((blocks(o, platform, R), pair_up(o, state, platform, [], R)))
            return steps.prefill.lower(leaves, state, *args, scored=scored, **static)
        case (kind, size):
            B = 1 if kind == "begin" else size
            work = pair_up(o, state, platform, [], B)
            rows = given((steps.pack_rows(B, o.pages_a_row + 1), work))
            args = (leaves, state, *rows, given(jax.eval_shape(lambda: steps.no_extras(B, V))))
            if kind == "begin":
                return steps.begin.lower(*args, given(np.zeros((1, size), np.int32)), **static)
            if kind == "decode":
                return steps.decode.lower(*args, given(np.int32(1)), window=o.window, **static)
            drafts = given(np.full((B, o.speculate), -1, np.int32))
            return steps.verify.lower(*args, drafts, **static)


def _sizes(largest: int, *, only_largest: bool) -> list[int]:
    """1, 2, 4, .. and ``largest``."""
    if only_largest:
        return [largest]
    return sorted({largest, *(1 << i for i in range(largest.bit_length()) if 1 << i < largest)})
