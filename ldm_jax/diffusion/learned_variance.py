"""The variance of the reverse step as a net's output (Nichol & Dhariwal 2021).

Such a net has twice the latent's channels: what it predicts, then v, which interpolates
the log variance between the posterior's (v = -1) and beta (v = 1), eq. 15 there.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import denoiser, schedules


def bounds(schedule: schedules.Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) log variance of the step from t to t - 1, each float64 [T].

    The posterior at t = 0 is a point; its entry repeats that of t = 1.
    """
    bar, before = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    lower = (schedule.betas * (1 - before) / (1 - bar))[1:]
    return np.log(np.append(lower[:1], lower)), np.log(schedule.betas)


def log_variance(
    v: jax.Array, lower: jax.Array | float, upper: jax.Array | float
) -> jax.Array:
    """Log variance [b, …] of `v` in about [-1, 1] between two others."""
    share = (v + 1) / 2
    return share * upper + (1 - share) * lower


def bound_terms(
    schedule: schedules.Schedule,
    parameterization: str,
    out: jax.Array,
    v: jax.Array,
    z: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Each example's term of the variational bound at `t`: bits per dimension, [b].

    KL(q(z_{t-1} | z_t, z) || p(z_{t-1} | z_t)), and at t = 0 the likelihood of `z` in
    256 levels of [-1, 1]. The mean, which `out` predicts, gets no gradient here, so
    that only `v` learns from it (section 3.1 there).
    """
    x0_hat, _ = denoiser.predict(parameterization, schedule, out, z_t, t)
    x0_hat = jax.lax.stop_gradient(x0_hat)

    def at(table):
        return denoiser.lookup(table, t, z)

    def mean(x0):
        first, second = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return at(first) * x0 + at(second) * z_t

    lower, upper = (at(table) for table in bounds(schedule))
    learned = log_variance(v, lower, upper)
    kl = gaussian_kl(mean(z), lower, mean(x0_hat), learned)
    first = -discretized_log_likelihood(z, mean(x0_hat), learned / 2)
    terms = jnp.where(denoiser.per_example(t == 0, z), first, kl)
    return jnp.mean(terms, axis=tuple(range(1, z.ndim))) / jnp.log(2.0)


def gaussian_kl(
    mean1: jax.Array, logvar1: jax.Array, mean2: jax.Array, logvar2: jax.Array
) -> jax.Array:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats, elementwise."""
    distance = jnp.square(mean1 - mean2) * jnp.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1 + jnp.exp(logvar1 - logvar2) + distance)


def discretized_log_likelihood(
    x: jax.Array, mean: jax.Array, log_std: jax.Array
) -> jax.Array:
    """Log probability of the 1/255-wide level around `x` in [-1, 1], elementwise.

    The outermost levels reach to infinity. `x` may be continuous, as latents are.
    """
    scale, half = jnp.exp(-log_std), 1 / 255
    above = jnp.where(x > 0.999, jnp.inf, scale * (x - mean + half))
    below = jnp.where(x < -0.999, -jnp.inf, scale * (x - mean - half))
    # In the left tail, where the difference of two numbers near 0 keeps its digits.
    right = above + below > 0
    above, below = jnp.where(right, -below, above), jnp.where(right, -above, below)
    cdf = jax.scipy.stats.norm.cdf
    return jnp.log(jnp.maximum(cdf(above) - cdf(below), 1e-12))
