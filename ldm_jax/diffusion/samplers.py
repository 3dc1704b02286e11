"""Samplers: free functions of a denoiser, a start and float64 tables; one scan each.

Every step here and in the files beside is a step of DDIM, alpha' x0_hat + sigma'
eps_hat, and what the sampler adds to it. That is finite from pure noise (alpha = 0) and
down to a clean latent (sigma' = 0), where the usual forms divide by zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import (
    denoiser,
    grids,
    samplers_multistep,
    samplers_singlestep,
    schedules,
    stepping,
)


def _noisy_steps(
    denoise, z, columns, key, temperature, noise, start, trajectory, widest=None
):
    """Steps of signal x0_hat + direction eps_hat + spread noise; columns [S] each.

    `widest` [S] is how many times the spread there is where a learned v is 1.
    """
    t, signal, direction, spread = columns
    keys = stepping.per_example_keys(key, z)
    stochastic = bool(np.any(spread > 0))  # else no random bits are drawn at all

    def step(state, inputs):
        (z_t,), (i, (t, (signal, direction, spread, *wide), eps)) = state, inputs
        if widest is None:
            x0_hat, eps_hat = denoise(z_t, stepping.full(z_t, t))
        else:
            x0_hat, eps_hat, v = denoise.predict(z_t, stepping.full(z_t, t))
            spread *= wide[0] ** ((v + 1) / 2)
        # Eq. 12: sqrt(alpha_prev) "predicted x0" + "direction pointing to x_t" + noise
        z_prev = signal * x0_hat + direction * eps_hat
        if stochastic:
            eps = stepping.draw(keys, i, z_t) if eps is None else eps
            z_prev += spread * temperature * eps
        return (z_prev,), x0_hat

    wide = () if widest is None else (widest,)
    coefficients = stepping.table(z, signal, direction, spread, *wide)
    rows = (stepping.times(z, t), coefficients, noise)
    return stepping.scan(step, (z,), rows, start, trajectory)


def _check_range(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta}; choose from 0 (DDIM) to 1 (ancestral)")


def ancestral_noise(grid: grids.Grid, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """(direction, spread) of each step, float64 [S]: what eps_hat and noise weigh.

    spread is sigma of Song et al. 2021, eq. 16, `eta` times the posterior's standard
    deviation; direction is what it leaves of the end's noise.
    """
    _check_range(eta)
    fresh = 1 - grid.shrink**2
    direction = grid.sigma[1:] * np.sqrt(1 - eta**2 * fresh)
    return direction, eta * grid.sigma[1:] * np.sqrt(fresh)


def ddim(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    eta: float = 0.0,
    temperature: jax.Array | float = 1.0,
    noise: jax.Array | None = None,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Denoises `z` [b, …], float32, along a grid of S steps (Song et al. 2021, eq. 12).

    `key` is one typed key, or one for each example [b], which makes an example's noise
    independent of its batch. `noise` [S, b, …], in the order of sampling, replaces what
    would be drawn; `temperature` scales either. The first `start` steps are left out.
    Returns the sample, and x0_hat after each step [S, b, …] if `trajectory`, else None.

    At eta 0 it is Euler's method for sigma / alpha (Karras et al. 2022), of order 1;
    above, that method with ancestral noise.
    """
    direction, spread = ancestral_noise(grid, eta)
    columns = (grid.t[:-1], grid.alpha[1:], direction, spread)
    return _noisy_steps(denoise, z, columns, key, temperature, noise, start, trajectory)


def ddpm(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    noise: jax.Array | None = None,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Ancestral sampling (Ho et al. 2020, algorithm 2); arguments as of `ddim`.

    Its mean is that of q(z_prev | z_t, x0_hat); its variance lies between the bounds
    of theirs as the schedule's `v_posterior` says, or as the net does where it has
    learned that. No noise is added at a clean end.
    """
    alpha, sigma = grid.alpha[1:], grid.sigma[1:]
    v = getattr(grid.schedule, "v_posterior", 0.0)
    lower = sigma**2 * (1 - grid.shrink**2)
    upper = grid.sigma[:-1] ** 2 - (grid.alpha[:-1] / alpha * sigma) ** 2
    widest = None
    if isinstance(denoise, denoiser.WithVariance):
        v, widest = 0.0, np.sqrt(np.where(sigma > 0, upper, 1))
        widest /= np.sqrt(np.where(sigma > 0, lower, 1))
    spread = np.where(sigma > 0, np.sqrt((1 - v) * lower + v * upper), 0)
    columns = (grid.t[:-1], alpha, sigma * grid.shrink, spread)
    given = (key, temperature, noise, start, trajectory)
    return _noisy_steps(denoise, z, columns, *given, widest)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler that a user may name, with the grid that suits it.

    `stochastic` says whether it draws noise by default, `eta` is its default share of
    ancestral noise (None: it has no such option), `calls` are net calls a step.
    """

    run: Callable[..., stepping.Result]
    stochastic: bool = False
    eta: float | None = None
    calls: int = 1
    spacing: str = "trailing"
    clean: bool = True

    def grid(
        self, schedule: denoiser.Schedule, steps: int, spacing: str | None = None
    ) -> grids.Grid:
        """Where it stops, in its own spacing unless another is asked for.

        Under a SigmaSchedule that is Karras et al.'s; from a zero terminal SNR it is
        trailing, so that the first step begins with pure noise.
        """
        if spacing is None:
            spacing = self.spacing
            if isinstance(schedule, schedules.SigmaSchedule):
                spacing = "karras"
            elif np.isinf(schedule.ratios[-1]) and spacing in ("uniform", "quad"):
                spacing = "trailing"
        return grids.make_grid(schedule, steps, spacing, clean=self.clean)

    def check_eta(self, eta: float | None) -> None:
        """Raises UserError unless it can take this share of ancestral noise."""
        if eta is None:
            return
        if self.eta is None and eta:
            legal = ", ".join(name for name, s in SAMPLERS.items() if s.eta is not None)
            raise UserError(f"eta: {eta}; only {legal} have it, so leave it out")
        _check_range(eta)

    def __call__(
        self,
        denoise: denoiser.Denoise,
        z: jax.Array,
        schedule: denoiser.Schedule,
        key: jax.Array,
        *,
        steps: int,
        eta: float | None = None,
        temperature: jax.Array | float = 1.0,
        spacing: str | None = None,
        start: jax.Array | int = 0,
        trajectory: bool = False,
        **options: Any,
    ) -> stepping.Result:
        """Samples in `steps` steps from `z` [b, …], float32; see `ddim` for the rest.

        `z` and `start` are `grids.begin`'s; `temperature` counts where noise is drawn.
        `options` go to `run`. UserError where `eta` isn't 0 and the sampler has none.
        """
        self.check_eta(eta)
        if self.eta is not None:
            options["eta"] = self.eta if eta is None else eta
        if self.eta is not None or self.stochastic:
            options["temperature"] = temperature
        grid = self.grid(schedule, steps, spacing)
        return self.run(
            denoise, z, grid, key, start=start, trajectory=trajectory, **options
        )


# What --sampler may name.
SAMPLERS = {
    "ddim": Sampler(ddim, eta=0.0, spacing="uniform", clean=False),
    "ddpm": Sampler(ddpm, stochastic=True),
    "plms": Sampler(samplers_multistep.plms, spacing="uniform", clean=False),
    "euler": Sampler(ddim),
    "euler_ancestral": Sampler(ddim, stochastic=True, eta=1.0),
    "heun": Sampler(samplers_singlestep.heun, calls=2),
    "edm": Sampler(samplers_singlestep.edm, stochastic=True, calls=2, spacing="karras"),
    "lms": Sampler(samplers_multistep.lms),
    "dpmpp_2m": Sampler(samplers_multistep.dpmpp_2m),
    "dpmpp_single2": Sampler(samplers_singlestep.dpmpp_single2, calls=2),
    "dpmpp_single3": Sampler(samplers_singlestep.dpmpp_single3, calls=3),
    "unipc": Sampler(samplers_multistep.unipc),
}
