"""Hugging Face folders are read and written bit for bit, and nothing in them is ignored."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmzoo_jax import hf
from llmzoo_jax.config import RopeConfig
from llmzoo_jax.hf import CheckpointError
from llmzoo_jax.sharding import named_leaves
from tests import parity

BLOOM, LLAMA = parity.FAMILIES
UNTIED = "bloom-6-heads-untied"


def place(name, array):
    """What the library promises to hand over: float32, and nothing else."""
    assert array.dtype == np.float32, name
    return jnp.array(array)


def write_folder(folder, case, *, dtype="float32", max_shard_bytes=10_000):
    config = parity.our_config(case)
    write_config(folder, **hf.config_to_hf(config, dtype=dtype))
    hf.save_params(
        folder, parity.our_model(case), config, dtype=dtype, max_shard_bytes=max_shard_bytes
    )
    return config


def write_config(folder, **keys):
    (folder / "config.json").write_text(json.dumps(keys))


def one_file(folder, case, change=lambda tensors: tensors):
    """A folder with one model.safetensors, after ``change({name: array})``."""
    config = write_folder(folder, case)
    tensors = {}
    for path in sorted(folder.glob("model-*")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(change(tensors), folder / "model.safetensors")
    return config


def load(folder, config):
    return hf.load_params(folder, config, place=place)


def assert_same_bits(ours, theirs):
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        y = np.asarray(theirs[name])
        assert np.asarray(x).tobytes() == y.astype(np.float32).tobytes(), name


# --- tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", parity.CASES)
def test_float32_round_trip_is_bit_exact_in_several_files(case, tmp_path):
    config = write_folder(tmp_path, case)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert hf.read_config(tmp_path) == config
    assert_same_bits(load(tmp_path, config), parity.our_model(case))


@pytest.mark.parametrize("case", [BLOOM, LLAMA])
def test_bfloat16_round_trip_is_bit_exact(case, tmp_path):
    """What is written is the rounded weight; reading and writing that again changes no bit."""
    config = write_folder(tmp_path, case, dtype="bfloat16")
    once = load(tmp_path, config)
    rounded = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32),
        parity.our_model(case),
    )
    assert_same_bits(once, rounded)
    again = tmp_path / "again"
    again.mkdir()
    files = hf.save_params(again, once, config, dtype="bfloat16", max_shard_bytes=10_000)
    for name in files:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_index_names_every_tensor_and_files_keep_their_size(dtype, tmp_path):
    limit = 9_000
    write_folder(tmp_path, LLAMA, dtype=dtype, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="np") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = list(handle.keys())
            assert all(index["weight_map"].pop(name) == path.name for name in names)
            size = sum(handle.get_tensor(name).nbytes for name in names)
            assert size <= limit or len(names) == 1
            total += size
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("case", [BLOOM, UNTIED, LLAMA])
def test_the_table_has_the_names_and_shapes_of_transformers(case, tmp_path):
    theirs = {name: tuple(x.shape) for name, x in parity.their_model(case).state_dict().items()}
    if parity.our_config(case).tie_embeddings:
        theirs.pop("lm_head.weight")
    written = {}
    one_file(tmp_path, case, lambda tensors: written.update(tensors) or tensors)
    assert {name: x.shape for name, x in written.items()} == theirs


def without(name):
    return lambda tensors: {n: x for n, x in tensors.items() if n != name}


def test_a_missing_tensor_is_named_with_its_shape(tmp_path):
    name = "model.layers.1.self_attn.k_proj.weight"
    config = one_file(tmp_path, LLAMA, without(name))
    with pytest.raises(CheckpointError, match=rf"missing tensor {name}, shape \[40, 48\]"):
        load(tmp_path, config)


def test_a_missing_bias_is_not_taken_for_zero(tmp_path):
    name = "transformer.h.0.self_attention.query_key_value.bias"
    config = one_file(tmp_path, BLOOM, without(name))
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path, config)


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_an_unexpected_tensor_is_named(name, tmp_path):
    extra = {name: np.ones(3, np.float32)}
    config = one_file(tmp_path, LLAMA, lambda tensors: tensors | extra)
    with pytest.raises(CheckpointError, match=f"unexpected tensors {name}"):
        load(tmp_path, config)


def test_an_untied_head_of_a_config_without_one_is_unexpected(tmp_path):
    config = one_file(tmp_path, UNTIED)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from .*word_embeddings"):
        load(tmp_path, dataclasses.replace(config, tie_embeddings=True))


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    config = one_file(tmp_path, BLOOM, lambda tensors: tensors | {name: tensors[name].T.copy()})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[56, 224\].* \[224, 56\]"):
        load(tmp_path, config)


def test_buffers_that_hold_nothing_are_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    config = one_file(tmp_path, LLAMA, lambda tensors: tensors | extra)
    assert_same_bits(load(tmp_path, config), parity.our_model(LLAMA))


@pytest.mark.parametrize(
    ("case", "table"),
    [(BLOOM, "transformer.word_embeddings.weight"), (LLAMA, "model.embed_tokens.weight")],
)
def test_a_tied_head_saved_twice_must_be_the_same(case, table, tmp_path):
    def same(tensors):
        return tensors | {"lm_head.weight": tensors[table]}

    def different(tensors):
        other = tensors[table].copy()
        other[-1, -1] += 1e-3
        return tensors | {"lm_head.weight": other}

    config = one_file(tmp_path, case, same)
    assert_same_bits(load(tmp_path, config), parity.our_model(case))
    one_file(tmp_path, case, different)
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight differs from {table}"):
        load(tmp_path, config)


def test_the_first_names_of_bloom_are_read_too(tmp_path):
    """bigscience saved the inner model: no "transformer." in front."""

    def original(tensors):
        return {name.removeprefix("transformer."): x for name, x in tensors.items()}

    config = one_file(tmp_path, BLOOM, original)
    with safe_open(tmp_path / "model.safetensors", framework="np") as handle:
        assert "h.0.input_layernorm.weight" in handle.keys()  # noqa: SIM118
    assert_same_bits(load(tmp_path, config), parity.our_model(BLOOM))


def test_float16_weights_are_read(tmp_path):
    config = one_file(
        tmp_path, LLAMA, lambda tensors: {n: x.astype(np.float16) for n, x in tensors.items()}
    )
    half = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), parity.our_model(LLAMA))
    assert_same_bits(load(tmp_path, config), half)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [3, 2_000, -8])
def test_a_truncated_file_is_named(keep, tmp_path):
    config = one_file(tmp_path, LLAMA)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load(tmp_path, config)


def test_a_missing_shard_is_named(tmp_path):
    config = write_folder(tmp_path, LLAMA)
    gone = sorted(tmp_path.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"{gone.name}: missing, .*index\.json names it"):
        load(tmp_path, config)


def test_a_missing_shard_without_an_index_is_a_missing_tensor(tmp_path):
    config = write_folder(tmp_path, LLAMA)
    (tmp_path / "model.safetensors.index.json").unlink()
    gone = sorted(tmp_path.glob("model-*"))[1]
    with safe_open(gone, framework="np") as handle:
        lost = set(handle.keys())
    gone.unlink()
    with pytest.raises(CheckpointError, match="missing tensor") as error:
        load(tmp_path, config)
    assert any(name in str(error.value) for name in lost)


def test_a_tensor_in_two_files_is_named(tmp_path):
    config = one_file(tmp_path, LLAMA)
    save_file({"model.norm.weight": np.ones(48, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is in another file"):
        load(tmp_path, config)


@pytest.mark.parametrize("text", ['{"weight_map": ', '{"metadata": {}}'])
def test_a_broken_index_is_named(text, tmp_path):
    config = write_folder(tmp_path, LLAMA)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path, config)


def test_pickled_weights_alone_are_refused_with_advice(tmp_path):
    config = parity.our_config(LLAMA)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors.*pytorch_model.*safetensors"):
        load(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file$"):
        load(tmp_path / "..", config)


def test_a_folder_without_config_json_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{\n"model_type": "bloom",,}')
    with pytest.raises(CheckpointError, match=r"config\.json: line 2 is not JSON"):
        hf.read_config(tmp_path)


# --- config.json --------------------------------------------------------------------------------

LLAMA_1 = {  # as LLaMA 1 was first converted: no key about RoPE or grouped queries
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 83,
}
BLOOM_FIRST = {  # as bigscience wrote it
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomModel"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 56,
    "n_inner": None,
    "n_layer": 2,
    "num_attention_heads": 7,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 4,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 91,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(tmp_path, keys):
    write_config(tmp_path, **keys)
    return hf.read_config(tmp_path)


def test_llama_1_without_rope_keys(tmp_path):
    config = read(tmp_path, LLAMA_1)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.num_kv_heads, config.head_dim) == (4, 12)
    assert (config.rms_norm_eps, config.max_positions) == (1e-6, 2048)
    assert not (config.attention_bias or config.mlp_bias or config.tie_embeddings)


def test_the_first_config_of_bloom(tmp_path):
    config = read(tmp_path, BLOOM_FIRST)
    assert (config.hidden_size, config.num_layers, config.num_heads) == (56, 2, 7)
    assert config.tie_embeddings
    modern = {"hidden_size": 56, "n_head": 7}
    rest = {k: v for k, v in BLOOM_FIRST.items() if k not in ("n_embed", "num_attention_heads")}
    assert read(tmp_path, rest | modern) == config


@pytest.mark.parametrize(
    ("old", "new", "want"),
    [
        (
            {"rope_theta": 777.0, "rope_scaling": None},
            {"rope_type": "default", "rope_theta": 777.0},
            RopeConfig(theta=777.0),
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            RopeConfig(theta=1e4, scaling="linear", factor=4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
            LLAMA3_SCALING | {"rope_theta": 5e5},
            RopeConfig(
                theta=5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_positions=64,
            ),
        ),
    ],
    ids=["default", "linear", "llama3"],
)  # fmt: skip
def test_rope_of_transformers_4_and_5_reads_the_same(old, new, want, tmp_path):
    assert read(tmp_path, LLAMA_1 | old).rope == want
    assert read(tmp_path, LLAMA_1 | {"rope_parameters": new}).rope == want
    assert read(tmp_path, LLAMA_1 | old | {"rope_parameters": new}).rope == want


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 600.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    ],
    ids=["theta", "factor", "type", "old type"],
)
def test_conflicting_spellings_of_rope_are_an_error(keys, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: .*rope"):
        read(tmp_path, LLAMA_1 | keys)


def test_conflicting_spellings_of_a_size_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="n_head and num_attention_heads say different"):
        read(tmp_path, BLOOM_FIRST | {"n_head": 8})


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "nonsense"])
def test_an_unsupported_rope_type_is_named_with_those_that_are(kind, tmp_path):
    for keys in (
        {"rope_scaling": {"type": kind, "factor": 2.0}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}},
    ):
        with pytest.raises(CheckpointError, match=f"rope type '{kind}'.*default, linear, llama3"):
            read(tmp_path, LLAMA_1 | keys)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, "'linear' needs .*'factor'"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "unknown keys.*beta_fast"),
        (
            {k: v for k, v in LLAMA3_SCALING.items() if k != "low_freq_factor"},
            "'llama3' needs .*low_freq_factor",
        ),
    ],
)
def test_keys_of_rope_scaling_are_all_there_and_all_known(scaling, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, LLAMA_1 | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("base", "keys", "message"),
    [
        (LLAMA_1, {"sliding_window": 4096}, r"config\.json: unknown key 'sliding_window' \(4096\)"),
        (LLAMA_1, {"quantization_config": {"bits": 4}}, "unknown key 'quantization_config'"),
        (BLOOM_FIRST, {"rope_theta": 1e4}, "unknown key 'rope_theta'"),
        (LLAMA_1, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        (LLAMA_1, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        (BLOOM_FIRST, {"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
        (BLOOM_FIRST, {"n_inner": 128}, "n_inner is 128"),
        (BLOOM_FIRST, {"num_attention_heads": 5}, "hidden_size 56 is not divisible by n_head 5"),
        (LLAMA_1, {"model_type": "mistral"}, "model_type is 'mistral'; known are bloom, llama"),
        (LLAMA_1, {"model_type": None}, "model_type is None"),
        (LLAMA_1, {"vocab_size": None}, "no key 'vocab_size'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(base, keys, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, base | keys)


@pytest.mark.parametrize("case", parity.CASES)
def test_config_json_round_trip(case, tmp_path):
    config = parity.our_config(case)
    keys = hf.config_to_hf(config, dtype="bfloat16")
    assert read(tmp_path, keys) == config
    if config.family == "llama":  # what readers of transformers 4 look for
        assert keys["rope_theta"] == config.rope.theta
        assert (keys["rope_scaling"] is None) == (config.rope.scaling == "default")


@functools.cache
def padded_tokens(vocab_size):
    return np.random.default_rng(8).integers(0, vocab_size, (3, 128)).astype(np.int32)


@pytest.mark.parametrize("case", parity.CASES)
def test_transformers_computes_the_same_from_what_we_write(case, tmp_path):
    """Config and weights, read by ``AutoModelForCausalLM``."""
    pytest.importorskip("torch")
    config, model = parity.our_config(case), parity.our_model(case)
    tokens = padded_tokens(config.vocab_size)
    got = parity.forward(model, tokens, *parity.segments([[128]] * 3, 128))
    want = parity.torch_logits(parity.to_torch(tmp_path, config, model), tokens)
    difference = parity.max_difference(got, want)
    print(f"{case}: {difference:.1e}")
    assert difference <= 1e-4
