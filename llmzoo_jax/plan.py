"""Says whether a run fits before it is rented: compiles its step for devices that are not here.

    python -m llmzoo_jax.plan --config=configs/phoenix_7b.py \\
        --hardware=configs/hardware/tpu.py:v5e-256 --target=v5e:16x16

prints memory a device, FLOPs, bytes and collectives, and how long compiling took. Nothing is
allocated and no device is needed: ``v5e:16x16`` wants ``pip install 'jax[tpu]'`` and ``h200:8``
``pip install 'jax[cuda13]'``, ``cpu:8`` nothing. Every key of the config can be set as in training.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import time
from typing import NamedTuple

import jax
from absl import flags

from llmzoo_jax import (
    cli,
    distributed,
    flops,
    hf_config,
    lora,
    models,
    optim,
    program,
    sharding,
    targets,
)
from llmzoo_jax import config as configs
from llmzoo_jax import step as steps
from llmzoo_jax.config import Config, ConfigError, ModelConfig
from llmzoo_jax.packing import Batch
from llmzoo_jax.targets import Target


class Plan(NamedTuple):
    """A compiled step; bytes and FLOPs are those of one device in one step."""

    target: str
    devices: int
    parameters: int
    tokens: int  # positions of the global batch
    compute: configs.ComputeConfig
    compile_seconds: float
    memory: int | None  # that a device has; None: not known
    peak: flops.Peak | None  # FLOP/s of a device; None: not known
    arguments: int  # parameters, optimiser state, batch
    temporaries: int  # activations, gradients, what collectives bring
    flops: program.Flops  # of all devices, attention as if it computed all scores
    traffic: program.Traffic

    @property
    def needed(self) -> int:
        """Bytes of memory; outputs take the place of the state that went in."""
        return self.arguments + self.temporaries

    @property
    def seconds_at_peak(self) -> float | None:
        """Of the products of one device, each at the peak of its operands' width."""
        if self.peak is None:
            return None
        low = self.flops.eight_bits / self.devices
        return self.peak.seconds(self.flops_a_device - low, low, self.compute.matmul)

    @property
    def flops_a_device(self) -> float:
        """Causal attention over rows that are one segment needs half of all scores."""
        return (self.flops.projections + self.flops.attention / 2) / self.devices


class DoesNotFit(NamedTuple):
    """The compiler found no way to place the step in the memory of a device."""

    target: str
    devices: int
    reason: str


def plan(config: Config, target: Target) -> Plan | DoesNotFit:
    """Compiles the training step of ``config`` for ``target``."""
    model = resolve_model(config)
    mesh = sharding.make_mesh(config.mesh, target.devices)
    compute = steps.resolve(config.compute, mesh, lora=config.lora)
    tx = optim.make_optimizer(config.optim, config.optim.steps or 1000)
    shape = config.data.batch_size, config.data.sequence_length
    batch_sharding = sharding.batch_sharding(mesh, shape)
    with jax.set_mesh(mesh):
        state = abstract_state(config, model, tx)
        shardings = sharding.tree_shardings(state, mesh)
        batch = abstract_batch(shape, batch_sharding)
        args = placed(state, shardings), batch, batch.positions  # the last: numbers of languages
        compile_for = lambda compute: steps.jit_train_step(  # noqa: E731
            tx, compute, config.optim.accumulation, shardings, seed=config.seed, languages=1
        )
        since = time.monotonic()
        try:
            compiled = compile_for(compute).lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return DoesNotFit(target.name, mesh.size, out_of_memory(str(error)))
        seconds = time.monotonic() - since
        # Kernels are closed to counting: all scores, in plain products, are not.
        plain = dataclasses.replace(compute, attention="scores")
        counted = program.count_flops(compile_for(plain).trace(*args).jaxpr)
    memory = compiled.memory_analysis()
    return Plan(
        target=target.name,
        devices=mesh.size,
        parameters=models.num_params(models.abstract(model)),
        tokens=shape[0] * shape[1],
        compute=compute,
        compile_seconds=seconds,
        memory=target.memory,
        peak=flops.peak(target.devices[0].device_kind, config.compute.peak_flops),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=counted,
        traffic=program.count_traffic(compiled.as_text()),
    )


def abstract_state(config: Config, model: ModelConfig, tx) -> steps.TrainState:
    """The state of training, all parameters or adapters over a frozen base, as shapes."""
    whole = models.abstract(model)
    if config.lora is None:
        return jax.eval_shape(lambda: steps.start_state(whole, tx))
    adapters = lora.abstract(config.lora, model)
    base = jax.eval_shape(functools.partial(lora.freeze, config=config.lora), whole)
    return jax.eval_shape(lambda: steps.start_state(adapters, tx))._replace(base=base)


def resolve_model(config: Config) -> ModelConfig:
    if config.model is not None:
        return config.model
    if not config.init_from:
        raise ConfigError("config: set model, or init_from to a Hugging Face folder")
    return hf_config.read_config(config.init_from)


def placed(tree, shardings):
    """Abstract arrays with their place on the mesh; ``shardings`` is a prefix of ``tree``."""

    def put(sharding, part):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
        )

    return jax.tree.map(put, shardings, tree)


def abstract_batch(shape: tuple[int, int], batch_sharding) -> Batch:
    dtypes = dict.fromkeys(Batch._fields, "int32") | {"loss_mask": "bool"}
    return Batch(
        **{k: jax.ShapeDtypeStruct(shape, d, sharding=batch_sharding) for k, d in dtypes.items()}
    )


def out_of_memory(message: str) -> str:
    """The lines of XLA's message that say how much is missing, and what takes most."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    largest = [line for line in lines if re.match(r"(Size|Operator|Shape):", line)]
    return "\n".join([lines[0], *largest[:9]])


# --- in words -----------------------------------------------------------------------------------


def describe(result: Plan | DoesNotFit) -> str:
    if isinstance(result, DoesNotFit):
        return (
            f"{result.target}: the step does not fit {result.devices} device(s)\n{result.reason}\n"
            "Set compute.remat=full, compute.loss_chunk, optim.accumulation, or a larger mesh.fsdp"
        )
    traffic = result.traffic
    lines = [
        f"{result.target}: {result.devices} device(s), {result.parameters:,} parameters, "
        f"{result.tokens:,} positions a step, attention by {result.compute.attention}",
        f"memory a device    {gib(result.needed)} = {gib(result.arguments)} parameters, optimiser "
        f"and batch + {gib(result.temporaries)} temporaries" + verdict(result),
        f"FLOPs a device     {result.flops_a_device:.3e} a step: "
        f"{result.flops.projections / result.devices:.3e} of projections and logits, "
        f"{result.flops.attention / 2 / result.devices:.3e} of causal attention"
        + (f"; {result.seconds_at_peak:.2f} s at its peak" if result.peak else ""),
        f"bytes a device     {traffic.bytes:.3e} of main memory a step",
        "collectives        "
        + (
            ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(traffic.collectives.items()))
            or "none"
        ),
        f"compiled in        {result.compile_seconds:.1f} s",
    ]
    if result.flops.eight_bits:
        label = f"of these, in {result.compute.matmul}"
        lines.insert(3, f"{label:<19}{result.flops.eight_bits / result.devices:.3e}")
    if traffic.unknown_loops:
        lines.append(
            f"bytes count {len(traffic.unknown_loops)} loop(s) once, since only data says how "
            "often they turn: " + ", ".join(traffic.unknown_loops)
        )
    return "\n".join(lines)


def verdict(result: Plan) -> str:
    if result.memory is None:
        return ""
    word = "fits" if result.needed <= result.memory else "DOES NOT FIT"
    share = result.needed / result.memory
    return f"; {word}: {share:.0%} of {gib(result.memory)}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def main(overrides: list[str]) -> None:
    args = flags.FLAGS
    config = configs.load(args.config, overrides, args.hardware)
    distributed.set_environment(config.hardware)  # before JAX starts a device
    # What is compiled for is not here, and a plugin that is installed would look for its device.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if args.target.startswith("cpu:") and args.target[4:].isdigit():
        jax.config.update("jax_num_cpu_devices", int(args.target[4:]))
    result = plan(config, targets.load(args.target, slices=args.slices))
    print(describe(result))
    if isinstance(result, DoesNotFit) or (result.memory and result.needed > result.memory):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string(
        "config",
        None,
        "Config file, as for training; its keys as --config.KEY=VALUE.",
        required=True,
    )
    flags.DEFINE_string("hardware", "", "Hardware file, as for training.")
    flags.DEFINE_string(
        "target", None, "v5e:16x16, v5p:4x4x4, h200:8, h200:4x8, cpu:8, ...", required=True
    )
    flags.DEFINE_integer("slices", 1, "So many TPU slices of the target.", lower_bound=1)
    argv, overrides = cli.split_overrides(sys.argv)
    cli.run(lambda _: main(overrides), argv)
