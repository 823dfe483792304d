"""Fine-tunes or trains a model.

    python -m llmzoo_jax.train --config=configs/quickstart.py:phoenix

Every key of the config can be set: ``--config.optim.learning_rate=1e-5``. The same command again
resumes the run where its newest checkpoint is. Ctrl-C and SIGTERM save and stop.
"""

from __future__ import annotations

import functools
import math
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from llmzoo_jax import checkpoint, cli, hf, lora, lora_run, metrics, models, optim, sharding
from llmzoo_jax import config as configs
from llmzoo_jax import step as steps
from llmzoo_jax.config import Config, ConfigError, ModelConfig
from llmzoo_jax.data import heldout_batches, train_data
from llmzoo_jax.errors import InputError
from llmzoo_jax.metrics import say
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format, save_tokenizer

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, e.g. configs/quickstart.py:phoenix. Any key of it can be set as "
    "--config.KEY=VALUE.",
    required=True,
)


class TrainingError(InputError):
    """Training can't go on; the message says at which step and what to do."""


def train(config: Config) -> None:
    """Runs training from the newest checkpoint of ``config.run_dir``, or from the start."""
    # Everything that can be wrong is read before anything is compiled.
    model_config = resolve_model(config)
    if config.lora:
        lora.targets(config.lora, model_config)
    tokenizer = load_tokenizer(config.tokenizer)
    chat_format = resolve_format(config.chat_format, tokenizer)
    check_vocabulary(tokenizer, model_config, config.tokenizer)
    mesh = sharding.make_mesh(config.mesh)
    B, T = config.data.batch_size, config.data.sequence_length
    batch_sharding = sharding.batch_sharding(mesh, (B, T))
    check_accumulation(config, mesh)
    checkpoint.claim(config, model_config)
    report_config(config, model_config)

    encoding = {"tokenizer": tokenizer, "chat_format": chat_format}
    data = train_data(config.data, **encoding, seed=config.seed)
    heldout = heldout_batches(config.data, **encoding)
    say(data.report)
    if heldout.report:
        say(f"held out:\n{heldout.report}")
    total = config.optim.steps or math.ceil(config.optim.epochs * data.rows_per_epoch / B)
    save_tokenizer(tokenizer, Path(config.run_dir) / "tokenizer", chat_format=chat_format)

    tx = optim.make_optimizer(config.optim, total)
    schedule = optim.schedule(config.optim, total)
    with (
        jax.set_mesh(mesh),
        checkpoint.open_manager(config.run_dir, keep=config.keep_checkpoints) as manager,
    ):
        state = start_state(config, model_config, tx, mesh, manager)
        start = int(state.step)
        if start >= total:
            say(f"{config.run_dir}: all {total} steps are done")
            return
        size = models.num_params(state.params)
        say(f"{size:,} parameters to train on {mesh.size} device(s), steps {start + 1} to {total}")
        step_fn = steps.jit_train_step(
            tx,
            config.compute,
            config.optim.accumulation,
            sharding.tree_shardings(state, mesh),
            seed=config.seed,
        )
        eval_fn = steps.jit_eval_step(config.compute)
        put = functools.partial(jax.device_put, device=batch_sharding)
        log = metrics.MetricsLog(config.run_dir, start_step=start)
        stop = StopSignal()
        since = time.monotonic()
        step_fn = step_fn.lower(state, put(data.batch(start))).compile()
        say(f"compiled in {time.monotonic() - since:.1f} s")
        pending, counts, since = [], Counter(), time.monotonic()
        bar = tqdm(
            data.iterate(start, total), initial=start, total=total, unit="step", disable=None
        )
        for step, batch in enumerate(bar, start + 1):
            state, step_metrics = step_fn(state, put(batch))
            pending.append(step_metrics)
            counts["tokens"] += int((batch.segment_ids > 0).sum())
            counts["slots"] += B * T
            last = step == total or bool(stop.asked)
            due_eval = step == total or (config.eval_every and step % config.eval_every == 0)
            due_save = last or step % config.save_every == 0
            if last or due_eval or due_save or step % config.log_every == 0:
                jax.block_until_ready(step_metrics)
                record = summarise(pending, counts, time.monotonic() - since, step)
                record["learning_rate"] = float(schedule(step - 1))
                log.write(step, **record)
                bar.set_postfix(
                    loss=f"{record['loss']:.3f}", tok_s=f"{record['tokens_per_s']:,.0f}"
                )
                if bar.disable:
                    say(f"step {step}/{total}  " + describe(record))
                pending, counts = [], Counter()
                if due_eval:
                    evaluate(eval_fn, state.model, heldout, put, log, step)
                    metrics.plot(config.run_dir, title=Path(config.run_dir).name)
                if due_save:
                    checkpoint.save(manager, state)
                since = time.monotonic()
            if last:
                break
        bar.close()
        checkpoint.wait(manager)
        log.close()
        metrics.plot(config.run_dir, title=Path(config.run_dir).name)
    if stop.asked and step < total:
        say(
            f"{stop.asked}: saved step {step} of {total} in {config.run_dir}; run it again to go on"
        )
        sys.exit(0 if stop.asked == "SIGTERM" else 130)
    say(
        f"done: {config.run_dir}; export it with python -m llmzoo_jax.export --run={config.run_dir}"
    )


# --- before the loop ----------------------------------------------------------------------------


def resolve_model(config: Config) -> ModelConfig:
    """The model config, from the run's config, the folder it starts from, or both if they agree."""
    if not config.init_from:
        if config.lora:
            raise ConfigError(
                "config: lora trains adapters of a model that exists; set init_from to its Hugging "
                "Face folder (or --config.lora=none to train all weights)"
            )
        if config.model is None:
            raise ConfigError("config: set model, or init_from to a Hugging Face folder")
        return config.model
    theirs = hf.read_config(config.init_from)
    if config.model is not None:
        different = configs.differences(configs.to_dict(config.model), configs.to_dict(theirs))
        different.pop("init_std", None)
        if different:
            raise ConfigError(
                f"config.model and {config.init_from}/config.json differ (config, folder): "
                f"{different}; leave model out to take the folder's"
            )
    return theirs


def check_vocabulary(tokenizer, model: ModelConfig, path: str) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= model.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has ids up to {highest}, the model rows for "
            f"{model.vocab_size}; set --config.model.vocab_size={highest + 1} or more, or take the "
            "tokenizer that the model was trained with"
        )


def check_accumulation(config: Config, mesh) -> None:
    B, parts = config.data.batch_size, config.optim.accumulation
    ways = mesh.shape["replica"] * mesh.shape["fsdp"]
    if B % (parts * ways):
        raise ConfigError(
            f"data.batch_size {B} can't be computed in optim.accumulation={parts} equal parts "
            f"on {ways} batch device(s)"
        )


def report_config(config: Config, model: ModelConfig) -> None:
    say(f"run {config.run_dir}: {model}")
    defaults = Config(run_dir="", tokenizer="", data=configs.DataConfig(train=()))
    ours, theirs = (configs.to_dict(c) | {"model": None} for c in (config, defaults))
    for key, (value, default) in configs.differences(ours, theirs).items():
        say(f"  {key} = {value}" + (f"  (default {default})" if default not in ("", []) else ""))


def start_state(config: Config, model_config: ModelConfig, tx, mesh, manager) -> steps.TrainState:
    """The newest checkpoint, else the weights of ``init_from``, else random ones: in this order."""
    if config.lora:
        return lora_run.start_state(config, model_config, tx, mesh, manager)
    if manager.latest_step() is not None:
        abstract = jax.eval_shape(lambda: steps.start_state(models.abstract(model_config), tx))
        say(f"resuming {config.run_dir} at step {manager.latest_step()}")
        return checkpoint.restore(manager, abstract, mesh)
    if not config.init_from:
        return steps.init_state(model_config, tx, mesh, config.seed)
    shardings = sharding.tree_shardings(models.abstract(model_config), mesh)
    by_name = dict(
        zip(
            sharding.named_leaves(models.abstract(model_config)),
            jax.tree.leaves(shardings),
            strict=True,
        )
    )
    say(f"reading {config.init_from}")
    params = hf.load_params(
        config.init_from, model_config, place=lambda name, x: jax.device_put(x, by_name[name])
    )
    make = functools.partial(steps.start_state, tx=tx)
    out = sharding.tree_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=out)(params)


class StopSignal:
    """Remembers SIGTERM or the first Ctrl-C; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = ""
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number, frame):
        self.asked = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say(f"{self.asked}: saving after this step")


# --- in the loop --------------------------------------------------------------------------------


def summarise(pending: list[steps.Metrics], counts: Counter, seconds: float, step: int) -> dict:
    """The metrics of the steps since the last line, means weighted by loss tokens."""
    check_finite(pending, step)
    loss, loss_tokens, grad_norm = np.array(jax.device_get(pending), np.float64).T
    return {
        "loss": float((loss * loss_tokens).sum() / max(loss_tokens.sum(), 1)),
        "grad_norm": float(grad_norm[-1]),
        "tokens_per_s": counts["tokens"] / seconds,
        "loss_tokens_per_s": float(loss_tokens[-len(pending) :].sum()) / seconds,
        "packing": counts["tokens"] / max(counts["slots"], 1),
    }


def check_finite(pending: list[steps.Metrics], step: int) -> None:
    for i, one in enumerate(jax.device_get(pending)):
        if not np.isfinite(one.loss) or not np.isfinite(one.grad_norm):
            bad = step - len(pending) + 1 + i
            raise TrainingError(
                f"step {bad}: loss {one.loss}, gradient norm {one.grad_norm}: not finite. No later "
                "state was saved; lower optim.learning_rate or set optim.clip_norm, and run again"
            )


def describe(record: dict) -> str:
    return (
        f"loss {record['loss']:.4f}  grad norm {record['grad_norm']:.2f}  "
        f"lr {record['learning_rate']:.2e}  {record['tokens_per_s']:,.0f} tok/s  "
        f"packing {record['packing']:.1%}"
    )


def evaluate(eval_fn, params, heldout, put, log: metrics.MetricsLog, step: int) -> None:
    """Held-out loss, whole and by language, over every held-out pair once."""
    sums: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for batch, language in heldout.batches():
        losses = np.asarray(eval_fn(params, put(batch)))
        parts = metrics.by_language(losses, batch.loss_mask, language, heldout.languages)
        for name, (loss, count) in parts.items():
            sums[name] += loss
            tokens[name] += count
    if not tokens:
        return
    whole = sums.total() / tokens.total()
    by_language = {name: sums[name] / tokens[name] for name in tokens}
    log.write(step, heldout_loss=whole, heldout_by_language=by_language)
    worst = sorted(by_language.items(), key=lambda item: -item[1])[:4]
    say(
        f"step {step}  held-out loss {whole:.4f}  highest: "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in worst)
    )


if __name__ == "__main__":
    argv, overrides = cli.split_overrides(sys.argv)
    cli.run(lambda _: train(configs.load(CONFIG.value, overrides)), argv)
