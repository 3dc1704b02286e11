"""Samplers: free functions of a denoiser, a start and float64 tables; one scan each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, schedules

SPACINGS = ("uniform", "quad")


class DDIMTables(NamedTuple):
    """What each step of DDIM needs, [S] numpy, from the least to the most noise."""

    t: np.ndarray  # int64, what the net is told
    alpha: np.ndarray  # alphas_cumprod where a step starts
    alpha_prev: np.ndarray  # and where it ends
    sigma: np.ndarray  # standard deviation of the noise that it adds


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
    if spacing not in SPACINGS:
        raise UserError(f"spacing: {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps: {steps}; choose from 1 to {num_timesteps}")
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


def ddim_tables(
    schedule: schedules.Schedule, timesteps: np.ndarray, eta: float = 0.0
) -> DDIMTables:
    """Coefficients for ascending `timesteps` [S]; `eta` runs from 0 to 1.

    sigma is Song et al. 2021, eq. 16. As in the reference, the last step ends at
    alphas_cumprod[0] and leaves that much noise in; where timestep 0 itself is visited,
    it ends at 1, so that all T steps with eta 1 are DDPM's ancestral sampler.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta: {eta}; choose from 0 (DDIM) to 1 (ancestral)")
    alpha = schedule.alphas_cumprod[timesteps]
    end = schedule.alphas_cumprod[0] if timesteps[0] > 0 else 1.0
    alpha_prev = np.append(end, alpha[:-1])
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    return DDIMTables(timesteps, alpha, alpha_prev, eta * np.sqrt(variance))


def ddim(
    denoise: denoiser.Denoise,
    z: jax.Array,
    tables: DDIMTables,
    key: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    noise: jax.Array | None = None,
    trajectory: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Denoises `z` [b, …], float32, in S steps (Song et al. 2021, eq. 12).

    `key` is one typed key, or one for each example [b], which makes an example's noise
    independent of its batch. `noise` [S, b, …], in the order of sampling, replaces what
    would be drawn; `temperature` scales either. Returns the sample, and x0_hat after
    each step [S, b, …] if `trajectory`, else None.
    """
    keys = jax.random.split(key, z.shape[0]) if key.ndim == 0 else key
    stochastic = bool(np.any(tables.sigma > 0))  # else no random bits are drawn at all
    # At eta = 1 and alpha = 0, what is left for eps_hat is 0 up to rounding.
    direction = np.sqrt(np.maximum(1 - tables.alpha_prev - tables.sigma**2, 0))
    coefficients = np.stack([np.sqrt(tables.alpha_prev), direction, tables.sigma], 1)

    def step(z_t, inputs):
        i, t, (signal, direction, sigma), eps = inputs
        x0_hat, eps_hat = denoise(z_t, jnp.full(z_t.shape[:1], t))
        # Eq. 12: sqrt(alpha_prev) "predicted x0" + "direction pointing to x_t" + noise
        z_prev = signal * x0_hat + direction * eps_hat
        if stochastic:
            if eps is None:
                step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
                eps = jax.vmap(lambda k: jax.random.normal(k, z_t.shape[1:]))(step_keys)
            z_prev += sigma * temperature * eps
        return z_prev, x0_hat if trajectory else None

    inputs = (
        jnp.arange(len(tables.t)),
        jnp.asarray(tables.t[::-1], jnp.int32),
        jnp.asarray(coefficients[::-1], jnp.float32),
        noise,
    )
    return jax.lax.scan(step, z, inputs)


def sample_ddim(
    denoise: denoiser.Denoise,
    z: jax.Array,
    schedule: schedules.Schedule,
    key: jax.Array,
    *,
    steps: int,
    eta: float = 0.0,
    temperature: jax.Array | float = 1.0,
    trajectory: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """DDIM in exactly `steps` uniform steps; see `ddim`."""
    timesteps = ddim_timesteps(steps, len(schedule.betas))
    tables = ddim_tables(schedule, timesteps, eta)
    return ddim(denoise, z, tables, key, temperature=temperature, trajectory=trajectory)


# What --sampler may name: (denoise, z, schedule, key, *, steps, eta, temperature,
# trajectory) -> (sample, x0_hat of each step or None).
SAMPLERS = {"ddim": sample_ddim}
