"""Which mesh axis holds which axis of a parameter or an activation: one table, one rule.

A parameter names its logical axes where it is made (``nnx.Param(..., axes=("embed", "mlp"))``);
``RULES`` maps them to mesh axes. Stacked layers have one axis more in front, ``layers``.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmzoo_jax.config import LlamaConfig, MeshConfig, ModelConfig
from llmzoo_jax.errors import InputError

AXES = ("replica", "fsdp", "tensor", "sequence")
FEW_CORES = 4  # a device each: two sums a layer wait for another core, not every operation

# logical axis -> mesh axes. ``replica`` and ``fsdp`` both split the batch; ``fsdp`` splits the
# parameters and optimiser state as well.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "qkv": (),
    "mlp": ("tensor",),
    "rank": (),
    "blocks": (),
    "batch": ("replica", "fsdp"),
    "length": ("sequence",),
    "act_embed": (),
}


class ShardingError(InputError):
    """A mesh or a parameter can't be laid out as asked; the message names the axis."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; an axis of -1 takes those that the others leave.

    Devices that are near each other are neighbours in the mesh: slices, which a slow network
    joins, are parts of ``replica``, and of the next axis where replicas are fewer than slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ShardingError(f"mesh ({asked}): sizes are >= 1, and -1 may stand at one axis only")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ShardingError(f"mesh ({asked}) does not fit {len(devices)} devices; set mesh.*")
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    across, rest = [], len(slices)
    for size in sizes:
        across.append(math.gcd(size, rest))
        rest //= across[-1]
    if rest > 1 or len(set(slices.values())) > 1:
        raise ShardingError(
            f"mesh ({asked}): its {len(slices)} slices are no equal parts of it; set mesh.replica "
            f"to {len(slices)} or a multiple of it, and take slices of one size"
        )
    inside = [size // parts for size, parts in zip(sizes, across, strict=True)]
    split = {"allow_split_physical_axes": True}
    if len(slices) > 1:
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)
    else:
        grid = mesh_utils.create_device_mesh(inside, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_cpu_devices(ways: int) -> None:
    """A CPU is so many devices, or, for 0, one a core where those are few. Before JAX looks for
    devices; accelerators stay what they are."""
    jax.config.update("jax_num_cpu_devices", ways or _few_cores())


def _few_cores() -> int:
    """Of this machine; 1 where they are more than few."""
    cores = os.cpu_count() or 1
    return cores if cores <= FEW_CORES else 1


def tensor_mesh(config: ModelConfig, ways: int) -> Mesh | None:
    """A mesh that splits a model over the first ``ways`` devices of this process, by heads and MLP
    width; None for one way. 0 ways: a device for each of a CPU's few cores if the model can be
    split so, else one way. Raises ShardingError where it can't be split as asked.

    Each device has its own key/value heads with the queries that read them, so that attention needs
    no other device. Heads are not copied where they are fewer than devices: every token's keys and
    values would take as much memory on twice as many devices."""
    sizes = {"heads": config.num_heads, "mlp": 4 * config.hidden_size}
    if isinstance(config, LlamaConfig):
        sizes |= {"kv_heads": config.num_kv_heads, "mlp": config.intermediate_size}
    good = [n for n in range(1, min(sizes.values()) + 1) if not any(s % n for s in sizes.values())]
    here = jax.local_devices()
    if ways == 0:
        cores = _few_cores() if here[0].platform == "cpu" else 1
        ways = cores if cores <= len(here) and cores in good else 1
    if ways == 1:
        return None
    for axis, size in sizes.items():
        if size % ways:
            raise ShardingError(
                f"tensor={ways} does not divide axis {axis!r} of the model, which has size {size}; "
                f"choose one of {', '.join(map(str, good))}"
            )
    if len(here) < ways:
        raise ShardingError(f"tensor={ways}: this process has {len(here)} device(s)")
    return make_mesh(MeshConfig(fsdp=1, tensor=ways), here[:ways])


def ways(mesh: Mesh | None) -> int:
    """Over how many devices ``tensor_mesh`` splits a model."""
    return 1 if mesh is None else mesh.shape["tensor"]


def one_thread_a_device(mesh: Mesh | None) -> bool:
    """Whether the devices of a mesh are parts of a CPU that has no two cores for each."""
    cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    return cpu and 2 * ways(mesh) > (os.cpu_count() or 1)


def compiler_options(mesh: Mesh | None) -> dict[str, Any] | None:
    """For programs of a mesh, or of one device. A CPU's products (YNNPACK's) take in what makes
    their operands: else a bfloat16 weight is written as float32 first, at every step."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "cpu":
        return None
    options: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
    if one_thread_a_device(mesh):
        options["xla_cpu_multi_thread_eigen"] = False
    return options


def jit(function: Callable, **how: Any) -> Callable:
    """``jax.jit`` with the ``compiler_options`` of the mesh that is set where it is called."""

    @functools.cache
    def program(mesh: Mesh | None):
        return jax.jit(function, compiler_options=compiler_options(mesh), **how)

    @functools.wraps(function)
    def run(*args, **kwargs):
        mesh = jax.sharding.get_mesh()
        return program(None if mesh.empty else mesh)(*args, **kwargs)

    return run


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """``jax.set_mesh`` if there is a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def describe(mesh: Mesh) -> str:
    """The mesh for the console, with the axes that slow networks are crossed for."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())

    def crossing(attribute: str) -> str:
        where = np.vectorize(lambda device: getattr(device, attribute, 0))(mesh.devices)
        count = len(np.unique(where))
        axes = [name for i, name in enumerate(mesh.axis_names) if np.diff(where, axis=i).any()]
        return f"; {count} {{}} along {', '.join(axes)}" if count > 1 else ""

    return (
        f"mesh {sizes}"
        + crossing("process_index").format("processes")
        + crossing("slice_index").format("slices")
    )


def spec(axes: Sequence[str | None], *, name: str = "array") -> PartitionSpec:
    """Logical axes -> PartitionSpec. A missing rule or two uses of a mesh axis is an error."""
    used: dict[str, str] = {}
    parts: list[Any] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ShardingError(f"{name}: no rule for logical axis {axis!r}; add it to RULES")
        mesh_axes = () if axis is None else RULES[axis]
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ShardingError(
                    f"{name}: logical axes {used[mesh_axis]!r} and {axis!r} both map to mesh axis "
                    f"{mesh_axis!r}"
                )
            used[mesh_axis] = axis
        parts.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*parts)


def sharding_of(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mesh,
    *,
    name: str,
    uneven: Literal["error", "replicate"] = "error",
) -> NamedSharding:
    """The sharding of one array. Where a mesh axis does not divide its dimension, that is an error
    or, with ``uneven="replicate"``, every device along the mesh axis holds the whole dimension."""
    if len(shape) == len(axes) + 1:
        axes = ("layers", *axes)
    if len(shape) != len(axes):
        raise ShardingError(f"{name}: shape {tuple(shape)} does not match its axes {tuple(axes)}")
    partition = spec(axes, name=name)
    if uneven == "replicate":
        divided = (part if size % _ways(part, mesh) == 0 else None
                   for size, part in zip(shape, partition, strict=True))  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*divided))
    for size, axis, part in zip(shape, axes, partition, strict=True):
        ways = _ways(part, mesh)
        if size % ways:
            mesh_axes = _mesh_axes(part)
            raise ShardingError(
                f"{name}: axis {axis!r} of size {size} is not divisible by {ways}, the mesh axis "
                f"{'*'.join(mesh_axes)}; choose another mesh.{mesh_axes[-1]}"
            )
    return NamedSharding(mesh, partition)


def _mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return part if isinstance(part, tuple) else (part,) if part else ()


def _ways(part: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    """How many parts an entry of a PartitionSpec cuts an axis into."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(part))


def tree_shardings(
    tree: Any, mesh: Mesh, *, uneven: Literal["error", "replicate"] = "error"
) -> Any:
    """Shardings for any pytree of (abstract) arrays: by logical axes for ``nnx.Param`` nodes,
    replicated for everything else. A prefix tree, as ``jax.jit`` takes it. ``uneven`` is that of
    ``sharding_of`` for nodes that don't say."""

    def one(path, node):
        if not isinstance(node, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        if not jax.tree.leaves(node):  # masked by optax
            return NamedSharding(mesh, PartitionSpec())
        keys = node.get_metadata()
        return sharding_of(
            jax.tree.leaves(node)[0].shape,
            keys["axes"],
            mesh,
            name=path_name(path),
            uneven=keys.get("uneven", uneven),
        )

    return jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def path_name(path: Sequence[Any]) -> str:
    """``blocks.attention.q.w``: the dotted name of a leaf, without NNX's own ``value``."""
    names = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


def named_leaves(tree: Any) -> dict[str, Any]:
    """``{"blocks.attention.q.w": array}`` for the leaves of any pytree, in tree order."""
    return {path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def constrain(
    x: jax.Array,
    axes: Sequence[str | None],
    *,
    uneven: Literal["error", "replicate"] = "error",
) -> jax.Array:
    """Pins an activation to its layout in the mesh that ``jax.set_mesh`` has set, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    where = sharding_of(x.shape, axes, mesh, name="activation", uneven=uneven)
    return jax.lax.with_sharding_constraint(x, where)


def per_device(
    function: Callable, *, inputs: Any, outputs: Any, undivided: Literal["whole", "error"]
) -> Callable:
    """``function``, run by each device of the mesh (if one is set) on its own part.

    ``inputs`` and ``outputs`` are pytrees of logical axes, as ``function`` takes and gives arrays.
    Where a mesh axis does not divide an array, ``undivided`` says: everything is computed as one,
    which the compiler splits as it can, or a ShardingError (the compiler can't split a kernel).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def is_axes(node):
        return type(node) is tuple and all(x is None or isinstance(x, str) for x in node)

    def specs(axes):
        return jax.tree.map(lambda a: spec(a, name="activation"), axes, is_leaf=is_axes)

    def indivisible(axes, x) -> str:
        for size, axis, part in zip(x.shape, axes, spec(axes, name="activation"), strict=True):
            if size % _ways(part, mesh):
                where = "*".join(_mesh_axes(part))
                return f"{axis!r} of size {size} by {_ways(part, mesh)}, the mesh axis {where}"
        return ""

    def run(*args):
        reasons = jax.tree.leaves(jax.tree.map(indivisible, inputs, args, is_leaf=is_axes))
        if any(reasons) and undivided == "whole":
            return function(*args)
        if any(reasons):
            raise ShardingError(
                f"the mesh does not divide {next(filter(None, reasons))}; choose another mesh.* or "
                "data.batch_size"
            )
        return jax.shard_map(
            function, in_specs=specs(inputs), out_specs=specs(outputs), check_vma=False
        )(*args)

    return run


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of a batch ``[B, T]``; errors name ``data.batch_size``, ``sequence_length``."""
    for size, key, axes in (
        (shape[0], "data.batch_size", RULES["batch"]),
        (shape[1], "data.sequence_length", RULES["length"]),
    ):
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise ShardingError(
                f"{key} {size} is not divisible by {ways}, the mesh axes {'*'.join(axes)}"
            )
    return NamedSharding(mesh, spec(("batch", "length")))
