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
class Adversary:
    """The discriminator's part of a state; it has no average."""

    params: Any
    opt_state: Any
    variables: Any  # running statistics of its norms


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, and so all that a checkpoint must hold.

    Randomness is `fold_in(key(seed), step)`, and so is the data position: nothing but
    the step need be saved for either.
    """

    step: jax.Array  # int32 [], batches consumed
    skipped: jax.Array  # int32 [], steps in a row, up to now, that were not finite
    params: Any
    opt_state: Any
    ema: Any  # float32 averages of params; None where config.ema_decay is 0
    variables: Any = None  # what training moves without gradients, e.g. codebooks
    adversary: Adversary | None = None


def create(
    params: Any,
    tx: optax.GradientTransformation,
    ema_decay: float,
    variables: Any = None,
    adversary: Adversary | None = None,
) -> TrainState:
    """The state before the first step; meant to be jitted with out_shardings."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        skipped=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema_decay else None,
        variables=variables,
        adversary=adversary,
    )


def averaged(state: TrainState) -> Any:
    """The params that evaluation, sampling and later stages use."""
    return state.params if state.ema is None else state.ema


def step_key(seed: int, step: jax.Array | int, purpose: int = TRAIN) -> jax.Array:
    """The key of one step for one purpose; used once."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def accumulate(
    gradients: Callable[[Any, Any, jax.Array], tuple[Any, Any, Metrics]],
    carry: Any,
    batch: Any,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Any, Metrics]:
    """Mean of `gradients(carry, batch, key) -> (carry, grads, metrics)`, in parts.

    The batch [b, …] is cut with stride, so that each micro-batch keeps its rows on the
    device where they are. `carry` goes from one to the next; metrics are (sum, count)
    pairs and add up.
    """
    if micro_batches == 1:
        return gradients(carry, batch, key)

    def split(x):
        rows = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    def add(totals, inputs):
        carry, *totals = totals
        micro_batch, index = inputs
        carry, *more = gradients(carry, micro_batch, jax.random.fold_in(key, index))
        return (carry, *jax.tree.map(jnp.add, totals, more)), None

    rows = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradients, carry, jax.tree.map(lambda x: x[0], rows), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1:])
    # XLA's CPU backend computes the weight gradient of a convolution inside a loop
    # some 60 times slower than outside of one.
    unroll = micro_batches if jax.default_backend() == "cpu" else 1
    (carry, grads, metrics), _ = jax.lax.scan(
        add, (carry, *zeros), (rows, jnp.arange(micro_batches)), unroll=unroll
    )
    return carry, jax.tree.map(lambda g: g / micro_batches, grads), metrics


def update(
    state: TrainState,
    grads: Any,
    tx: optax.GradientTransformation,
    ema_decay: float,
    move: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer update, then one of the averages (latent-diffusion's LitEma).

    `move(params) -> params` is what changes them besides gradients, in between.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if move is not None:
        params = move(params)
    ema = state.ema
    if ema is not None:
        ema = ema_lib.update(ema, params, state.step, ema_decay)
    one = jnp.ones([], jnp.float32)
    metrics = {
        "grad_norm": (optax.tree.norm(grads), one),
        "update_norm": (optax.tree.norm(updates), one),
    }
    state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    )
    return state, metrics


def update_adversary(
    adversary: Adversary,
    grads: Any,
    tx: optax.GradientTransformation,
    variables: Any,
) -> tuple[Adversary, Metrics]:
    """One optimizer update of the discriminator."""
    updates, opt_state = tx.update(grads, adversary.opt_state, adversary.params)
    params = optax.apply_updates(adversary.params, updates)
    norm = optax.tree.norm(grads), jnp.ones([], jnp.float32)
    return Adversary(params, opt_state, variables), {"disc_grad_norm": norm}


def keep_finite(
    old: TrainState, new: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """`new`, or `old` with its step counted where a loss or gradient is not finite.

    Such a step moves nothing and adds nothing to the metrics but its own count.
    """
    finite = jnp.array(True)
    for name in ("loss", "grad_norm", "disc_loss", "disc_grad_norm"):
        if name in metrics:
            finite &= jnp.isfinite(metrics[name][0])
    kept = jax.tree.map(lambda a, b: jnp.where(finite, b, a), old, new)
    kept = kept.replace(
        step=new.step, skipped=jnp.where(finite, 0, old.skipped + 1).astype(jnp.int32)
    )
    metrics = jax.tree.map(lambda m: jnp.where(finite, m, jnp.zeros_like(m)), metrics)
    one = jnp.ones([], jnp.float32)
    return kept, metrics | {"skipped": (1 - finite.astype(jnp.float32), one)}
