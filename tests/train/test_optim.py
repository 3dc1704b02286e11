import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.train import optim

SECTION = dict(
    learning_rate=0.5,
    schedule="constant",
    warmup_steps=0,
    final_fraction=0.0,
    b1=0.9,
    b2=0.999,
    eps=1.0,
    weight_decay=0.0,
    clip_norm=0.0,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 9: 2.0, 50: 2.0}),
        ("linear", {0: 0.5, 3: 2.0, 4: 2.0, 7: 1.1, 10: 0.2, 50: 0.2}),
        ("cosine", {0: 0.5, 3: 2.0, 4: 2.0, 7: 1.1, 10: 0.2, 50: 0.2}),
    ],
)
def test_learning_rate_literals(schedule, expected):
    rate = optim.learning_rate(
        peak=2.0, steps=10, schedule=schedule, warmup_steps=4, final=0.1
    )
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))


def test_cosine_is_not_linear():
    rate = optim.learning_rate(
        peak=1.0, steps=12, schedule="cosine", warmup_steps=0, final=0.0
    )
    np.testing.assert_allclose(rate(4), 0.75, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_step_is_the_peak(warmup):
    rate = optim.learning_rate(
        peak=3.0, steps=10, schedule="constant", warmup_steps=warmup, final=0.0
    )
    np.testing.assert_allclose([rate(0), rate(1)], [3.0, 3.0])


def test_unknown_schedule_is_named():
    with pytest.raises(UserError, match="optim.schedule: 'step'; choose one of"):
        optim.make_optimizer(ConfigDict(SECTION | dict(schedule="step")), 10)


def _first_update(grad, param=0.0, **options):
    tx, _ = optim.make_optimizer(ConfigDict(SECTION | options), 10)
    params = {"w": jnp.full(len(grad), param)}
    updates, _ = tx.update({"w": jnp.asarray(grad)}, tx.init(params), params)
    return updates["w"]


def test_adamw_literals():
    """The first step: -lr (g / (|g| + eps) + weight_decay · w)."""
    grad = np.array([3.0, -1.0, 0.0], np.float32)
    np.testing.assert_allclose(_first_update(grad), [-0.375, 0.25, 0], rtol=1e-5)
    decayed = _first_update(grad, param=2.0, weight_decay=0.1)
    np.testing.assert_allclose(decayed, [-0.475, 0.15, -0.1], rtol=1e-5)


def test_clipping_is_by_global_norm():
    grad = np.array([30.0, 40.0], np.float32)  # norm 50, clipped to 5: 3 and 4
    clipped = _first_update(grad, clip_norm=5.0)
    np.testing.assert_allclose(clipped, [-0.5 * 3 / 4, -0.5 * 4 / 5], rtol=1e-5)
    np.testing.assert_allclose(
        _first_update(grad), [-0.5 * 30 / 31, -0.5 * 40 / 41], rtol=1e-5
    )
