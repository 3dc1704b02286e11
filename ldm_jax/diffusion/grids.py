"""Where a sampler stops on its way from noise to a clean latent: float64 tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, schedules

TIME_SPACINGS = ("uniform", "quad", "trailing", "leading", "linspace")
RATIO_SPACINGS = ("karras", "log_snr")
SPACINGS = TIME_SPACINGS + RATIO_SPACINGS
RHO = 7  # Karras et al. 2022, eq. 5


class Grid(NamedTuple):
    """S + 1 points in the order of sampling, each table float64 [S + 1].

    z_t = alpha z + sigma eps at each; the last is where sampling ends, by default
    alpha 1 and sigma 0, and `t` is what the net is told.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    schedule: schedules.Schedule | schedules.SigmaSchedule

    @property
    def steps(self) -> int:
        """S."""
        return len(self.t) - 1

    @property
    def ratio(self) -> np.ndarray:
        """sigma / alpha; inf at pure noise, 0 at the clean end."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def shrink(self) -> np.ndarray:
        """[S]: ratio after each step by that before; 1 where it doesn't fall."""
        return np.minimum(self.ratio[1:] / self.ratio[:-1], 1)

    @property
    def log_snr(self) -> np.ndarray:
        """log(alpha / sigma), the lambda of DPM-Solver (half the log of the SNR)."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratio)

    def without_end(self) -> "Grid":
        """All points but the last."""
        return self._replace(
            t=self.t[:-1], alpha=self.alpha[:-1], sigma=self.sigma[:-1]
        )

    def reversed(self) -> "Grid":
        """The same points from the least to the most noise, for inversion."""
        return self._replace(
            t=self.t[::-1], alpha=self.alpha[::-1], sigma=self.sigma[::-1]
        )


def ddim_timesteps(
    steps: int,
    num_timesteps: int,
    spacing: str = "uniform",
    *,
    reference: bool = False,
) -> np.ndarray:
    """Which of `num_timesteps` = T timesteps to visit: int64, ascending.

    By default exactly `steps` = S distinct ones in [1, T-1]: `uniform` takes
    1 + floor(i T / S) for i < S, `quad` takes 1 + floor(0.8 T (i / (S-1))²), moved up
    where that would repeat one. S = T visits them all, 0 … T-1.

    `reference` gives the table of `make_ddim_timesteps` instead. The two agree where S
    divides T (uniform) or nothing repeats (quad), except at S = T. Elsewhere the
    reference takes another number of uniform steps than asked (150 -> 167) or reaches
    past the last timestep (300, 1000), which raises UserError here.
    """
    if spacing not in ("uniform", "quad"):
        raise UserError(f"spacing: {spacing!r}; choose one of uniform, quad")
    check_steps(steps, num_timesteps)
    i = np.arange(steps)
    quad = (np.linspace(0, (0.8 * num_timesteps) ** 0.5, steps) ** 2).astype(int)
    if reference:
        stride = num_timesteps // steps
        t = 1 + (quad if spacing == "quad" else np.arange(0, num_timesteps, stride))
        if t[-1] >= num_timesteps:
            raise UserError(
                f"steps: {steps} with the reference's {spacing} spacing reach timestep"
                f" {t[-1]}, but the last one is {num_timesteps - 1}; use a smaller"
                f" divisor of {num_timesteps}, or reference=False"
            )
        return t
    if steps == num_timesteps:
        return i
    if spacing == "uniform":
        return 1 + i * num_timesteps // steps
    t = 1 + i + np.maximum.accumulate(quad - i)
    return np.minimum(t, num_timesteps - steps + i)  # 1 + 0.8 T is T or more if T < 6


def check_steps(steps: int, num_timesteps: int) -> None:
    """Raises UserError unless so many distinct timesteps can be visited."""
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps: {steps}; choose from 1 to {num_timesteps}")


def timesteps(steps: int, num_timesteps: int, spacing: str) -> np.ndarray:
    """`steps` = S distinct whole timesteps of T, int64, in the order of sampling.

    `trailing` begins at T-1 (Lin et al. 2023, table 2), `linspace` spans T-1 … 0,
    `leading` ends at 0; `uniform` and `quad` are those of `ddim_timesteps`.
    """
    total, i = num_timesteps, np.arange(steps)
    if spacing in ("uniform", "quad"):
        return ddim_timesteps(steps, total, spacing)[::-1]
    check_steps(steps, total)
    if spacing == "trailing":
        return np.round(total - i * total / steps).astype(int) - 1
    if spacing == "linspace":
        return np.round(np.linspace(total - 1, 0, steps)).astype(int)
    return (i * total // steps)[::-1]


def ratios(steps: int, low: float, high: float, spacing: str) -> np.ndarray:
    """`steps` values of sigma / alpha from `high` down to `low`, float64.

    `karras` is evenly spaced in their 7th roots (Karras et al. 2022, eq. 5), `log_snr`
    in their logarithms.
    """
    if spacing == "log_snr":
        return np.geomspace(high, low, steps)
    return np.linspace(high ** (1 / RHO), low ** (1 / RHO), steps) ** RHO


def make_grid(
    schedule: schedules.Schedule | schedules.SigmaSchedule,
    steps: int,
    spacing: str,
    *,
    clean: bool = True,
) -> Grid:
    """The points of `steps` = S steps from the most noise of `schedule` down.

    `clean` ends at alpha 1, sigma 0; otherwise, as the DDIM of the reference does, at
    timestep 0 and what noise that has left, unless timestep 0 is visited before.
    """
    discrete = isinstance(schedule, schedules.Schedule)
    legal = SPACINGS if discrete else RATIO_SPACINGS
    if spacing not in legal:
        raise UserError(f"spacing: {spacing!r}; choose one of {', '.join(legal)}")
    if spacing in TIME_SPACINGS:
        t = timesteps(steps, len(schedule.betas), spacing)
        return at_times(schedule, t, clean=clean)
    levels = _from_pure_noise(schedule, steps, spacing)
    return _with_end(schedule, schedule.at_ratio(levels), clean)


def at_times(
    schedule: schedules.Schedule, t: np.ndarray, *, clean: bool = True
) -> Grid:
    """A grid that starts a step at each of the timesteps `t`, descending; see above."""
    return _with_end(schedule, (t, *schedule.at_time(t)), clean)


def _with_end(schedule, points, clean) -> Grid:
    end = (0.0, 1.0, 0.0)
    if not clean and isinstance(schedule, schedules.Schedule) and points[0][-1] > 0:
        end = (0.0, *(float(level) for level in schedule.at_time(np.int64(0))))
    tables = (np.append(table, x) for table, x in zip(points, end, strict=True))
    return Grid(*tables, schedule)


def _from_pure_noise(schedule, steps, spacing) -> np.ndarray:
    """A last timestep without signal comes first and takes no part in the spacing."""
    levels = schedule.ratios
    if steps < 1:
        raise UserError(f"steps: {steps}; choose 1 or more")
    if np.isfinite(levels[-1]):
        return ratios(steps, levels[0], levels[-1], spacing)
    return np.append(levels[-1], ratios(steps - 1, levels[0], levels[-2], spacing))


def at_ratios(
    schedule: schedules.Schedule | schedules.SigmaSchedule, levels: np.ndarray
) -> Grid:
    """A grid through given values of sigma / alpha, descending, all above 0."""
    return Grid(*schedule.at_ratio(np.asarray(levels, np.float64)), schedule)


def begin(
    grid: Grid,
    noise: jax.Array,
    init: jax.Array | None = None,
    strength: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(z, start): the latent that a sampler begins with, and how many steps it skips.

    `noise` [b, …] is standard normal. Without `init` it is scaled to the first point.
    With it `strength`, which may be traced, says how much of the way is gone: 1 is the
    same pure noise and all steps, 0 is `init` itself and none; between them the last
    round(strength S) steps start from `init` noised to where they start.
    """
    scale = float(np.hypot(grid.alpha[0], grid.sigma[0]))  # 1 where variance is kept
    if init is None:
        return scale * noise, jnp.int32(0)
    strength = jnp.clip(jnp.asarray(strength, jnp.float32), 0, 1)
    start = grid.steps - jnp.round(strength * grid.steps).astype(jnp.int32)
    signal = np.concatenate([[0.0], grid.alpha[1:-1], [1.0]])
    spread = np.concatenate([[scale], grid.sigma[1:-1], [0.0]])
    signal = denoiser.lookup(signal, start, init)
    return signal * init + denoiser.lookup(spread, start, init) * noise, start
