"""A program is compiled once, and read after that, even where what was kept is broken."""

import functools
import logging
import os

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


# --- whole programs -----------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnames="state")
def step(state, x):
    return {"sum": state["sum"] + x, "last": x}


def start(*, key="a", options=None, device=0):
    """(whether it was traced, what it gives), as in a new process."""
    jax.clear_caches()
    here = jax.devices()[device]
    shape = jax.ShapeDtypeStruct((3,), np.float32, sharding=jax.sharding.SingleDeviceSharding(here))
    traced = []

    def lower():
        traced.append(True)
        return step.lower({"sum": shape}, shape)

    program = compile_cache.program(lower, key=key, devices=[here], options=options)
    state = {"sum": jax.device_put(np.float32([1, 2, 3]), here)}
    out = program(state, jax.device_put(np.float32([0.5, 0, 1]), here))
    assert state["sum"].is_deleted()  # it was donated
    assert out["sum"].devices() == {here}
    return bool(traced), {name: x.tolist() for name, x in out.items()}


RESULT = {"sum": [1.5, 2, 4], "last": [0.5, 0, 1]}


def test_a_program_that_is_there_is_not_traced(tmp_path):
    for _ in range(2):
        assert start() == (True, RESULT)  # no folder
    with compile_cache.kept_in(tmp_path, least_seconds=0.0):
        assert start() == (True, RESULT)
        assert start() == (False, RESULT)
        assert start(device=1) == (True, RESULT)
        assert start(device=1) == (False, RESULT)


def test_what_decides_a_program_makes_another(tmp_path, monkeypatch):
    with compile_cache.kept_in(tmp_path, least_seconds=0.0):
        assert start()[0]
        assert start(key=("a", 1))[0]
        assert start(options={"xla_cpu_multi_thread_eigen": False})[0]
        with monkeypatch.context() as settings:
            settings.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " ")
            assert start()[0]
        jax.config.update("jax_default_matmul_precision", "highest")
        try:
            assert start()[0]
        finally:
            jax.config.update("jax_default_matmul_precision", None)
        monkeypatch.setattr(compile_cache, "_versions", lambda: "newer")
        assert start()[0]
        monkeypatch.undo()
        assert not start()[0]


def test_a_change_of_a_source_is_seen(tmp_path):
    def checksum():
        compile_cache.sources.cache_clear()
        return compile_cache.sources(tmp_path)

    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.py").write_text("x = 1\n")
    before = checksum()
    (tmp_path / "notes.txt").write_text("x")
    assert checksum() == before
    (tmp_path / "below" / "a.py").write_text("x = 2\n")
    assert checksum() != before
    (tmp_path / "below" / "a.py").rename(tmp_path / "a.py")
    (tmp_path / "a.py").write_text("x = 1\n")
    assert checksum() != before


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"what?"])
def test_a_damaged_program_is_named_and_made_again(damage, tmp_path, caplog):
    with compile_cache.kept_in(tmp_path, least_seconds=0.0):
        start()
        (path,) = (tmp_path / "programs").iterdir()
        path.write_bytes(damage(path.read_bytes()))
        assert start() == (True, RESULT)
        assert str(path) in caplog.text
        assert start() == (False, RESULT)
        assert list(path.parent.iterdir()) == [path]


def test_where_nothing_can_be_written_it_still_starts(tmp_path, caplog):
    (tmp_path / "programs").write_text("in the way")
    with compile_cache.kept_in(tmp_path, least_seconds=0.0):
        assert start() == (True, RESULT)
        assert str(tmp_path / "programs") in caplog.text
        assert start() == (True, RESULT)


def test_a_disk_that_fills_up_leaves_no_part_of_a_program(tmp_path, monkeypatch, caplog):
    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with compile_cache.kept_in(tmp_path, least_seconds=0.0):
        assert start() == (True, RESULT)
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "programs").iterdir())
