"""The configs of this repository: what they resolve to is on record, and the commands in their
docstrings work and fit the devices that they name."""

import ast
import json
import math
import os
import shlex
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from llmzoo_jax import config, lora, models, optim, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.cli import split_overrides

GOLDEN = Path(__file__).parent / "golden"
RECIPES = ("phoenix_7b", "phoenix_7b_lora", "chimera_7b", "chimera_7b_lora", "chimera_13b")
CONFIGS = [
    *RECIPES,
    *("quickstart:phoenix", "quickstart:chimera", "real_cpu:phoenix", "real_cpu:chimera"),
]
GIGABYTES = {"h100": 80, "h200": 141, "v5e": 16}  # of a device


@pytest.fixture(autouse=True)
def in_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_resolves_to_what_is_on_record(name):
    path, _, family = name.partition(":")
    resolved = config.to_dict(config.load(f"configs/{path}.py" + (f":{family}" if family else "")))
    golden = GOLDEN / f"{name.replace(':', '_')}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(json.dumps(resolved, indent=2) + "\n")
    different = config.differences(resolved, json.loads(golden.read_text()))
    assert not different, (
        f"(now, on record): {different}; if it is meant, UPDATE_GOLDEN=1 pytest {__file__}"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_hyper_parameters_of_llm_zoo(name):
    recipe = config.load(f"configs/{name}.py")
    o, data = recipe.optim, recipe.data
    assert (data.sequence_length, data.batch_size, o.epochs) == (2048, 256, 3.0)
    assert (o.learning_rate, o.schedule, o.warmup_ratio) == (2e-5, "cosine", 0.03)
    assert (o.weight_decay, recipe.compute.dtype) == (0.0, "bfloat16")
    assert (recipe.save_every, recipe.keep_checkpoints) == (500, 3)
    assert (recipe.lora is not None) == name.endswith("lora")
    if recipe.lora:
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 16.0, 0.05)
        assert lora.targets(recipe.lora, recipe.model) == lora.DEFAULT_TARGETS[recipe.model.family]


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(hardware, overrides) of the training commands in the docstring of a config."""
    text = ast.get_docstring(ast.parse(Path(f"configs/{name}.py").read_text()))
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if "llmzoo_jax.train" in line:
            arguments, overrides = split_overrides(shlex.split(line)[3:])
            flags = dict(argument.lstrip("-").split("=", 1) for argument in arguments)
            assert flags["config"] == f"configs/{name}.py"
            found.append((flags["hardware"], overrides))
    return found


def abstract_mesh(mesh: config.MeshConfig, devices: int) -> AbstractMesh:
    sizes = [getattr(mesh, axis) for axis in sharding.AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    return AbstractMesh(tuple(devices // fixed if s == -1 else s for s in sizes), sharding.AXES)


def device_bytes(tree, mesh) -> int:
    """Of one device's part of an abstract pytree."""
    layout = jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda _: sharding, part),
        sharding.tree_shardings(tree, mesh),
        tree,
        is_leaf=lambda x: isinstance(x, jax.sharding.Sharding),
    )
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def abstract_state(recipe) -> steps.TrainState:
    tx = optim.make_optimizer(recipe.optim, 1000)

    def make():
        model = models.init(recipe.model, jax.random.key(0))
        if recipe.lora is None:
            return steps.start_state(model, tx)
        adapters = lora.init(recipe.lora, recipe.model, jax.random.key(0))
        return steps.start_state(adapters, tx)._replace(base=lora.freeze(model, recipe.lora))

    return jax.eval_shape(make)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_each_of_its_three_targets(name):
    """Weights, gradients and optimiser leave an eighth of the memory or more to the rest; and the
    batch can be shared out."""
    found = commands(name)
    assert len({hardware for hardware, _ in found}) == 3
    for hardware, overrides in found:
        recipe = config.load(f"configs/{name}.py", overrides, hardware)
        kind, devices = recipe.hardware.name.split("-")
        mesh = abstract_mesh(recipe.mesh, int(devices))
        state = abstract_state(recipe)
        size = device_bytes(state, mesh) + device_bytes(state.params, mesh)
        print(f"{name} on {recipe.hardware.name}: {size / 1e9:.2f} GB a device")
        assert size < 7 / 8 * GIGABYTES[kind] * 1e9
        rows = recipe.data.batch_size / recipe.optim.accumulation
        assert rows % int(devices) == 0 and rows / int(devices) <= 8


@pytest.mark.parametrize("name", RECIPES)
def test_the_bytes_in_a_docstring_are_those_of_its_state(name):
    text = Path(f"configs/{name}.py").read_text().replace("\n", " ")
    state = abstract_state(config.load(f"configs/{name}.py"))
    one = AbstractMesh((1, 1, 1, 1), sharding.AXES)
    trained = device_bytes(state._replace(base=None), one) + device_bytes(state.params, one)
    if state.base is None:
        assert f"{trained / 1e9:.0f} GB" in text
    else:
        assert f"takes {device_bytes(state.base, one) / 1e9:.1f} GB" in text
        assert f"optimiser {trained / 1e9:.2f} GB" in text
