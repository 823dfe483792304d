"""Configuration: frozen dataclasses, and the two functions that read and override them.

A config file is a Python file with ``get_config() -> Config`` (or ``get_config(arg)``, for
``--config=FILE:arg``). Every field can be overridden as ``--config.optim.learning_rate=1e-5``.
Reading a config touches no device and imports no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmzoo_jax.errors import InputError


class ConfigError(InputError):
    """A config file, key or value is wrong; the message names it and says what to do."""


# --- models: no defaults, so that no numeric can hide -------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """BLOOM (Phoenix). Names follow HF's ``config.json`` where it has one meaning only."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    residual_post_layernorm: bool  # apply_residual_connection_post_layernorm
    tie_embeddings: bool
    init_std: float
    family: Literal["bloom"] = "bloom"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; ``scaling`` as in HF's ``rope_type``.

    ``factor`` is used by ``linear`` and ``llama3``, the last three fields by ``llama3`` alone.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """LLaMA 1, 2 and 3 (Chimera)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    attention_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    init_std: float
    family: Literal["llama"] = "llama"


ModelConfig = BloomConfig | LlamaConfig


# --- a run --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; none of it changes what the model is."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    # What the backward pass computes again: "full" each layer, "dots" all but products, "offload"
    # (GPU, TPU) the same, with the products kept in the host's memory, "none" nothing.
    remat: Literal["none", "dots", "offload", "full"] = "dots"
    # How packed rows attend: "blocks" anywhere, "splash" on TPUs, "triton" on GPUs, all in memory
    # that grows with T; "scores" holds T x T (the reference); "auto" = the fastest.
    attention: Literal["auto", "blocks", "splash", "triton", "scores"] = "auto"
    # Products of the layers' projections in training: in dtype, or with operands of 8 bits, where
    # the hardware multiplies them faster: "int8" (TPU v5e, v5p, v6e; GPUs), "fp8" (GPUs from
    # compute capability 8.9 on, TPU7x). On a CPU: the same numerics, to try them out.
    matmul: Literal["dtype", "int8", "fp8"] = "dtype"
    loss_chunk: int = 0  # tokens of which logits are held at once; 0 = all of them
    compile_cache: bool = True  # compiled programs are kept in data.cache_dir, for a restart
    peak_flops: float = 0.0  # FLOP/s of a device, for MFU; 0 = of its kind (flops.PEAKS)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of conversations (JSON Lines, see ``conversation.py``)."""

    path: str
    weight: float = 1.0  # passes over it in an epoch; 0.5: each row comes once in two epochs


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: tuple[Source, ...]
    heldout: tuple[Source, ...] = ()
    languages: tuple[str, ...] = ()  # keep only these (BCP-47); empty = all
    sequence_length: int = 2048  # T
    batch_size: int = 256  # B, rows of the global batch
    overlong: Literal["split", "truncate", "error"] = "split"  # conversations longer than a row
    cache_dir: str = "cache"  # tokenised records, keyed by content
    workers: int = 0  # processes that make batches; 0: threads do
    worker_restarts: int = 3  # after so many deaths of workers, threads go on


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The defaults are LLM Zoo's: AdamW, 2e-5, cosine, 3 % warm-up, no weight decay, 3 epochs.

    ``b1`` is the decay of the first moment (Adafactor: 0 for none), ``b2`` of the second (Lion: of
    its momentum; Muon: of Adam's, for what is no matrix of a layer).
    """

    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of moments, between steps
    learning_rate: float = 2e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    final_ratio: float = 0.0  # the schedule ends at learning_rate * final_ratio
    epochs: float = 3.0  # passes over the rows of the training mixture ...
    steps: int = 0  # ... or a number of steps, where it is not 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices; norms and biases never decay
    clip_norm: float = 1.0  # 0 = no clipping
    accumulation: int = 1  # the batch is computed in this many parts
    # A step is skipped where its loss or gradient is not finite, or its gradient norm is over
    # spike_factor x the median of the last spike_window norms. It stays out of the schedule.
    spike_factor: float = 0.0  # 0: no step is a spike
    spike_window: int = 128
    max_skipped: int = 10  # in a row; one more stops the run


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices by axis; -1, at one axis at most, takes those that are left."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021), trained while the weights of ``init_from`` are frozen.

    The defaults are LLM Zoo's. ``quantise`` makes it QLoRA (Dettmers et al., 2023).
    """

    rank: int = 16
    alpha: float = 16.0  # what an adapter adds is scaled by alpha / rank
    dropout: float = 0.05  # of an adapter's input, in training
    targets: tuple[str, ...] = ()  # HF's names; empty: q_, k_, v_, o_proj or query_key_value
    init_from: str = ""  # PEFT folder to start from; empty: adapters that change nothing yet
    base_dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights ...
    quantise: Literal["none", "int8", "nf4"] = "none"  # ... but for the layers' projections


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a target needs, beside its own keys of the config; a file of ``configs/hardware``."""

    name: str = ""
    settings: tuple[str, ...] = ()  # KEY=VALUE of the config; what the command line says wins
    xla_flags: tuple[str, ...] = ()  # put before what XLA_FLAGS has
    libtpu_flags: tuple[str, ...] = ()  # put before what LIBTPU_INIT_ARGS has
    environment: tuple[str, ...] = ()  # NAME=VALUE, where NAME is not set


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a training run is. It is saved, resolved, in the run folder."""

    run_dir: str
    tokenizer: str  # folder of a Hugging Face fast tokenizer, or a SentencePiece tokenizer.model
    data: DataConfig
    model: BloomConfig | LlamaConfig | None = None  # None: the one in init_from
    init_from: str = ""  # Hugging Face folder to start from; empty: random
    chat_format: str = "phoenix"
    lora: LoraConfig | None = None  # None: all weights are trained
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hardware: Hardware = field(default_factory=Hardware)
    seed: int = 0
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: once, at the end
    save_every: int = 500  # steps; the last step is always saved
    keep_checkpoints: int = 3  # the newest ...
    keep_best: int = 0  # ... and so many of the lowest held-out loss; then each evaluation is saved


# --- reading ------------------------------------------------------------------------------------


HARDWARE_KEYS = ("mesh.", "compute.", "optim.accumulation")  # what a hardware file may set


def load(spec: str, overrides: typing.Sequence[str] = (), hardware: str = "") -> Config:
    """Reads ``FILE`` or ``FILE:arg``, lays the settings of a ``hardware`` file over it, and applies
    overrides such as ``optim.learning_rate=1e-5``.

    Raises ConfigError where a file is missing or broken, a key is unknown (with a suggestion), or a
    value has the wrong type.
    """
    config = _call(spec, "--config", "get_config", Config)
    if hardware:
        target = _call(hardware, "--hardware", "get_hardware", Hardware)
        config = dataclasses.replace(config, hardware=target)
    for text in config.hardware.settings:
        where = f"{hardware or spec}: {text}"
        if not text.startswith(HARDWARE_KEYS):
            raise ConfigError(f"{where}: a target may set {', '.join(HARDWARE_KEYS)} only")
        try:
            config = override(config, *text.split("=", 1))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--config.{text}: write --config.{text}=VALUE")
        config = override(config, key, value)
    return config


def _call(spec: str, flag: str, function: str, kind: type) -> Any:
    """What ``function`` of the Python file ``FILE`` or ``FILE:arg`` returns."""
    path, _, arg = spec.partition(":")
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, [str(p) for p in Path("configs").rglob("*.py")])
        raise ConfigError(f"{flag}: no file {path!r}" + _did_you_mean(near))
    module_spec = importlib.util.spec_from_file_location("llmzoo_jax_config_file", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"{flag}: {path} has no function {function}()")
    try:
        result = getattr(module, function)(*([arg] if arg else []))
    except TypeError as error:
        raise ConfigError(f"{flag}={spec}: {error}; use {flag}={path}[:arg]") from error
    except KeyError as error:
        raise ConfigError(
            f"{flag}={spec}: {path} knows no {error}; its docstring has the commands"
        ) from error
    if not isinstance(result, kind):
        found = type(result).__name__
        raise ConfigError(f"{path}: {function}() must return a {kind.__name__}, not {found}")
    return result


def override(config: Any, key: str, text: str, *, _prefix: str = "") -> Any:
    """Returns a copy of ``config`` in which the dotted ``key`` has the value that ``text`` says."""
    name, _, rest = key.partition(".")
    names = [f.name for f in dataclasses.fields(config)]
    where = _prefix + name
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise ConfigError(
            f"--config.{where}: unknown key {name!r}"
            + _did_you_mean([_prefix + n for n in near])
            + f" ({_prefix[:-1] or 'the config'} has {', '.join(names)})"
        )
    value, hint = getattr(config, name), typing.get_type_hints(type(config))[name]
    if rest:
        if value is None:
            value = _default(hint)
        if not dataclasses.is_dataclass(value):
            what = "not set in the config file" if value is None else "a value"
            raise ConfigError(f"--config.{where} is {what} and has no key {rest!r}")
        value = override(value, rest, text, _prefix=where + ".")
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{name: _parse(text, hint, where)})


def _default(hint: Any) -> Any:
    """What ``hint`` is where one of its keys is set and it was None: the only dataclass in it, if
    that has a default for every field (``lora.rank=8`` makes a LoRA run); else None."""
    options = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
    if len(options) != 1:
        return None
    fields = dataclasses.fields(options[0])
    missing = dataclasses.MISSING
    whole = all(f.default is not missing or f.default_factory is not missing for f in fields)
    return options[0]() if whole else None


def _parse(text: str, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    try:
        if origin is Literal:
            if text in args:
                return text
            raise ValueError(f"one of {', '.join(map(str, args))}")
        if origin in (typing.Union, types.UnionType):
            if text.lower() == "none" and type(None) in args:
                return None
            inner = [a for a in args if a is not type(None) and not dataclasses.is_dataclass(a)]
            if len(inner) == 1:
                return _parse(text, inner[0], where)
        if origin is tuple and args[0] is str:
            return tuple(part for part in text.split(",") if part)
        if hint is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if hint is int:
            return int(text)
        if hint is float:
            return float(text)
        if hint is str:
            return text
    except KeyError as error:
        raise ConfigError(f"--config.{where}={text}: expected true or false") from error
    except ConfigError:
        raise
    except ValueError as error:
        wanted = str(error) if origin is Literal else hint.__name__
        raise ConfigError(f"--config.{where}={text}: expected {wanted}") from error
    raise ConfigError(f"--config.{where} can't be set on the command line; edit the config file")


def _did_you_mean(names: list[str]) -> str:
    return f"; did you mean {names[0]!r}?" if names else ""


# --- writing, comparing -------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}} -> {"a.b": 1}``; lists are leaves."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``{"dotted.key": (ours, theirs)}`` wherever two ``to_dict`` results differ."""
    a, b = flatten(ours), flatten(theirs)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def model_from_dict(tree: dict[str, Any]) -> ModelConfig:
    """The inverse of ``to_dict`` for a model config."""
    tree = dict(tree)
    if tree["family"] == "llama":
        return LlamaConfig(**tree | {"rope": RopeConfig(**tree["rope"])})
    return BloomConfig(**tree)


def lora_from_dict(tree: dict[str, Any] | None) -> LoraConfig | None:
    """The inverse of ``to_dict`` for ``Config.lora``."""
    return None if tree is None else LoraConfig(**tree | {"targets": tuple(tree["targets"])})
