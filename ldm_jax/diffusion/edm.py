"""Diffusion in terms of the noise level: preconditioning and loss of EDM and SGM.

z_t = z + sigma eps and t = sigma (`schedules.SigmaSchedule`). A preconditioned net is
one that predicts x0, so `denoiser.make_denoiser(precondition(apply), SigmaSchedule(),
"x0", …)` serves every sampler.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, objective

SCALINGS = ("edm", "eps", "v", "v_edm_noise")
WEIGHTINGS = ("edm", "eps", "v", "unit")


class Scales(NamedTuple):
    """x0_hat = skip z_t + out F(in z_t, noise); all shaped as sigma."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def scales(scaling: str, sigma: jax.Array, sigma_data: float = 0.5) -> Scales:
    """The four factors at `sigma` (Karras et al. 2022, table 1; SGM's `*Scaling`).

    `eps` and `v` make F what those parameterizations predict for data of unit variance;
    they tell the net sigma itself, `edm` and `v_edm_noise` a quarter of its logarithm.
    """
    check_scaling(scaling)
    log_noise = jnp.log(sigma) / 4
    if scaling == "edm":
        total = sigma**2 + sigma_data**2
        skip, out = sigma_data**2 / total, sigma * sigma_data * total**-0.5
        return Scales(skip, out, total**-0.5, log_noise)
    total = sigma**2 + 1
    if scaling == "eps":
        return Scales(jnp.ones_like(sigma), -sigma, total**-0.5, sigma)
    noise = log_noise if scaling == "v_edm_noise" else sigma
    return Scales(1 / total, -sigma * total**-0.5, total**-0.5, noise)


def check_scaling(scaling: str) -> None:
    """Raises UserError unless `scaling` is one of SCALINGS."""
    if scaling not in SCALINGS:
        raise UserError(
            f"diffusion.parameterization: {scaling!r}; with the schedule sigma choose"
            f" one of {', '.join(SCALINGS)}"
        )


def precondition(
    apply: denoiser.Apply, scaling: str = "edm", sigma_data: float = 0.5
) -> denoiser.Apply:
    """(z_t, sigma [b], cond) -> x0_hat [b, …], float32, by a net of unit scale."""

    def denoised(z_t, sigma, cond):
        factors = scales(scaling, sigma, sigma_data)
        skip, out, inner = (denoiser.per_example(c, z_t) for c in factors[:3])
        raw = apply(inner * z_t, factors.c_noise, cond).astype(jnp.float32)
        return skip * z_t + out * raw

    return denoised


def check_weighting(weighting: str) -> None:
    """Raises UserError unless `weighting` is one of WEIGHTINGS."""
    if weighting not in WEIGHTINGS:
        legal = ", ".join(WEIGHTINGS)
        raise UserError(f"loss.weighting: {weighting!r}; choose one of {legal}")


def loss_weights(
    weighting: str, sigma: jax.Array, sigma_data: float = 0.5
) -> jax.Array:
    """Weights of the squared error of x0_hat at `sigma` [b].

    `edm` makes the net's own error count alike at every level (Karras et al. 2022,
    table 1); `v` is that for data of unit variance, `eps` is sigma^-2.
    """
    check_weighting(weighting)
    if weighting == "unit":
        return jnp.ones_like(sigma)
    if weighting == "eps":
        return sigma**-2
    s = sigma_data if weighting == "edm" else 1.0
    return (sigma**2 + s**2) / (sigma * s) ** 2


def sigma_loss(
    apply: denoiser.Apply,
    z: jax.Array,
    cond: Any,
    key: jax.Array,
    *,
    scaling: str = "edm",
    weighting: str = "edm",
    sigma_data: float = 0.5,
    log_mean: float = -1.2,
    log_std: float = 1.2,
    loss_type: str = "l2",
    offset_noise: float = 0.0,
    sigma: jax.Array | None = None,
    eps: jax.Array | None = None,
    mask: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> tuple[jax.Array, objective.Metrics]:
    """The loss [] of latents `z` [b, …] over noise levels, with metrics.

    ln sigma is normal with `log_mean` and `log_std` (Karras et al. 2022, table 1), and
    the quartiles of the metrics are those of that distribution; for these, `mask` and
    `weight` see `objective.diffusion_loss`. `sigma` [b] and `eps` are drawn from `key`
    unless given.
    """
    sigma_key, eps_key = jax.random.split(key)
    z = z.astype(jnp.float32)
    if sigma is None:
        normal = jax.random.normal(sigma_key, z.shape[:1])
        sigma = jnp.exp(log_mean + log_std * normal)
    if eps is None:
        eps = objective.draw_noise(eps_key, z, offset_noise)
    denoised = precondition(apply, scaling, sigma_data)
    x0_hat = denoised(z + denoiser.per_example(sigma, z) * eps, sigma, cond)
    simple = objective.mean_error(x0_hat - z, loss_type)
    loss = loss_weights(weighting, sigma, sigma_data) * simple
    if weight is not None:
        loss *= weight
    place = jax.scipy.stats.norm.cdf((jnp.log(sigma) - log_mean) / log_std)
    last = objective.QUARTILES - 1
    quartile = jnp.minimum((place * objective.QUARTILES).astype(jnp.int32), last)
    values = {"loss": loss, "loss_simple": simple}
    return objective.pooled(values, "loss", quartile, mask)
