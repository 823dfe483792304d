"""Compiled programs, kept in a folder: a run that goes on compiles nothing again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_in(folder: str | Path | None, *, least_seconds: float = 1.0) -> Iterator[None]:
    """Within it, what takes ``least_seconds`` or more to compile is read from ``folder`` or written
    there; None: it is compiled. A folder that JAX_COMPILATION_CACHE_DIR names is taken instead, and
    all else that JAX was told of it. A file that can't be read is compiled again, with a warning.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    _use(None if folder is None else str(Path(folder).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        _use(None)


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # JAX opens the folder once, at the first compilation
