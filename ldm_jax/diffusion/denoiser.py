"""From a net's raw output to (x0_hat, eps_hat): parameterization and guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import schedules

# (z_t [b, …], t [b], cond) -> raw output [b, …]
Apply = Callable[[jax.Array, jax.Array, Any], jax.Array]
# (z_t [b, …], t [] or [b]) -> (x0_hat, eps_hat), each [b, …]
Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """[] or [b] -> [b, 1, …], to multiply `like` [b, …] without implicit broadcasting.

    A scalar gives [1, 1, …].
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def lookup(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """`table` [T] at integer `t`, cast to float32 and shaped as by `per_example`."""
    return per_example(jnp.asarray(table, jnp.float32)[t], like)


def q_sample(
    schedule: schedules.Schedule, z: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """z_t [b, …]: `z` noised to timestep `t`, [] or [b] (Ho et al. 2020, eq. 4)."""
    return (
        lookup(schedule.sqrt_alphas_cumprod, t, z) * z
        + lookup(schedule.sqrt_one_minus_alphas_cumprod, t, z) * eps
    )


def target(
    parameterization: str,
    schedule: schedules.Schedule,
    z: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """What the net should output for `z` noised with `eps` to `t`: [b, …].

    `v` is sqrt(bar) eps - sqrt(1 - bar) z (Salimans & Ho 2022, appendix D).
    """
    schedules.check_parameterization(parameterization)
    if parameterization == "eps":
        return eps
    if parameterization == "x0":
        return z
    return (
        lookup(schedule.sqrt_alphas_cumprod, t, z) * eps
        - lookup(schedule.sqrt_one_minus_alphas_cumprod, t, z) * z
    )


def predict(
    parameterization: str,
    schedule: schedules.Schedule,
    out: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(x0_hat, eps_hat), each [b, …], from the raw output; the inverse of `target`."""
    schedules.check_parameterization(parameterization)
    signal = lookup(schedule.sqrt_alphas_cumprod, t, z_t)
    sigma = lookup(schedule.sqrt_one_minus_alphas_cumprod, t, z_t)
    if parameterization == "eps":
        return (z_t - sigma * out) / signal, out
    if parameterization == "x0":
        return out, (z_t - signal * out) / sigma
    return signal * z_t - sigma * out, signal * out + sigma * z_t


def guide(
    uncond_out: jax.Array, cond_out: jax.Array, guidance_scale: jax.Array | float
) -> jax.Array:
    """Classifier-free guidance with a scale [] or [b] (Ho & Salimans 2022, eq. 6).

    In the convention of Stable Diffusion, where 1 is no guidance and 0 no condition.
    """
    scale = per_example(jnp.asarray(guidance_scale, jnp.float32), cond_out)
    return uncond_out + scale * (cond_out - uncond_out)


def make_denoiser(
    apply: Apply,
    schedule: schedules.Schedule,
    parameterization: str,
    cond: Any,
    uncond: Any = None,
    guidance_scale: jax.Array | float | None = None,
) -> Denoise:
    """The denoiser that samplers see: `denoise(z_t, t) -> (x0_hat, eps_hat)`.

    `cond` and `uncond` are pytrees of [b, …] arrays of one structure. Without `uncond`
    nothing is guided and `guidance_scale` plays no part; with it the net is called once
    on [uncond, cond], and its raw output is guided before it is converted.
    """
    schedules.check_parameterization(parameterization)
    if uncond is not None and guidance_scale is None:
        raise ValueError("guidance_scale: None, but uncond is given; give a number")

    def denoise(z_t, t):
        t = jnp.broadcast_to(jnp.asarray(t, jnp.int32), z_t.shape[:1])
        if uncond is None:
            out = apply(z_t, t, cond).astype(jnp.float32)
        else:
            both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
            twice = jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t])
            out = apply(*twice, both).astype(jnp.float32)
            out = guide(*jnp.split(out, 2), guidance_scale)
        return predict(parameterization, schedule, out, z_t, t)

    return denoise
