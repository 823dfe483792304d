"""The training command as a user meets it: it trains, resumes exactly, and says what is wrong.

Runs in this process on eight fake devices (FSDP) with a tiny BLOOM.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmzoo_jax import checkpoint, config, goodput, metrics, summary, train
from llmzoo_jax.config import ComputeConfig, Config, ConfigError, DataConfig, OptimConfig, Source
from llmzoo_jax.conversation import ConversationError, write_jsonl
from llmzoo_jax.data import DataError
from llmzoo_jax.errors import InputError
from tests.tiny_runs import BLOOM
from tests.tiny_tokenizers import SENTENCES, conversation, tiny

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer and two small files of conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny("bpe").save_pretrained(folder / "tokenizer")
    pairs = [conversation(a, b, lang="xx"[: i % 2] + "fr") for i, a in enumerate(SENTENCES)
             for b in SENTENCES]  # fmt: skip
    write_jsonl(folder / "train.jsonl", pairs)
    write_jsonl(folder / "heldout.jsonl", pairs[::9])
    return folder


@pytest.fixture(autouse=True)
def signals():
    """train() takes over SIGINT and SIGTERM; they are given back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_config(folder: Path, run_dir: Path, **changes) -> Config:
    return dataclasses.replace(
        Config(
            run_dir=str(run_dir),
            tokenizer=str(folder / "tokenizer"),
            model=BLOOM,
            data=DataConfig(
                train=(Source(path=str(folder / "train.jsonl")),),
                heldout=(Source(path=str(folder / "heldout.jsonl")),),
                sequence_length=128,
                batch_size=16,
                cache_dir=str(folder / "cache"),
            ),
            optim=OptimConfig(learning_rate=1e-2, steps=STEPS, accumulation=2, weight_decay=0.1),
            compute=ComputeConfig(dtype="bfloat16", loss_chunk=512),
            log_every=1,
            eval_every=3,
            save_every=2,
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """A run that was never disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train.train(make_config(folder, run_dir))
    return run_dir


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in metrics.read(run_dir) if "loss" in r}


def final_weights(run_dir: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(checkpoint.restore_params(run_dir, BLOOM))]


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Sends a signal to this process when the metrics of ``step`` are written."""
    write = metrics.MetricsLog.write

    def write_and_stop(self, at, **values):
        write(self, at, **values)
        if at == step and "loss" in values:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.MetricsLog, "write", write_and_stop)


def test_a_run_leaves_its_config_tokenizer_metrics_plot_and_checkpoints(finished):
    saved = checkpoint.read_config(finished)
    assert saved["model"]["family"] == "bloom" and saved["optim"]["steps"] == STEPS
    assert (finished / "tokenizer" / "tokenizer.json").is_file()
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert sorted(losses(finished)) == list(range(1, STEPS + 1))
    with checkpoint.open_manager(finished) as manager:
        assert manager.latest_step() == STEPS


def test_the_loss_falls_on_training_and_on_heldout_data(finished):
    by_step = losses(finished)
    assert by_step[STEPS] < by_step[1] - 0.5
    held = [r for r in metrics.read(finished) if "heldout_loss" in r]
    assert [r["step"] for r in held] == [3, STEPS]
    assert held[1]["heldout_loss"] < held[0]["heldout_loss"]
    assert set(held[0]["heldout_by_language"]) == {"fr", "xfr"}


def test_a_finished_run_is_left_as_it_is(finished, folder, capsys):
    before = final_weights(finished)
    train.train(make_config(folder, finished))
    assert "all 6 steps are done" in capsys.readouterr().out
    np.testing.assert_array_equal(before[0], final_weights(finished)[0])


def test_a_run_accounts_for_its_time_and_its_languages(finished):
    records = [r for r in metrics.read(finished) if "loss" in r]
    for record in records:
        losses_of = record["loss_by_language"]
        assert losses_of.keys() == {"fr", "xfr"}
        assert min(losses_of.values()) <= record["loss"] <= max(losses_of.values())
        assert 0 < record["goodput"] < 1 and "mfu" not in record  # a CPU has no peak
    spent = goodput.goodput(goodput.read(finished), time.time())
    assert spent.useful > 0 and spent.startup > 0 and spent.restarts == 0
    assert "conversations" in (finished / "data.txt").read_text()
    assert "Loss by language" in (finished / "report.html").read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_stopped_run_resumes_to_bitwise_the_same_losses_and_weights(
    number, code, finished, folder, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        with pytest.raises(SystemExit) as stopped:
            train.train(make_config(folder, tmp_path / "run"))
    assert stopped.value.code == code
    assert "saved step 4 of 6" in capsys.readouterr().out
    train.train(make_config(folder, tmp_path / "run"))
    assert "resuming" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(finished)
    for ours, theirs in zip(final_weights(tmp_path / "run"), final_weights(finished), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_killed_run_resumes_to_bitwise_the_same_losses(finished, folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed  # as SIGKILL does, without a last save; after step 5, the newest save is of 4

    with monkeypatch.context() as patch:
        check = summary.check_skipped
        patch.setattr(train, "check_skipped", lambda *a: die() if a[1] == 5 else check(*a))
        with pytest.raises(Killed):
            train.train(make_config(folder, tmp_path / "run"))
    train.train(make_config(folder, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(finished)


def test_a_run_folder_of_another_config_is_refused_with_every_key_that_differs(finished, folder):
    other = make_config(folder, finished, seed=7)
    other = config.override(other, "optim.learning_rate", "0.5")
    with pytest.raises(InputError, match="belongs to another config") as error:
        train.train(other)
    assert "optim.learning_rate: now 0.5, there 0.01" in str(error.value)
    assert "seed: now 7, there 0" in str(error.value)
    assert "run_dir" in str(error.value)


def test_where_a_run_is_computed_and_how_often_it_reports_may_change(finished, folder):
    other = make_config(folder, finished, log_every=3, save_every=5)
    other = config.override(other, "mesh.tensor", "5")
    checkpoint.claim(other, BLOOM)


def test_a_nonfinite_loss_names_the_step_and_saves_nothing(folder, tmp_path):
    bad = make_config(folder, tmp_path / "run", save_every=1)
    bad = config.override(bad, "optim.learning_rate", "1e30")
    bad = config.override(bad, "optim.clip_norm", "0")
    bad = config.override(bad, "optim.warmup_ratio", "0")
    bad = config.override(bad, "optim.max_skipped", "0")
    with pytest.raises(summary.TrainingError, match=r"step \d: loss .*not finite"):
        train.train(bad)
    with checkpoint.open_manager(tmp_path / "run") as manager:
        for step in manager.all_steps():
            assert np.isfinite(losses(tmp_path / "run")[step])


def test_a_run_starts_from_a_hugging_face_folder(folder, tmp_path, finished):
    from llmzoo_jax import export, load

    export.export(finished, tmp_path / "hf")
    start = make_config(folder, tmp_path / "run", model=None, init_from=str(tmp_path / "hf"))
    start = config.override(start, "optim.learning_rate", "0")
    start = config.override(start, "optim.weight_decay", "0")
    train.train(start)
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(
        load(tmp_path / "run").logits(tokens), load(finished).logits(tokens)
    )


def test_a_full_disk_stops_the_run_and_what_was_saved_stays_whole(
    folder, tmp_path, monkeypatch, finished
):
    with monkeypatch.context() as patch:
        real = checkpoint.shutil.disk_usage
        calls = []

        def usage(path):
            calls.append(path)
            full = real(path)
            return full if len(calls) < 2 else full._replace(free=1000)

        patch.setattr(checkpoint.shutil, "disk_usage", usage)
        with pytest.raises(InputError, match=r"disk is full: the checkpoint of step 4 needs"):
            train.train(make_config(folder, tmp_path / "run"))
    train.train(make_config(folder, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(finished)


def test_a_checkpoint_with_a_missing_tensor_is_named(finished):
    other = dataclasses.replace(BLOOM, tie_embeddings=False)
    with pytest.raises(InputError, match=r"misses tensor params.head.w"):
        checkpoint.restore_params(finished, other)
    other = dataclasses.replace(BLOOM, vocab_size=640)
    with pytest.raises(InputError, match=r"params.embed.w has shape \[620,40\]"):
        checkpoint.restore_params(finished, other)


# --- bad input: an error that names it, before anything is compiled ------------------------------


def with_data(folder: Path, tmp_path: Path, text: str) -> Config:
    (tmp_path / "bad.jsonl").write_text(text)
    data = DataConfig(train=(Source(path=str(tmp_path / "bad.jsonl")),), batch_size=16,
                      sequence_length=64, cache_dir=str(tmp_path))  # fmt: skip
    return make_config(folder, tmp_path / "run", data=data)


def turns(*roles_and_contents) -> str:
    messages = [{"role": r, "content": c} for r, c in roles_and_contents]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


GOOD = turns(("user", "Qui ?"), ("assistant", "Moi."))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (GOOD + "{not json\n", r"bad\.jsonl:2.*not JSON"),
        (GOOD + '{"messages": []}\n', r"bad\.jsonl:2.*empty conversation"),
        (turns(("user", "Qui ?")), r"bad\.jsonl:1.*ends without an answer"),
        (turns(("user", "Qui ?"), ("robot", "Moi.")), r"bad\.jsonl:1.*unknown role 'robot'"),
        (turns(("user", "Qui ?"), ("assistant", "a</s>b")), r"bad\.jsonl:1.*</s>"),
        ("", r"bad\.jsonl.*no conversation"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(text, wanted, folder, tmp_path):
    with pytest.raises(ConversationError, match=wanted):
        train.train(with_data(folder, tmp_path, text))


def test_a_missing_data_file_is_named(folder, tmp_path):
    data = DataConfig(train=(Source(path="nowhere.jsonl"),), batch_size=16, sequence_length=64)
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        train.train(make_config(folder, tmp_path / "run", data=data))


def test_a_language_filter_that_leaves_nothing_lists_the_languages(folder, tmp_path):
    bad = config.override(make_config(folder, tmp_path / "run"), "data.languages", "sw")
    with pytest.raises(DataError, match="fr"):
        train.train(bad)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(folder, tmp_path):
    small = dataclasses.replace(BLOOM, vocab_size=100)
    with pytest.raises(ConfigError, match=r"ids up to \d+, the model rows for 100"):
        train.train(make_config(folder, tmp_path / "run", model=small))


def test_accumulation_that_does_not_divide_the_batch_is_refused(folder, tmp_path):
    bad = config.override(make_config(folder, tmp_path / "run"), "optim.accumulation", "3")
    with pytest.raises(ConfigError, match=r"data.batch_size 16 .* optim.accumulation=3"):
        train.train(bad)


def test_a_sequence_longer_than_the_row_is_counted_and_reported(folder, tmp_path, capsys):
    text = GOOD + turns(("user", "Qui ?"), ("assistant", "Moi ! " * 60))
    bad = with_data(folder, tmp_path, text)
    train.train(config.override(bad, "optim.steps", "1"))
    assert "1 longer than a row, split" in capsys.readouterr().out


def test_the_command_shows_errors_without_a_traceback_and_exits_with_1(folder, repository):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "llmzoo_jax.train", *arguments],
            cwd=repository, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    unknown = command("--config=configs/quickstart.py", "--config.optim.learning_rat=1")
    assert unknown.returncode == 1 and "Traceback" not in unknown.stderr
    assert "did you mean 'optim.learning_rate'" in unknown.stderr
    helped = command("--help")
    assert "--config" in helped.stdout and "configs/quickstart.py" in helped.stdout
