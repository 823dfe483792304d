"""A base plus a delta is a model: what Vicuna and Chimera were released as."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmzoo_jax
from llmzoo_jax import hf
from llmzoo_jax.errors import InputError
from tests import parity
from tests.tiny_runs import make_run
from tests.tiny_tokenizers import tiny

TOKENS = [[5, 9, 30, 2, 7], [8, 8, 1, 40, 59]]


def write(folder, config, params, *, dtype="float32"):
    folder.mkdir()
    hf.save_params(folder, params, config, dtype=dtype, max_shard_bytes=10_000)
    (folder / "config.json").write_text(json.dumps(hf.config_to_hf(config, dtype=dtype)))
    return folder


def small(config, seed):
    """As large as what fine-tuning changes."""
    return jax.tree.map(lambda x: 0.1 * (x - x.mean()), parity.random_model(config, seed))


@pytest.fixture(params=parity.FAMILIES)
def case(request, tmp_path):
    """(config, {"base", "delta", "sum": folder}) of a family."""
    config = parity.our_config(request.param)
    base, delta = parity.our_model(request.param), small(config, 7)
    whole = jax.tree.map(lambda x, y: x + y, base, delta)
    parts = {"base": base, "delta": delta, "sum": whole}
    return config, {name: write(tmp_path / name, config, parts[name]) for name in parts}


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"weights": "int8"},
                                     {"weights": "nf4", "dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_a_base_and_its_delta_are_the_sum(case, options):
    _, folders = case
    model = llmzoo_jax.load(folders["delta"], base=folders["base"], **options)
    want = llmzoo_jax.load(folders["sum"], **options)
    jax.tree.map(np.testing.assert_array_equal, model.params, want.params)
    assert model.config == want.config
    np.testing.assert_array_equal(model.logits(TOKENS), want.logits(TOKENS))


def test_it_is_the_model_that_fastchat_makes(case):
    torch = pytest.importorskip("torch")
    import transformers

    _, folders = case
    base, delta = (
        transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
        for name in ("base", "delta")
    )
    table = base.get_output_embeddings().weight
    tied = table is base.get_input_embeddings().weight
    with torch.no_grad():
        for name, param in base.state_dict().items():
            if not (tied and name == "lm_head.weight"):
                param += delta.state_dict()[name]
    want = parity.torch_logits(base.eval(), np.array(TOKENS))
    got = llmzoo_jax.load(folders["delta"], base=folders["base"]).logits(TOKENS)
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def test_the_sum_is_rounded_once(case, tmp_path):
    """Both parts in bfloat16, whose sum has more digits."""
    config, _ = case
    parts = parity.random_model(config, 1), small(config, 7)
    folders = [
        write(tmp_path / f"{i}", config, part, dtype="bfloat16") for i, part in enumerate(parts)
    ]
    base, delta = (dict(hf.read_params(folder, config)) for folder in folders)
    for name, array in hf.read_params(folders[1], config, delta_of=folders[0]):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, base[name] + delta[name])
        if array.size > 1000:
            assert (array != array.astype(jnp.bfloat16).astype(np.float32)).any()


def test_tokens_that_the_base_lacks_have_the_rows_of_the_delta(case, tmp_path):
    """FastChat's make_delta gave the base zeros for them."""
    config, folders = case
    larger = dataclasses.replace(config, vocab_size=config.vocab_size + 3)
    longer = write(tmp_path / "longer", larger, small(larger, 9))
    delta = dict(hf.read_params(longer, larger))
    base = dict(hf.read_params(folders["base"], config))
    for name, array in hf.read_params(longer, larger, delta_of=folders["base"]):
        if name in ("embed.w", "head.w"):
            np.testing.assert_array_equal(array[-3:], delta[name][-3:])
            np.testing.assert_array_equal(array[:-3], base[name] + delta[name][:-3])
    model = llmzoo_jax.load(longer, base=folders["base"])
    assert model.logits(TOKENS).shape[-1] == config.vocab_size + 3
    tensor = hf.TABLES[config.family]["embed.w"][0]
    with pytest.raises(InputError, match=rf"{tensor} has \d+ rows.*may have more, not fewer"):
        llmzoo_jax.load(folders["delta"], base=longer)


def test_the_tokenizer_is_the_deltas_else_the_bases(case):
    _, folders = case
    tiny("bpe").save_pretrained(folders["base"])
    model = llmzoo_jax.load(folders["delta"], base=folders["base"])
    assert model.tokenizer.get_vocab() == tiny("bpe").get_vocab()


def test_what_does_not_belong_together_is_named(case, tmp_path):
    config, folders = case
    with pytest.raises(InputError, match=r"whole weights and no differences"):
        llmzoo_jax.load(folders["sum"], base=folders["base"])
    with pytest.raises(InputError, match=r"no such file; is .*nowhere a Hugging Face"):
        llmzoo_jax.load(folders["delta"], base=tmp_path / "nowhere")
    theirs = json.loads((folders["base"] / "config.json").read_text())
    key = "layer_norm_epsilon" if config.family == "bloom" else "rms_norm_eps"
    (folders["base"] / "config.json").write_text(json.dumps(theirs | {key: 0.123}))
    with pytest.raises(InputError, match=r"norm_eps is 0.\d+, and in .* it is 0.123"):
        llmzoo_jax.load(folders["delta"], base=folders["base"])
    run = make_run(tmp_path / "run", "bpe")
    with pytest.raises(InputError, match=r"base=.* is a run folder"):
        llmzoo_jax.load(run, base=folders["base"])
