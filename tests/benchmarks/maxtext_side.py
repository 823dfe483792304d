"""MaxText's side of the training benchmark. It runs in MaxText's own Python and imports nothing of
this project; ``train.py`` starts it with --maxtext_python, and says where the model and rows are.

MaxText's own configuration, model creation, optimiser and jitted train_step, as its train_loop puts
them together; weights and rows are those of the other sides. What differs from its defaults: the
sizes, float32, our AdamW, no compile cache, no checkpoints, and --remat_policy.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", required=True, help="folder of model and maxtext.npz")
    parser.add_argument("--started", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--remat_policy", required=True)
    parser.add_argument("--max_foreign", type=float, required=True)
    parser.add_argument("--patience", type=float, required=True)
    return parser.parse_args()


def configure(model: dict, rows: tuple[int, int], args: argparse.Namespace, out: str):
    import maxtext
    from maxtext.configs import pyconfig

    keys = {
        "run_name": "benchmark",
        "base_output_directory": out,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "log_config": False,
        "jax_cache_dir": "",  # a first step is a first step
        "dataset_type": "synthetic",  # its batches are not used
        "decoder_block": "llama2",
        "base_emb_dim": model["hidden_size"],
        "base_mlp_dim": model["intermediate_size"],
        "base_num_decoder_layers": model["num_hidden_layers"],
        "base_num_query_heads": model["num_attention_heads"],
        "base_num_kv_heads": model["num_key_value_heads"],
        "head_dim": model["hidden_size"] // model["num_attention_heads"],
        "vocab_size": model["vocab_size"],
        "normalization_layer_epsilon": model["rms_norm_eps"],
        "logits_via_embedding": False,
        "attention": "dot_product",
        "per_device_batch_size": rows[0],
        "max_target_length": rows[1],
        "dtype": "float32",
        "weight_dtype": "float32",
        "remat_policy": args.remat_policy,
        "steps": 1000,
        "learning_rate": args.learning_rate,
        "learning_rate_final_fraction": 1.0,  # constant
        "warmup_steps_fraction": 0.0,
        "adam_b2": 0.999,
        "adam_weight_decay": 0.0,
        "gradient_clipping_threshold": 1.0,
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    return pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in keys.items())])


def their_weights(folder: Path, model: dict) -> dict[str, np.ndarray]:
    """The weights of the Hugging Face folder by MaxText's names; the layers are its second axis.
    MaxText has the 1 / sqrt(head_dim) of attention in the query's weights."""
    from safetensors.numpy import load_file

    theirs = {}
    for path in sorted(folder.glob("*.safetensors")):
        theirs |= load_file(path)
    N, D = model["num_attention_heads"], model["hidden_size"]
    H = D // N

    def stacked(name: str, shape: tuple[int, ...]) -> np.ndarray:
        layers = range(model["num_hidden_layers"])
        each = [theirs[f"model.layers.{i}.{name}.weight"] for i in layers]
        return np.stack([(x.T if x.ndim == 2 else x).reshape(shape) for x in each], axis=1)

    names = {
        "mlp.wi_0.kernel": ("mlp.gate_proj", (D, -1), 1.0),
        "mlp.wi_1.kernel": ("mlp.up_proj", (D, -1), 1.0),
        "mlp.wo.kernel": ("mlp.down_proj", (-1, D), 1.0),
        "pre_self_attention_layer_norm.scale": ("input_layernorm", (D,), 1.0),
        "post_self_attention_layer_norm.scale": ("post_attention_layernorm", (D,), 1.0),
        "self_attention.query.kernel": ("self_attn.q_proj", (D, N, H), 1 / math.sqrt(H)),
        "self_attention.key.kernel": ("self_attn.k_proj", (D, -1, H), 1.0),
        "self_attention.value.kernel": ("self_attn.v_proj", (D, -1, H), 1.0),
        "self_attention.out.kernel": ("self_attn.o_proj", (N, H, D), 1.0),
    }
    ours = {
        f"decoder.layers.{key}": scale * stacked(name, shape)
        for key, (name, shape, scale) in names.items()
    }
    return ours | {
        "decoder.decoder_norm.scale": theirs["model.norm.weight"],
        "decoder.logits_dense.kernel": theirs["lm_head.weight"].T,
        "token_embedder.embedding": theirs["model.embed_tokens.weight"],
    }


def put_weights(state, weights: dict[str, np.ndarray]):
    """``state`` with the parameters of its model replaced, every one of them."""
    import jax

    left = dict(weights)

    def one(path, x):
        names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        if names[0] != "model" or "rngs" in names:
            return x
        name = ".".join(names[1:]).removesuffix(".value")  # the last is the variable's own
        new = left.pop(name)
        assert new.shape == x.shape, f"{name}: {new.shape} is not {x.shape}"
        return jax.device_put(new.astype(x.dtype), x.sharding)

    state = jax.tree_util.tree_map_with_path(one, state)
    assert not left, f"MaxText's model has no {sorted(left)}"
    return state


def batch_of(arrays, step: int) -> dict[str, np.ndarray]:
    """MaxText's names of a packed batch."""
    ours = {key: arrays[f"{step}.0.{key}"] for key in ("tokens", "targets", "segment_ids")}
    positions = arrays[f"{step}.0.positions"]
    loss = np.where(arrays[f"{step}.0.loss_mask"], ours["segment_ids"], 0)
    return {
        "inputs": ours["tokens"],
        "inputs_position": positions,
        "inputs_segmentation": ours["segment_ids"],
        "targets": ours["targets"],
        "targets_position": positions,
        "targets_segmentation": loss,  # 0: not in the loss
    }


def run(args: argparse.Namespace, out: str) -> dict:
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.common.goodput import create_goodput_recorder
    from maxtext.trainers.pre_train.train import train_step
    from maxtext.utils import sharding, train_utils

    folder = Path(args.work)
    model = json.loads((folder / "config.json").read_text("utf-8"))
    arrays = np.load(folder / "maxtext.npz")
    config = configure(model, arrays["0.0.tokens"].shape, args, out)
    setup = train_utils.setup_train_loop(config, create_goodput_recorder(config))
    shardings, mesh, state = setup[2], setup[4], setup[-1]
    graph, state = nnx.split(state)
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    state = put_weights(state, their_weights(folder, model))
    compiled, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train_step, None, None, params_shardings
    )
    data = sharding.get_input_data_sharding(config, mesh)

    def step(number: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = compiled(state, jax.device_put(batch_of(arrays, number), data))
        return float(metrics["scalar"]["learning/loss"])

    losses = [step(number) for number in range(args.warmup)]
    first = time.time() - args.started
    from stopwatch import Stopwatch  # beside this file

    watch, timed = Stopwatch(args.patience, args.max_foreign), []
    steps = len({name.partition(".")[0] for name in arrays})
    for number in range(args.warmup, steps):
        loss, time_ = watch(lambda number=number: step(number))
        losses.append(loss)
        timed.append(time_ | {"step": number - args.warmup})
    return {"first_step_s": first, "timed": timed, "losses": losses}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        result = run(parse(), out)
    print(json.dumps(result))
