"""Noise schedules: float64 tables over the timesteps, computed once in numpy.

Names are those of the torch originals' buffers (`DDPM.register_schedule`), so that a
table here and a buffer in an imported checkpoint can be compared by name.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ldm_jax.config import UserError

SCHEDULES = ("linear", "cosine", "sqrt_linear", "sqrt", "squaredcos_cap_v2")
PARAMETERIZATIONS = ("eps", "x0", "v")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process q and its posterior, every table float64 [T].

    z_t = sqrt_alphas_cumprod[t] z + sqrt_one_minus_alphas_cumprod[t] eps, and
    q(z_{t-1} | z_t, z) has mean posterior_mean_coef1[t] z + posterior_mean_coef2[t] z_t
    (Ho et al. 2020, eq. 4, 6, 7). Compared and hashed by identity: a constant of jit.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray  # [0] is 1
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray


def betas(
    schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """The variances of the forward steps, float64 [timesteps].

    `linear` is the square of evenly spaced roots, the schedule of every LDM and Stable
    Diffusion config; DDPM's evenly spaced betas are `sqrt_linear`. `cosine` and
    `squaredcos_cap_v2` are one formula, the latter with its offset fixed.
    Raises UserError for another name. Source: `make_beta_schedule`.
    """
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, timesteps) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, timesteps)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, timesteps) ** 0.5
    if schedule in ("cosine", "squaredcos_cap_v2"):
        s = cosine_s if schedule == "cosine" else 8e-3
        u = np.arange(timesteps + 1, dtype=np.float64) / timesteps
        alphas_cumprod = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
        return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)
    raise UserError(
        f"diffusion.schedule: {schedule!r}; choose one of {', '.join(SCHEDULES)}"
    )


def make_schedule(
    *,
    schedule: str = "linear",
    timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    v_posterior: float = 0.0,
    given_betas: Sequence[float] | np.ndarray | None = None,
) -> Schedule:
    """Computes all tables of a config's `diffusion` section.

    `given_betas` [T] replaces the named schedule. `v_posterior` moves the posterior
    variance from its lower bound (0) to its upper bound beta (1).
    """
    if given_betas is None:
        beta = betas(schedule, timesteps, linear_start, linear_end, cosine_s)
    else:
        beta = np.asarray(given_betas, np.float64)
    bar = np.cumprod(1 - beta)
    bar_prev = np.append(1.0, bar[:-1])
    variance = (1 - v_posterior) * beta * (1 - bar_prev) / (1 - bar)
    variance += v_posterior * beta
    return Schedule(
        betas=beta,
        alphas_cumprod=bar,
        alphas_cumprod_prev=bar_prev,
        sqrt_alphas_cumprod=np.sqrt(bar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - bar),
        log_one_minus_alphas_cumprod=np.log(1 - bar),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / bar),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / bar - 1),
        posterior_variance=variance,
        # The posterior at t = 0 is a point, whose log variance would be -inf.
        posterior_log_variance_clipped=np.log(np.maximum(variance, 1e-20)),
        posterior_mean_coef1=beta * np.sqrt(bar_prev) / (1 - bar),
        posterior_mean_coef2=(1 - bar_prev) * np.sqrt(1 - beta) / (1 - bar),
    )


def lvlb_weights(schedule: Schedule, parameterization: str) -> np.ndarray:
    """Weights of the variational bound on the simple loss, float64 [T].

    For `eps` they are Ho et al. 2020, eq. 12; entry 0, infinite there, repeats entry 1.
    For `x0` the reference means sqrt(bar) / (2 · 2 (1 - bar)) but drops the brackets,
    and what it computes, sqrt(bar) / (2 (2 - bar)), is kept: published runs used it.
    For `v` they are ones. They count only where `original_elbo_weight` isn't 0.
    """
    check_parameterization(parameterization)
    beta, bar = schedule.betas[1:], schedule.alphas_cumprod[1:]
    if parameterization == "eps":
        variance = schedule.posterior_variance[1:]
        weights = beta**2 / (2 * variance * (1 - beta) * (1 - bar))
    elif parameterization == "x0":
        weights = 0.5 * np.sqrt(bar) / (2 * 1 - bar)
    else:
        weights = np.ones_like(bar)
    return np.append(weights[:1], weights)


def check_parameterization(parameterization: str) -> None:
    """Raises UserError unless a net may predict this."""
    if parameterization not in PARAMETERIZATIONS:
        raise UserError(
            f"diffusion.parameterization: {parameterization!r}; choose one of"
            f" {', '.join(PARAMETERIZATIONS)}"
        )
