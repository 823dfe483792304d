"""Compiled programs, kept in a folder: a run that goes on compiles nothing again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)


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


def program(
    lower: Callable[[], jax.stages.Lowered],
    *,
    key: Any,
    devices: Sequence[jax.Device],
    options: Mapping[str, Any] | None,
) -> jax.stages.Compiled:
    """``lower()``, compiled with ``options`` for ``devices``. Where there is a folder (``kept_in``)
    it is kept there, and not even traced the next time; JAX's own cache finds a program by what
    tracing and lowering it gives, which takes longer than to read it.

    The repr of ``key`` says all that decides the program but for what is asked here: the sources of
    this package, versions, settings and options of JAX and its compiler, and the machine. Whoever
    can write into the folder can have anything run, as with JAX's own.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None or "://" in folder or jax.process_count() > 1:
        return lower().compile(options)
    everything = repr((_versions(), _settings(), list(devices), options, key))
    path = Path(folder) / "programs" / hashlib.sha256(everything.encode()).hexdigest()
    if path.is_file():
        try:
            parts = pickle.loads(path.read_bytes())
            return serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
        except Exception as error:  # anything may come of a damaged file
            log.warning("%s can't be read, so it is compiled again: %r", path, error)
    lowered = lower()
    _use(None)  # what JAX's own cache gives can't be written again: on a CPU it lacks its functions
    try:
        compiled = lowered.compile(options)
    finally:
        _use(folder)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        parts = pickle.dumps(serialize_executable.serialize(compiled))
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(parts)
        part.replace(path)
    except (OSError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        log.warning("a program can't be kept in %s for the next start: %r", path.parent, error)
        if part.is_file():  # of a disk that is full
            part.unlink()
    return compiled


@functools.cache
def sources(folder: Path) -> str:
    """A checksum of the Python files of a package."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(repr((str(path.relative_to(folder)), path.read_bytes())).encode())
    return found.hexdigest()


@functools.cache
def _versions() -> tuple[Any, ...]:
    packages = ("jax", "jaxlib", "flax", "numpy")
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    return (
        sources(Path(__file__).parent),
        [importlib.metadata.version(name) for name in packages],
        jax.devices()[0].client.platform_version,
        [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2],
    )


def _settings() -> tuple[Any, ...]:
    """Of JAX and its compiler, but for where and what is kept."""
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return os.cpu_count(), flags, {k: v for k, v in jax.config.values.items() if "cache" not in k}
