"""A program is compiled once, and read after that, even where what was kept is broken."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmzoo_jax import compile_cache


@pytest.fixture(autouse=True)
def no_folder_of_the_tests_own():
    before = jax.config.jax_compilation_cache_dir
    compile_cache._use(None)
    yield
    compile_cache._use(before)


class Counter(logging.Handler):
    """Counts what JAX says of its cache."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.hits = self.misses = 0

    def emit(self, record):
        text = record.getMessage()
        self.hits += "Persistent compilation cache hit" in text
        self.misses += "PERSISTENT COMPILATION CACHE MISS" in text


def compiled_with(folder, scale):
    """(hits, misses, result) of a program that differs by ``scale``."""
    logger, counter = logging.getLogger("jax._src.compiler"), Counter()
    level = logger.level
    logger.addHandler(counter)
    logger.setLevel(logging.DEBUG)
    try:
        with compile_cache.kept_in(folder, least_seconds=0.0):
            result = jax.jit(lambda x: jnp.sin(x) * scale).lower(jnp.ones(3)).compile()(jnp.ones(3))
    finally:
        logger.removeHandler(counter)
        logger.setLevel(level)
    return counter.hits, counter.misses, np.asarray(result)


def test_a_program_is_compiled_once_and_gives_the_same_bits(tmp_path):
    jax.clear_caches()  # as a new process would begin, here and below
    hits, misses, first = compiled_with(tmp_path, 2.5)
    assert (hits, misses > 0) == (0, True)
    jax.clear_caches()
    hits, misses, second = compiled_with(tmp_path, 2.5)
    assert hits > 0 and misses == 0
    np.testing.assert_array_equal(first, second)
    assert compiled_with(tmp_path, 3.5)[1] > 0  # another program


def test_a_broken_file_is_compiled_again(tmp_path):
    _, _, first = compiled_with(tmp_path, 4.5)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # cut off by a kill
    jax.clear_caches()
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        _, _, second = compiled_with(tmp_path, 4.5)
    np.testing.assert_array_equal(first, second)


def test_a_folder_that_jax_was_told_of_is_taken_and_afterwards_all_is_as_before(tmp_path):
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    assert jax.config.jax_compilation_cache_dir is None
    with compile_cache.kept_in(None):
        assert jax.config.jax_compilation_cache_dir is None
    with compile_cache.kept_in(tmp_path / "a"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")
        with compile_cache.kept_in(tmp_path / "b", least_seconds=0.0):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")
            assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    with compile_cache.kept_in(tmp_path / "b", least_seconds=0.0):
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == least
