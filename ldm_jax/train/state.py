"""The train state and the one update that both stages share."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from ldm_jax.train import ema as ema_lib

# Purposes of a key.
TRAIN, INIT = range(2)

Metrics = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, and so all that a checkpoint must hold.

    Randomness is `fold_in(key(seed), step)`, and so is the data position: nothing but
    the step need be saved for either.
    """

    step: jax.Array  # int32 [], optimizer updates done
    params: Any
    opt_state: Any
    ema: Any  # float32 averages of params; None where config.ema_decay is 0


def create(params: Any, tx: optax.GradientTransformation, ema_decay: float):
    """The state before the first step; meant to be jitted with out_shardings."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
    )


def averaged(state: TrainState) -> Any:
    """The params that evaluation, sampling and later stages use."""
    return state.params if state.ema is None else state.ema


def step_key(seed: int, step: jax.Array | int, purpose: int = TRAIN) -> jax.Array:
    """The key of one step for one purpose; used once."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def accumulated_gradients(
    loss_fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Any,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Metrics]:
    """Gradient of the mean of `loss_fn(params, batch, key)` over `micro_batches`.

    The batch [b, …] is cut with stride, so that each micro-batch keeps its rows on the
    device where they are. Metrics are (sum, count) pairs and add up.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        (_, metrics), grads = grad_fn(params, batch, key)
        return grads, metrics

    def split(x):
        rows = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    def gradients(micro_batch, index):
        (_, metrics), grads = grad_fn(
            params, micro_batch, jax.random.fold_in(key, index)
        )
        return grads, metrics

    def add(total, inputs):
        return jax.tree.map(jnp.add, total, gradients(*inputs)), None

    inputs = jax.tree.map(split, batch), jnp.arange(micro_batches)
    shapes = jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    # XLA's CPU backend computes the weight gradient of a convolution inside a loop
    # some 60 times slower than outside of one.
    unroll = micro_batches if jax.default_backend() == "cpu" else 1
    (grads, metrics), _ = jax.lax.scan(add, zeros, inputs, unroll=unroll)
    return jax.tree.map(lambda g: g / micro_batches, grads), metrics


def update(
    state: TrainState,
    grads: Any,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """One optimizer update, then one of the averages (latent-diffusion's LitEma)."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = ema_lib.update(ema, params, state.step, ema_decay)
    one = jnp.ones([], jnp.float32)
    metrics = {
        "grad_norm": (optax.tree.norm(grads), one),
        "update_norm": (optax.tree.norm(updates), one),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics
