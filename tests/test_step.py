"""A step computes what a plain torch loop computes, however the batch is packed or cut up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmzoo_jax import optim, sharding
from llmzoo_jax import step as steps
from llmzoo_jax.config import ComputeConfig, ConfigError, MeshConfig, OptimConfig
from llmzoo_jax.packing import Batch, empty_rows, fill_rows, plan
from tests import parity

FLOAT32 = ComputeConfig()


def random_examples(vocab_size, count, longest, seed):
    """``count`` conversations as (tokens, loss mask), of random lengths from 2 tokens up."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [
        (rng.integers(0, vocab_size, n).astype(np.int32), rng.random(n) < rng.random())
        for n in lengths
    ]


def packed(examples, *, sequence_length, rows=None, overlong="split") -> Batch:
    """All examples in one batch, padded with empty rows up to ``rows``."""
    packing = plan(
        [len(tokens) for tokens, _ in examples], sequence_length=sequence_length, overlong=overlong
    )
    batch = fill_rows(packing, range(packing.rows), examples.__getitem__)
    if rows is None:
        return batch
    assert packing.rows <= rows
    padding = empty_rows(rows - packing.rows, sequence_length)
    return Batch(*(np.concatenate(both) for both in zip(batch, padding, strict=True)))


def one_a_row(examples, *, sequence_length) -> Batch:
    """The same pairs, each piece of at most ``sequence_length`` alone in its row."""
    rows = []
    for tokens, mask in examples:
        for start in range(0, len(tokens) - 1, sequence_length):
            stop = min(start + sequence_length, len(tokens) - 1)
            pad = (0, sequence_length - (stop - start))
            arrays = (
                tokens[start:stop],
                tokens[start + 1 : stop + 1],
                mask[start + 1 : stop + 1],
                np.ones(stop - start, np.int32),
                np.arange(stop - start, dtype=np.int32),
            )
            rows.append([np.pad(x, pad) for x in arrays])
    return Batch(*(np.stack(column) for column in zip(*rows, strict=True)))


@functools.cache
def compiled_grads(compute=FLOAT32, accumulation=1):
    return jax.jit(
        functools.partial(steps.loss_and_grads, compute=compute, accumulation=accumulation)
    )


# --- parity with a torch loop -------------------------------------------------------------------

STEPS = 20
TRAINING = OptimConfig(
    learning_rate=3e-3,
    schedule="cosine",
    warmup_ratio=0.2,
    weight_decay=0.1,
    clip_norm=0.7,
    b2=0.95,
)


def torch_losses(model, batches):
    """Padded rows, HF's own loss, torch's AdamW, clipping and cosine schedule."""
    import torch
    import transformers

    torch.manual_seed(0)
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=TRAINING.learning_rate,
        betas=(TRAINING.b1, TRAINING.b2),
        eps=TRAINING.eps,
        weight_decay=TRAINING.weight_decay,
    )
    warmup = round(TRAINING.warmup_ratio * STEPS)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    losses, norms = [], []
    for examples in batches:
        length = max(len(tokens) for tokens, _ in examples)
        ids = torch.zeros((len(examples), length), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        attention = torch.zeros_like(ids)
        for row, (tokens, mask) in enumerate(examples):
            n = len(tokens)
            ids[row, :n] = torch.from_numpy(tokens)
            labels[row, :n] = torch.from_numpy(np.where(mask, tokens, -100))
            attention[row, :n] = 1
        loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return np.array(losses), np.array(norms)


@pytest.mark.parametrize("case", ["bloom-5-heads-post-norm", "llama-gqa-4-to-1-bias"])
def test_twenty_losses_equal_a_torch_loop_with_transformers(case):
    """Ours packs the conversations, theirs pads them: same text, same numbers."""
    theirs = parity.random_torch(parity.CASES[case], seed=7, scale=0.15)
    config, params = parity.from_torch(theirs)
    passes = [random_examples(config.vocab_size, 7, 22, seed=100 + i) for i in range(5)]
    batches = (passes * STEPS)[:STEPS]
    want, want_norms = torch_losses(theirs, batches)

    tx = optim.make_optimizer(TRAINING, STEPS)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = jax.jit(functools.partial(steps.start_state, tx=tx))(params)
        step = steps.jit_train_step(tx, FLOAT32, 1, sharding.tree_shardings(state, mesh))
        metrics = []
        for examples in batches:
            state, one = step(state, packed(examples, sequence_length=32, rows=7))
            metrics.append(one)
    got = np.array([m.loss for m in metrics])
    norms = np.array([m.grad_norm for m in metrics])
    error = np.abs(got / want - 1).max()
    print(f"{case}: loss {error:.1e}, gradient norm {np.abs(norms / want_norms - 1).max():.1e}")
    assert error <= 1e-4
    assert np.abs(norms / want_norms - 1).max() <= 1e-3
    assert (want_norms > TRAINING.clip_norm).any()  # clipping acted
    assert (got[-5:] < got[:5]).all()  # and it learns
    assert int(state.step) == STEPS
    counts = [sum(int(mask[1:].sum()) for _, mask in examples) for examples in batches]
    assert [int(m.loss_tokens) for m in metrics] == counts


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", parity.FAMILIES)
@pytest.mark.parametrize(("longest", "name"), [(24, "short"), (80, "split")])
def test_packed_rows_give_the_loss_and_gradients_of_one_conversation_a_row(case, longest, name):
    model, length = parity.our_model(case), 24
    examples = random_examples(model.config.vocab_size, 9, longest, seed=longest)
    assert any(len(tokens) > length + 1 for tokens, _ in examples) == (name == "split")
    together = packed(examples, sequence_length=length)
    apart = one_a_row(examples, sequence_length=length)
    assert len(together.tokens) < len(apart.tokens)
    loss, losses, grads = compiled_grads()(model, together)
    want_loss, want_losses, want_grads = compiled_grads()(model, apart)
    np.testing.assert_allclose(losses.sum(), want_losses.sum(), rtol=1e-5)
    difference = parity.max_difference(grads, want_grads)
    print(f"{case} {name}: loss {abs(loss - want_loss):.1e}, gradients {difference:.1e}")
    assert abs(float(loss) - float(want_loss)) <= 1e-5
    assert difference <= 1e-5


def test_only_loss_tokens_and_what_they_see_count():
    """Targets outside the mask, and padding tokens, change nothing at all."""
    model = parity.our_model(parity.FAMILIES[0])
    examples = random_examples(model.config.vocab_size, 9, 24, seed=24)
    batch = packed(examples, sequence_length=24)
    other = batch._replace(
        targets=np.where(batch.loss_mask, batch.targets, 5),
        tokens=np.where(batch.segment_ids > 0, batch.tokens, 6),
    )
    assert (other.tokens != batch.tokens).any()
    a, b = compiled_grads()(model, batch), compiled_grads()(model, other)
    assert float(a[0]) == float(b[0])
    assert parity.max_difference(a[2], b[2]) <= 1e-7


# --- accumulation -------------------------------------------------------------------------------


def uneven_batch(vocab_size) -> Batch:
    """Eight rows whose numbers of loss tokens differ widely; one has none."""
    rng = np.random.default_rng(11)
    segment_ids, positions = parity.segments([[8, 8]] * 4 + [[16], [5], [3, 2], [15, 1]], 16)
    tokens = rng.integers(0, vocab_size, (8, 16)).astype(np.int32)
    rate = np.array([1.0, 0.05, 0.9, 0.0, 0.5, 1.0, 0.5, 0.1])[:, None]
    mask = (rng.random((8, 16)) < rate) & (segment_ids > 0)
    targets = rng.integers(0, vocab_size, (8, 16)).astype(np.int32)
    return Batch(tokens, targets, mask, segment_ids, positions)


@pytest.mark.parametrize(
    "case", [parity.FAMILIES[0], pytest.param(parity.FAMILIES[1], marks=pytest.mark.slow)]
)
def test_accumulation_gives_the_same_update(case):
    model = parity.our_model(case)
    batch = uneven_batch(model.config.vocab_size)
    counts = batch.loss_mask.sum(1)
    assert len({int(counts[i::4].sum()) for i in range(4)}) == 4  # no two parts weigh the same
    # A large epsilon: AdamW would blow up the rounding of gradients that are zero in exact
    # arithmetic, such as those of BLOOM's key biases.
    tx = optim.make_optimizer(
        OptimConfig(learning_rate=0.1, eps=1e-2, weight_decay=0.1, warmup_ratio=0.0), 10
    )

    def updated(accumulation):
        step = functools.partial(
            steps.train_step, tx=tx, compute=FLOAT32, accumulation=accumulation
        )
        state, metrics = jax.jit(step)(steps.start_state(model, tx), batch)
        return state.params, metrics

    params, metrics = updated(1)
    assert parity.max_difference(params, model) > 1e-2
    for accumulation in (2, 4):
        other_params, other_metrics = updated(accumulation)
        difference = parity.max_difference(other_params, params)
        print(f"{case} accumulation {accumulation}: {difference:.1e}")
        assert difference <= 1e-5
        assert int(other_metrics.loss_tokens) == int(metrics.loss_tokens) == counts.sum()
        assert abs(other_metrics.loss - metrics.loss) <= 1e-5
        assert abs(other_metrics.grad_norm / metrics.grad_norm - 1) <= 1e-5


@pytest.mark.parametrize("compute", [FLOAT32, ComputeConfig(loss_chunk=8, remat="full")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_loss_tokens_has_loss_0_and_gradients_0(compute, accumulation):
    model = parity.our_model(parity.FAMILIES[1])
    batch = uneven_batch(model.config.vocab_size)
    batch = batch._replace(loss_mask=np.zeros_like(batch.loss_mask))
    loss, losses, grads = compiled_grads(compute, accumulation)(model, batch)
    assert float(loss) == 0.0
    assert not losses.any()
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


# --- schedules and the decay mask ---------------------------------------------------------------


def test_offloading_on_a_cpu_is_refused_and_auto_becomes_a_choice():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert steps.resolve(ComputeConfig(), mesh).attention == "blocks"
    with pytest.raises(ConfigError, match=r"compute.remat=offload.*compute.remat=dots"):
        steps.resolve(ComputeConfig(remat="offload"), mesh)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup_ratio", "final_ratio"), [(0.0, 0.0), (0.1, 0.0), (0.03, 0.25)])
def test_schedule_values(name, warmup_ratio, final_ratio):
    total, peak = 200, 2e-5
    config = OptimConfig(
        learning_rate=peak, schedule=name, warmup_ratio=warmup_ratio, final_ratio=final_ratio
    )
    rate = optim.schedule(config, total)
    warmup = round(warmup_ratio * total)
    for step in range(0, total + 1, 5):
        if step < warmup:
            want = peak * step / warmup
        else:
            done = (step - warmup) / (total - warmup)
            left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}
            want = (
                peak
                if name == "constant"
                else peak * (final_ratio + (1 - final_ratio) * left[name])
            )
        assert float(rate(step)) == pytest.approx(want, rel=1e-5, abs=peak * 1e-6)


def test_defaults_are_those_of_llm_zoo():
    config = OptimConfig()
    assert (config.learning_rate, config.schedule, config.warmup_ratio) == (2e-5, "cosine", 0.03)
    assert (config.weight_decay, config.epochs) == (0.0, 3.0)


@pytest.mark.parametrize("case", ["bloom-6-heads-untied", "llama-llama3-tied-all-biases"])
def test_matrices_decay_and_norms_and_biases_never_do(case):
    mask = sharding.named_leaves(optim.decay_mask(parity.our_model(case)))
    decays = {name for name, decay in mask.items() if decay}
    norms = {name for name in mask if "norm" in name}
    biases = {name for name in mask if name.endswith(("bias", ".b"))}
    assert norms
    assert biases
    assert decays == mask.keys() - norms - biases
    assert {"embed.w", "blocks.attention.out.w", "blocks.down.w"} <= decays


def test_weight_decay_shrinks_matrices_only():
    """With gradients of zero, one update is the decay alone."""
    model = parity.our_model(parity.FAMILIES[0])
    tx = optim.make_optimizer(
        OptimConfig(learning_rate=0.5, warmup_ratio=0.0, weight_decay=0.1), 10
    )

    @jax.jit
    def update(model):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, model), tx.init(model), model)
        return optax.apply_updates(model, updates)

    after = sharding.named_leaves(update(model))
    for name, before in sharding.named_leaves(model).items():
        factor = 0.95 if name.endswith(".w") else 1.0
        np.testing.assert_allclose(after[name], factor * before, rtol=1e-6, err_msg=name)


def test_clipping_keeps_the_direction():
    grads = {"blocks": {"w": jnp.array([300.0, -400.0])}, "norm": {"scale": jnp.array([0.0])}}
    for clip_norm, factor in ((0.0, 1.0), (2.0, 2.0 / 500.0), (501.0, 1.0)):
        tx = optim.make_optimizer(OptimConfig(clip_norm=clip_norm), 10)
        _, state = tx.update(grads, tx.init(grads), grads)
        leaves = jax.tree.leaves(state, is_leaf=_is_adam)
        moment = next(leaf for leaf in leaves if _is_adam(leaf)).mu
        # AdamW's first moment is a tenth of the gradients that reached it.
        np.testing.assert_allclose(
            10 * moment["blocks"]["w"], factor * grads["blocks"]["w"], rtol=1e-5
        )


def _is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
