"""LoRA as a user meets it: train, stop, resume, export, load; what is kept on disk, and errors."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from llmzoo_jax import checkpoint, config, hf, load, lora, lora_run, metrics, peft_format, train
from llmzoo_jax.checkpoint import RunError
from llmzoo_jax.config import ConfigError, LoraConfig
from llmzoo_jax.export import ExportError, export
from llmzoo_jax.inference import LoadError
from llmzoo_jax.sharding import named_leaves
from tests import parity
from tests.test_train import BLOOM, STEPS, folder, losses, make_config, signals
from tests.tiny_tokenizers import tiny

__all__ = ["folder", "signals"]  # fixtures
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=("query_key_value", "dense_4h_to_h"))
TOKENS = np.arange(24)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder with random weights and a tokenizer."""
    path = tmp_path_factory.mktemp("base") / "bloom"
    tiny("bpe").save_pretrained(path)
    model = parity.random_model(BLOOM, seed=4, scale=0.1)
    (path / "config.json").write_text(json.dumps(hf.config_to_hf(BLOOM, dtype="float32")))
    hf.save_params(path, model, BLOOM, dtype="float32", max_shard_bytes=60_000)
    return path


def lora_config(folder, base, run_dir, **keys):
    """A LoRA run like test_train's: packed, accumulated, bfloat16, on eight devices."""
    changes = {"lora": dataclasses.replace(LORA, **keys), "init_from": str(base), "model": None}
    return make_config(folder, run_dir, **changes)


@pytest.fixture(scope="module")
def finished(folder, base, tmp_path_factory):
    """An undisturbed run on an int8 base."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train.train(lora_config(folder, base, run_dir, quantise="int8"))
    return run_dir


def adapters(run_dir):
    return checkpoint.restore_params(run_dir, lora.abstract(LORA, BLOOM))


def test_adapters_learn_and_are_all_that_a_checkpoint_holds(finished):
    by_step = losses(finished)
    assert by_step[STEPS] < by_step[1] - 0.05
    saved = checkpoint.manifest.read(finished / "checkpoints" / str(STEPS))["tensors"]
    parts = [name for name in saved if name.startswith("params.")]
    assert sorted(parts) == [
        f"params.blocks.{path}.lora_{x}" for path in ("attention.qkv", "down") for x in "ab"
    ]
    moments = [name for name in saved if ".mu." in name or ".nu." in name]
    assert len(moments) == 2 * len(parts)
    others = saved.keys() - {*parts, *moments}
    assert not any("blocks" in name or "embed" in name for name in others), others  # counters
    known = lora_run.read_base(finished)
    assert known["sha256"] == hf.content_hash(known["folder"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_bitwise_the_same_losses_and_adapters(
    finished, folder, base, tmp_path, monkeypatch, capsys
):
    """As SIGKILL does, without a last save; and the base may be elsewhere by then."""

    class Killed(BaseException):
        pass

    def check(pending, step, optim):
        if step == 5:  # the newest save is of step 4
            raise Killed

    again = lora_config(folder, base, tmp_path / "run", quantise="int8")
    with monkeypatch.context() as patch:
        patch.setattr(train, "check_skipped", check)
        with pytest.raises(Killed):
            train.train(again)
    moved = shutil.copytree(base, tmp_path / "moved")
    train.train(dataclasses.replace(again, init_from=str(moved)))
    assert "at step 4" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(finished)
    for name, x in named_leaves(adapters(tmp_path / "run")).items():
        np.testing.assert_array_equal(x, named_leaves(adapters(finished))[name], err_msg=name)
    assert lora_run.read_base(tmp_path / "run")["folder"] == str(moved)


# --- export and load ----------------------------------------------------------------------------


def test_run_export_and_adapter_give_the_same_merged_model(finished, base, tmp_path):
    """Of the int8 base that was trained on; the adapter alone goes on the base as it is."""
    out = export(finished, tmp_path / "model")
    logits = load(finished).logits(TOKENS)
    np.testing.assert_array_equal(load(out).logits(TOKENS), logits)
    frozen = lora_run.load_base(
        base, BLOOM, dataclasses.replace(LORA, quantise="int8"), one_device()
    )
    merged = lora.merge(frozen, adapters(finished))
    np.testing.assert_allclose(parity.forward(merged, *whole_row()), logits, atol=1e-5)
    held = [r["heldout_loss"] for r in metrics.read(finished) if "heldout_loss" in r]
    assert f"| held-out loss | {held[-1]:.4f} |" in (out / "README.md").read_text()
    assert "rank 4, alpha 8 on query_key_value, dense_4h_to_h" in (out / "README.md").read_text()

    folder = export(finished, tmp_path / "adapter", content="adapter")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert "config.json" not in names
    plain = lora.merge(parity.random_model(BLOOM, seed=4, scale=0.1), adapters(finished))
    np.testing.assert_allclose(
        load(folder).logits(TOKENS), parity.forward(plain, *whole_row()), atol=1e-5
    )
    assert load(folder).chat([{"role": "user", "content": "Qui ?"}], max_new_tokens=4).tokens


def whole_row():
    return TOKENS, np.ones_like(TOKENS), np.arange(TOKENS.size)[None]


def one_device():
    return train.sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])


def test_transformers_with_peft_reads_the_adapter(finished, tmp_path):
    pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    folder = export(finished, tmp_path / "adapter", content="adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    np.testing.assert_allclose(
        parity.torch_logits(theirs, TOKENS), load(folder).logits(TOKENS), atol=2e-5
    )


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_goes_on_with_its_numbers(
    finished, folder, base, tmp_path
):
    source = export(finished, tmp_path / "adapter", content="adapter")
    start = lora_config(folder, base, tmp_path / "run", init_from=str(source), quantise="int8")
    start = config.override(start, "optim.learning_rate", "0")
    start = config.override(config.override(start, "optim.steps", "1"), "optim.weight_decay", "0")
    train.train(start)
    assert parity.max_difference(adapters(tmp_path / "run"), adapters(finished)) == 0.0
    again = export(tmp_path / "run", content="adapter")
    assert again == tmp_path / "run" / "adapter"
    assert (again / peft_format.WEIGHTS).read_bytes() == (source / peft_format.WEIGHTS).read_bytes()


# --- the base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", ["none", "int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_base_is_read_as_it_is_frozen_in_memory(quantise, base):
    """Layer by layer, onto eight devices."""
    options = dataclasses.replace(LORA, quantise=quantise, base_dtype="bfloat16")
    mesh = train.sharding.make_mesh(config.MeshConfig(fsdp=4, replica=2))
    ours = lora_run.load_base(base, BLOOM, options, mesh)
    want = lora.freeze(parity.random_model(BLOOM, seed=4, scale=0.1), options)
    ours, want = named_leaves(ours), named_leaves(want)
    assert ours.keys() == want.keys()
    for name, x in ours.items():
        assert x.dtype == want[name].dtype and len(x.sharding.device_set) == 8, name
        difference = parity.max_difference(x, want[name])
        assert difference <= (1 if x.dtype.kind in "iu" else 1e-6), name  # a code on the edge


def test_another_base_is_refused_on_resume_and_on_export(finished, folder, base, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    other = shutil.copytree(base, tmp_path / "other")
    model = parity.random_model(BLOOM, seed=5, scale=0.1)
    hf.save_params(other, model, BLOOM, dtype="float32", max_shard_bytes=60_000)
    with pytest.raises(RunError, match=r"other: its safetensors are not those .*SHA-256"):
        train.train(lora_config(folder, other, run, quantise="int8"))
    known = lora_run.read_base(run)
    (run / "base.json").write_text(json.dumps(known | {"folder": str(other)}))
    with pytest.raises(RunError, match=r"other: its safetensors are not those"):
        export(run)
    (run / "base.json").write_text(json.dumps(known | {"folder": str(tmp_path / "gone")}))
    with pytest.raises(RunError, match=r"gone, which is gone; .*\"folder\""):
        load(run)
    (run / "base.json").unlink()
    with pytest.raises(RunError, match=r"base\.json: the base .* can't be read"):
        load(run)


# --- errors -------------------------------------------------------------------------------------


def test_lora_without_a_base_is_refused(folder, tmp_path):
    bad = make_config(folder, tmp_path / "run", lora=LORA)
    with pytest.raises(ConfigError, match=r"lora trains adapters .* set init_from"):
        train.train(bad)
    assert not (tmp_path / "run").exists()


def test_a_wrong_target_is_named_before_anything_is_made(folder, base, tmp_path):
    bad = lora_config(folder, base, tmp_path / "run", targets=("query_key",))
    with pytest.raises(lora.LoraError, match=r"did you mean 'query_key_value'"):
        train.train(bad)
    assert not (tmp_path / "run").exists()


def test_only_a_lora_run_has_an_adapter(tmp_path, finished):
    from tests.tiny_runs import make_run

    run = make_run(tmp_path / "run", "bpe")
    with pytest.raises(ExportError, match=r"trained all weights; only a LoRA run"):
        export(run, content="adapter")
    with pytest.raises(ExportError, match=r"--adapter writes float32, not --dtype=bfloat16"):
        export(finished, tmp_path / "x", content="adapter", dtype="bfloat16")


def test_an_adapter_whose_base_is_not_here_says_so(finished, base, tmp_path):
    out = export(finished, tmp_path / "adapter", content="adapter")
    want = load(out)
    path = out / peft_format.CONFIG
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/model"})
    )
    with pytest.raises(LoadError, match=r"base_model_name_or_path is 'some/model', which is no"):
        load(out)
    model = load(out, base=base)
    jax.tree.map(np.testing.assert_array_equal, model.params, want.params)
