"""Any mesh computes what one device computes, and a layout that can't be is an error with names."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from llmzoo_jax import models, optim, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.config import (
    BloomConfig,
    ComputeConfig,
    LlamaConfig,
    MeshConfig,
    OptimConfig,
    RopeConfig,
)
from llmzoo_jax.packing import Batch
from llmzoo_jax.sharding import ShardingError
from tests import parity

TOLERANCE = 1e-5  # of the loss and of every gradient, absolute
ROWS, LENGTH = 16, 16

# Every axis that a mesh splits has a size that 8 divides.
CONFIGS = {
    "bloom": BloomConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=8,
        layer_norm_eps=1e-2,
        residual_post_layernorm=False,
        tie_embeddings=True,
        init_std=0.02,
    ),
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        rms_norm_eps=1e-2,
        rope=RopeConfig(theta=100.0),
        max_positions=64,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
        init_std=0.02,
    ),
}
MESHES = [
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8
]  # (replica, fsdp, tensor, sequence)
SPLIT_BATCH = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]


def mesh_of(sizes, devices=None):
    return sharding.make_mesh(MeshConfig(**dict(zip(sharding.AXES, sizes, strict=True))), devices)


@functools.cache
def model_of(family):
    return parity.random_model(CONFIGS[family], seed=5)


@functools.cache
def packed_batch() -> Batch:
    """Packed rows, some of them with padding, one of them with nothing else."""
    rng = np.random.default_rng(6)
    rows = [[5, 1, 9], [16], [3, 3, 3, 3], []] * (ROWS // 4)
    segment_ids, positions = parity.segments(rows, LENGTH)
    tokens, targets = rng.integers(0, 64, (2, ROWS, LENGTH)).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < 0.6) & (segment_ids > 0)
    return Batch(tokens, targets, mask, segment_ids, positions)


def loss_and_grads(accumulation):
    return functools.partial(
        steps.loss_and_grads, compute=ComputeConfig(), accumulation=accumulation
    )


@functools.cache
def one_device(family):
    """(loss, losses, gradients) without any mesh."""
    return jax.device_get(jax.jit(loss_and_grads(1))(model_of(family), packed_batch()))


def on_mesh(family, sizes, accumulation):
    mesh = mesh_of(sizes)
    model = model_of(family)
    placed = jax.device_put(model, sharding.tree_shardings(model, mesh))
    batch = jax.device_put(packed_batch(), sharding.batch_sharding(mesh, (ROWS, LENGTH)))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(loss_and_grads(accumulation))(placed, batch))


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [(sizes, 1) for sizes in MESHES] + [(sizes, 2) for sizes in SPLIT_BATCH],
    ids=str,
)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(family, sizes, accumulation):
    loss, losses, grads = on_mesh(family, sizes, accumulation)
    want_loss, want_losses, want_grads = one_device(family)
    difference = parity.max_difference(grads, want_grads)
    print(f"{family} {sizes} {accumulation}: {abs(loss - want_loss):.1e} {difference:.1e}")
    assert abs(losses - want_losses).max() <= 10 * TOLERANCE  # of single tokens, about 6 each
    assert abs(float(loss) - float(want_loss)) <= TOLERANCE
    assert difference <= TOLERANCE


def test_parameters_and_optimiser_are_split_from_the_start():
    """No device holds more than its share of what ``fsdp`` and ``tensor`` split."""
    tx = optim.make_optimizer(OptimConfig(), 10)
    state = steps.init_state(CONFIGS["llama"], tx, mesh_of((1, 2, 4, 1)), seed=0)
    split = 0
    for name, leaf in sharding.named_leaves(state).items():
        assert len(leaf.sharding.device_set) == 8, name
        (size,) = {shard.data.size for shard in leaf.addressable_shards}
        if name.endswith(".w"):  # the parameter, and both of AdamW's moments
            assert leaf.size == 8 * size, name
            split += leaf.size
        else:
            assert leaf.size // size in (1, 2, 4), name
    assert split == 3 * sum(
        x.size for n, x in sharding.named_leaves(state.params).items() if n.endswith(".w")
    )


def test_a_training_step_keeps_its_layout_and_its_numbers():
    """Donated state in, state of the same sharding out, and the update of one device."""
    tx = optim.make_optimizer(OptimConfig(learning_rate=0.1, eps=1e-2, warmup_ratio=0.0), 10)
    model, batch, mesh = model_of("llama"), packed_batch(), mesh_of((2, 2, 2, 1))
    state = jax.jit(functools.partial(steps.start_state, tx=tx))(model)
    one_device = functools.partial(steps.train_step, tx=tx, compute=ComputeConfig(), accumulation=1)
    want, want_metrics = jax.jit(one_device)(state, batch)

    shardings = sharding.tree_shardings(state, mesh)
    with jax.set_mesh(mesh):
        step = steps.jit_train_step(tx, ComputeConfig(), 1, shardings)
        before = jax.device_put(state, shardings)
        layout = [x.sharding for x in jax.tree.leaves(before)]
        placed = jax.device_put(batch, sharding.batch_sharding(mesh, (ROWS, LENGTH)))
        after, metrics = step(before, placed)
    kept = zip(layout, jax.tree.leaves(after), strict=True)
    assert all(x.sharding.is_equivalent_to(old, x.ndim) for old, x in kept)
    assert parity.max_difference(after.params, want.params) <= TOLERANCE
    assert parity.max_difference(metrics._asdict(), want_metrics._asdict()) <= TOLERANCE
    assert parity.max_difference(after.params, model) > 1e-2


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_names_logical_axes_that_have_rules(family):
    model = models.abstract(CONFIGS[family])
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    for path, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]:
        name = sharding.path_name(path)
        axes = node.get_metadata()["axes"]
        assert set(axes) <= sharding.RULES.keys(), name
        shape = jax.tree.leaves(node)[0].shape
        assert len(shape) == len(axes) + name.startswith("blocks."), name


def test_a_spec_follows_the_rules():
    assert sharding.spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    assert sharding.spec(("batch", "length")) == PartitionSpec(("replica", "fsdp"), "sequence")
    assert sharding.spec(("head", None)) == PartitionSpec(None, None)


# --- slices -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh reads: 16 of them in 2 slices of 2 processes each."""

    id: int
    platform: str = "cpu"
    device_kind: str = "cpu"

    @property
    def process_index(self):
        return self.id // 4

    @property
    def slice_index(self):
        return self.id // 8


DEVICES = [Device(i) for i in range(16)]


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ((2, -1, 1, 1), "replica"),
        ((4, -1, 2, 1), "replica"),  # more replicas than slices: two in each
        ((1, -1, 2, 1), "fsdp"),  # no replicas
    ],
    ids=str,
)
def test_slices_are_parts_of_the_outermost_axis(sizes, axis):
    mesh = mesh_of(sizes, DEVICES)
    where = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    number = sharding.AXES.index(axis)
    for index, half in enumerate(np.split(where, 2, axis=number)):
        assert (half == index).all()
    assert f"2 slices along {axis}" in sharding.describe(mesh)


def test_what_stays_in_a_process_and_what_crosses_is_said():
    mesh = mesh_of((2, 2, 4, 1), DEVICES)
    text = "mesh replica=2, fsdp=2, tensor=4, sequence=1; 4 processes along replica, fsdp"
    assert sharding.describe(mesh) == text + "; 2 slices along replica"
    assert sharding.describe(mesh_of((1, 8, 1, 1))) == (
        "mesh replica=1, fsdp=8, tensor=1, sequence=1"
    )


@pytest.mark.parametrize("ids", [(0, 1, 8, 16), (0, 1, 2, 8)])
def test_slices_that_are_no_equal_parts_of_the_mesh_are_an_error(ids):
    slices = len({number // 8 for number in ids})
    with pytest.raises(ShardingError, match=rf"its {slices} slices are no equal parts .*replica"):
        mesh_of((2, 2, 1, 1), [Device(number) for number in ids])


# --- errors -------------------------------------------------------------------------------------


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(mesh_of((2, -1, 2, 1)).shape) == {
        "replica": 2, "fsdp": 2, "tensor": 2, "sequence": 1,
    }  # fmt: skip
    assert mesh_of((1, -1, 1, 1), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, 1, 1), r"fsdp=3.*does not fit 8 devices"),
        ((3, -1, 1, 1), r"replica=3.*does not fit 8 devices"),
        ((-1, -1, 1, 1), r"-1 may stand at one axis only"),
        ((1, -1, 0, 1), r"tensor=0.*sizes are >= 1"),
        ((1, -1, 1, -2), r"sequence=-2.*sizes are >= 1"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_says_so(sizes, message):
    with pytest.raises(ShardingError, match=message):
        mesh_of(sizes)


def test_an_indivisible_axis_names_the_parameter_and_the_mesh_axis():
    config = BloomConfig(**{**CONFIGS["bloom"].__dict__, "num_heads": 6, "hidden_size": 48})
    mesh = mesh_of((1, 2, 4, 1))
    with pytest.raises(ShardingError) as error:
        sharding.tree_shardings(models.abstract(config), mesh)
    message = str(error.value)
    assert "blocks.attention." in message
    assert "'heads' of size 6 is not divisible by 4" in message
    assert "mesh.tensor" in message


def test_a_missing_rule_names_the_parameter_and_the_axis():
    tree = {"gate": {"w": nnx.Param(np.ones((8, 8)), axes=("embed", "experts"))}}
    with pytest.raises(ShardingError, match=r"gate\.w: no rule for logical axis 'experts'"):
        sharding.tree_shardings(tree, mesh_of((1, 8, 1, 1)))


def test_colliding_rules_name_the_parameter_and_both_axes():
    tree = {"gate": {"w": nnx.Param(np.ones((8, 8)), axes=("heads", "mlp"))}}
    with pytest.raises(ShardingError, match=r"gate\.w: .*'heads' and 'mlp' both map .*'tensor'"):
        sharding.tree_shardings(tree, mesh_of((1, 8, 1, 1)))


def test_axes_that_do_not_match_the_shape_name_the_parameter():
    tree = {"gate": {"w": nnx.Param(np.ones((8, 8, 8, 8)), axes=("heads", "mlp"))}}
    with pytest.raises(ShardingError, match=r"gate\.w: shape \(8, 8, 8, 8\)"):
        sharding.tree_shardings(tree, mesh_of((1, 8, 1, 1)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 16), r"data\.batch_size 6 is not divisible by 4, .*replica\*fsdp"),
        ((8, 15), r"data\.sequence_length 15 is not divisible by 2, .*sequence"),
    ],
)
def test_an_indivisible_batch_names_the_config_key(shape, message):
    with pytest.raises(ShardingError, match=message):
        sharding.batch_sharding(mesh_of((2, 2, 1, 2)), shape)


def test_without_a_mesh_nothing_is_constrained():
    x = np.ones((3, 5, 7), np.float32)  # sizes that no mesh divides
    assert sharding.constrain(x, ("batch", "length", "act_embed")) is x
