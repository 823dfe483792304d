"""Batched decoding with a key/value cache: greedy and sampled. Token ids in, token ids out.

The prompts are prefilled in one call, padded to a bucket; then windows of steps run on the device
(``lax.while_loop``), and between them the host looks for stop strings and grows the cache. A row's
tokens depend on its prompt, its parameters and its seed, not on its batch-mates.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llmzoo_jax import models, sharding
from llmzoo_jax.errors import InputError
from llmzoo_jax.models import KVCache
from llmzoo_jax.sampling import Params, choose

WINDOW = 16  # tokens decoded in one call; a stop string is noticed at its end
STREAM_WINDOW = 4  # the same where somebody watches
BUCKET = 32  # see _bucket; prompts and caches have few sizes, so that little is compiled


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; the filters apply in HF's order:
    temperature, top-k, top-p. ``top_k`` 0 and ``top_p`` 1 are off."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, good in (
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("temperature", self.temperature >= 0),
            ("top_k", self.top_k >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("seed", 0 <= self.seed < 2**32),
        ):
            if not good:
                raise InputError(f"{name}={getattr(self, name)} is out of range")


@dataclass(frozen=True)
class Generated:
    """One row: the new tokens, without the stop token, and why they end: "stop" or "length"."""

    tokens: list[int]
    finish_reason: str


class DecodeState(NamedTuple):
    """What a window of decode steps carries. B rows, S cache slots, M new tokens at most."""

    tokens: jax.Array  # int32[B,M], the new tokens so far
    count: jax.Array  # int32, how many there are (the same for all rows)
    last: jax.Array  # int32[B], the newest token, not in the cache yet
    positions: jax.Array  # int32[B], where it goes in the cache
    done: jax.Array  # bool[B], a stop token came
    kv_cache: KVCache


def generate(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    stopped: Callable[[int, list[int]], bool] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    dtype: str = "float32",
) -> list[Generated]:
    """Continues ``prompts`` (lists of token ids, of any lengths) as one batch.

    ``on_tokens(row, tokens so far)`` is called after every window, for streaming; then
    ``stopped(row, tokens so far)`` is asked whether the row has ended, for example because its text
    has a stop string. Row i samples with the seed ``sampling.seed + i``.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or 0 in lengths:
        raise InputError("generate: every prompt needs at least one token")
    B, M = len(prompts), sampling.max_new_tokens
    window = WINDOW if on_tokens is None else STREAM_WINDOW
    T = _bucket(max(lengths))
    used = max(lengths)  # cache slots
    tokens = np.zeros((B, T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    params = None if sampling.temperature == 0 else _params(sampling, B)
    stops = np.asarray(sorted(set(stop_ids)) or [-1], np.int32)
    state = _prefill(
        model, tokens, np.asarray(lengths, np.int32), params, stops,
        slots=_bucket(used + window), new=_bucket(M), dtype=dtype,
    )  # fmt: skip
    ended, rows = [False] * B, [[] for _ in range(B)]
    while True:
        count = int(state.count)
        new, done = np.asarray(state.tokens)[:, :count], np.asarray(state.done)
        for i, row in enumerate(new.tolist()):
            if ended[i]:  # what the device wrote after that is not the row's
                continue
            rows[i] = _until_stop(row, stops)
            if on_tokens is not None:
                on_tokens(i, rows[i])
            ended[i] = bool(done[i]) or (stopped is not None and stopped(i, rows[i]))
        if all(ended) or count >= M:
            break
        used += window
        state = _decode_window(
            model, _grow(state._replace(done=jnp.asarray(ended)), slots=_bucket(used)),
            params, stops, limit=min(count + window, M), dtype=dtype,
        )  # fmt: skip
    return [Generated(row, "stop" if ended[i] else "length") for i, row in enumerate(rows)]


def _params(sampling: Sampling, rows: int) -> Params:
    """Row i samples with the seed ``sampling.seed + i``."""
    return Params(
        temperature=np.full(rows, sampling.temperature, np.float32),
        top_k=np.full(rows, min(sampling.top_k, 2**31 - 1), np.int32),
        top_p=np.full(rows, sampling.top_p, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=(sampling.seed + np.arange(rows)).astype(np.uint32),
    )


def _bucket(n: int) -> int:
    """The first of 32, 48, 64, 96, 128, 192, .. that is not below ``n``."""
    sizes = (size << k for k in itertools.count() for size in (BUCKET, BUCKET * 3 // 2))
    return next(size for size in sizes if size >= n)


def _until_stop(row: list[int], stops: np.ndarray) -> list[int]:
    for i, token in enumerate(row):
        if token in stops:
            return row[:i]
    return row


# --- on the device ------------------------------------------------------------------------------


@functools.partial(sharding.jit, static_argnames=("slots", "new", "dtype"))
def _prefill(
    model, tokens, lengths, params: Params | None, stops, *, slots: int, new: int, dtype: str
) -> DecodeState:
    """Fills the cache with ``tokens[B,T]`` (right-padded) and chooses the first new token. What
    the padding writes into the cache lies behind every query until a token overwrites it."""
    B, T = tokens.shape
    cache = models.init_cache(
        model.config, B, slots, dtype=jnp.dtype(dtype), unrolled=isinstance(model.blocks, tuple)
    )
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = models.cache_mask(positions)
    hidden, cache = model.hidden(tokens, mask, positions, kv_cache=cache, dtype=jnp.dtype(dtype))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B,D]
    chosen = choose(model.logits(last), lengths, params)
    return DecodeState(
        tokens=jnp.zeros((B, new), jnp.int32).at[:, 0].set(chosen),
        count=jnp.int32(1),
        last=chosen,
        positions=lengths,
        done=(chosen[:, None] == stops).any(-1),
        kv_cache=cache,
    )


def _grow(state: DecodeState, *, slots: int) -> DecodeState:
    """The state with a cache of ``slots`` slots at least. Attention reads every slot, used or not,
    so the cache follows the tokens, in few sizes, since each is compiled."""
    more = slots - jax.tree.leaves(state.kv_cache)[0].shape[-2]
    return state if more <= 0 else _pad_cache(state, more=more)


@functools.partial(jax.jit, static_argnames=("more",))
def _pad_cache(state: DecodeState, *, more: int) -> DecodeState:
    def pad(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

    return state._replace(kv_cache=jax.tree.map(pad, state.kv_cache))


@functools.partial(sharding.jit, static_argnames=("dtype",), donate_argnames=("state",))
def _decode_window(
    model, state: DecodeState, params: Params | None, stops, *, limit, dtype: str
) -> DecodeState:
    """Decodes until ``state.count`` is ``limit`` or every row is done."""

    def step(state: DecodeState) -> DecodeState:
        positions = state.positions[:, None]  # [B,1]
        hidden, cache = model.hidden(
            state.last[:, None],
            models.cache_mask(positions),
            positions,
            kv_cache=state.kv_cache,
            dtype=jnp.dtype(dtype),
        )
        positions = state.positions + 1
        chosen = choose(model.logits(hidden[:, 0]), positions, params)
        return DecodeState(
            tokens=jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.count)),
            count=state.count + 1,
            last=chosen,
            positions=positions,
            done=state.done | (chosen[:, None] == stops).any(-1),
            kv_cache=cache,
        )

    return jax.lax.while_loop(lambda s: (s.count < limit) & ~s.done.all(), step, state)


def prepare(model: nnx.Module, mesh: Mesh | None = None) -> nnx.Module:
    """The model in the form that decodes fastest: one block a layer, where a scan would copy each
    layer's cache for every token. On a ``mesh`` (``sharding.tensor_mesh``), where its parameters
    may be already, it is laid out by their logical axes."""
    if isinstance(model.blocks, tuple):
        return model
    panels = sharding.one_thread_a_device(mesh)
    return lay_out(unstacked(model, shards=sharding.ways(mesh), panels=panels), mesh)


def unstacked(model: nnx.Module, *, shards: int, panels: bool = False) -> nnx.Module:
    """One block a layer, joined for so many devices."""
    blocks = models.unstack(model.blocks, shards=shards, panels=panels)
    model = jax.tree.map(lambda x: x, model)  # the same arrays in a new object
    model.blocks = nnx.data(blocks)
    return model


def lay_out(model: nnx.Module, mesh: Mesh | None) -> nnx.Module:
    """A prepared model on a mesh. Embeddings whose size it does not divide are whole everywhere."""
    if mesh is None:
        return model
    if model.head is not None:
        model.head.join(shards=sharding.ways(mesh), panels=sharding.one_thread_a_device(mesh))
    return jax.device_put(model, sharding.tree_shardings(model, mesh, uneven="replicate"))
