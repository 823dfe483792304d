"""What a run writes: losses by language that add up, and a picture that shows them."""

import jax
import numpy as np
import pytest

from llmzoo_jax import metrics, step


def test_loss_by_language_of_a_step_is_that_of_numpy():
    rng = np.random.default_rng(0)
    losses = rng.random((3, 40)).astype(np.float32)
    mask = rng.random((3, 40)) < 0.6
    language = rng.integers(-1, 4, (3, 40)).astype(np.int32)
    mask &= language >= 0
    names = ["ar", "en", "fr", "zh", "zu"]
    got = jax.jit(step.loss_by_language, static_argnums=3)(losses, mask, language, 5)
    want = metrics.by_language(losses, mask, language, names)
    assert not got[4].any()
    for i, name in enumerate(names[:4]):
        assert got[i].tolist() == pytest.approx(want[name], rel=1e-5)


def test_a_resumed_log_has_each_step_once(tmp_path):
    log = metrics.MetricsLog(tmp_path, start_step=0)
    for n in (1, 2, 3):
        log.write(n, loss=float(n), loss_by_language={"fr": 1.0})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log = metrics.MetricsLog(tmp_path, start_step=2)
    log.write(3, loss=30.0)
    log.close()
    assert [r["loss"] for r in metrics.read(tmp_path)] == [1.0, 2.0, 30.0]


def test_the_picture_shows_training_languages_where_nothing_is_held_out(tmp_path):
    log = metrics.MetricsLog(tmp_path, start_step=0)
    log.write(1, loss=2.0)
    plain = metrics.plot(tmp_path, title="a").stat().st_size
    log.write(2, loss=1.0, loss_by_language={"fr": 0.5, "ar": 1.5})
    log.close()
    assert metrics.plot(tmp_path, title="a").stat().st_size > plain
