"""The training loss of latent diffusion (`LatentDiffusion.p_losses`), in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, schedules
from ldm_jax.diffusion import learned_variance as variance

LOSS_TYPES = ("l2", "l1")
TIMESTEP_SAMPLING = ("uniform", "logit_normal")
QUARTILES = 4

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def check_loss_type(loss_type: str) -> None:
    """Raises UserError unless `loss_type` is one of LOSS_TYPES."""
    if loss_type not in LOSS_TYPES:
        raise UserError(
            f"loss.loss_type: {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}"
        )


def mean_error(difference: jax.Array, loss_type: str) -> jax.Array:
    """Mean square (l2) or magnitude (l1) of each example of [b, …]: [b]."""
    check_loss_type(loss_type)
    error = jnp.abs if loss_type == "l1" else jnp.square
    return jnp.mean(error(difference), axis=tuple(range(1, difference.ndim)))


def min_snr_weights(
    schedule: schedules.Schedule, parameterization: str, gamma: float
) -> np.ndarray:
    """Weights of the simple loss, float64 [T] (Hang et al. 2023, section 3.4).

    All three weigh the error of x0_hat by min(SNR, gamma): for `x0` that is the weight,
    for `eps` it is divided by SNR, for `v` by SNR + 1. At a zero terminal SNR none is
    infinite; those of x0 and v are 0 there.
    """
    if gamma <= 0:
        raise UserError(f"loss.min_snr_gamma: {gamma}; choose more than 0, such as 5")
    schedules.check_learnable(schedule, parameterization)
    bar = schedule.alphas_cumprod
    snr = bar / (1 - bar)
    if parameterization == "eps":
        return np.minimum(1, gamma / snr)
    clipped = np.minimum(snr, gamma)
    return clipped if parameterization == "x0" else clipped / (snr + 1)


def check_timestep_sampling(sampling: str) -> None:
    """Raises UserError unless `sampling` is one of TIMESTEP_SAMPLING."""
    if sampling not in TIMESTEP_SAMPLING:
        legal = ", ".join(TIMESTEP_SAMPLING)
        raise UserError(f"loss.timestep_sampling: {sampling!r}; choose one of {legal}")


def draw_timesteps(
    key: jax.Array,
    b: int,
    steps: int,
    sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> jax.Array:
    """[b] int32 timesteps of `steps` = T.

    `logit_normal` has the logit of t / T normal (Esser et al. 2024, eq. 19): more of
    the middle, or of one end by `logit_mean`.
    """
    check_timestep_sampling(sampling)
    if sampling == "uniform":
        return jax.random.randint(key, [b], 0, steps)
    place = jax.nn.sigmoid(logit_mean + logit_std * jax.random.normal(key, [b]))
    return jnp.minimum((place * steps).astype(jnp.int32), steps - 1)


def draw_noise(key: jax.Array, z: jax.Array, offset_noise: float = 0.0) -> jax.Array:
    """Standard normal noise like `z` [b, …, c], float32.

    `offset_noise` times another normal number is added to each example's channel as a
    whole, so that a net learns to change what a picture's mean is.
    """
    eps = jax.random.normal(key, z.shape)
    if offset_noise:
        shape = (z.shape[0], *[1] * (z.ndim - 2), z.shape[-1])
        eps += offset_noise * jax.random.normal(jax.random.fold_in(key, 1), shape)
    return eps


def diffusion_loss(
    apply: denoiser.Apply,
    schedule: schedules.Schedule,
    z: jax.Array,
    cond: Any,
    key: jax.Array,
    *,
    parameterization: str,
    loss_type: str = "l2",
    logvar: jax.Array | None = None,
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    min_snr_gamma: float | None = None,
    offset_noise: float = 0.0,
    timestep_sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    t: jax.Array | None = None,
    eps: jax.Array | None = None,
    mask: jax.Array | None = None,
    weight: jax.Array | None = None,
    learned_variance: bool = False,
    variance_weight: float = 1e-3,
) -> tuple[jax.Array, Metrics]:
    """The loss [] of latents `z` [b, …], and metrics as (sum, count) pairs.

    `apply(z_t, t, cond)` predicts in the net's own parameterization; `simple` is its
    mean error, squared (`l2`, Ho et al. 2020, eq. 14) or absolute (`l1`).
    An example's loss is l_simple_weight (simple / exp(logvar[t]) + logvar[t])
    + original_elbo_weight lvlb_weights[t] simple; `logvar` [T] is zero where None.
    `min_snr_gamma` multiplies the first term by `min_snr_weights`.
    With `learned_variance` the second half of the net's channels is v, and
    variance_weight T `learned_variance.bound_terms` is added (Nichol & Dhariwal 2021,
    eq. 16; T times a drawn term stands for the sum over all).
    `t` int32 [b] and `eps` are drawn from `key`, see `draw_timesteps` and `draw_noise`,
    unless given. `mask` [b] is 0 on the rows that pad the batch; the rest are averaged,
    each example's loss times its `weight` [b], if any.

    Metrics: loss, loss_simple, loss_vlb, loss_variance where v is learned (bits per
    dimension), and the loss by quartile of the timesteps,
    loss_q0 (least noise) … loss_q3. Sums and counts of the quartiles add up to those of
    the loss, so pooling them over batches and hosts is exact.
    """
    schedules.check_learnable(schedule, parameterization)
    t_key, eps_key = jax.random.split(key)
    b, steps = z.shape[0], len(schedule.betas)
    z = z.astype(jnp.float32)
    if t is None:
        t = draw_timesteps(t_key, b, steps, timestep_sampling, logit_mean, logit_std)
    if eps is None:
        eps = draw_noise(eps_key, z, offset_noise)

    check_loss_type(loss_type)
    z_t = denoiser.q_sample(schedule, z, t, eps)
    out, v = apply(z_t, t, cond).astype(jnp.float32), None
    if learned_variance:
        out, v = denoiser.split_variance(out)
    target = denoiser.target(parameterization, schedule, z, t, eps)
    simple = mean_error(out - target, loss_type)
    weights = schedules.lvlb_weights(schedule, parameterization)
    vlb = jnp.asarray(weights, jnp.float32)[t] * simple
    weighted = simple
    if min_snr_gamma is not None:
        by_snr = min_snr_weights(schedule, parameterization, min_snr_gamma)
        weighted *= jnp.asarray(by_snr, jnp.float32)[t]
    if logvar is not None:
        weighted = weighted / jnp.exp(logvar[t]) + logvar[t]
    loss = l_simple_weight * weighted + original_elbo_weight * vlb
    values = {"loss_simple": simple, "loss_vlb": vlb}
    if v is not None:
        given = (parameterization, out, v, z, z_t, t)
        values["loss_variance"] = variance.bound_terms(schedule, *given)
        loss += variance_weight * steps * values["loss_variance"]
    values["loss"] = loss if weight is None else weight * loss
    return pooled(values, "loss", t * QUARTILES // steps, mask)


def pooled(
    values: dict[str, jax.Array],
    quartered: str,
    quartile: jax.Array,
    mask: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
    """The mean [] of values["loss"], and all of them as (sum, count) pairs.

    `values` are [b], counted where `mask` [b] isn't 0. The one that `quartered` names
    also comes by quartile: int32 [b] says which of 0 … 3 an example's noise belongs to.
    """
    loss = values["loss"]
    mask = jnp.ones_like(loss) if mask is None else mask.astype(jnp.float32)

    def pair(values, mask):
        return jnp.sum(values * mask), jnp.sum(mask)

    pairs = {name: pair(value, mask) for name, value in values.items()}
    for q in range(QUARTILES):
        there = jnp.where(quartile == q, mask, 0.0)
        pairs[f"{quartered}_q{q}"] = pair(values[quartered], there)
    total, count = pairs["loss"]
    return total / count, pairs
