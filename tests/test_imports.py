"""Who may import whom, and that an import does nothing but import: by walking the source."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("llmzoo_jax", "configs", "data_pipelines", "serving", "eval")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "tokamax"}
STANDARD = set(sys.stdlib_module_names)

# What a module may import of the project, beside itself and its own folder. A name stands for
# the modules below it too.
CORE = {"llmzoo_jax.config", "llmzoo_jax.errors", "llmzoo_jax.cli"}
TEXT = {
    "llmzoo_jax.conversation",
    "llmzoo_jax.chat_formats",
    "llmzoo_jax.byte_tokens",
    "llmzoo_jax.tokenizer",
}
TOKENS = {"llmzoo_jax.packing", "llmzoo_jax.shards", "llmzoo_jax.tokenise"}
BELOW_MODELS = {"llmzoo_jax.sharding", "llmzoo_jax.config", "llmzoo_jax.errors"}
KERNELS = {
    "llmzoo_jax.models.packed_attention",
    "llmzoo_jax.models.paged_attention",
    "llmzoo_jax.models.splash",
    "llmzoo_jax.models.triton_attention",
}
ATTENTION = {*KERNELS, "llmzoo_jax.models.attention"}
FAMILY = {*BELOW_MODELS, *ATTENTION, "llmzoo_jax.models.layers"}
MODELS = {*BELOW_MODELS, "llmzoo_jax.models"}
MAY_IMPORT = {
    "llmzoo_jax.errors": set(),
    "llmzoo_jax.cli": {"llmzoo_jax.errors"},
    "llmzoo_jax.config": {"llmzoo_jax.errors"},
    "llmzoo_jax.conversation": {"llmzoo_jax.errors", "llmzoo_jax.chat_formats"},
    "llmzoo_jax.chat_formats": {"llmzoo_jax.errors", "llmzoo_jax.conversation"},
    "llmzoo_jax.packing": {"llmzoo_jax.errors"},
    "llmzoo_jax.byte_tokens": {"llmzoo_jax.conversation"},
    "llmzoo_jax.tokenizer": {*TEXT, "llmzoo_jax.errors", "llmzoo_jax.llama_tokenizer"},
    "llmzoo_jax.llama_tokenizer": {"llmzoo_jax.errors"},
    "llmzoo_jax.text_stream": {*TEXT, "llmzoo_jax.errors"},
    "llmzoo_jax.figures": set(),
    "llmzoo_jax.tensorboard": set(),
    "llmzoo_jax.metrics": {*CORE, "llmzoo_jax.figures", "llmzoo_jax.tensorboard"},
    "llmzoo_jax.goodput": CORE,
    "llmzoo_jax.profiling": CORE,
    "llmzoo_jax.flops": CORE,
    "llmzoo_jax.run_page": {
        *CORE,
        "llmzoo_jax.metrics",
        "llmzoo_jax.goodput",
        "llmzoo_jax.checkpoint",
    },
    "llmzoo_jax.shards": {*TEXT, *CORE},
    "llmzoo_jax.tokenise": {*TEXT, *CORE, "llmzoo_jax.shards"},
    "llmzoo_jax.data": {
        *TEXT,
        *CORE,
        "llmzoo_jax.packing",
        "llmzoo_jax.tokenise",
        "llmzoo_jax.workers",
    },
    "llmzoo_jax.sharding": CORE,
    "llmzoo_jax.distributed": CORE,
    "llmzoo_jax.workers": set(),
    "llmzoo_jax.spikes": CORE,
    "llmzoo_jax.moments": {*CORE, "llmzoo_jax.sharding"},
    "llmzoo_jax.optim": {
        *CORE,
        "llmzoo_jax.sharding",
        "llmzoo_jax.moments",
        "llmzoo_jax.spikes",
    },
    "llmzoo_jax.models": MODELS,
    "llmzoo_jax.models.packed_attention": BELOW_MODELS,
    "llmzoo_jax.models.paged_attention": BELOW_MODELS,
    "llmzoo_jax.sampling": set(),
    "llmzoo_jax.models.splash": {*BELOW_MODELS, "llmzoo_jax.models.packed_attention"},
    "llmzoo_jax.models.triton_attention": {"llmzoo_jax.models.packed_attention"},
    "llmzoo_jax.models.attention": {*BELOW_MODELS, *KERNELS},
    "llmzoo_jax.models.layers": {*BELOW_MODELS, *ATTENTION, "llmzoo_jax.models.panels"},
    "llmzoo_jax.models.low_precision": {"llmzoo_jax.models.layers"},
    "llmzoo_jax.models.bloom": FAMILY,
    "llmzoo_jax.models.llama": FAMILY,
    "llmzoo_jax.models.panels": set(),
    "llmzoo_jax.models.quantised": BELOW_MODELS,
    "llmzoo_jax.lora": MODELS,
    "llmzoo_jax.step": {
        *MODELS,
        "llmzoo_jax.packing",
        "llmzoo_jax.optim",
        "llmzoo_jax.lora",
        "llmzoo_jax.flops",
        "llmzoo_jax.vocabulary_loss",
    },
    "llmzoo_jax.peft_format": {*MODELS, "llmzoo_jax.lora", "llmzoo_jax.hf"},
    "llmzoo_jax.summary": {*CORE, "llmzoo_jax.metrics", "llmzoo_jax.step"},
    "llmzoo_jax.program": set(),
    "llmzoo_jax.compile_cache": set(),
    "llmzoo_jax.vocabulary_loss": {*CORE, "llmzoo_jax.sharding"},
    "llmzoo_jax.targets": {"llmzoo_jax.errors"},
    "llmzoo_jax.hf": {*MODELS, "llmzoo_jax.hf_config"},
    "llmzoo_jax.hf_config": CORE,
    "llmzoo_jax.generate": {*MODELS, "llmzoo_jax.sampling"},
    "llmzoo_jax.placement": {
        *MODELS,
        "llmzoo_jax.generate",
        "llmzoo_jax.hf",
        "llmzoo_jax.lora",
    },
    "llmzoo_jax.embeddings": MODELS,
    "llmzoo_jax.manifest": set(),
    "llmzoo_jax.retention": {"llmzoo_jax.manifest"},
    "llmzoo_jax.checkpoint": {
        *MODELS,
        "llmzoo_jax.step",
        "llmzoo_jax.optim",
        "llmzoo_jax.manifest",
        "llmzoo_jax.metrics",
        "llmzoo_jax.retention",
    },
    "configs": {"llmzoo_jax.config"},
    "data_pipelines": {
        *TEXT,
        *CORE,
        "llmzoo_jax.figures",
        "llmzoo_jax.packing",
        "llmzoo_jax.shards",
        "llmzoo_jax.tokenise",
        "data_pipelines",
    },
    "serving": {"llmzoo_jax", "serving"},
    # The client of endpoints, formats of questions, and language identification.
    "eval": {
        "llmzoo_jax",
        "eval",
        "data_pipelines.endpoint",
        "data_pipelines.ledger",
        "data_pipelines.language",
        "data_pipelines.sources",
        "serving.offline",
    },
}
NO_JAX = (
    "llmzoo_jax", "llmzoo_jax.errors", "llmzoo_jax.cli", "llmzoo_jax.config",
    "llmzoo_jax.conversation", "llmzoo_jax.chat_formats", "llmzoo_jax.tokenizer",
    "llmzoo_jax.text_stream", "llmzoo_jax.hf_config", *TOKENS,
)  # fmt: skip
ONLY = {  # packages from elsewhere that a module may import
    "llmzoo_jax": set(),
    "llmzoo_jax.errors": set(),
    "llmzoo_jax.config": set(),
    "llmzoo_jax.conversation": set(),
    "llmzoo_jax.chat_formats": {"jinja2"},
    "llmzoo_jax.cli": {"absl"},
    "llmzoo_jax.packing": {"numpy"},
}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """``{dotted name: syntax tree}`` of every module of the project but the tests."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


def imports(tree: ast.Module, *, at_import: bool = False) -> set[str]:
    """Dotted names of what a module imports; only type checkers see some, which don't count."""
    names = set()
    for node in walk(tree, into_functions=not at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in modules() else node.module)
    return names


def walk(node, *, into_functions: bool):
    """The nodes that run: all, or at import; never what stands under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        is_main = isinstance(child, ast.If) and "__name__" in ast.unparse(child.test)
        if is_main and not into_functions:
            continue
        yield child
        if into_functions or not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        ):
            yield from walk(child, into_functions=into_functions)


def of_project(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] in PACKAGES}


def under(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def test_the_rules_name_modules_that_exist():
    named = MAY_IMPORT.keys() | set(NO_JAX) | ONLY.keys()
    packages = {name.rpartition(".")[0] for name in modules()}
    assert named <= modules().keys() | packages


def test_the_library_imports_none_of_its_siblings():
    for name, tree in modules().items():
        if name.partition(".")[0] == "llmzoo_jax":
            siblings = {n for n in of_project(imports(tree)) if not under(n, {"llmzoo_jax"})}
            assert not siblings, f"{name} imports {siblings}"


def test_every_module_imports_only_what_stands_before_it():
    for name, tree in modules().items():
        rules = [rule for rule in MAY_IMPORT if under(name, {rule})]
        if not rules:
            continue
        allowed = MAY_IMPORT[max(rules, key=len)]
        found = {n for n in of_project(imports(tree)) if not under(n, allowed)}
        assert not found, f"{name} imports {sorted(found)}; it may import {sorted(allowed)}"


def test_nothing_imports_the_commands():
    commands = {"llmzoo_jax.train", "llmzoo_jax.export", "llmzoo_jax.plan", "llmzoo_jax.delta"}
    for name, tree in modules().items():
        found = {n for n in of_project(imports(tree)) if under(n, commands)}
        assert not found, f"{name} imports {found}"


def test_imports_at_module_level_have_no_cycle():
    graph = {
        name: {n for n in imports(tree, at_import=True) if n in modules() and n != name}
        for name, tree in modules().items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]):
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def reachable(name: str) -> set[str]:
    """Everything from elsewhere that importing a module imports, by following the project's own."""
    seen, outside, todo = set(), set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        parent = current.rpartition(".")[0]
        todo += [parent] if parent in modules() else []
        for other in imports(modules()[current], at_import=True):
            if other in modules():
                todo.append(other)
            else:
                outside.add(other.partition(".")[0])
    return outside


def test_configuration_and_text_need_no_jax():
    names = [*NO_JAX, *(n for n in modules() if under(n, {"configs", "data_pipelines"}))]
    for name in names:
        assert not reachable(name) & JAX, f"{name} imports {reachable(name) & JAX}"


@pytest.mark.parametrize("name", ONLY)
def test_small_modules_import_little(name):
    outside = {n.partition(".")[0] for n in imports(modules()[name])} - STANDARD - set(PACKAGES)
    assert outside <= ONLY[name]


def test_torch_is_for_tests_only():
    for name, tree in modules().items():
        found = {n for n in imports(tree) if n.partition(".")[0] in ("torch", "tensorflow")}
        assert not found, f"{name} imports {found}"


# --- what an import does ------------------------------------------------------------------------

TOUCHES = {  # calls that start a device, or make an array on one
    "jax.devices", "jax.local_devices", "jax.device_count", "jax.local_device_count",
    "jax.default_backend", "jax.process_index", "jax.process_count", "jax.device_put",
    "jax.random.key", "jax.random.PRNGKey", "jax.distributed.initialize", "jax.set_mesh",
    "jax.config.update", "jax.make_mesh",
}  # fmt: skip
SETS = ("jax.config.", "os.environ")


def test_no_import_touches_a_device_or_sets_a_flag():
    found = []
    for name, tree in modules().items():
        for node in walk(tree, into_functions=False):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in TOUCHES or called.startswith(("jnp.", "jax.numpy.", "os.environ.")):
                    found.append(f"{name}:{node.lineno}: {called}")
            elif isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [
                    f"{name}:{node.lineno}: {ast.unparse(target)}"
                    for target in targets
                    if ast.unparse(target).startswith(SETS)
                ]
    assert not found


def test_importing_everything_starts_no_device():
    """For real, in a fresh process: every module that needs no optional package."""
    code = """
import importlib, os, sys
before = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import started a device"
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
assert not {k for k in changed if k.startswith(("JAX", "XLA", "LIBTPU"))}, changed
"""
    names = [name for name in modules() if name.startswith("llmzoo_jax")]
    run = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
