"""Parameterizations and guidance, against algebra and the reference's posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, schedules
from tests import parity

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("t", [0, 500, 999, (3, 700)])
@pytest.mark.parametrize("parameterization", schedules.PARAMETERIZATIONS)
def test_predict_undoes_target(parameterization, t):
    z, eps, t = normal(0, 2, 4, 4, 3), normal(1, 2, 4, 4, 3), jnp.asarray(t)
    z_t = denoiser.q_sample(SCHEDULE, z, t, eps)
    out = denoiser.target(parameterization, SCHEDULE, z, t, eps)
    x0_hat, eps_hat = denoiser.predict(parameterization, SCHEDULE, out, z_t, t)
    # Each is as exact as float32 allows: eps says little of z at t = 999 and
    # z says little of eps at t = 0.
    np.testing.assert_allclose(x0_hat, z, atol=2e-5)
    np.testing.assert_allclose(eps_hat, eps, atol=2e-5)


def test_a_scalar_t_is_the_same_t_for_all():
    z, eps = normal(0, 2, 4, 4, 3), normal(1, 2, 4, 4, 3)
    np.testing.assert_array_equal(
        denoiser.q_sample(SCHEDULE, z, jnp.int32(7), eps),
        denoiser.q_sample(SCHEDULE, z, jnp.asarray([7, 7]), eps),
    )


def test_v_is_that_of_a_quarter_turn():
    schedule = schedules.make_schedule(given_betas=[0.36])
    z, eps = jnp.asarray([[2.0]]), jnp.asarray([[1.0]])
    v = denoiser.target("v", schedule, z, jnp.int32(0), eps)
    np.testing.assert_allclose(v, [[0.8 * 1 - 0.6 * 2]], rtol=1e-6)


def test_single_step_quantities_are_the_reference_s():
    """Forward mean, x0_hat and posterior of the fixture's eps net."""
    meta, _, io = parity.load("ddpm_ancestral")
    schedule = schedules.make_schedule(**meta["config"])
    x, t = io["single/x"], io["single/t"]
    context = io["context"].mean((1, 2))[:, None, None, None]
    angle = t.astype(np.float32)[:, None, None, None]
    out = 0.3 * x + 0.2 * np.tanh(x) + 0.1 * np.sin(angle / 100)
    out += 0.2 * context * np.cos(angle / 250)
    x0_hat, _ = denoiser.predict(
        "eps", schedule, jnp.asarray(out), jnp.asarray(x), jnp.asarray(t, jnp.int32)
    )
    np.testing.assert_allclose(x0_hat, io["single/x_recon"], atol=5e-6)

    def column(table):
        return table[t][:, None, None, None]

    mean = column(schedule.posterior_mean_coef1) * np.asarray(x0_hat)
    mean += column(schedule.posterior_mean_coef2) * x
    np.testing.assert_allclose(mean, io["single/mean"], atol=5e-6)
    np.testing.assert_allclose(
        column(schedule.posterior_variance), io["single/var"], atol=1e-7
    )
    np.testing.assert_allclose(
        column(schedule.posterior_log_variance_clipped),
        io["single/logvar"],
        rtol=1e-6,
    )
    noiseless = denoiser.q_sample(
        schedule,
        jnp.asarray(io["single/x0"]),
        jnp.asarray(t, jnp.int32),
        jnp.zeros_like(x),
    )
    np.testing.assert_allclose(noiseless, io["single/q_mean"], atol=1e-6)


def net(z_t, t, cond):
    scale = denoiser.per_example(cond["a"] + t.astype(jnp.float32) / 1000, z_t)
    return jnp.tanh(z_t * scale)


COND = {"a": jnp.asarray([0.5, -1.0]), "unused": None}
UNCOND = {"a": jnp.asarray([0.1, 0.2]), "unused": None}


@pytest.mark.parametrize("parameterization", schedules.PARAMETERIZATIONS)
def test_guidance_scale_1_is_no_guidance_and_0_no_condition(parameterization):
    z_t, t = normal(0, 2, 4, 4, 3), jnp.asarray([20, 800])

    def denoise(*args):
        return denoiser.make_denoiser(net, SCHEDULE, parameterization, *args)(z_t, t)

    for scale, cond in ((1.0, COND), (0.0, UNCOND), (jnp.asarray([1.0, 1.0]), COND)):
        guided, plain = denoise([UNCOND, COND], [scale]), denoise([cond])
        np.testing.assert_allclose(guided[0], plain[0], atol=1e-5)
        np.testing.assert_allclose(guided[1], plain[1], atol=1e-5)


def test_each_example_may_have_its_own_scale():
    z_t, scales = normal(0, 2, 4, 4, 3), [1.5, 7.5]

    def denoise(scale):
        conds = [UNCOND, COND]
        return denoiser.make_denoiser(net, SCHEDULE, "eps", conds, [scale])(z_t, 9)

    together, _ = denoise(jnp.asarray(scales))
    for row, scale in enumerate(scales):
        np.testing.assert_allclose(together[row], denoise(scale)[0][row], atol=1e-6)


def test_guidance_is_one_call_with_the_unconditional_half_first():
    seen = []

    def spy(z_t, t, cond):
        seen.append((z_t.shape, t, cond["a"]))
        return net(z_t, t, cond)

    denoise = denoiser.make_denoiser(spy, SCHEDULE, "eps", [UNCOND, COND], [3.0])
    denoise(normal(0, 2, 4, 4, 3), jnp.int32(5))
    ((shape, t, a),) = seen
    assert shape == (4, 4, 4, 3) and t.dtype == jnp.int32 and t.tolist() == [5] * 4
    np.testing.assert_array_equal(a, [*UNCOND["a"], *COND["a"]])


def test_errors():
    with pytest.raises(UserError, match="'epsilon'.*eps, x0, v"):
        denoiser.make_denoiser(net, SCHEDULE, "epsilon", [COND])
    with pytest.raises(ValueError, match="2 conds with 0 scales; give 1"):
        denoiser.make_denoiser(net, SCHEDULE, "eps", [UNCOND, COND])
