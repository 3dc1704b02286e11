"""Exponential moving averages of parameters (`LitEma`)."""

from typing import Any

import jax
import jax.numpy as jnp


def update(
    ema: Any,
    params: Any,
    num_updates: jax.Array | int,
    decay: float,
    warmup: bool = True,
) -> Any:
    """The averages, float32, after one more update of `params`, of whatever dtype.

    `num_updates` counts the updates done before this one. With `warmup` the n-th
    update, n from 1, keeps min(decay, (1 + n) / (10 + n)): the first one 2/11.
    """
    effective = jnp.float32(decay)
    if warmup:
        n = jnp.asarray(num_updates, jnp.float32) + 1
        effective = jnp.minimum(effective, (1 + n) / (10 + n))

    def average(old, new):
        old = old.astype(jnp.float32)
        return old - (1 - effective) * (old - new.astype(jnp.float32))

    return jax.tree.map(average, ema, params)
