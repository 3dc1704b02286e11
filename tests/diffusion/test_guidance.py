"""Two conditions apart, rescaling, and a classifier's say, against algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import denoiser, editing, guidance, samplers, schedules

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)


def net(z_t, t, cond):
    return z_t * denoiser.per_example(cond, z_t)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_two_conditions_have_scales_apart():
    """Brooks et al. 2023, eq. 3: e0 + s1 (e1 - e0) + s2 (e12 - e1)."""
    z_t = normal(0, 2, 4, 4, 3)
    conds = [jnp.full([2], x) for x in (0.1, 0.4, 1.0)]
    denoise = denoiser.make_denoiser(net, SCHEDULE, "eps", conds, [2.0, 5.0])
    _, eps_hat = denoise(z_t, 500)
    expected = (0.1 + 2.0 * (0.4 - 0.1) + 5.0 * (1.0 - 0.4)) * z_t
    np.testing.assert_allclose(eps_hat, expected, rtol=1e-5)


def test_rescaling_gives_the_contrast_of_the_condition_back():
    z_t = normal(0, 2, 8, 8, 3)
    conds = [jnp.full([2], x) for x in (0.1, 1.0)]

    def contrast(phi):
        denoise = denoiser.make_denoiser(
            net, SCHEDULE, "eps", conds, [7.5], guidance_rescale=phi
        )
        return np.std(denoise(z_t, 500)[1], (1, 2, 3)) / np.std(z_t, (1, 2, 3))

    np.testing.assert_allclose(contrast(None), 0.1 + 7.5 * 0.9, rtol=1e-5)
    np.testing.assert_allclose(contrast(0.0), 0.1 + 7.5 * 0.9, rtol=1e-5)
    np.testing.assert_allclose(contrast(1.0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(contrast(0.5), 0.5 + 0.5 * 6.85, rtol=1e-5)


def test_a_constraint_on_x0_moves_eps_with_it():
    z_t = 3 * normal(0, 2, 4, 4, 3)
    denoise = denoiser.make_denoiser(
        net, SCHEDULE, "eps", [jnp.ones([2])], constrain=lambda x: jnp.clip(x, -1, 1)
    )
    x0_hat, eps_hat = denoise(z_t, 400)
    assert np.abs(x0_hat).max() <= 1
    alpha, sigma = SCHEDULE.at_time(np.int64(400))
    np.testing.assert_allclose(alpha * x0_hat + sigma * eps_hat, z_t, atol=1e-5)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_classifier_turns_the_prior_into_its_posterior(parameterization):
    """z ~ N(0, 1) and log p(y | z) = -(y - z)² / (2 s²): the posterior is known."""
    y, s2 = 1.5, 0.5
    bars = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)

    def log_prob(z_t, t):
        """y given z_t ~ N(sqrt(bar) z_t, s² + 1 - bar)."""
        bar = bars[t][:, None]
        return -jnp.sum((y - jnp.sqrt(bar) * z_t) ** 2 / (2 * (s2 + 1 - bar)), 1)

    def exact(z_t, t, cond):
        """For z ~ N(0, 1) x0_hat is sqrt(bar) z_t and eps_hat sqrt(1 - bar) z_t."""
        alpha, sigma = denoiser.levels(SCHEDULE, t, z_t)
        x0_hat, eps_hat = alpha * z_t, sigma * z_t
        return denoiser.target(parameterization, SCHEDULE, x0_hat, t, eps_hat)

    def sample(scale):
        denoise = denoiser.make_denoiser(
            exact,
            SCHEDULE,
            parameterization,
            [None],
            score=guidance.classifier_score(log_prob, scale),
        )
        z, _ = samplers.SAMPLERS["dpmpp_2m"](
            denoise, normal(0, 4096, 1), SCHEDULE, jax.random.key(1), steps=60
        )
        return np.mean(z), np.std(z)

    mean, std = sample(1.0)
    # It starts from N(0, 1), which has no share of y yet: about 0.07 too few.
    assert abs(mean - y / (1 + s2)) < 0.08
    assert abs(std - np.sqrt(s2 / (1 + s2))) < 0.03
    mean, std = sample(0.0)
    assert abs(mean) < 0.05 and abs(std - 1) < 0.03


def test_slerp_stays_on_the_sphere_and_begins_and_ends_where_it_should():
    a, b = normal(0, 3, 8, 8, 4), normal(1, 3, 8, 8, 4)
    np.testing.assert_allclose(editing.slerp(a, b, 0.0), a, atol=1e-5)
    np.testing.assert_allclose(editing.slerp(a, b, jnp.ones([3])), b, atol=1e-5)
    assert abs(np.std(editing.slerp(a, b, 0.5)) - 1) < 0.05
    assert np.std(0.5 * (a + b)) < 0.8
    np.testing.assert_allclose(editing.slerp(a, a, 0.3), a, atol=1e-5)
