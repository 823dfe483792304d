"""How the next token is chosen from logits, a row at a time: penalties, filters, the draw.

Every row has parameters of its own, and no row's result depends on another row. What no row asks
for is not computed (``lax.cond``), and compiles no other program. Filters find their thresholds by
bisection on the bits of floats, not by sorting, which a CPU does slowly.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens whose probabilities are added up first, when one is drawn


class Params(NamedTuple):
    """Of B rows, each ``[B]``: float32 but ``top_k`` int32 and ``seed`` uint32. Temperature 0 is
    greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def choose(logits: jax.Array, positions: jax.Array, params: Params | None) -> jax.Array:
    """The next token of each row, int32 ``[B]``, from float32 ``logits[B,V]``. Without ``params``
    all are greedy, and nothing else is compiled.

    The filters apply in HF's order: temperature, top-k, top-p, min-p. The key of a draw is made of
    the row's seed and the position ``positions[B]`` of the drawn token, and of nothing else.
    """
    greedy = jax.lax.platform_dependent(logits, cpu=_argmax_by_blocks, default=_argmax)
    if params is None:
        return greedy
    drawn = params.temperature > 0
    filtered = drawn & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))

    def sample():
        x = logits - logits.max(-1, keepdims=True)
        x = x / jnp.where(drawn, params.temperature, 1.0)[:, None]
        x = jax.lax.cond(
            filtered.any(),
            lambda x: filter_logits(x, params.top_k, params.top_p, params.min_p),
            lambda x: x,
            x,
        )
        return draw(x, positions, params.seed)

    sampled = jax.lax.cond(drawn.any(), sample, lambda: greedy)
    return jnp.where(drawn, sampled, greedy)


def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _argmax_by_blocks(logits: jax.Array) -> jax.Array:
    """The same, where XLA's argmax takes one number after the other, but a maximum many at once."""
    blocks = _blocks(logits, -jnp.inf)
    block = _argmax(blocks.max(-1))[:, None]  # [B,1]
    places = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]  # [B,BLOCK]
    return block[:, 0] * BLOCK + _argmax(places)


def _blocks(x: jax.Array, fill: float) -> jax.Array:
    """``[B,V] -> [B,blocks,BLOCK]``."""
    B, V = x.shape
    return jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=fill).reshape(B, -1, BLOCK)


def draw(logits: jax.Array, positions: jax.Array, seeds: jax.Array) -> jax.Array:
    """A token of each row with the probabilities of ``softmax(logits[B,V])``: where one uniform
    number falls among their running sums, by blocks first, so that few sums run."""
    p = _blocks(jnp.exp(logits - logits.max(-1, keepdims=True)), 0.0)  # [B,blocks,BLOCK]
    ends = jnp.cumsum(p.sum(-1), axis=-1)  # [B,blocks]

    def uniform(seed, position):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))

    at = jax.vmap(uniform)(seeds, positions)[:, None] * ends[:, -1:]  # [B,1]
    block = _first_above(ends, at)
    before = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0), axis=1), 0.0)
    p = jnp.take_along_axis(p, block[:, :, None], axis=1)[:, 0]  # [B,BLOCK]
    token = _first_above(jnp.cumsum(p, axis=-1), at - before)
    return (block * BLOCK + token)[:, 0].astype(jnp.int32)


def _first_above(sums: jax.Array, at: jax.Array) -> jax.Array:
    """The first place, ``[B,1]``, where running sums ``[B,n]`` pass ``at[B,1]``; where rounding
    left none, the last at which they grow."""
    whole = (sums < sums[:, -1:]).sum(-1, keepdims=True)  # the first place with the whole sum
    return jnp.minimum((sums <= at).sum(-1, keepdims=True), whole)


def filter_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """-inf for what top-k, then top-p, then min-p, each ``[B]``, leave out of ``logits[B,V]``. As
    HF's ``TopKLogitsWarper`` (tokens tied with the k-th stay), ``TopPLogitsWarper`` (the least
    likely go, as long as their probabilities add up to 1 - top_p at most; one stays) and
    ``MinPLogitsWarper``.
    """
    V = logits.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    order = _ordered(logits)
    kth = _largest(lambda t: (order >= t[:, None]).sum(-1) >= k, len(logits))
    logits = jnp.where(order < kth[:, None], -jnp.inf, logits)

    p = jnp.exp(logits - logits.max(-1, keepdims=True))  # [B,V], 1 at the likeliest
    order = _ordered(p)
    room = (1 - top_p) * p.sum(-1)  # what may go

    def below(t):
        return jnp.where(order < t[:, None], p, 0.0).sum(-1)

    least = _largest(lambda t: below(t) <= room, len(logits))[:, None]  # all below it go
    # Of those tied at the border as many go as there is room for.
    tied = order == least
    weight = jnp.where(tied, p, 0.0).max(-1)
    spare = jnp.floor((room - below(least[:, 0])) / jnp.where(weight > 0, weight, 1.0))
    spare = jnp.minimum(spare.astype(jnp.int32), (order >= least).sum(-1) - 1)
    gone = jax.lax.cond(
        ((spare > 0) & (top_p < 1)).any(),
        lambda: tied & (jnp.cumsum(tied, axis=-1) <= spare[:, None]),
        lambda: jnp.zeros_like(tied),
    )
    gone = ((order < least) | gone) & (top_p < 1)[:, None]
    gone = gone | (p < min_p[:, None])
    return jnp.where(gone, -jnp.inf, logits)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of float32."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # + 0.0: -0.0 and 0.0 are equal
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(good, rows: int) -> jax.Array:
    """The largest uint32 ``t[rows]`` for which ``good(t)``, which holds for all below it, too."""

    def step(i, t):
        more = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(good(more), more, t)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(rows, jnp.uint32))


class Penalties(NamedTuple):
    """Float32 ``[B]``; 1, 0, 0 are off."""

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


def penalise(
    logits: jax.Array, in_prompt: jax.Array, counts: jax.Array, penalties: Penalties
) -> jax.Array:
    """``logits[B,V]`` made less likely for tokens of the prompt (bool ``in_prompt[B,V]``) and of
    the answer so far (``counts[B,V]``): repetition as HF's ``RepetitionPenaltyLogitsProcessor`` on
    both, presence and frequency as OpenAI's API, on the answer."""
    repetition, presence, frequency = (x[:, None] for x in penalties)
    seen = in_prompt | (counts > 0)
    harder = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(seen, harder, logits)
    return logits - frequency * counts - presence * (counts > 0)
