"""An engine's programs change the cache where it is, here and on accelerators that are not here."""

import dataclasses

import jax
import pytest

from llmzoo_jax import targets
from llmzoo_jax.errors import InputError
from serving import programs
from serving.runner import EngineOptions
from tests.benchmarks import serve_targets
from tests.test_sharding import CONFIGS

# Heads as wide as those of real models; a cache that dwarfs all else, 1 GiB a layer and side.
CONFIG = dataclasses.replace(
    CONFIGS["llama"], num_heads=8, num_kv_heads=4, head_dim=128, vocab_size=512
)
OPTIONS = EngineOptions(max_batch=8, context=256, cache_tokens=2**20, prefill_tokens=64)
PROGRAMS = [("decode", 1), ("decode", 8), ("prefill", 1, False), ("prefill", 2, False),
            ("begin", 32), ("copy_page",)]  # fmt: skip
LAYER = 2 * 2**20 * CONFIG.num_kv_heads * CONFIG.head_dim * 2  # bytes of bfloat16


def check(devices, ways, **options):
    where = serve_targets.place(devices, ways)
    o = dataclasses.replace(OPTIONS, **options)
    for name in PROGRAMS:
        compiled = serve_targets.compile_one(name, CONFIG, o, where, tokens=64)
        assert compiled.copied == 0, name
        assert compiled.temporaries < LAYER / ways / 16, name
        assert compiled.moved < LAYER / ways / 8, name  # of all rows 512 tokens


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_the_cache_is_updated_in_place(kv_dtype):
    check(jax.devices(), 1, kv_dtype=kv_dtype)


def test_the_cache_of_a_mesh_is_updated_in_place():
    check(jax.devices(), 4)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "h200:4"])
@pytest.mark.parametrize("ways", [1, 4])
def test_the_cache_is_updated_in_place_on(target, ways):
    """Needs the plugins of ``jax[tpu]`` and ``jax[cuda13]``, but no device."""
    try:
        devices = targets.load(target).devices
    except InputError as error:
        pytest.skip(str(error))
    check(devices, ways)
    check(devices, ways, kv_dtype="int8")


def test_every_size_of_work_has_a_program():
    options = dataclasses.replace(OPTIONS, speculate=2)
    names = programs.names(options, platform="cpu", scores=True)
    assert [n[1] for n in names if n[0] == "decode"] == [1, 2, 4, 8]
    assert [n[1] for n in names if n[0] == "verify"] == [1, 2, 4]
    # Half pages on a CPU, whole ones elsewhere.
    prefill = [n[1:] for n in names if n[0] == "prefill"]
    assert prefill == [(1, False), (2, False), (4, False), (4, True)]
    assert [n[1] for n in names if n[0] == "begin"] == [16, 32]
    names = programs.names(options, platform="gpu", scores=True)
    prefill = [n[1:] for n in names if n[0] == "prefill"]
    assert prefill == [(1, False), (2, False), (2, True)]
    assert [n[1] for n in names if n[0] == "begin"] == [32]
    options = dataclasses.replace(OPTIONS, deterministic=True)
    alone = programs.names(options, platform="cpu", scores=False)
    assert alone == [("decode", 8), ("prefill", 4, False), ("copy_page",)]
