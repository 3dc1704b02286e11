"""What a denoiser may be guided by, besides one number: schedules, a classifier."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import denoiser


def scale_per_step(
    times: np.ndarray, scales: jax.Array
) -> Callable[[jax.Array], jax.Array]:
    """Scales [n] spread evenly over the steps of a grid, as a function of t [b].

    `times` are the grid's, `Grid.t` [S + 1], and n = S gives each step its own. Between
    two of them, and between the times of two steps, it is linear.
    """
    begins = np.asarray(times[:-1], np.float32)
    place = np.linspace(0, 1, len(begins))
    scales = jnp.asarray(scales, jnp.float32)
    at_step = jnp.interp(place, np.linspace(0, 1, len(scales)), scales)
    ascending = jnp.asarray(begins[::-1])
    return lambda t: jnp.interp(t.astype(jnp.float32), ascending, at_step[::-1])


def classifier_score(
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    scale: jax.Array | float = 1.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`score(z_t, t)` of `log_prob(z_t, t) -> log p(y | z_t) [b]`, times `scale`.

    For the y that is wanted, from a classifier of noisy latents (Dhariwal & Nichol
    2021, algorithm 2).
    """

    def score(z_t, t):
        gradient = jax.grad(lambda z_t: jnp.sum(log_prob(z_t, t)))(z_t)
        scales = denoiser.per_example(jnp.asarray(scale, jnp.float32), z_t)
        return scales * gradient

    return score
