"""The loss against a float64 transcription of its definition, and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, edm, objective, schedules

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


# ---- Beyond the originals ------------------------------------------------------


@pytest.mark.parametrize("parameterization", schedules.PARAMETERIZATIONS)
@pytest.mark.parametrize("terminal", [False, True])
def test_min_snr_weighs_the_same_error_of_x0_whatever_is_predicted(
    parameterization, terminal
):
    """min(SNR, gamma) |x0_hat - z|² of Hang et al. 2023, for eps, x0 and v alike."""
    if terminal and parameterization == "eps":
        pytest.skip("no net can learn that")
    schedule = schedules.make_schedule(
        linear_start=0.00085, linear_end=0.012, zero_terminal_snr=terminal
    )
    weights = objective.min_snr_weights(schedule, parameterization, 5.0)
    assert np.isfinite(weights).all() and weights.min() >= 0
    z, eps, _ = (jnp.asarray(x, jnp.float32) for x in inputs())
    t = jnp.asarray([0, 100, 400, 700, 900, 998])
    z_t = denoiser.q_sample(schedule, z, t, eps)
    out = denoiser.target(parameterization, schedule, z, t, eps) + 1.0
    x0_hat, _ = denoiser.predict(parameterization, schedule, out, z_t, t)
    bar = schedule.alphas_cumprod[t]
    expected = np.minimum(bar / (1 - bar), 5.0) * np.mean((x0_hat - z) ** 2, (1, 2, 3))
    np.testing.assert_allclose(weights[t], expected, rtol=1e-4)


def test_min_snr_changes_the_loss_and_nothing_else():
    z, eps, cond = inputs()
    options = dict(parameterization="v", t=T, eps=eps)
    plain, metrics = run(z, cond, **options)
    weighted, weighted_metrics = run(z, cond, **options, min_snr_gamma=5.0)
    assert abs(plain - weighted) > 1e-3
    np.testing.assert_array_equal(
        metrics["loss_simple"], weighted_metrics["loss_simple"]
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear"])
def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_noise(name):
    plain = schedules.make_schedule(schedule=name)
    schedule = schedules.make_schedule(schedule=name, zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] == 0 and schedule.betas[-1] == 1
    first = plain.alphas_cumprod[0]
    np.testing.assert_allclose(schedule.alphas_cumprod[0], first, rtol=1e-12)
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    with pytest.raises(UserError, match="zero_terminal_snr=True.*'v' or 'x0'"):
        schedules.check_learnable(schedule, "eps")


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_the_loss_is_finite_at_a_zero_terminal_snr(parameterization):
    z, eps, cond = inputs()
    schedule = schedules.make_schedule(zero_terminal_snr=True)
    loss, metrics = objective.diffusion_loss(
        net,
        schedule,
        jnp.asarray(z, jnp.float32),
        jnp.asarray(cond, jnp.float32),
        jax.random.key(0),
        parameterization=parameterization,
        min_snr_gamma=5.0,
        t=jnp.full([6], 999),
        eps=jnp.asarray(eps, jnp.float32),
    )
    assert np.isfinite(loss) and np.isfinite(metrics["loss_vlb"][0])


def test_offset_noise_shifts_whole_channels():
    z = jnp.zeros([512, 8, 8, 3])
    key = jax.random.key(0)
    plain, shifted = (objective.draw_noise(key, z, level) for level in (0.0, 0.5))
    shift = np.asarray(shifted - plain)
    np.testing.assert_allclose(shift, shift[:, :1, :1] + np.zeros_like(z), atol=1e-6)
    assert abs(shift[:, 0, 0].std() - 0.5) < 0.03
    assert abs(np.corrcoef(shift[:, 0, 0].T)[0, 1]) < 0.1
    assert abs(np.std(plain) - 1) < 0.01


def test_logit_normal_timesteps():
    key = jax.random.key(0)
    t = objective.draw_timesteps(key, 4096, 1000, "logit_normal", 0.5, 2.0)
    place = (np.asarray(t) + 0.5) / 1000
    logit = np.log(place / (1 - place))
    assert 0 <= t.min() and t.max() < 1000
    assert abs(logit.mean() - 0.5) < 0.1 and abs(logit.std() - 2.0) < 0.1
    uniform = objective.draw_timesteps(key, 4096, 1000)
    assert abs(np.mean(uniform) - 499.5) < 15
    with pytest.raises(UserError, match="timestep_sampling: 'cosine'"):
        objective.draw_timesteps(jax.random.key(0), 2, 10, "cosine")


# SGM's table (§2.11): c_skip, c_out, c_in, c_noise at sigma 2 with sigma_data 0.5.
SGM = {
    "edm": (0.25 / 4.25, 1 / 4.25**0.5, 1 / 4.25**0.5, np.log(2) / 4),
    "eps": (1.0, -2.0, 1 / 5**0.5, 2.0),
    "v": (1 / 5, -2 / 5**0.5, 1 / 5**0.5, 2.0),
    "v_edm_noise": (1 / 5, -2 / 5**0.5, 1 / 5**0.5, np.log(2) / 4),
}


@pytest.mark.parametrize("scaling", edm.SCALINGS)
def test_scalings_are_sgm_s(scaling):
    np.testing.assert_allclose(
        [float(x) for x in edm.scales(scaling, jnp.float32(2.0))],
        SGM[scaling],
        rtol=1e-6,
    )


def test_weightings_are_sgm_s():
    expected = {"edm": 4.25, "v": 5 / 4, "eps": 1 / 4, "unit": 1.0}
    for weighting, value in expected.items():
        weight = edm.loss_weights(weighting, jnp.float32(2.0))
        np.testing.assert_allclose(weight, value, rtol=1e-6)


def test_sigma_loss_is_its_definition():
    z, eps, cond = inputs()
    sigma = np.array([0.1, 0.3, 0.5, 1.0, 3.0, 20.0])
    loss, metrics = edm.sigma_loss(
        net,
        jnp.asarray(z, jnp.float32),
        jnp.asarray(cond, jnp.float32),
        jax.random.key(0),
        sigma=jnp.asarray(sigma, jnp.float32),
        eps=jnp.asarray(eps, jnp.float32),
    )
    s = sigma[:, None, None, None]
    total = s**2 + 0.25
    z_t = z + s * eps
    out = (
        0.3 * z_t / np.sqrt(total)
        + (np.sin(np.log(sigma) / 4 / 300) * cond)[:, None, None, None]
    )
    x0_hat = 0.25 / total * z_t + 0.5 * s / np.sqrt(total) * out
    simple = ((x0_hat - z) ** 2).mean((1, 2, 3))
    expected = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * simple).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"][0], simple.sum(), rtol=1e-5)
    counts = [int(metrics[f"loss_q{q}"][1]) for q in range(4)]
    place = (np.log(sigma) + 1.2) / 1.2
    edges = np.searchsorted([-0.6745, 0.0, 0.6745], place)
    assert counts == np.bincount(edges, minlength=4).tolist()


def test_drawn_levels_are_log_normal():
    z = jnp.zeros([4096, 1, 1, 1])
    seen = []

    def spy(z_t, noise, cond):
        seen.append(noise)
        return z_t

    edm.sigma_loss(spy, z, None, jax.random.key(0), log_mean=0.5, log_std=0.7)
    log_sigma = 4 * np.asarray(seen[0])
    assert abs(log_sigma.mean() - 0.5) < 0.05 and abs(log_sigma.std() - 0.7) < 0.03
