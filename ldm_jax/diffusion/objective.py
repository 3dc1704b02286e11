"""The training loss of latent diffusion (`LatentDiffusion.p_losses`), in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, schedules

LOSS_TYPES = ("l2", "l1")
QUARTILES = 4

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def check_loss_type(loss_type: str) -> None:
    """Raises UserError unless `loss_type` is one of LOSS_TYPES."""
    if loss_type not in LOSS_TYPES:
        raise UserError(
            f"loss.loss_type: {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}"
        )


def simple_loss(
    apply: denoiser.Apply,
    schedule: schedules.Schedule,
    z: jax.Array,
    cond: Any,
    t: jax.Array,
    eps: jax.Array,
    *,
    parameterization: str,
    loss_type: str,
) -> jax.Array:
    """Each example's mean error in the net's own parameterization, float32 [b].

    `z` and `eps` are [b, …], `t` int32 [b]. `l2` is the squared error (Ho et al. 2020,
    eq. 14), `l1` the absolute one.
    """
    check_loss_type(loss_type)
    target = denoiser.target(parameterization, schedule, z, t, eps)
    out = apply(denoiser.q_sample(schedule, z, t, eps), t, cond)
    error = out.astype(jnp.float32) - target
    error = jnp.abs(error) if loss_type == "l1" else jnp.square(error)
    return jnp.mean(error, axis=tuple(range(1, z.ndim)))


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
    t: jax.Array | None = None,
    eps: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss [] of latents `z` [b, …], and metrics as (sum, count) pairs.

    An example's loss is l_simple_weight (simple / exp(logvar[t]) + logvar[t])
    + original_elbo_weight lvlb_weights[t] simple; `logvar` [T] is zero where None.
    `t` int32 [b] and `eps` are drawn from `key` unless given. `mask` [b] is 0 on the
    rows that pad the batch; the rest are averaged.

    Metrics: loss, loss_simple, loss_vlb, and the loss by quartile of the timesteps,
    loss_q0 (least noise) … loss_q3. Sums and counts of the quartiles add up to those of
    the loss, so pooling them over batches and hosts is exact.
    """
    t_key, eps_key = jax.random.split(key)
    b, steps = z.shape[0], len(schedule.betas)
    z = z.astype(jnp.float32)
    if t is None:
        t = jax.random.randint(t_key, [b], 0, steps)
    if eps is None:
        eps = jax.random.normal(eps_key, z.shape)

    simple = simple_loss(
        apply,
        schedule,
        z,
        cond,
        t,
        eps,
        parameterization=parameterization,
        loss_type=loss_type,
    )
    weights = schedules.lvlb_weights(schedule, parameterization)
    vlb = jnp.asarray(weights, jnp.float32)[t] * simple
    weighted = simple
    if logvar is not None:
        weighted = simple / jnp.exp(logvar[t]) + logvar[t]
    loss = l_simple_weight * weighted + original_elbo_weight * vlb

    mask = jnp.ones_like(loss) if mask is None else mask.astype(jnp.float32)

    def pair(values, mask):
        return jnp.sum(values * mask), jnp.sum(mask)

    metrics = {
        "loss": pair(loss, mask),
        "loss_simple": pair(simple, mask),
        "loss_vlb": pair(vlb, mask),
    }
    quartile = t * QUARTILES // steps
    for q in range(QUARTILES):
        metrics[f"loss_q{q}"] = pair(loss, jnp.where(quartile == q, mask, 0.0))
    total, count = metrics["loss"]
    return total / count, metrics
