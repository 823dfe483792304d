"""The programs that an engine runs on the device: prefill pages, decode a window of steps, or
verify guesses.

They get all they need of their rows with each call, in small arrays, and change nothing but the
cache and the counts for penalties, in place. Their shapes depend on the number of rows alone, of
which there are a few sizes, so all are compiled before the first request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmzoo_jax import models, sharding
from llmzoo_jax.models import KVCache
from llmzoo_jax.models.paged_attention import AXES, PageView, init_pages
from llmzoo_jax.sampling import Params, Penalties, choose, penalise
from serving import adapters
from serving.requests import MAX_BIAS, MAX_LOGPROBS, MAX_STOP_IDS

OWN_STOP_IDS = 8  # of a model, besides those of a request
INTS = (
    "last", "position", "slot", "adapter", "active", "left", "min_left", "seed", "top_k",
    "logprobs",
)  # fmt: skip
FLOATS = (
    "temperature", "top_p", "min_p", "repetition", "presence", "frequency",
)  # fmt: skip
COUNTS = (None, "vocab")  # logical axes
STOPS = slice(len(INTS) + len(FLOATS), len(INTS) + len(FLOATS) + MAX_STOP_IDS + OWN_STOP_IDS)


class State(NamedTuple):
    """What stays on the device. ``counts`` int16 and ``in_prompt`` bool ``[slots,V]``: tokens of
    the answer and of the prompt, of rows with penalties."""

    cache: KVCache
    counts: jax.Array
    in_prompt: jax.Array


class Work(NamedTuple):
    """Pairs of rows and pages, as ``PageView`` has them."""

    rows: np.ndarray
    pages: np.ndarray
    indices: np.ndarray
    turns: np.int32


class Blocks(NamedTuple):
    """R parts of pages that are to be filled, T tokens each; int32. ``starts[R]``: their first
    positions; ``targets[R,T]``: the tokens after ``tokens[R,T]``; ``tables[R,M]``: the pages of
    their rows."""

    adapters: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    tables: np.ndarray


class Extras(NamedTuple):
    """What few rows need: tokens with a bias, ``[B,MAX_BIAS]`` (id -1: none), and the tokens that a
    grammar allows, as bits, int32 ``[B,ceil(V/32)]``."""

    bias_ids: Any
    bias: Any
    allowed: Any


class Window(NamedTuple):
    """What W steps gave: ``tokens`` int32 ``[W,B]``, -1 where a row had ended; log-probabilities of
    the chosen, ``[W,B]``, and of the likeliest, ``[W,B,MAX_LOGPROBS]``, where a row asked."""

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def init_state(
    config: Any, *, num_pages: int, page_size: int, slots: int, kv_dtype: Any, mesh: Mesh | None
) -> State:
    """``num_pages`` without page 0. On a mesh, pages are split by heads, counts by tokens."""
    shape = (num_pages + 1, models.kv_heads(config), page_size, config.head_dim)
    where = mesh and sharding.sharding_of(shape, AXES, mesh, name="pages")
    layers = [
        [init_pages(*shape, kv_dtype, device=where) for _ in range(config.num_layers)] for _ in "kv"
    ]
    shape = (slots, config.vocab_size)
    where = mesh and sharding.sharding_of(shape, COUNTS, mesh, name="counts", uneven="replicate")
    counts, in_prompt = (jnp.zeros(shape, dtype, device=where) for dtype in (jnp.int16, bool))
    return State(KVCache(*map(tuple, layers)), counts, in_prompt)


def _state(cache: KVCache, counts: jax.Array, in_prompt: jax.Array) -> State:
    """Laid out as ``init_state`` has it, so that any program takes what another one gave."""
    keep = functools.partial(sharding.constrain, axes=COUNTS, uneven="replicate")
    return State(cache, keep(counts), keep(in_prompt))


def no_extras(rows: int, vocab_size: int) -> Extras:
    return Extras(
        jnp.full((rows, MAX_BIAS), -1, jnp.int32),
        jnp.zeros((rows, MAX_BIAS), jnp.float32),
        jnp.full((rows, -(-vocab_size // 32)), -1, jnp.int32),
    )


def pack_rows(rows: int, tables: int) -> np.ndarray:
    """An empty int32 ``[rows, fields]``: ``INTS``, ``FLOATS``, stop ids, the table of pages."""
    packed = np.zeros((rows, STOPS.stop + tables), np.int32)
    packed[:, STOPS] = -1
    ones = np.float32(1.0).view(np.int32)
    for name in ("top_p", "repetition"):
        packed[:, len(INTS) + FLOATS.index(name)] = ones
    return packed


def _unpack(rows: jax.Array) -> dict[str, jax.Array]:
    fields = {name: rows[:, i] for i, name in enumerate(INTS)}
    floats = jax.lax.bitcast_convert_type(rows[:, len(INTS) : STOPS.start], jnp.float32)
    return fields | {name: floats[:, i] for i, name in enumerate(FLOATS)}


def pair_up(tables: Sequence[Sequence[int]], *, lines: int, width: int, apart: bool) -> Work:
    """The work of rows with these pages. ``apart``: no two rows share a line, so that how a row's
    sums are made does not depend on other rows."""
    empty = len(tables)
    parts: list[tuple[int, int, int]] = []
    for row, pages in enumerate(tables):
        parts += [(row, page, index) for index, page in enumerate(pages)]
        if apart:
            parts += [(empty, 0, 0)] * (-len(parts) % width)
    work = np.zeros((3, lines * width), np.int32)
    work[0] = empty
    if parts:
        work[:, : len(parts)] = np.asarray(parts, np.int32).T
    rows, pages, indices = work.reshape(3, lines, width)
    return Work(rows, pages, indices, np.int32(-(-len(parts) // width)))


@functools.partial(
    jax.jit, static_argnames=("treedef", "window", "dtype"), donate_argnames=("state",)
)
def decode(
    leaves, state: State, rows, work: Work, extras: Extras, limit, *, treedef, window: int, dtype
) -> tuple[State, Window]:
    """Up to ``limit`` steps (at most ``window``) of ``rows[B,fields]``, until all have ended."""
    model = jax.tree.unflatten(treedef, leaves)
    c = _controls(rows, extras, model.config.vocab_size)
    row, B = c.row, len(rows)
    adapters.select(model, row["adapter"])

    def step(carry):
        i, last, position, active, state, out = carry
        view = PageView(position[:, None], c.tables, *work, one_page=True)
        x, cache = model.hidden(
            last[:, None], view, position[:, None], kv_cache=state.cache, dtype=jnp.dtype(dtype)
        )
        raw = model.logits(x[:, 0])  # [B,V]
        token = choose(c.constrain(raw, state, i), position + 1, c.params)
        new = (jnp.where(active, token, -1), *_logprobs_if_asked(raw, token, row))
        out = Window(*(old.at[i].set(x) for old, x in zip(out, new, strict=True)))
        counts = c.count(state.counts, token, active)
        stopped = (token[:, None] == c.stops).any(-1) | (i + 1 >= row["left"])
        # A row that has ended stays where it is, and what it writes there is overwritten.
        return (
            i + 1,
            jnp.where(active, token, last),
            jnp.where(active, position + 1, position),
            active & ~stopped,
            _state(cache, counts, state.in_prompt),
            out,
        )

    out = Window(
        jnp.full((window, B), -1, jnp.int32),
        jnp.zeros((window, B)),
        jnp.zeros((window, B, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((window, B, MAX_LOGPROBS)),
    )
    start = (jnp.int32(0), row["last"], row["position"], row["active"] > 0, state, out)
    *_, state, out = jax.lax.while_loop(lambda x: (x[0] < limit) & x[3].any(), step, start)
    return state, out


@functools.partial(jax.jit, static_argnames=("treedef", "dtype"), donate_argnames=("state",))
def begin(
    leaves, state: State, rows, work: Work, extras: Extras, tokens, *, treedef, dtype
) -> tuple[State, Window]:
    """The first step of one row, which reads ``tokens[1,T]`` at once: its last page, from the start
    of that to the row's last token, and whatever follows."""
    model = jax.tree.unflatten(treedef, leaves)
    c = _controls(rows, extras, model.config.vocab_size)
    row, size = c.row, state.cache.k[0].values.shape[2]
    adapters.select(model, row["adapter"])
    last = row["position"] % size  # [1]
    positions = (row["position"] - last)[:, None] + jnp.arange(tokens.shape[1])
    view = PageView(positions, c.tables, *work, one_page=True)
    x, cache = model.hidden(tokens, view, positions, kv_cache=state.cache, dtype=jnp.dtype(dtype))
    raw = model.logits(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])  # [1,V]
    token = choose(c.constrain(raw, state, 0), row["position"] + 1, c.params)
    counts = c.count(state.counts, token, row["active"] > 0)
    out = Window(*(x[None] for x in (token, *_logprobs_if_asked(raw, token, row))))
    return _state(cache, counts, state.in_prompt), out


@functools.partial(jax.jit, static_argnames=("treedef", "dtype"), donate_argnames=("state",))
def verify(
    leaves, state: State, rows, work: Work, extras: Extras, drafts, *, treedef, dtype
) -> tuple[State, Window]:
    """One step of ``rows`` over their last token and ``drafts[B,k]``, guesses of the next ones (-1:
    none). A row gets the tokens that it would have got one by one: each place draws with its own
    key, and what follows a wrong guess is -1. A row with a guess has no penalties, bias or grammar,
    and is past its ``min_tokens``."""
    model = jax.tree.unflatten(treedef, leaves)
    c = _controls(rows, extras, model.config.vocab_size)
    row, (B, k) = c.row, drafts.shape
    adapters.select(model, row["adapter"])
    tokens = jnp.concatenate([row["last"][:, None], jnp.maximum(drafts, 0)], axis=1)  # [B,1+k]
    positions = row["position"][:, None] + jnp.arange(k + 1)
    view = PageView(positions, c.tables, *work)
    x, cache = model.hidden(tokens, view, positions, kv_cache=state.cache, dtype=jnp.dtype(dtype))
    raw = model.logits(x)  # [B,1+k,V]
    logits = raw.at[:, 0].set(c.constrain(raw[:, 0], state, 0))
    params = Params(*(jnp.repeat(p, k + 1) for p in c.params))
    raw, logits = (y.reshape(B * (k + 1), -1) for y in (raw, logits))
    chosen = choose(logits, positions.reshape(-1) + 1, params)
    logprobs = _logprobs_if_asked(raw, chosen, row)
    chosen = chosen.reshape(B, k + 1)
    right = jnp.cumprod(drafts == chosen[:, :-1], axis=1)  # [B,k]
    active = (row["active"] > 0)[:, None]
    reached = jnp.concatenate([active, active & (right > 0)], axis=1)
    counts = c.count(state.counts, chosen[:, 0], row["active"] > 0)
    rest = (x.reshape(B, k + 1, *x.shape[1:]) for x in logprobs)
    out = (jnp.where(reached, chosen, -1), *rest)
    window = Window(*(jnp.swapaxes(x, 0, 1) for x in out))
    return _state(cache, counts, state.in_prompt), window


class _Controls(NamedTuple):
    """What rows ask for. ``constrain(logits[B,V], state, steps)``: penalties, bias, what a grammar
    allows, no stop before ``min_tokens``. ``count(counts, token[B], active[B])``."""

    row: dict[str, jax.Array]
    stops: jax.Array
    tables: jax.Array
    params: Params
    constrain: Callable
    count: Callable


def _controls(rows: jax.Array, extras: Extras, V: int) -> _Controls:
    row = _unpack(rows)
    slot, stops = row["slot"], rows[:, STOPS]
    params = Params(
        row["temperature"], row["top_k"], row["top_p"], row["min_p"],
        jax.lax.bitcast_convert_type(row["seed"], jnp.uint32),
    )  # fmt: skip
    penalties = Penalties(row["repetition"], row["presence"], row["frequency"])
    penalised = (penalties.repetition != 1) | (penalties.presence != 0) | (penalties.frequency != 0)
    everyone = jnp.arange(len(rows))[:, None]

    def constrain(logits, state, generated):
        early = generated < row["min_left"]
        asked = penalised | early
        asked |= (extras.bias_ids >= 0).any(-1) | (extras.allowed != -1).any(-1)
        # One condition around all: each copies the logits, even where it is false.
        apply = functools.partial(constrain_some, early=early, state=state)
        return _where_asked(asked.any(), apply, logits)

    def constrain_some(logits, early, state):
        logits = _where_asked(
            penalised.any(),
            lambda x: penalise(x, state.in_prompt[slot], state.counts[slot], penalties), logits,
        )  # fmt: skip
        ids = jnp.where(extras.bias_ids < 0, V, extras.bias_ids)  # V: out of range, dropped
        logits = _where_asked(
            (extras.bias_ids >= 0).any(),
            lambda x: x.at[everyone, ids].add(extras.bias, mode="drop"), logits,
        )  # fmt: skip
        logits = _where_asked(
            (extras.allowed != -1).any(),
            lambda x: jnp.where(_bits(extras.allowed, V), x, -jnp.inf), logits,
        )  # fmt: skip
        ids = jnp.where(early[:, None] & (stops >= 0), stops, V)
        return _where_asked(
            early.any(), lambda x: x.at[everyone, ids].set(-jnp.inf, mode="drop"), logits
        )

    def count(counts, token, active):
        return counts.at[slot, token].add((active & penalised).astype(counts.dtype))

    return _Controls(row, stops, rows[:, STOPS.stop :], params, constrain, count)


def _where_asked(asked: jax.Array, change: Callable, logits: jax.Array) -> jax.Array:
    """``change(logits)``, or ``logits``; split over devices by tokens in both cases, else the
    compiler may gather them, even where nobody asked."""
    keep = functools.partial(sharding.constrain, axes=COUNTS, uneven="replicate")
    return keep(jax.lax.cond(asked, lambda x: keep(change(x)), keep, logits))


class Scores(NamedTuple):
    """Of each place of R blocks: the log-probability of the token after it, and the likeliest."""

    logprobs: jax.Array  # [R,T]
    top_ids: jax.Array  # [R,T,MAX_LOGPROBS]
    top_logprobs: jax.Array


@functools.partial(
    jax.jit, static_argnames=("treedef", "scored", "dtype"), donate_argnames=("state",)
)
def prefill(
    leaves, state: State, blocks: Blocks, work: Work, *, treedef, scored: bool, dtype
) -> tuple[State, Scores | None]:
    """Fills pages, or parts of them."""
    model = jax.tree.unflatten(treedef, leaves)
    R, T = blocks.tokens.shape
    adapters.select(model, blocks.adapters)
    positions = blocks.starts[:, None] + jnp.arange(T)  # [R,T]
    view = PageView(positions, blocks.tables, *work, one_page=True)
    x, cache = model.hidden(
        blocks.tokens, view, positions, kv_cache=state.cache, dtype=jnp.dtype(dtype)
    )
    state = _state(cache, state.counts, state.in_prompt)
    if not scored:
        return state, None
    logits = model.logits(x.reshape(R * T, -1))
    scores = _logprobs(logits, blocks.targets.reshape(-1))
    return state, Scores(*(y.reshape(R, T, *y.shape[1:]) for y in scores))


@functools.partial(jax.jit, donate_argnames=("state",))
def set_counts(state: State, slot, in_prompt, counts) -> State:
    """The tokens of a new row with penalties: bool and int16 ``[V]``."""
    return _state(
        state.cache,
        state.counts.at[slot].set(counts),
        state.in_prompt.at[slot].set(in_prompt),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def copy_page(state: State, source, target) -> State:
    """Keys and values of the page ``source``, in the page ``target``, too."""
    return state._replace(cache=jax.tree.map(lambda x: _copy(x, source, target), state.cache))


def _copy(pages: jax.Array, source, target) -> jax.Array:
    def slices(x):
        page = jax.lax.dynamic_index_in_dim(x, source)
        return jax.lax.dynamic_update_index_in_dim(x, page, target, axis=0)

    def scatter(x):  # with page 0 beside it: of one alone a TPU makes slices, and copies all
        return x.at[jnp.stack([target, 0])].set(x[jnp.stack([source, 0])])

    return jax.lax.platform_dependent(pages, cpu=slices, default=scatter)


def _logprobs_if_asked(logits: jax.Array, tokens: jax.Array, row: dict[str, jax.Array]):
    n = len(tokens)
    return jax.lax.cond(
        (row["logprobs"] > 0).any(), lambda: _logprobs(logits, tokens),
        lambda: (jnp.zeros(n), jnp.zeros((n, MAX_LOGPROBS), jnp.int32),
                 jnp.zeros((n, MAX_LOGPROBS))),
    )  # fmt: skip


def _logprobs(logits: jax.Array, tokens: jax.Array):
    """float32 ``[B]`` of ``tokens``, and ids and values of the likeliest, ``[B,MAX_LOGPROBS]``."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logprobs.shape[-1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - top.shape[-1]))
    return own, jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(top, pad, constant_values=-jnp.inf)


def _bits(words: jax.Array, n: int) -> jax.Array:
    """int32 ``[B,ceil(n/32)]`` -> bool ``[B,n]``, the lowest bit first."""
    bits = (words[:, :, None] >> jnp.arange(32)) & 1
    return (bits == 1).reshape(len(words), -1)[:, :n]
