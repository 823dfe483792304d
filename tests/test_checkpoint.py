"""A checkpoint is what was saved, or it is named as damaged; the newest and the best ones stay."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmzoo_jax
from llmzoo_jax import checkpoint, export, manifest, models, optim, sharding, step
from llmzoo_jax.checkpoint import DamagedError, RunError
from llmzoo_jax.config import MeshConfig, OptimConfig
from llmzoo_jax.errors import InputError
from tests.tiny_runs import BLOOM, STEP, make_run, save_checkpoint

TX = optim.make_optimizer(OptimConfig(), 100)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A run with two checkpoints, of other weights."""
    folder = make_run(tmp_path_factory.mktemp("run"), "bpe")
    save_checkpoint(folder, BLOOM, seed=1, at=STEP + 1)
    return folder


@pytest.fixture
def run(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def restore(run: Path) -> step.TrainState:
    abstract = jax.eval_shape(lambda: step.start_state(models.abstract(BLOOM), TX))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with checkpoint.open_manager(run, keep=3) as manager:
        return checkpoint.restore(manager, abstract, mesh)


def weights(run: Path, **options) -> list[np.ndarray]:
    return [
        np.asarray(x) for x in jax.tree.leaves(checkpoint.restore_params(run, BLOOM, **options))
    ]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "flipped": lambda folder: flip(largest(folder)),
    "truncated": lambda folder: truncate(largest(folder)),
    "missing": lambda folder: largest(folder).unlink(),
    "manifest": lambda folder: flip(folder / "_CHECKPOINT_METADATA"),
    "no manifest": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_back_to_the_newest_whole_checkpoint(damage, run, capsys):
    newest = run / "checkpoints" / str(STEP + 1)
    DAMAGE[damage](newest)
    assert int(restore(run).step) == STEP
    said = capsys.readouterr()
    assert f"{newest} is damaged: " in said.out
    assert f"moved to {run}/damaged/{STEP + 1}; the run goes back to step {STEP}" in said.out
    assert "Traceback" not in said.err and "Exception ignored" not in said.err
    assert (run / "damaged" / str(STEP + 1)).is_dir() and not newest.exists()
    save_checkpoint(run, BLOOM, seed=1, at=STEP + 1)  # saved again, damaged again
    DAMAGE[damage](newest)
    assert int(restore(run).step) == STEP
    assert (run / "damaged" / f"{STEP + 1}-2").is_dir()


def test_no_damage_to_any_file_gives_other_tensors(run):
    """Files that are of use and those that are redundant: the tensors are right, or it is said."""
    folder, copy = run / "checkpoints" / str(STEP), run / "copy"
    shutil.copytree(folder, copy)
    expected, damaged = weights(run, step=STEP), []
    names = [path.relative_to(folder) for path in files(folder)]
    for name in names:
        for how in (flip, truncate, Path.unlink):
            how(folder / name)
            try:
                found = weights(run, step=STEP)
            except DamagedError:
                damaged.append(name)
            else:
                for ours, theirs in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(ours, theirs, err_msg=str(name))
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)
    assert len(names) >= 10 and {path.relative_to(copy) for path in [largest(copy)]} <= {*damaged}


def test_where_all_checkpoints_are_damaged_none_is_moved_and_each_is_named(run):
    for number in (STEP, STEP + 1):
        flip(largest(run / "checkpoints" / str(number)))
    with pytest.raises(RunError, match="every checkpoint is damaged") as error:
        restore(run)
    assert f"checkpoints/{STEP} is damaged" in str(error.value)
    assert f"checkpoints/{STEP + 1} is damaged" in str(error.value)
    assert not (run / "damaged").exists()


def test_an_export_of_a_damaged_checkpoint_is_refused(run):
    flip(largest(run / "checkpoints" / str(STEP + 1)))
    with pytest.raises(DamagedError, match=rf"checkpoints/{STEP + 1} is damaged.* tensors"):
        export.export(run)
    assert export.export(run, step=STEP).is_dir()


def test_a_half_written_checkpoint_is_cleared_away_by_the_run_and_not_by_a_reader(run):
    half = run / "checkpoints" / f"{STEP + 2}.orbax-checkpoint-tmp"
    half.mkdir()
    assert checkpoint.find_step(run, "latest") == STEP + 1
    assert half.is_dir()
    restore(run)
    assert not half.exists()


# --- retention ----------------------------------------------------------------------------------


def save(run: Path, losses: dict[int, float | None], **keep) -> list[int]:
    """Saves steps with their held-out losses; the steps that stay."""
    state = step.start_state({"w": jnp.arange(4.0)}, TX)
    with checkpoint.open_manager(run, **keep) as manager:
        for number, loss in losses.items():
            checkpoint.save(manager, state._replace(step=jnp.int32(number)), heldout_loss=loss)
        checkpoint.wait(manager)
        return sorted(manager.all_steps(read=True))


def test_the_newest_stay_and_the_best_although_they_are_old(tmp_path):
    losses = {1: 5.0, 2: 2.0, 3: 4.0, 4: 3.0, 5: None, 6: 6.0, 7: None}
    assert save(tmp_path, losses, keep=2, keep_best=2) == [2, 4, 6, 7]
    # The losses are kept with the checkpoints: another process goes on.
    assert save(tmp_path, {8: 2.5, 9: float("nan")}, keep=2, keep_best=2) == [2, 8, 9]
    assert save(tmp_path, {10: None}, keep=1) == [10]


def test_a_checkpoint_is_chosen_by_step_by_age_or_by_loss(tmp_path):
    save(tmp_path, {1: None, 2: 2.0, 3: 4.0}, keep=9)
    assert [checkpoint.find_step(tmp_path, at) for at in ("latest", "best", 1)] == [3, 2, 1]
    with pytest.raises(RunError, match=r"no checkpoint 7; there are .* 1, 2 \(2.0000\), 3"):
        checkpoint.find_step(tmp_path, 7)
    save(tmp_path / "other", {1: None}, keep=9)
    with pytest.raises(RunError, match="no checkpoint 'best'"):
        checkpoint.find_step(tmp_path / "other", "best")
    with pytest.raises(RunError, match="no finished checkpoint"):
        checkpoint.find_step(tmp_path / "none", "latest")


def test_load_and_export_take_the_checkpoint_that_is_asked_for(run):
    tokens = np.arange(8)[None]
    old, new = (llmzoo_jax.load(run, step=at).logits(tokens) for at in (STEP, "latest"))
    assert not np.array_equal(old, new)
    out = export.export(run, step=STEP)
    np.testing.assert_allclose(llmzoo_jax.load(out).logits(tokens), old, atol=1e-5)
    with pytest.raises(InputError, match="is for a run folder"):
        llmzoo_jax.load(out, step=STEP)


# --- the manifest -------------------------------------------------------------------------------

TENSORS = {
    "float32": jnp.linspace(-1, 1, 60, dtype=jnp.float32).reshape(3, 4, 5),
    "bfloat16": jnp.linspace(-1, 1, 60, dtype=jnp.bfloat16),
    "int8": jnp.arange(60, dtype=jnp.int8),
    "int4": jnp.arange(-8, 8).astype(jnp.int4),
    "bool": jnp.arange(60) % 3 == 0,
    "scalar": np.int32(7),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_checksum_notices_a_changed_a_moved_and_a_lost_element(name):
    x = np.asarray(TENSORS[name])
    made = manifest.make({name: x})["tensors"]
    flat = x.reshape(-1)
    assert manifest.changed(made, {name: x}) == []
    changed = flat.copy()
    changed[0] = changed[0] + 1 if name != "bool" else ~changed[0]
    assert manifest.changed(made, {name: changed.reshape(x.shape)}) == [name]
    if x.size > 1:
        assert manifest.changed(made, {name: np.roll(flat, 1).reshape(x.shape)}) == [name]
        lost = flat.copy()
        lost[x.size // 2 :] = 0
        assert manifest.changed(made, {name: lost.reshape(x.shape)}) == [name]


def test_a_checksum_does_not_depend_on_the_mesh():
    x = np.random.default_rng(0).normal(size=(8, 16, 3)).astype(np.float32)
    sums = set()
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"replica": 8}):
        mesh = sharding.make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
        spec = jax.sharding.PartitionSpec("fsdp", "tensor")
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        sums.add(manifest.make({"x": placed})["tensors"]["x"])
    assert len(sums) == 1 and sums == {manifest.make({"x": x})["tensors"]["x"]}
