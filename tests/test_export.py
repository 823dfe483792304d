"""Exports: the same weights, text and tokens in transformers; whole or not at all."""

import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest

from llmzoo_jax import checkpoint, hf, train
from llmzoo_jax.checkpoint import RunError
from llmzoo_jax.config import MeshConfig, OptimConfig
from llmzoo_jax.conversation import FORMATS, Message
from llmzoo_jax.export import ExportError, export
from llmzoo_jax.inference import find_format
from llmzoo_jax.loading import load_model
from llmzoo_jax.optim import make_optimizer
from llmzoo_jax.sharding import make_mesh, named_leaves
from llmzoo_jax.tokenizer import encode_prompt, load_tokenizer, resolve_format
from tests.tiny_runs import BLOOM, MODELS, STEP, make_run, save_checkpoint

KINDS = tuple(MODELS)
CHATS = (
    [("user", "Who are you?")],
    [("system", "Be brief."), ("user", "你是谁？"), ("assistant", "凤凰。"), ("user", "真的吗？")],
    [("user", "  spaces  \n and\ttabs "), ("assistant", "ok"), ("user", "قل لي 👍🏽")],
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{tokenizer kind: run folder}, one of each family; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: make_run(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {kind: export(runs[kind], folder / kind, max_shard_size="60KB") for kind in KINDS}


def params_of(folder):
    return hf.load_params(folder, hf.read_config(folder), place=lambda name, x: x)


def assert_same(one, other):
    one, other = named_leaves(one), named_leaves(other)
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], strict=True, err_msg=name)


def card_of(folder):
    return (folder / "README.md").read_text("utf-8")


# --- what is exported is what was trained -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_bit_exact_over_several_shards(kind, runs, exports):
    assert len(list(exports[kind].glob("model-*.safetensors"))) > 3
    assert hf.read_config(exports[kind]) == MODELS[kind]
    assert_same(params_of(exports[kind]), checkpoint.restore_params(runs[kind], MODELS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_that_a_run_starts_from_comes_out_bit_exact(kind, exports, tmp_path):
    run = make_run(tmp_path / "run", kind, init_from=str(exports[kind]))
    shutil.rmtree(run / "checkpoints")
    config = SimpleNamespace(init_from=str(exports[kind]), run_dir=str(run), lora=None)
    tx, mesh = make_optimizer(OptimConfig(), 10), make_mesh(MeshConfig())
    with checkpoint.open_manager(run) as manager:
        # What a run does before its first step, on eight devices.
        state = train.start_state(config, MODELS[kind], tx, mesh, manager)
        checkpoint.save(manager, state)
        checkpoint.wait(manager)
    again = export(run)
    assert_same(params_of(again), params_of(exports[kind]))
    assert f"fine-tuned from `{kind}`" in card_of(again)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_are_the_rounded_ones(kind, runs, exports, tmp_path):
    import ml_dtypes

    out = export(runs[kind], tmp_path / "out", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    whole = named_leaves(params_of(exports[kind]))
    for name, x in named_leaves(params_of(out)).items():
        expected = whole[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(x, expected, err_msg=name)


# --- transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_decodes_the_same_64_tokens(kind, exports):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    theirs = AutoModelForCausalLM.from_pretrained(exports[kind]).eval()
    tokenizer = AutoTokenizer.from_pretrained(exports[kind])
    ours = load_model(exports[kind])
    prompts = ["The quick brown fox", "你好，世界", "Съешь же ещё", "a"]
    results = ours.generate(prompts, max_new_tokens=64)
    for prompt, result in zip(prompts, results, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs.input_ids.shape[1] == result.prompt_tokens
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=64)[0].tolist()
        tokens = tokens[result.prompt_tokens :]
        if result.finish_reason == "stop":
            assert tokens.pop() in ours.stop_ids
        assert result.tokens == tokens
        assert len(tokens) == 64 or result.finish_reason == "stop"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_apply_chat_template_gives_the_ids_of_training(kind, name, tmp_path):
    from transformers import AutoTokenizer

    if name == "phoenix":  # the weights do not matter here: one whole run is enough
        out = export(make_run(tmp_path / "run", kind, name))
    else:
        from llmzoo_jax.tokenizer import save_tokenizer
        from tests.tiny_tokenizers import tiny

        out = tmp_path / "out"
        save_tokenizer(tiny(kind), out, chat_format=resolve_format(name, tiny(kind)))
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    chat_format = find_format(ours)
    assert chat_format == resolve_format(name, ours)  # known again by its template
    for chat in CHATS:
        messages = [Message(*turn) for turn in chat]
        ids = theirs.apply_chat_template(
            [{"role": role, "content": content} for role, content in chat],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert ids == encode_prompt(messages, tokenizer=ours, chat_format=chat_format)


@pytest.mark.parametrize(("kind", "name"), [("bpe", "llama-3"), ("sentencepiece", "chatml")])
def test_transformers_stops_where_the_format_does(kind, name, tmp_path):
    from transformers import GenerationConfig

    out = export(make_run(tmp_path / "run", kind, name))
    tokenizer = load_tokenizer(out)
    stop = tokenizer.convert_tokens_to_ids(FORMATS[name].stop[0])
    generation = GenerationConfig.from_pretrained(out)
    assert sorted(generation.eos_token_id) == sorted({tokenizer.eos_token_id, stop})
    assert generation.do_sample is False
    assert generation.pad_token_id is not None
    config = json.loads((out / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[key] == getattr(tokenizer, key)


# --- the model card -----------------------------------------------------------------------------


def test_the_card_says_what_the_files_of_the_run_say(exports):
    card = card_of(exports["bpe"])
    head = card.split("---\n")[1]
    languages = '- "en"\n- "fr"\n- "zh"\n'
    assert f"language:\n{languages}library_name:" in head  # two licences: none is named
    assert '- "owner/b"' in head
    for text in (
        "# bpe\n",
        "trained from random weights",
        "| a | MIT | 2 |",
        "| owner/b | CC0-1.0 | 1 |",
        "Training: 3 conversations.",
        "Held out: 1 conversations.",
        "conversation 3.",
        f"| steps | {STEP} |",
        "| tokens | about 6,400 (rows 62.5% full) |",  # 20 * 256 * (0.5 + 0.75)
        "| training loss, last recorded | 2.1250 |",
        "| held-out loss | 2.2500 |",
        "| fr | 2.2500 |",
        "![Loss by step](loss.png)",
        "Human: <s>Who are you?</s>Assistant: <s>\n~~~~",
        "ends with `</s>`",
        '{"role": "user", "content": "Who are you?"}',
    ):
        assert text in card, text
    assert (exports["bpe"] / "loss.png").is_file()


def test_the_card_leaves_out_what_is_unknown(tmp_path):
    run = make_run(tmp_path / "run", "bpe")
    for name in ("metrics.jsonl", "loss.png", "train.jsonl", "heldout.jsonl"):
        (run / name).unlink()
    card = card_of(export(run))
    assert "could not be read at export: `train.jsonl`" in card
    for text in ("loss", "None", "nan", "language", "license", "| tokens", str(tmp_path)):
        assert text not in card, text


def test_one_licence_of_all_data_is_the_licence_of_a_model_from_scratch(tmp_path):
    run = make_run(tmp_path / "run", "bpe")
    lines = (run / "train.jsonl").read_text("utf-8").splitlines(True)
    (run / "train.jsonl").write_text(lines[1], "utf-8")
    assert 'license: "cc0-1.0"' in card_of(export(run))


def test_the_python_of_the_card_runs(exports):
    pytest.importorskip("torch")
    for block in re.findall(r"```python\n(.*?)```", card_of(exports["bpe"]), re.DOTALL):
        exec(block.replace("path/to/this/folder", str(exports["bpe"])), {})


# --- whole or not at all ------------------------------------------------------------------------


def listing(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_earlier_export_is_replaced_by_the_newest_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", "bpe")
    first = listing(export(run, max_shard_size="60KB"))
    assert listing(export(run, max_shard_size="60KB")) == first  # the same bytes again
    save_checkpoint(run, BLOOM, seed=1, at=STEP + 10)
    second = export(run)
    assert len(list(second.glob("model-*"))) == 1  # nothing of the old one is left
    assert f"| steps | {STEP + 10} |" in card_of(second)
    assert_same(params_of(second), checkpoint.restore_params(run, BLOOM))
    assert sorted(p.name for p in run.iterdir() if ".part" in p.name or ".old" in p.name) == []


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "config.json"])
def test_a_folder_that_is_no_export_is_not_replaced(name, runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(ExportError, match="--overwrite"):
        export(runs["bpe"], out)
    assert listing(out) == {(out / name).relative_to(out): b"{}"}
    export(runs["bpe"], out, overwrite=True)
    assert hf.read_config(out) == BLOOM


def test_a_file_added_to_an_export_is_not_deleted(runs, tmp_path):
    out = export(runs["bpe"], tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        export(runs["bpe"], out)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("where", [".", "..", "../other"])
def test_no_run_is_deleted_even_with_overwrite(where, tmp_path):
    run = make_run(tmp_path / "run", "bpe")
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ExportError, match="holds a run"):
        export(run, run / where, overwrite=True)
    assert (run / "config.json").is_file()


def test_a_full_disk_is_named_before_anything_is_written(runs, tmp_path, monkeypatch):
    out = export(runs["sentencepiece"], tmp_path / "out")
    before = listing(tmp_path)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=f"{tmp_path}: the disk is full"):
        export(runs["sentencepiece"], out)
    assert listing(tmp_path) == before


def test_a_write_that_fails_leaves_the_earlier_export_and_nothing_else(tmp_path):
    """A real limit on the size of files, which the weights exceed and nothing before them."""
    run = make_run(tmp_path / "run", "sentencepiece")
    export(run, max_shard_size="60KB")
    before = listing(tmp_path)
    command = [sys.executable, "-m", "llmzoo_jax.export", f"--run={run}"]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command]  # in units of 1,024 bytes
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert f"error: {run / 'export'}: not written: " in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


# --- errors -------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(runs, tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        export(tmp_path / "nothing")
    for size in ("5 apples", "0GB", "", "GB", "-1GB"):
        with pytest.raises(ExportError, match="--max_shard_size"):
            export(runs["bpe"], tmp_path / "out", max_shard_size=size)
    with pytest.raises(ExportError, match="float16"):
        export(runs["bpe"], tmp_path / "out", dtype="float16")
    run = make_run(tmp_path / "run", "bpe")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="no finished checkpoint"):
        export(run)
    assert not (run / "export").exists()
