"""Fine-tunes or trains a model.

    python -m llmzoo_jax.train --config=configs/quickstart.py:phoenix

Every key of the config can be set: ``--config.optim.learning_rate=1e-5``. The same command again
resumes the run where its newest checkpoint is. Ctrl-C and SIGTERM save and stop. ``launch/`` has
scripts that start it on several hosts.
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

from llmzoo_jax import (
    checkpoint,
    cli,
    compile_cache,
    distributed,
    flops,
    hf,
    lora,
    lora_run,
    metrics,
    models,
    optim,
    run_page,
    sharding,
)
from llmzoo_jax import config as configs
from llmzoo_jax import step as steps
from llmzoo_jax.config import Config, ConfigError, ModelConfig
from llmzoo_jax.data import heldout_batches, train_data
from llmzoo_jax.goodput import TimeLog
from llmzoo_jax.metrics import say
from llmzoo_jax.moments import state_bytes
from llmzoo_jax.profiling import Trace
from llmzoo_jax.summary import check_skipped, describe, summarise
from llmzoo_jax.tokenizer import load_tokenizer, resolve_format, save_tokenizer

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Config file, e.g. configs/quickstart.py:phoenix. Any key of it can be set as "
    "--config.KEY=VALUE.",
    required=True,
)
HARDWARE = flags.DEFINE_string(
    "hardware",
    "",
    "What the config runs on, e.g. configs/hardware/tpu.py:v5e-256: mesh, memory, XLA's flags.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where there are several processes; auto: as JAX finds it on a TPU VM "
    "or in Kubernetes. Not needed under Slurm's srun, Open MPI, or for TPU slices in Kubernetes. "
    "$JAX_COORDINATOR_ADDRESS where it is not given.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many, with --coordinator; or $JAX_NUM_PROCESSES."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which one this is, with --coordinator; or $JAX_PROCESS_ID."
)
PROFILE = flags.DEFINE_string(
    "profile", "", "FIRST:LAST, steps to trace into RUN_DIR/profile (for XProf or TensorBoard)."
)


def train(config: Config, *, profile: str = "") -> None:
    """Runs training from the newest checkpoint of ``config.run_dir``, or from the start.

    ``profile``: see the flag."""
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
    check_counts(config)
    compute = steps.resolve(config.compute, mesh, lora=config.lora)
    distributed.in_turn(lambda: checkpoint.claim(config, model_config))
    report_config(config, model_config)
    clock = TimeLog(config.run_dir, writes=metrics.writes())

    encoding = {"tokenizer": tokenizer, "chat_format": chat_format}
    data, heldout = distributed.in_turn(
        lambda: (
            train_data(config.data, **encoding, seed=config.seed),
            heldout_batches(config.data, **encoding),
        )
    )
    rows = distributed.local_rows(batch_sharding, (B, T))
    say(data.report)
    if heldout.report:
        say(f"held out:\n{heldout.report}")
    total = config.optim.steps or math.ceil(config.optim.epochs * data.rows_per_epoch / B)
    if metrics.writes():
        save_tokenizer(tokenizer, Path(config.run_dir) / "tokenizer", chat_format=chat_format)
        checkpoint.write_text(Path(config.run_dir) / "data.txt", data.report + "\n")

    tx = optim.make_optimizer(config.optim, total)
    schedule = optim.schedule(config.optim, total)
    stop = StopSignal()
    programs = Path(config.data.cache_dir) / "compiled" if compute.compile_cache else None
    with (
        jax.set_mesh(mesh),
        compile_cache.kept_in(programs),
        checkpoint.open_manager(
            config.run_dir, keep=config.keep_checkpoints, keep_best=config.keep_best
        ) as manager,
    ):
        state = start_state(config, model_config, tx, mesh, manager)
        start = int(state.step)
        if start >= total:
            say(f"{config.run_dir}: all {total} steps are done")
            return
        size = models.num_params(state.params)
        say(
            f"{size:,} parameters to train, {sharding.describe(mesh)}, steps {start + 1} to {total}"
        )
        kept = state_bytes(state.opt_state)
        say(f"the state of {config.optim.optimizer} takes {kept / 1e6:,.1f} MB")
        step_fn = steps.jit_train_step(
            tx,
            compute,
            config.optim.accumulation,
            sharding.tree_shardings(state, mesh),
            seed=config.seed,
            languages=len(data.languages),
        )
        eval_fn = steps.jit_eval_step(compute, state.step.sharding)
        put = functools.partial(distributed.put, sharding=batch_sharding, shape=(B, T))
        log = metrics.MetricsLog(config.run_dir, start_step=start)
        utilisation = flops.Utilisation(
            model_config, config.compute, mesh, frozen=config.lora is not None
        )
        trace = Trace(profile, config.run_dir, start=start, total=total)
        clock.start(start)

        def put_batch(step: int, batch):
            return put(batch), put(data.language(step, batch, rows))

        agree = distributed.agreement(mesh)
        since = time.monotonic()
        step_fn = step_fn.lower(state, *put_batch(start, data.batch(start, rows))).compile()
        say(f"compiled in {time.monotonic() - since:.1f} s")
        pending, asked, since = [], 0, time.monotonic()
        batches = data.iterate(
            start,
            total,
            rows,
            workers=config.data.workers,
            restarts=config.data.worker_restarts,
            report=say,
        )
        bar = tqdm(
            batches,
            initial=start,
            total=total,
            unit="step",
            disable=None if metrics.writes() else True,
        )
        for step, batch in enumerate(bar, start + 1):
            agreed = agree(stop.asked)
            state, step_metrics = trace.run(step, step_fn, state, *put_batch(step - 1, batch))
            pending.append(step_metrics)
            asked = int(agreed)
            last = step == total or asked > 0
            due_eval = step == total or (config.eval_every and step % config.eval_every == 0)
            due_save = last or step % config.save_every == 0 or (due_eval and config.keep_best)
            if last or due_eval or due_save or step % config.log_every == 0:
                jax.block_until_ready(step_metrics)
                seconds, pending = time.monotonic() - since, jax.device_get(pending)
                record = summarise(pending, B * T, seconds, data.languages)
                clock.spent("steps", step, seconds)
                record["learning_rate"] = float(schedule(step - 1 - record["skipped"]))
                record |= utilisation(pending, seconds) | {"goodput": clock.share()}
                log.write(step, **record)
                check_skipped(pending, step, config.optim)
                bar.set_postfix(
                    loss=f"{record.get('loss', math.nan):.3f}",
                    tok_s=f"{record['tokens_per_s']:,.0f}",
                )
                if bar.disable:
                    say(f"step {step}/{total}  " + describe(record))
                pending, heldout_loss = [], None
                if due_eval:
                    with clock.timed("evaluate", step):
                        heldout_loss = evaluate(eval_fn, state.model, heldout, put, log, step)
                        run_page.write(config.run_dir)
                if due_save:
                    with clock.timed("save", step):
                        checkpoint.save(manager, state, heldout_loss=heldout_loss)
                since = time.monotonic()
            if last:
                break
        bar.close()
        batches.close()
        trace.close()
        with clock.timed("save", step):
            checkpoint.wait(manager)
        log.close()
        run_page.write(config.run_dir)
    if asked and step < total:
        name = signal.Signals(asked).name
        say(f"{name}: saved step {step} of {total} in {config.run_dir}; run it again to go on")
        sys.exit(0 if name == "SIGTERM" else 130)
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


def check_counts(config: Config) -> None:
    for key, value, least in (
        ("keep_checkpoints", config.keep_checkpoints, 1),
        ("keep_best", config.keep_best, 0),
        ("data.workers", config.data.workers, 0),
        ("data.worker_restarts", config.data.worker_restarts, 0),
        ("optim.spike_window", config.optim.spike_window, 1),
        ("optim.max_skipped", config.optim.max_skipped, 0),
    ):
        if value < least:
            raise ConfigError(f"{key} must be {least} or more, not {value}")
    if config.keep_best and not config.data.heldout:
        raise ConfigError("keep_best chooses by the held-out loss; set data.heldout")


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
        config.init_from, model_config, place=lambda name, x: distributed.place(x, by_name[name])
    )
    make = functools.partial(steps.start_state, tx=tx)
    out = sharding.tree_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=out)(params)


class StopSignal:
    """Remembers SIGTERM or the first Ctrl-C; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = 0  # the number of the signal
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number, frame):
        self.asked = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say(f"{signal.Signals(number).name}: saving after this step")


# --- in the loop --------------------------------------------------------------------------------


def evaluate(eval_fn, params, heldout, put, log: metrics.MetricsLog, step: int) -> float | None:
    """Held-out loss, whole and by language, over every held-out pair once; the whole is returned,
    None where there is no held-out data."""
    sums: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for batch, language in heldout.batches():
        losses = np.asarray(eval_fn(params, put(batch)))
        parts = metrics.by_language(losses, batch.loss_mask, language, heldout.languages)
        for name, (loss, count) in parts.items():
            sums[name] += loss
            tokens[name] += count
    if not tokens:
        return None
    whole = sums.total() / tokens.total()
    by_language = {name: sums[name] / tokens[name] for name in tokens}
    log.write(step, heldout_loss=whole, heldout_by_language=by_language)
    worst = sorted(by_language.items(), key=lambda item: -item[1])[:4]
    say(
        f"step {step}  held-out loss {whole:.4f}  highest: "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in worst)
    )
    return whole


def main(overrides: list[str]) -> None:
    place = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    config = configs.load(CONFIG.value, overrides, HARDWARE.value)
    distributed.set_environment(config.hardware)  # before JAX starts a device
    with distributed.joined(*place):
        train(config, profile=PROFILE.value)


if __name__ == "__main__":
    argv, overrides = cli.split_overrides(sys.argv)
    cli.run(lambda _: main(overrides), argv)
