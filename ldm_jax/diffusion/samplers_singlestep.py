"""Samplers that call the net several times within a step and remember nothing.

Each adds to the step of DDIM (see samplers.py) differences between the outputs of one
step; steps from pure noise or to a clean end take the first call only.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import denoiser, grids, stepping


def heun(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Heun's method for sigma / alpha (Karras et al. 2022, algorithm 1). Order 2.

    Arguments as of `ddim`. Two calls a step, one in the last where it ends clean.
    """
    return edm(denoise, z, grid, key, s_churn=0.0, start=start, trajectory=trajectory)


def edm(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    temperature: jax.Array | float = 1.0,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Heun's method after a little fresh noise (Karras et al. 2022, algorithm 2).

    Arguments as of `ddim`. Noise levels (sigma / alpha) within [s_tmin, s_tmax] are
    raised by min(s_churn / S, sqrt(2) - 1) of themselves before the step, but not past
    the schedule's greatest; the fresh noise has standard deviation `s_noise`. The
    defaults are their choice for ImageNet-64.
    """
    keys = stepping.per_example_keys(key, z)
    ratio = grid.ratio[:-1]
    churned = (s_tmin <= ratio) & (ratio <= s_tmax) & np.isfinite(ratio)
    gamma = np.where(churned, min(s_churn / grid.steps, np.sqrt(2) - 1), 0)
    raised = np.maximum(
        np.minimum(ratio * (1 + gamma), grid.schedule.ratios[-1]), ratio
    )
    moved = raised > ratio
    t_raised, alpha_raised, _ = grid.schedule.at_ratio(raised)
    t = np.where(moved, t_raised, grid.t[:-1])
    corrects = np.isfinite(ratio) & (grid.sigma[1:] > 0)
    with np.errstate(invalid="ignore"):  # where pure noise, unmoved, is infinite
        kept = np.where(moved, alpha_raised / grid.alpha[:-1], 1)
        fresh = alpha_raised * s_noise * np.sqrt(raised**2 - ratio**2)
        half = (grid.sigma[1:] - raised * grid.alpha[1:]) / 2
    fresh, half = np.where(moved, fresh, 0), np.where(corrects, half, 0)

    def step(state, inputs):
        (z_t,), (i, (t, t_next, corrects, coefficients)) = state, inputs
        kept, fresh, alpha, sigma, half = coefficients
        if moved.any():
            z_t = kept * z_t + fresh * temperature * stepping.draw(keys, i, z_t)
        x0_hat, eps_hat = denoise(z_t, stepping.full(z_t, t))
        z_next = alpha * x0_hat + sigma * eps_hat

        def corrected():
            _, eps_next = denoise(z_next, stepping.full(z_t, t_next))
            return half * (eps_next - eps_hat)

        z_next += jax.lax.cond(corrects, corrected, lambda: jnp.zeros_like(z_t))
        return (z_next,), x0_hat

    rows = (
        stepping.times(z, t),
        stepping.times(z, grid.t[1:]),
        jnp.asarray(corrects),
        stepping.table(z, kept, fresh, grid.alpha[1:], grid.sigma[1:], half),
    )
    return stepping.scan(step, (z,), rows, start, trajectory)


def dpmpp_single2(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1). Order 2, two calls a step.

    Arguments as of `ddim`. The second call lies half-way in log-SNR, at a time that
    need not be whole.
    """
    del key
    return _singlestep(denoise, z, grid, start, trajectory, places=(1 / 2,))


def dpmpp_single3(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """DPM-Solver-3 (Lu et al. 2022a, algorithm 2) for x0_hat. Order 3, three calls.

    Arguments as of `ddim`. The calls lie one and two thirds of the way in log-SNR.
    """
    del key
    return _singlestep(denoise, z, grid, start, trajectory, places=(1 / 3, 2 / 3))


def _singlestep(denoise, z, grid, start, trajectory, *, places):
    log_snr = grid.log_snr
    h = np.diff(log_snr)
    inner = np.isfinite(h)  # neither from pure noise nor to a clean end
    h = np.where(inner, h, 1.0)
    begin = np.where(np.isfinite(log_snr[:-1]), log_snr[:-1], 0.0)
    stops = [grid.schedule.at_ratio(np.exp(-begin - r * h)) for r in places]

    def weight(alpha, r, inner_r):
        """Of the second output, at `inner_r`, in the latent at `r`: alpha phi r / r'.

        phi is 1 - (1 - e^-x) / x for x = r h, or its like for the midpoint rule.
        """
        x = r * h
        return alpha * (np.expm1(-x) / x + 1) * r / inner_r

    if len(places) == 1:  # order 2 leaves this free; the paper takes the midpoint rule
        last = -grid.alpha[1:] * np.expm1(-h) / (2 * places[0])
        bends = []
    else:
        last = weight(grid.alpha[1:], 1.0, places[1])
        bends = [weight(stops[1][1], places[1], places[0])]

    def step(state, inputs):
        (z_t,), (_, (t, inner, (alpha, sigma, last), stops, bends)) = state, inputs
        x0_hat, eps_hat = denoise(z_t, stepping.full(z_t, t))

        def refined():
            change = jnp.zeros_like(z_t)
            for (t_in, levels), bend in zip(stops, (0.0, *bends), strict=True):
                z_in = levels[0] * x0_hat + levels[1] * eps_hat + bend * change
                change = denoise(z_in, stepping.full(z_t, t_in))[0] - x0_hat
            return last * change

        z_next = alpha * x0_hat + sigma * eps_hat
        z_next += jax.lax.cond(inner, refined, lambda: jnp.zeros_like(z_t))
        return (z_next,), x0_hat

    rows = (
        stepping.times(z, grid.t[:-1]),
        jnp.asarray(inner),
        stepping.table(z, grid.alpha[1:], grid.sigma[1:], last),
        [(stepping.times(z, t), stepping.table(z, *levels)) for t, *levels in stops],
        [jnp.asarray(bend, z.dtype) for bend in bends],
    )
    return stepping.scan(step, (z,), rows, start, trajectory)
