"""The loss against a float64 transcription of its definition, and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import objective, schedules

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)
T = np.array([0, 249, 250, 640, 999, 500])
LOGVAR = np.linspace(-1, 1, 1000)


def net(z_t, t, cond):
    angle = t.astype(jnp.float32)[:, None, None, None] / 300
    return 0.3 * z_t + jnp.sin(angle) * cond[:, None, None, None]


def inputs(b=6):
    rng = np.random.default_rng(0)
    shape = (b, 4, 4, 3)
    z, eps, cond = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=b)
    return z, eps, cond


def run(z, cond, key=0, **kwargs):
    kwargs = dict(parameterization="eps", loss_type="l2") | kwargs
    arrays = {
        name: jnp.asarray(kwargs.pop(name), dtype)
        for name, dtype in dict(
            t=jnp.int32, eps=jnp.float32, logvar=jnp.float32, mask=jnp.float32
        ).items()
        if name in kwargs
    }
    return objective.diffusion_loss(
        net,
        SCHEDULE,
        jnp.asarray(z, jnp.float32),
        jnp.asarray(cond, jnp.float32),
        jax.random.key(key),
        **kwargs,
        **arrays,
    )


@pytest.mark.parametrize("loss_type", objective.LOSS_TYPES)
@pytest.mark.parametrize("parameterization", schedules.PARAMETERIZATIONS)
def test_loss_is_its_definition(parameterization, loss_type):
    z, eps, cond = inputs()
    bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    signal, sigma = (np.sqrt(x[T])[:, None, None, None] for x in (bar, 1 - bar))
    target = {"eps": eps, "x0": z, "v": signal * eps - sigma * z}[parameterization]
    out = 0.3 * (signal * z + sigma * eps)
    out += (np.sin(T / 300) * cond)[:, None, None, None]
    error = out - target
    simple = (np.abs(error) if loss_type == "l1" else error**2).mean((1, 2, 3))
    vlb = schedules.lvlb_weights(SCHEDULE, parameterization)[T] * simple
    expected = 0.7 * (simple * np.exp(-LOGVAR[T]) + LOGVAR[T]) + 0.01 * vlb

    loss, metrics = run(
        z,
        cond,
        parameterization=parameterization,
        loss_type=loss_type,
        logvar=LOGVAR,
        l_simple_weight=0.7,
        original_elbo_weight=0.01,
        t=T,
        eps=eps,
    )
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    for name, values in dict(loss=expected, loss_simple=simple, loss_vlb=vlb).items():
        total, count = metrics[name]
        np.testing.assert_allclose(total, values.sum(), rtol=1e-5)
        assert count == len(T)
    for q, rows in enumerate([[0, 1], [2], [3, 5], [4]]):
        total, count = metrics[f"loss_q{q}"]
        np.testing.assert_allclose(total, expected[rows].sum(), rtol=1e-5)
        assert count == len(rows)


def test_zero_logvar_is_no_logvar():
    z, _, cond = inputs()
    with_zeros, _ = run(z, cond, logvar=np.zeros(1000))
    np.testing.assert_allclose(with_zeros, run(z, cond)[0], rtol=1e-6)


def test_logvar_gets_the_gradient_that_drives_it_to_the_log_loss():
    """d/ds (L exp(-s) + s) = 1 - L exp(-s), at the sampled timesteps only."""
    z, eps, cond = inputs(1)

    def loss(logvar):
        return objective.diffusion_loss(
            net,
            SCHEDULE,
            jnp.asarray(z, jnp.float32),
            jnp.asarray(cond, jnp.float32),
            jax.random.key(0),
            parameterization="eps",
            logvar=logvar,
            t=jnp.asarray([400]),
            eps=jnp.asarray(eps, jnp.float32),
        )

    grad, metrics = jax.grad(loss, has_aux=True)(jnp.zeros(1000))
    expected = np.zeros(1000)
    expected[400] = 1 - metrics["loss_simple"][0]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_quartiles_pool_to_the_loss():
    z, _, cond = inputs(64)
    loss, metrics = run(z, cond)
    parts = np.array([metrics[f"loss_q{q}"] for q in range(4)])
    assert (parts[:, 1] > 0).all()
    total, count = parts.sum(0)
    assert count == 64
    np.testing.assert_allclose(total / count, loss, rtol=1e-6)
    np.testing.assert_allclose([total, count], metrics["loss"], rtol=1e-6)


def test_masked_rows_count_for_nothing():
    z, eps, cond = inputs()
    keep = np.array([1, 0, 1, 1, 0, 1])
    rows = keep > 0
    _, expected = run(z[rows], cond[rows], t=T[rows], eps=eps[rows])
    z[~rows] = 1e3
    loss, metrics = run(z, cond, t=T, eps=eps, mask=keep)
    np.testing.assert_allclose(loss, expected["loss"][0] / 4, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)


def test_noise_and_timesteps_come_from_the_key():
    """Over 4,096 draws: t uniform in [0, T), eps standard, both anew for each key."""
    seen = []

    def spy(z_t, t, cond):
        seen.append((np.asarray(z_t), np.asarray(t)))
        return jnp.zeros_like(z_t)

    z = jnp.zeros([4096, 2])
    losses = [
        objective.diffusion_loss(
            spy, SCHEDULE, z, None, jax.random.key(k), parameterization="eps"
        )[0]
        for k in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    z_t, t = seen[0]
    assert t.min() >= 0 and t.max() <= 999 and len(np.unique(t)) > 950
    assert abs(t.mean() - 499.5) < 3 * 288.7 / 64
    eps = z_t / SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None]
    assert abs(eps.mean()) < 0.04 and abs(eps.std() - 1) < 0.03
    assert abs(np.corrcoef(t, eps[:, 0])[0, 1]) < 0.06


def test_unknown_loss_type_lists_the_legal_ones():
    z, _, cond = inputs()
    with pytest.raises(UserError, match="'huber'.*l2, l1"):
        run(z, cond, loss_type="huber")
