"""--profile: a trace of the steps that were asked for, and an error that names what can't be."""

import jax
import jax.numpy as jnp
import pytest

from llmzoo_jax.profiling import ProfileError, Trace


def steps(trace, first, last):
    step = jax.jit(lambda x: x @ x)
    for number in range(first, last + 1):
        x = trace.run(number, step, jnp.ones((8, 8)))
    trace.close()
    return x


def traces(folder):
    return list(folder.glob("profile/plugins/profile/*/*.xplane.pb"))


def test_a_trace_of_the_steps_is_written(tmp_path):
    assert float(steps(Trace("2:3", tmp_path, start=0, total=4), 1, 4)[0, 0]) == 8
    (path,) = traces(tmp_path)
    assert b"train" in path.read_bytes()


def test_a_run_that_stops_within_the_steps_writes_what_it_has(tmp_path):
    steps(Trace("2:9", tmp_path, start=0, total=9), 1, 2)
    assert len(traces(tmp_path)) == 1


def test_without_the_flag_nothing_is_traced(tmp_path):
    steps(Trace("", tmp_path, start=0, total=4), 1, 4)
    assert not traces(tmp_path)


@pytest.mark.parametrize("spec", ["3", "a:b", "4:3", "0:2", "5:11", "1:4"])
def test_steps_that_this_process_does_not_do_are_refused(spec, tmp_path):
    with pytest.raises(ProfileError, match=f"--profile={spec}: "):
        Trace(spec, tmp_path, start=4 if spec == "1:4" else 0, total=10)
