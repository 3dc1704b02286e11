"""The learned variance: the bound against float64, what gets a gradient, sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from ldm_jax.diffusion import (
    denoiser,
    editing,
    learned_variance,
    objective,
    samplers,
    schedules,
)

SCHEDULE = schedules.make_schedule(schedule="squaredcos_cap_v2", timesteps=100)
C = 3


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _case(t):
    """(z, z_t, t, output, v): pixels, some of them at the ends of the range."""
    t = jnp.asarray(t)
    z = jnp.clip(normal(0, len(t), 4, 4, C), -1, 1)
    z_t = denoiser.q_sample(SCHEDULE, z, t, normal(1, *z.shape))
    return z, z_t, t, normal(2, *z.shape), 0.8 * normal(3, *z.shape)


def test_kl_is_the_integral():
    mean1, logvar1, mean2, logvar2 = 0.3, -1.0, -0.2, -0.4
    p = scipy.stats.norm(mean1, np.exp(logvar1 / 2))
    q = scipy.stats.norm(mean2, np.exp(logvar2 / 2))
    expected, _ = scipy.integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10
    )
    found = learned_variance.gaussian_kl(*map(jnp.float32, (0.3, -1.0, -0.2, -0.4)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_levels_are_all_there_is():
    """The probabilities of the 256 levels add up to one."""
    levels = jnp.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.2), (-0.97, 0.5)):
        log = learned_variance.discretized_log_likelihood(
            levels, jnp.full([256], mean), jnp.full([256], np.log(std))
        )
        np.testing.assert_allclose(jnp.exp(log).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("parameterization", schedules.PARAMETERIZATIONS)
def test_terms_of_the_bound_are_those_of_float64(parameterization):
    case = z, z_t, t, out, v = _case([0, 1, 50, 99])
    terms = learned_variance.bound_terms(SCHEDULE, parameterization, out, v, z, z_t, t)
    z, z_t, t, out, v = (np.asarray(x, np.float64) for x in case)
    expected = []
    for i, step in enumerate(t.astype(int)):
        beta, bar = SCHEDULE.betas[step], SCHEDULE.alphas_cumprod[step]
        before = SCHEDULE.alphas_cumprod[step - 1] if step else 1.0
        alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
        x0 = {
            "eps": (z_t[i] - sigma * out[i]) / alpha,
            "x0": out[i],
            "v": alpha * z_t[i] - sigma * out[i],
        }[parameterization]

        def posterior(x0, i=i, beta=beta, bar=bar, before=before):
            mean = (
                np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * z_t[i]
            )
            return mean / (1 - bar)

        first = SCHEDULE.alphas_cumprod[max(step - 1, 0)]
        var = SCHEDULE.betas[max(step, 1)] * (1 - first)
        var /= 1 - SCHEDULE.alphas_cumprod[max(step, 1)]
        share = (v[i] + 1) / 2
        learned = np.exp(share * np.log(beta) + (1 - share) * np.log(var))
        if step:
            kl = np.log(learned / var) - 1 + var / learned
            kl = (kl + (posterior(z[i]) - posterior(x0)) ** 2 / learned) / 2
        else:
            law = scipy.stats.norm(posterior(x0), np.sqrt(learned))
            above = np.where(z[i] > 0.999, 1, law.cdf(z[i] + 1 / 255))
            below = np.where(z[i] < -0.999, 0, law.cdf(z[i] - 1 / 255))
            kl = -np.log(np.maximum(above - below, 1e-12))
        expected.append(kl.mean() / np.log(2))
    np.testing.assert_allclose(terms, expected, rtol=5e-5)


def test_only_the_variance_learns_of_the_bound():
    z, z_t, t, out, v = _case([0, 30])

    def total(out, v):
        return learned_variance.bound_terms(SCHEDULE, "eps", out, v, z, z_t, t).sum()

    of_out, of_v = jax.grad(total, (0, 1))(out, v)
    assert not np.any(of_out) and np.all(np.abs(of_v).sum((1, 2, 3)) > 0)


def _net(z_t, t, cond):
    level = denoiser.per_example(t.astype(jnp.float32) / 100 + cond, z_t)
    return jnp.concatenate([jnp.tanh(z_t * level), jnp.sin(z_t + level)], axis=-1)


def test_the_loss_is_the_simple_one_and_the_weighted_bound():
    z, z_t, t, *_ = _case([0, 5, 60])
    eps, cond = normal(1, *z.shape), jnp.zeros(3)
    given = dict(parameterization="eps", t=t, eps=eps)
    loss, metrics = objective.diffusion_loss(
        _net,
        SCHEDULE,
        z,
        cond,
        jax.random.key(0),
        learned_variance=True,
        variance_weight=0.01,
        **given,
    )
    plain, _ = objective.diffusion_loss(
        lambda *args: _net(*args)[..., :C],
        SCHEDULE,
        z,
        cond,
        jax.random.key(0),
        **given,
    )
    out, v = denoiser.split_variance(_net(z_t, t, cond))
    terms = learned_variance.bound_terms(SCHEDULE, "eps", out, v, z, z_t, t)
    np.testing.assert_allclose(loss, plain + terms.mean(), rtol=1e-5)  # 0.01 T = 1
    total, count = metrics["loss_variance"]
    np.testing.assert_allclose(total / count, terms.mean(), rtol=1e-6)


def test_guidance_moves_the_mean_alone():
    z_t, t = normal(0, 2, 4, 4, C), jnp.asarray([20, 80])
    conds = [jnp.zeros(2), jnp.ones(2)]
    guided = denoiser.make_denoiser(
        _net, SCHEDULE, "eps", conds, [8.0], learned_variance=True
    )
    alone = denoiser.make_denoiser(
        lambda *args: _net(*args)[..., :C], SCHEDULE, "eps", conds, [8.0]
    )
    *pair, v = guided.predict(z_t, t)
    for ours, plain, same in zip(pair, alone(z_t, t), guided(z_t, t), strict=True):
        np.testing.assert_array_equal(ours, same)
        np.testing.assert_allclose(ours, plain, atol=1e-6)
    np.testing.assert_array_equal(v, _net(z_t, t, conds[1])[..., C:])
    known = editing.inpainter(
        guided, SCHEDULE, z_t, jnp.ones((2, 4, 4, 1)), jax.random.key(0)
    )
    assert isinstance(known, denoiser.WithVariance)


@pytest.mark.parametrize("steps", [10, 100])
def test_the_variance_of_a_step_is_the_net_s(steps):
    """At v = -1 and 1 the sampler is that of the fixed bounds; DDIM does not care."""

    def made(v, schedule=SCHEDULE):
        def net(z_t, t, cond):
            out = _net(z_t, t, cond)
            return out.at[..., C:].set(v)

        return denoiser.make_denoiser(
            net, schedule, "eps", [jnp.zeros(2)], learned_variance=True
        )

    z, key = normal(0, 2, 4, 4, C), jax.random.key(1)
    for v, v_posterior in ((-1.0, 0.0), (1.0, 1.0)):
        fixed = schedules.make_schedule(
            schedule="squaredcos_cap_v2", timesteps=100, v_posterior=v_posterior
        )
        plain = denoiser.make_denoiser(
            lambda *args: _net(*args)[..., :C], fixed, "eps", [jnp.zeros(2)]
        )
        run = samplers.SAMPLERS["ddpm"]
        ours, _ = run(made(v), z, SCHEDULE, key, steps=steps)
        expected, _ = run(plain, z, fixed, key, steps=steps)
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)
        ddim = samplers.SAMPLERS["ddim"]
        a, _ = ddim(made(v), z, SCHEDULE, key, steps=steps)
        b, _ = ddim(plain, z, fixed, key, steps=steps)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
