"""From a net's raw output to (x0_hat, eps_hat): parameterization and guidance."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import schedules

# (z_t [b, …], t [b], cond) -> raw output [b, …]
Apply = Callable[[jax.Array, jax.Array, Any], jax.Array]
# (z_t [b, …], t [] or [b]) -> (x0_hat, eps_hat), each [b, …]
Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Schedule = schedules.Schedule | schedules.SigmaSchedule
# A guidance scale: a number, one for each example [b], or a function of t [b] to [b].
Scale = jax.Array | float | Callable[[jax.Array], jax.Array]


class WithVariance:
    """A denoiser whose net tells the variance of the reverse step too.

    To all samplers it is as any other; `ddpm` calls `predict(z_t, t) -> (x0_hat,
    eps_hat, v)` instead, see learned_variance.py.
    """

    def __init__(self, predict: Callable[..., tuple[jax.Array, ...]]):
        self.predict = predict

    def __call__(self, z_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.predict(z_t, t)[:2]


def split_variance(out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(prediction, v), each [b, …, c], of a net's output [b, …, 2c]."""
    return tuple(jnp.split(out, 2, axis=-1))


def seeing(
    denoise: Denoise, look: Callable[[jax.Array, jax.Array], jax.Array]
) -> Denoise:
    """`denoise` of `look(z_t, t)` in place of z_t."""
    if isinstance(denoise, WithVariance):
        return WithVariance(lambda z_t, t: denoise.predict(look(z_t, t), t))
    return lambda z_t, t: denoise(look(z_t, t), t)


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """[] or [b] -> [b, 1, …], to multiply `like` [b, …] without implicit broadcasting.

    A scalar gives [1, 1, …].
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def lookup(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """`table` [T] at integer `t`, cast to float32 and shaped as by `per_example`."""
    return per_example(jnp.asarray(table, jnp.float32)[t], like)


def levels(
    schedule: Schedule, t: jax.Array, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma) at `t` [] or [b], shaped as by `per_example`.

    Integer `t` reads the tables; fractional `t` is `Schedule.at_time`, traced. Under a
    SigmaSchedule `t` is sigma.
    """
    t = jnp.asarray(t)
    dtype = jnp.float64 if like.dtype == jnp.float64 else jnp.float32
    if isinstance(schedule, schedules.SigmaSchedule):
        sigma = per_example(t.astype(dtype), like)
        return jnp.ones_like(sigma), sigma
    alphas = schedule.sqrt_alphas_cumprod
    sigmas = schedule.sqrt_one_minus_alphas_cumprod
    if jnp.issubdtype(t.dtype, jnp.integer):
        return lookup(alphas, t, like), lookup(sigmas, t, like)

    def at(exact, angles):
        """Both are sines, of complementary angles, so that neither cancels near 0."""
        exact, angles = jnp.asarray(exact, dtype), jnp.asarray(angles, dtype)
        angle = angles[low] + (t - whole) * (angles[high] - angles[low])
        return per_example(jnp.where(t == whole, exact[low], jnp.sin(angle)), like)

    t = t.astype(dtype)
    whole = jnp.floor(t)
    low = whole.astype(jnp.int32)
    high = jnp.minimum(low + 1, len(alphas) - 1)
    return at(alphas, np.arctan2(alphas, sigmas)), at(sigmas, schedule.angles)


def q_sample(
    schedule: Schedule, z: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """z_t [b, …]: `z` noised to timestep `t`, [] or [b] (Ho et al. 2020, eq. 4)."""
    alpha, sigma = levels(schedule, t, z)
    return alpha * z + sigma * eps


def target(
    parameterization: str,
    schedule: Schedule,
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
    alpha, sigma = levels(schedule, t, z)
    return alpha * eps - sigma * z


def predict(
    parameterization: str,
    schedule: Schedule,
    out: jax.Array,
    z_t: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(x0_hat, eps_hat), each [b, …], from the raw output; the inverse of `target`."""
    schedules.check_parameterization(parameterization)
    alpha, sigma = levels(schedule, t, z_t)
    if parameterization == "eps":
        return (z_t - sigma * out) / alpha, out
    if parameterization == "x0":
        return out, (z_t - alpha * out) / sigma
    return alpha * z_t - sigma * out, alpha * out + sigma * z_t


def guide(outs: Sequence[jax.Array], scales: Sequence[jax.Array | float]) -> jax.Array:
    """outs[0] + sum over k of scales[k] (outs[k + 1] - outs[k]), each [b, …].

    `outs` are for more and more conditions, a scale is [] or [b]. Two are
    classifier-free guidance (Ho & Salimans 2022, eq. 6) in the convention of Stable
    Diffusion, where 1 is no guidance and 0 no condition; three guide for two conditions
    apart (Brooks et al. 2023, eq. 3).
    """
    out = outs[0]
    for scale, less, more in zip(scales, outs, outs[1:], strict=False):
        scale = per_example(jnp.asarray(scale, jnp.float32), out)
        out = out + scale * (more - less)
    return out


def rescale(out: jax.Array, cond_out: jax.Array, phi: jax.Array | float) -> jax.Array:
    """Takes a part `phi` [] or [b] of the contrast out that guidance put into `out`.

    At 1 each example has the standard deviation of `cond_out`; both are [b, …] (Lin et
    al. 2023, eq. 15 and 16).
    """
    axes = tuple(range(1, out.ndim))
    wanted = jnp.std(cond_out, axes, keepdims=True)
    factor = wanted / jnp.std(out, axes, keepdims=True)
    phi = per_example(jnp.asarray(phi, jnp.float32), out)
    return out * (phi * factor + (1 - phi))


def make_denoiser(
    apply: Apply,
    schedule: Schedule,
    parameterization: str,
    conds: Sequence[Any],
    scales: Sequence[Scale] = (),
    *,
    guidance_rescale: jax.Array | float | None = None,
    score: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
    learned_variance: bool = False,
) -> Denoise:
    """The denoiser that samplers see: `denoise(z_t, t) -> (x0_hat, eps_hat)`.

    `conds` are pytrees of [b, …] arrays of one structure, for more and more conditions:
    [cond], or [uncond, cond] with one of `scales`, or one more of each for every
    condition that is guided apart. The net is called once on all of them, in their
    order, and its raw outputs are guided (see `guide`) before they are converted.

    `guidance_rescale` in [0, 1] is `phi` of `rescale`. `score(z_t, t)` is the gradient
    of log p(y | z_t), see guidance.py. `constrain` maps x0_hat to what it may be (a
    clip, a codebook), and eps_hat follows. With `learned_variance` the second half of
    the net's channels is v of learned_variance.py, and the denoiser a `WithVariance`:
    v is that of all conditions, for guidance moves the mean alone.
    """
    schedules.check_learnable(schedule, parameterization)
    n = len(conds)
    if len(scales) != n - 1:
        raise ValueError(
            f"guidance: {n} conds with {len(scales)} scales; give {n - 1} scales"
        )

    def raw(z_t, t):
        """(guided output, v or None)"""
        stacked = conds[0]
        if n > 1:
            stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conds)
        copies = jnp.concatenate([z_t] * n), jnp.concatenate([t] * n)
        out, v = apply(*copies, stacked).astype(jnp.float32), None
        if learned_variance:
            out, v = split_variance(out)
            v = jnp.split(v, n)[-1]
        if n == 1:
            return out, v
        outs = jnp.split(out, n)
        out = guide(outs, [scale(t) if callable(scale) else scale for scale in scales])
        if guidance_rescale is not None:
            out = rescale(out, outs[-1], guidance_rescale)
        return out, v

    def predicted(z_t, t):
        t = jnp.asarray(t)
        whole = jnp.issubdtype(t.dtype, jnp.integer)
        t = t.astype(jnp.int32 if whole else jnp.float32)
        t = jnp.broadcast_to(t, z_t.shape[:1])
        out, v = raw(z_t, t)
        x0_hat, eps_hat = predict(parameterization, schedule, out, z_t, t)
        if score is None and constrain is None:
            return x0_hat, eps_hat, v
        alpha, sigma = levels(schedule, t, z_t)
        if score is not None:
            eps_hat -= sigma * score(z_t, t)  # Dhariwal & Nichol 2021, algorithm 2
            # Pure noise has no score: the classifier knows no more there than before.
            x0_hat = jnp.where(alpha > 0, (z_t - sigma * eps_hat) / alpha, x0_hat)
        if constrain is not None:
            x0_hat = constrain(x0_hat)
            eps_hat = (z_t - alpha * x0_hat) / sigma
        return x0_hat, eps_hat, v

    if learned_variance:
        return WithVariance(predicted)
    return lambda z_t, t: predicted(z_t, t)[:2]
