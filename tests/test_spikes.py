"""A step that is not finite, or a spike, changes nothing but the counters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmzoo_jax.config import OptimConfig
from llmzoo_jax.spikes import skip_spikes

CONFIG = OptimConfig(spike_factor=3.0, spike_window=4)
PARAMS = {"w": jnp.array([-0.0, 0.0, 1.5], jnp.float32)}


def run(norms, losses=None, config=CONFIG):
    """(parameters, state) after each step; a gradient of the given norm, a loss of 1."""
    tx = skip_spikes(optax.adam(0.1), config)

    @jax.jit
    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params, state, out = PARAMS, tx.init(PARAMS), []
    for norm, loss in zip(norms, losses or [1.0] * len(norms), strict=True):
        grads = {"w": jnp.array([0.0, norm, 0.0], jnp.float32)}
        params, state = step(params, state, grads, jnp.float32(loss))
        out.append((params, state))
    return out


def equal(one, two):
    leaves = [map(np.asarray, jax.tree.leaves(tree)) for tree in (one, two)]
    return all(a.tobytes() == b.tobytes() for a, b in zip(*leaves, strict=True))


@pytest.mark.parametrize(
    ("norm", "loss"), [(np.inf, 1.0), (np.nan, 1.0), (1.0, np.nan), (1.0, np.inf), (100.0, 1.0)]
)
def test_a_bad_step_leaves_parameters_and_state_bit_for_bit(norm, loss):
    out = run([1, 2, 1, 2, norm, 1], [1, 1, 1, 1, loss, 1])
    (params, before), (same, after), (later, last) = out[3:]
    assert equal(params, same) and equal(before.inner, after.inner)
    assert equal(before.norms, after.norms)
    assert (int(after.skipped), int(after.in_a_row)) == (1, 1)
    assert not equal(same, later)
    assert (int(last.skipped), int(last.in_a_row)) == (1, 0)


def test_a_skipped_step_is_as_if_it_had_not_been():
    without = run([1, 2, 1, 2, 1, 2])[-1]
    within = run([1, 2, 1, np.nan, 2, 50, 60, 1, 2])[-1]
    assert equal(without[0], within[0]) and equal(without[1].inner, within[1].inner)
    assert int(within[1].skipped) == 3


def test_no_step_is_a_spike_before_the_window_is_full():
    assert int(run([1, 100, 1, 100])[-1][1].skipped) == 0
    assert int(run([1, 1, 1, 1, 2.9])[-1][1].skipped) == 0
    assert int(run([1, 1, 1, 1, 3.1])[-1][1].skipped) == 1


def test_the_window_holds_the_last_norms_that_were_taken():
    state = run([1, 2, 3, 4, 5, 99, 6])[-1][1]
    np.testing.assert_array_equal(state.norms, [3, 4, 5, 6])


def test_without_a_factor_only_what_is_not_finite_is_skipped():
    config = dataclasses.replace(CONFIG, spike_factor=0.0)
    state = run([1, 1, 1, 1, 1e6, np.nan, np.nan], config=config)[-1][1]
    assert (int(state.skipped), int(state.in_a_row)) == (2, 2)
