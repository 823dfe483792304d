"""LoRA computes what PEFT computes on torch, on any mesh; its files are PEFT's."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmzoo_jax import lora, models, optim, peft_format, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.config import ComputeConfig, LoraConfig, MeshConfig, OptimConfig
from llmzoo_jax.lora import LoraError
from llmzoo_jax.peft_format import AdapterError
from tests import parity, test_sharding
from tests.test_step import packed, random_examples, torch_losses

FLOAT32 = ComputeConfig()
CASES = {"bloom": "bloom-5-heads-post-norm", "llama": "llama-gqa-4-to-1-bias"}
ALL = {family: tuple(names) for family, names in lora.TARGETS.items()}
TOLERANCE = 1e-5


def random_adapters(config, model, seed=3, scale=0.2):
    """Adapters in which no part is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32),
        lora.abstract(config, model),
    )


@functools.cache
def loss_and_grads(accumulation=1, compute=FLOAT32):
    return jax.jit(
        functools.partial(steps.loss_and_grads, compute=compute, accumulation=accumulation)
    )


# --- parity with PEFT ---------------------------------------------------------------------------


class Pair:
    """A model of torch with PEFT's adapters on every projection, and the same of ours."""

    def __init__(self, family, folder):
        peft = pytest.importorskip("peft")
        import torch

        self.folder = folder
        self.config = LoraConfig(rank=3, alpha=5.0, dropout=0.0, targets=ALL[family])
        base = parity.random_torch(parity.CASES[CASES[family]], seed=8, scale=0.15)
        self.model, self.base = parity.from_torch(base)
        self.theirs = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=3, lora_alpha=5, lora_dropout=0.0, target_modules=list(ALL[family]),
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        rng = np.random.default_rng(9)
        with torch.no_grad():
            for name, weight in self.theirs.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.from_numpy(0.2 * rng.standard_normal(weight.shape)))
        self.theirs.save_pretrained(folder)
        self.adapters = peft_format.load(folder, self.config, self.model)

    def examples(self, seed=0):
        return random_examples(self.model.vocab_size, 7, 22, seed=seed)

    def gradients(self, examples):
        """(loss, gradients of the adapters as ours) of PEFT, through a file in its format."""
        loss = torch_loss(self.theirs, examples)
        self.theirs.zero_grad()
        loss.backward()
        grads = {
            name.replace(".default", ""): p.grad.numpy()
            for name, p in self.theirs.named_parameters()
            if "lora_" in name
        }
        assert all(np.abs(g).max() > 0 for g in grads.values())
        folder = self.folder / "gradients"
        shutil.copytree(self.folder, folder)
        save_file(grads, folder / peft_format.WEIGHTS)
        return loss.item(), peft_format.load(folder, self.config, self.model)


def torch_loss(model, examples):
    import torch

    length = max(len(tokens) for tokens, _ in examples)
    ids = torch.zeros((len(examples), length), dtype=torch.int64)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (tokens, mask) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(np.where(mask, tokens, -100))
        attention[row, : len(tokens)] = 1
    return model(input_ids=ids, attention_mask=attention, labels=labels).loss


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_equal_those_of_peft(pair):
    tokens = np.random.default_rng(1).integers(0, pair.model.vocab_size, (3, 17))
    want = parity.torch_logits(pair.theirs, tokens)
    ours = models.logits(lora.attach(pair.base, pair.adapters), tokens)
    without = models.logits(pair.base, tokens)
    print(f"{pair.model.family}: {np.abs(ours - want).max():.1e}")
    assert np.abs(want - without).max() > 0.1  # the adapters do something
    np.testing.assert_allclose(ours, want, atol=2e-5, rtol=1e-5)


def test_loss_and_gradients_equal_those_of_peft(pair):
    want_loss, want_grads = pair.gradients(pair.examples())
    batch = packed(pair.examples(), sequence_length=32)
    loss, _, grads = loss_and_grads()(pair.adapters, batch, base=pair.base)
    difference = parity.max_difference(grads, want_grads)
    print(f"{pair.model.family}: loss {abs(loss - want_loss):.1e}, gradients {difference:.1e}")
    assert abs(float(loss) - want_loss) <= TOLERANCE
    assert difference <= TOLERANCE


def test_the_merged_model_is_that_of_peft(pair):
    import copy

    config, want = parity.from_torch(copy.deepcopy(pair.theirs).merge_and_unload())
    assert config == pair.model
    assert parity.max_difference(lora.merge(pair.base, pair.adapters), want) <= 1e-6
    assert parity.max_difference(pair.base, want) > 0.1


def test_training_losses_equal_a_torch_loop_with_peft(pair):
    """Clipping, weight decay and schedule on the adapters alone; ours packs the conversations."""
    import copy

    from tests.test_step import STEPS, TRAINING

    passes = [pair.examples(seed=100 + i) for i in range(5)]
    batches = (passes * STEPS)[:STEPS]
    want, want_norms = torch_losses(copy.deepcopy(pair.theirs), batches)
    tx = optim.make_optimizer(TRAINING, STEPS)
    state = steps.start_state(pair.adapters, tx)._replace(base=pair.base)
    step = jax.jit(functools.partial(steps.train_step, tx=tx, compute=FLOAT32, accumulation=1))
    losses, norms = [], []
    for examples in batches:
        state, metrics = step(state, packed(examples, sequence_length=32, rows=7))
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
    error = np.abs(np.array(losses) / want - 1).max()
    print(f"{pair.model.family}: {error:.1e}")
    assert error <= 1e-4
    assert np.abs(np.array(norms) / want_norms - 1).max() <= 1e-3
    assert want[-1] < want[0]
    assert parity.max_difference(state.base, pair.base) == 0.0


def test_our_files_are_those_of_peft_bit_for_bit(pair, tmp_path):
    """What PEFT wrote, read and written again; and PEFT reads it."""
    import peft

    peft_format.save(tmp_path, pair.adapters, pair.config, pair.model, base="somewhere")
    theirs, ours = (load_file(f / peft_format.WEIGHTS) for f in (pair.folder, tmp_path))
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, strict=True, err_msg=name)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.bias) == (3, 5, "none")
    assert config.target_modules == set(pair.config.targets)
    again = peft_format.load(tmp_path, pair.config, pair.model)
    assert parity.max_difference(again, pair.adapters) == 0.0


# --- what an adapter is -------------------------------------------------------------------------


@pytest.mark.parametrize("family", CASES)
def test_new_adapters_change_nothing_and_can_learn(family):
    config, model = LoraConfig(dropout=0.0), test_sharding.CONFIGS[family]
    base, batch = test_sharding.model_of(family), test_sharding.packed_batch()
    adapters = lora.init(config, model, lora.init_key(7))
    loss, _, grads = loss_and_grads()(adapters, batch, base=base)
    want, _, _ = test_sharding.one_device(family)
    assert float(loss) == float(want)
    for name, g in sharding.named_leaves(grads).items():
        assert (np.abs(g).max() > 0) == name.endswith("lora_b"), name  # A's gradient goes through B
    for path, adapter in adapters.items():
        a = np.asarray(adapter.lora_a)
        bound = 1 / np.sqrt(np.prod(a.shape[1:-1]))
        assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / np.sqrt(3), rel=0.2)
        assert not np.array_equal(a[0], a[1]), path  # each layer has its own


def test_the_default_targets_are_those_of_llm_zoo():
    assert (LoraConfig().rank, LoraConfig().alpha, LoraConfig().dropout) == (16, 16.0, 0.05)
    bloom, llama = (lora.targets(LoraConfig(), test_sharding.CONFIGS[f]) for f in CASES)
    assert bloom == ("query_key_value",)
    assert llama == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_only_adapters_are_in_gradients_and_optimiser():
    model = test_sharding.CONFIGS["llama"]
    adapters = lora.init(LoraConfig(rank=2), model, lora.init_key(0))
    state = steps.start_state(adapters, optim.make_optimizer(OptimConfig(), 10))
    held = sharding.named_leaves(state.opt_state)
    moments = [x.size for name, x in held.items() if ".mu." in name or ".nu." in name]
    assert sum(moments) == 2 * models.num_params(adapters)
    assert sum(x.size for x in held.values()) - sum(moments) < 200  # counters, recent norms
    assert models.num_params(adapters) < models.num_params(models.abstract(model)) / 5
    decay = sharding.named_leaves(optim.decay_mask(adapters))
    assert len(decay) == 8 and all(decay.values())  # as HF's Trainer decays them


@pytest.mark.parametrize(
    ("remat", "quantise"),
    [
        ("full", "nf4"),
        pytest.param("none", "nf4", marks=pytest.mark.slow),
        pytest.param("full", "none", marks=pytest.mark.slow),
    ],
)
def test_remat_and_loss_chunks_give_the_same_gradients(remat, quantise):
    config = LoraConfig(rank=4, dropout=0.1, targets=ALL["bloom"], quantise=quantise)
    model, batch = test_sharding.CONFIGS["bloom"], test_sharding.packed_batch()
    base = lora.freeze(test_sharding.model_of("bloom"), config)
    adapters, key = random_adapters(config, model), jax.random.key(2)
    want, _, want_grads = loss_and_grads()(adapters, batch, base=base, key=key)
    compute = ComputeConfig(remat=remat, loss_chunk=64)
    loss, _, grads = loss_and_grads(compute=compute)(adapters, batch, base=base, key=key)
    assert abs(float(loss) - float(want)) <= TOLERANCE
    assert parity.max_difference(grads, want_grads) <= TOLERANCE


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_step_row_layer_and_projection_alone():
    model = test_sharding.CONFIGS["llama"]
    config = LoraConfig(rank=4, dropout=0.5, targets=ALL["llama"])
    base, batch = test_sharding.model_of("llama"), test_sharding.packed_batch()
    adapters = random_adapters(config, model)

    def loss(adapters, seed, step):
        key = lora.dropout_key(seed, jnp.int32(step))
        return float(loss_and_grads()(adapters, batch, base=base, key=key)[0])

    assert loss(adapters, 0, 5) == loss(adapters, 0, 5)
    assert len({loss(adapters, *at) for at in ((0, 5), (0, 6), (1, 5), (0, 0))}) == 4
    keys = [
        jax.random.key_data(proj.lora.keys).reshape(-1, 2)
        for proj in (
            lora.module(lora.attach(base, adapters, jax.random.split(jax.random.key(0), 3)), path)
            for path in adapters
        )
    ]
    assert len(np.unique(np.concatenate(keys), axis=0)) == len(adapters) * model.num_layers * 3


def test_dropout_keeps_the_mean_and_drops_the_share_it_says():
    model = test_sharding.CONFIGS["llama"]
    config = LoraConfig(rank=4, dropout=0.25)
    path = "blocks.attention.q"
    adapter = jax.tree.map(lambda x: x[0], random_adapters(config, model)[path])
    adapter.lora_a[...] = jnp.eye(32)[:, :4]
    adapter.lora_b[...] = jnp.ones_like(adapter.lora_b[...])
    x = jnp.ones((3, 500, 32))
    assert np.ptp(adapter(x)) == 0.0
    base = lora.attach(
        test_sharding.model_of("llama"),
        {path: jax.tree.map(lambda y: jnp.stack([y, y]), adapter)},
        jax.random.split(jax.random.key(1), 3),
    )
    dropped = jax.tree.map(lambda y: y[0], lora.module(base, path).lora)
    y = np.asarray(dropped(x))[..., 0] / adapter.scale  # the sum of four inputs, 0 or 1 / 0.75 each
    assert y.mean() == pytest.approx(4.0, rel=0.05)
    assert (y == 0).mean() == pytest.approx(0.25**4, abs=0.01)


# --- meshes -------------------------------------------------------------------------------------

FEW = [
    ("bloom", (1, 2, 2, 2), 1, "int8"),
    ("llama", (2, 2, 2, 1), 2, "int8"),
]
MANY = [
    ("bloom", (2, 2, 2, 1), 2, "nf4"),
    *(
        (family, sizes, accumulation, quantise)
        for family in CASES
        for sizes in test_sharding.MESHES
        for accumulation, quantise in ((1, "none"), (2, "int8"))
    ),
]


def check_mesh(family, sizes, accumulation, quantise):
    """Packed rows, every projection with an adapter, dropout on."""
    model, batch = test_sharding.CONFIGS[family], test_sharding.packed_batch()
    mesh = test_sharding.mesh_of(sizes)
    config = LoraConfig(rank=4, alpha=4.0, dropout=0.2, targets=ALL[family], quantise=quantise)
    base = lora.freeze(test_sharding.model_of(family), config)
    adapters, key = random_adapters(config, model), jax.random.key(2)
    want, _, want_grads = loss_and_grads(accumulation)(adapters, batch, base=base, key=key)
    put = lambda tree: jax.device_put(tree, sharding.tree_shardings(tree, mesh))  # noqa: E731
    placed = jax.device_put(batch, sharding.batch_sharding(mesh, batch.tokens.shape))
    with jax.set_mesh(mesh):
        loss, _, grads = jax.device_get(
            loss_and_grads(accumulation)(put(adapters), placed, base=put(base), key=key)
        )
    difference = parity.max_difference(grads, jax.device_get(want_grads))
    print(f"{family} {sizes} {quantise}: {abs(loss - want):.1e} {difference:.1e}")
    assert abs(float(loss) - float(want)) <= TOLERANCE
    assert difference <= TOLERANCE


@pytest.mark.parametrize(("family", "sizes", "accumulation", "quantise"), FEW, ids=str)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(family, sizes, accumulation, quantise):
    check_mesh(family, sizes, accumulation, quantise)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "accumulation", "quantise"), MANY, ids=str)
def test_every_mesh_does(family, sizes, accumulation, quantise):
    check_mesh(family, sizes, accumulation, quantise)


@pytest.mark.parametrize("family", ["bloom", pytest.param("llama", marks=pytest.mark.slow)])
def test_accumulation_gives_the_same_gradients(family):
    """Dropout and all: a row drops the same whatever part it is in."""
    config, model = (
        LoraConfig(rank=4, dropout=0.3, targets=ALL[family]),
        test_sharding.CONFIGS[family],
    )
    base, batch = test_sharding.model_of(family), test_sharding.packed_batch()
    adapters = random_adapters(config, model)
    want, _, want_grads = loss_and_grads(1)(adapters, batch, base=base, key=jax.random.key(6))
    loss, _, grads = loss_and_grads(4)(adapters, batch, base=base, key=jax.random.key(6))
    assert abs(float(loss) - float(want)) <= TOLERANCE
    assert parity.max_difference(grads, want_grads) <= TOLERANCE


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"targets": ("q_pro",)}, r"no projection 'q_pro'; did you mean 'q_proj'"),
        ("llama", {"targets": ("query_key_value",)}, r"llama has no projection .*it has q_proj"),
        ("bloom", {"targets": ("dense_h_to_h4",)}, r"did you mean 'dense_h_to_4h'"),
        ("bloom", {"rank": 0}, r"lora\.rank must be 1 or more, not 0"),
        ("bloom", {"dropout": 1.0}, r"lora\.dropout must be in \[0, 1\), not 1\.0"),
        ("bloom", {"alpha": 0.0}, r"lora\.alpha must be more than 0, not 0\.0"),
    ],
)
def test_a_config_that_cannot_be_followed_names_the_key(family, keys, message):
    with pytest.raises(LoraError, match=message):
        lora.targets(LoraConfig(**keys), test_sharding.CONFIGS[family])


@pytest.fixture
def peft_folder(tmp_path):
    """(folder, config, model) of a good adapter, to spoil."""
    config, model = LoraConfig(rank=2, alpha=4.0), test_sharding.CONFIGS["llama"]
    peft_format.save(tmp_path, random_adapters(config, model), config, model, base="b")
    return tmp_path, config, model


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dora": True}, r"use_dora is True, which is not supported"),
        ({"bias": "all"}, r"bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; supported is LORA"),
        ({"r": 3}, r"lora\.rank is not that of the config \(2\); set --config\.lora\.rank=3"),
        ({"lora_alpha": 5}, r"lora\.alpha is not that of .*--config\.lora\.alpha=5\.0"),
    ],
)
def test_a_peft_config_that_is_not_followed_names_the_key(keys, message, peft_folder):
    folder, config, model = peft_folder
    path = folder / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(AdapterError, match=message):
        peft_format.load(folder, config, model)


def test_a_tensor_that_is_missing_unexpected_or_misshapen_is_named(peft_folder):
    folder, config, model = peft_folder
    file = folder / peft_format.WEIGHTS
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    save_file({k: x for k, x in tensors.items() if k != name}, file)
    with pytest.raises(AdapterError, match=rf"missing tensor {name}"):
        peft_format.load(folder, config, model)
    save_file(tensors | {name: np.zeros((7, 2), np.float32)}, file)
    with pytest.raises(AdapterError, match=rf"{name} has shape \[7, 2\]"):
        peft_format.load(folder, config, model)
    extra = name.replace(".1.", ".2.")
    save_file(tensors | {extra: tensors[name]}, file)
    with pytest.raises(AdapterError, match=rf"unexpected tensor {extra}"):
        peft_format.load(folder, config, model)
    file.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: no such file"):
        peft_format.load(folder, config, model)


def test_other_targets_than_those_of_the_folder_are_refused(peft_folder):
    folder, config, model = peft_folder
    other = dataclasses.replace(config, targets=("q_proj",))
    with pytest.raises(AdapterError, match=r"lora\.targets=q_proj,k_proj,v_proj,o_proj"):
        peft_format.load(folder, other, model)


def test_a_mesh_that_does_not_divide_an_adapter_names_it():
    model = dataclasses.replace(test_sharding.CONFIGS["llama"], num_kv_heads=4)
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    with pytest.raises(sharding.ShardingError, match=r"attention\.k\.lora_b: axis 'kv_heads'"):
        sharding.tree_shardings(lora.abstract(LoraConfig(), model), mesh)
