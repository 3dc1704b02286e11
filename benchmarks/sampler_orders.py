"""python -m benchmarks.sampler_orders

Measures the order of convergence of every deterministic sampler on a mixture of
Gaussians, whose exact denoiser and whose probability flow are known.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from ldm_jax.diffusion import denoiser, grids, samplers, schedules, stepping
from ldm_jax.diffusion import samplers_multistep as multistep
from ldm_jax.diffusion import samplers_singlestep as singlestep

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)
STEPS = (16, 32, 64, 128)
HIGH, LOW = 10.0, 0.1  # sigma / alpha where a run starts and ends

# Name -> (sampler, net calls a step, order that it has at least).
DETERMINISTIC: dict[str, tuple[Callable[..., stepping.Result], int, int]] = {
    "ddim": (samplers.ddim, 1, 1),
    "heun": (singlestep.heun, 2, 2),
    "edm, no churn": (partial(singlestep.edm, s_churn=0.0), 2, 2),
    "plms": (multistep.plms, 1, 2),
    "lms": (multistep.lms, 1, 2),
    "dpmpp_2m": (multistep.dpmpp_2m, 1, 2),
    "dpmpp_single2": (singlestep.dpmpp_single2, 2, 2),
    "dpmpp_single3": (singlestep.dpmpp_single3, 3, 3),
    "unipc": (multistep.unipc, 1, 2),
    "unipc, order 3": (partial(multistep.unipc, order=3), 1, 3),
}


class Mixture(NamedTuple):
    """Gaussians in one dimension: a clean latent's distribution."""

    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.0, 0.8)
    deviations: tuple[float, ...] = (0.4, 0.3)

    def denoise(self, schedule: denoiser.Schedule) -> denoiser.Denoise:
        """The exact (E[x0 | z_t], E[eps | z_t]) of z_t [b, …], of its dtype."""

        def exact(z_t, t):
            alpha, sigma = denoiser.levels(schedule, t, z_t)
            x0_hat = self.x0_hat(z_t, alpha, sigma)
            return x0_hat, (z_t - alpha * x0_hat) / sigma

        return exact

    def x0_hat(self, z_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """E[x0 | z_t], the latents of the components weighed by their likelihood."""
        logits, means = [], []
        for w, m, s in zip(*self, strict=True):
            variance = (alpha * s) ** 2 + sigma**2
            away = z_t - alpha * m
            logits.append(np.log(w) - away**2 / (2 * variance) - jnp.log(variance) / 2)
            means.append(m + alpha * s**2 / variance * away)
        share = jax.nn.softmax(jnp.stack(logits), axis=0)
        return jnp.sum(share * jnp.stack(means), axis=0)

    def cdf(self, z: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """P(z_t < z), in numpy."""
        total = np.zeros_like(z)
        for w, m, s in zip(*self, strict=True):
            place = (z - alpha * m) / np.hypot(alpha * s, sigma) / np.sqrt(2)
            total += w * (1 + np.vectorize(math.erf)(place)) / 2
        return total

    def flow(
        self, z: np.ndarray, begin: Sequence[float], end: Sequence[float]
    ) -> np.ndarray:
        """Where the probability flow takes z from one (alpha, sigma) to another.

        In one dimension it keeps every quantile in place.
        """
        return self.quantile(self.cdf(z, *begin), *end)

    def quantile(self, p: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """The z with P(z_t < z) = p, found by bisection."""
        low, high = np.full_like(p, -1e3), np.full_like(p, 1e3)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha, sigma) < p
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return middle


def errors(
    sampler: Callable[..., stepping.Result],
    steps: Sequence[int] = STEPS,
    mixture: Mixture | None = None,
) -> np.ndarray:
    """Greatest error at the end for each number of steps, in float64.

    Steps are even in log-SNR between two noise levels, neither pure noise nor clean.
    """
    mixture = mixture or Mixture()
    with jax.enable_x64(True):
        z = np.linspace(-2, 2, 41)
        worst = []
        for n in steps:
            grid = grids.at_ratios(SCHEDULE, np.geomspace(HIGH, LOW, n + 1))
            ends = [(grid.alpha[i], grid.sigma[i]) for i in (0, -1)]
            out, _ = jax.jit(
                lambda z, grid=grid: sampler(
                    mixture.denoise(SCHEDULE), z, grid, jax.random.key(0)
                )
            )(jnp.asarray(z)[:, None])
            worst.append(np.abs(out[:, 0] - mixture.flow(z, *ends)).max())
    return np.array(worst)


def order(worst: np.ndarray, steps: Sequence[int] = STEPS) -> float:
    """The slope between the last two points, in logarithms."""
    return float(np.log(worst[-2] / worst[-1]) / np.log(steps[-1] / steps[-2]))


def main() -> None:
    """The command."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(common.environment(), end="\n\n")
    counts = " | ".join(f"{n} steps" for n in STEPS)
    print(f"| Sampler | calls a step | {counts} | order | at least |")
    print("| --- " * (len(STEPS) + 4) + "|")
    for name, (sampler, calls, theory) in DETERMINISTIC.items():
        worst = errors(sampler)
        cells = " | ".join(f"{error:.1e}" for error in worst)
        print(f"| {name} | {calls} | {cells} | {order(worst):.2f} | {theory} |")


if __name__ == "__main__":
    main()
