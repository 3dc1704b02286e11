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
    v_posterior: float = 0.0

    @property
    def angles(self) -> np.ndarray:
        """atan2(sigma, alpha), [T]: rising, and finite even where alpha is 0."""
        return np.arctan2(self.sqrt_one_minus_alphas_cumprod, self.sqrt_alphas_cumprod)

    @property
    def ratios(self) -> np.ndarray:
        """sigma / alpha, [T]: the noise level of Karras et al. 2022; may end at inf."""
        with np.errstate(divide="ignore"):
            return self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod

    def at_time(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) at timesteps `t` in [0, T-1]; fractional ones too.

        Between two timesteps the angle atan2(sigma, alpha) is linear in t, which keeps
        alpha² + sigma² = 1 and, unlike log-SNR, has no pole at a zero terminal SNR.
        """
        whole = np.floor(t).astype(int)
        angle = np.interp(t, np.arange(len(self.betas)), self.angles)
        return (
            np.where(whole == t, self.sqrt_alphas_cumprod[whole], np.cos(angle)),
            np.where(
                whole == t, self.sqrt_one_minus_alphas_cumprod[whole], np.sin(angle)
            ),
        )

    def at_ratio(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, alpha, sigma) where sigma / alpha is `ratio`; the inverse of `at_time`.

        Levels beyond the first or the last timestep get that timestep.
        """
        angle = np.arctan(ratio)
        t = np.interp(angle, self.angles, np.arange(len(self.betas)))
        return t, 1 / np.hypot(1, ratio), np.sin(angle)


@dataclasses.dataclass(frozen=True)
class SigmaSchedule:
    """A process that only adds noise, z_t = z + t eps: the time is the noise level.

    That of Karras et al. 2022 ("EDM"), whose levels are theirs by default, as is
    `sigma_data`, the standard deviation of the data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"diffusion.sigma_min: {self.sigma_min}; choose more than 0 and less"
                f" than sigma_max, {self.sigma_max}"
            )

    @property
    def ratios(self) -> np.ndarray:
        """The least and the greatest noise level."""
        return np.array([self.sigma_min, self.sigma_max])

    def at_time(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(1, t)."""
        return np.ones_like(t), t

    def at_ratio(self, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, alpha, sigma) = (ratio, 1, ratio)."""
        return ratio, np.ones_like(ratio), ratio


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
    zero_terminal_snr: bool = False,
) -> Schedule:
    """Computes all tables of a config's `diffusion` section.

    `given_betas` [T] replaces the named schedule. `v_posterior` moves the posterior
    variance from its lower bound (0) to its upper bound beta (1). `zero_terminal_snr`
    makes the last timestep pure noise, which a net that predicts eps cannot learn.
    """
    if given_betas is None:
        beta = betas(schedule, timesteps, linear_start, linear_end, cosine_s)
    else:
        beta = np.asarray(given_betas, np.float64)
    if zero_terminal_snr:
        beta = rescaled_to_zero_terminal_snr(beta)
    bar = np.cumprod(1 - beta)
    bar_prev = np.append(1.0, bar[:-1])
    variance = (1 - v_posterior) * beta * (1 - bar_prev) / (1 - bar)
    variance += v_posterior * beta
    with np.errstate(divide="ignore"):  # infinite at a zero terminal SNR, as it should
        recip = 1 / bar
    return Schedule(
        betas=beta,
        alphas_cumprod=bar,
        alphas_cumprod_prev=bar_prev,
        sqrt_alphas_cumprod=np.sqrt(bar),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - bar),
        log_one_minus_alphas_cumprod=np.log(1 - bar),
        sqrt_recip_alphas_cumprod=np.sqrt(recip),
        sqrt_recipm1_alphas_cumprod=np.sqrt(recip - 1),
        posterior_variance=variance,
        # The posterior at t = 0 is a point, whose log variance would be -inf.
        posterior_log_variance_clipped=np.log(np.maximum(variance, 1e-20)),
        posterior_mean_coef1=beta * np.sqrt(bar_prev) / (1 - bar),
        posterior_mean_coef2=(1 - bar_prev) * np.sqrt(1 - beta) / (1 - bar),
        v_posterior=v_posterior,
    )


def rescaled_to_zero_terminal_snr(beta: np.ndarray) -> np.ndarray:
    """`beta` [T] with sqrt(alphas_cumprod) shifted to end at 0 and scaled to begin as
    before (Lin et al. 2023, algorithm 1); the last beta is 1.
    """
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1 - bar / np.append(1.0, bar[:-1])


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


def check_learnable(schedule: Schedule | SigmaSchedule, parameterization: str) -> None:
    """Raises UserError unless a net may predict this under `schedule`.

    At a zero terminal SNR eps is the input itself and says nothing of the image.
    """
    check_parameterization(parameterization)
    if parameterization == "eps" and not np.isfinite(schedule.ratios[-1]):
        raise UserError(
            "diffusion.parameterization: 'eps' can't start from pure noise, which"
            " diffusion.zero_terminal_snr=True asks for; set it to 'v' or 'x0'"
        )
