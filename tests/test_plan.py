"""The plan of a run is what its step would take, on devices that need not be here."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import jax
import pytest

from llmzoo_jax import flops, models, plan, targets
from llmzoo_jax.config import ComputeConfig, Config, DataConfig, MeshConfig, OptimConfig
from tests import tiny_runs

FLOAT = 4  # bytes


def config(model, **options) -> Config:
    data = DataConfig(train=(), sequence_length=32, batch_size=8)
    return Config(run_dir="", tokenizer="", data=data, model=model, **options)


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def planned(request) -> plan.Plan:
    model = tiny_runs.MODELS[request.param]
    return plan.plan(config(model, mesh=MeshConfig(fsdp=4, tensor=1)), targets.load("cpu:4"))


def test_arguments_are_the_parameters_and_twice_as_much_optimiser_split_over_the_mesh(planned):
    state = 3 * planned.parameters * FLOAT / 4
    batch = 5 * 32 * 8 * 4 / 4
    assert state < planned.arguments < 1.1 * state + batch


def test_flops_are_six_for_each_parameter_and_token_and_those_of_attention(planned):
    """Remat "dots" computes no product again; the table of embeddings multiplies once, as head."""
    lookup = 0 if planned.parameters == models.num_params(models.abstract(tiny_runs.BLOOM)) else 1
    model = tiny_runs.LLAMA if lookup else tiny_runs.BLOOM
    matrices = sum(
        x.size
        for path, x in jax.tree_util.tree_flatten_with_path(models.abstract(model))[0]
        if "'w'" in jax.tree_util.keystr(path) or ".w" in jax.tree_util.keystr(path)
    )
    matrices -= lookup * model.vocab_size * model.hidden_size
    assert planned.flops.projections == 6 * matrices * planned.tokens
    scores = 2 * 8 * model.num_heads * 32 * 32 * model.head_dim * model.num_layers
    assert planned.flops.attention == 7 * scores  # two forward, scores again and four backward


def test_the_words_hold_the_figures(planned):
    text = plan.describe(planned)
    assert f"{planned.parameters:,} parameters" in text
    assert "cpu:4: 4 device(s)" in text and "attention by blocks" in text
    assert re.search(r"all-gather [\d.]+ GiB", text)


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_what_is_multiplied_in_8_bits_is_said_and_takes_half_the_time(planned, matmul):
    """On a device that is twice as fast at it, of which there is none here."""
    low = planned.flops.projections // 2
    result = planned._replace(
        flops=planned.flops._replace(eight_bits=low),
        compute=dataclasses.replace(planned.compute, matmul=matmul),
        peak=flops.Peak(1e9, 2e9, 2e9),
    )
    assert f"of these, in {matmul}".ljust(19) + f"{low / 4:.3e}\n" in plan.describe(result)
    saved = planned._replace(peak=flops.Peak(1e9)).seconds_at_peak - result.seconds_at_peak
    assert saved == pytest.approx(low / 4 / 2e9)
    assert "of these" not in plan.describe(planned) and planned.seconds_at_peak is None


def test_a_step_that_needs_more_than_a_device_has_is_said_not_to_fit(planned):
    small = planned._replace(memory=planned.needed - 1)
    assert "DOES NOT FIT: 100%" in plan.describe(small)
    assert "; fits: " in plan.describe(planned._replace(memory=planned.needed))
    failed = plan.DoesNotFit("v5e:2x2", 4, plan.out_of_memory("RESOURCE_EXHAUSTED: Ran out\n  x"))
    assert "does not fit 4 device(s)" in plan.describe(failed)


def test_the_command_prints_the_plan_without_any_plugin(repository):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "llmzoo_jax.plan", "--config=configs/quickstart.py:phoenix"),
            *("--target=cpu:2", "--config.model.num_layers=1", "--config.data.sequence_length=64"),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "cpu:2: 2 device(s)" in run.stdout and "compiled in" in run.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7x:2x2", r"--target=v7x:2x2: write CHIP:TOPOLOGY.*v5e"),
        ("v5e", r"--target=v5e: write CHIP:TOPOLOGY"),
        ("cpu:2x2", r"write cpu:NUMBER"),
        ("cpu:4096", r"has 8 CPU devices"),
    ],
)
def test_a_target_that_is_not_known_says_what_is(name, message):
    with pytest.raises(targets.TargetError, match=message):
        targets.load(name)


PLUGINS = {"v5e:2x2": "libtpu", "v5p:2x2x1": "libtpu", "h200:4": "jax_plugins.xla_cuda13"}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("target", PLUGINS)
def test_a_plugin_that_is_missing_is_named_with_its_package(target):
    if installed(PLUGINS[target]):
        pytest.skip(f"{PLUGINS[target]} is installed")
    with pytest.raises(targets.TargetError, match=r"pip install 'jax\[(tpu|cuda13)\]"):
        targets.load(target)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "llama"])
@pytest.mark.parametrize("target", PLUGINS)
def test_flash_attention_compiles_for_accelerators_that_are_not_here(target, family):
    if not installed(PLUGINS[target]):
        pytest.skip(f"needs {PLUGINS[target]}: pip install 'jax[tpu]' or 'jax[cuda13]'")
    model = {"bloom": tiny_runs.BLOOM, "llama": tiny_runs.LLAMA}[family]
    compute = ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=64)
    run = config(model, compute=compute, optim=OptimConfig(accumulation=2))
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=-1))
    result = plan.plan(run, targets.load(target))
    assert result.compute.attention == ("triton" if target.startswith("h200") else "splash")
    assert 0 < result.needed < result.memory
