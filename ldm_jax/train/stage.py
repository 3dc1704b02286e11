"""What the loop trains: a stage gives init, loss, data and things to look at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from ldm_jax.data import sources
from ldm_jax.train import state as train_state


class Stage(NamedTuple):
    """One stage of training; a third kind would be one more file that returns this.

    frozen is a pytree of arrays that the loss reads and that is never trained, nor
    saved with the state.
    """

    name: str
    section: ml_collections.ConfigDict
    init: Callable[[jax.Array], Any]  # key -> params
    # (params, frozen, batch, key) -> (loss, metrics); no dropout where key is None.
    loss: Callable[..., tuple[jax.Array, train_state.Metrics]]
    frozen: Any
    train_source: sources.Source
    heldout_source: sources.Source
    ops: tuple[Any, ...]
    fields: tuple[str, ...]
    # (params, frozen) -> {name: pictures [n, h, w, 3] in [-1, 1]}
    panels: Callable[[Any, Any], dict[str, np.ndarray]]
    # params -> JSON facts that the last checkpoint must carry for what comes after
    finish: Callable[[Any], dict[str, Any]]


def batch_size(section: ml_collections.ConfigDict, config: ml_collections.ConfigDict):
    """Images per optimizer step, over all devices."""
    return section.batch_size or config.batch_size


def make_step(
    loss: Callable[..., tuple[jax.Array, train_state.Metrics]],
    tx: optax.GradientTransformation,
    *,
    seed: int,
    micro_batches: int,
    ema_decay: float,
) -> Callable[..., tuple[train_state.TrainState, train_state.Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`, pure; the loop jits it."""

    def step(state, frozen, batch):
        key = train_state.step_key(seed, state.step)
        grads, metrics = train_state.accumulated_gradients(
            lambda params, batch, key: loss(params, frozen, batch, key),
            state.params,
            batch,
            key,
            micro_batches,
        )
        state, more = train_state.update(state, grads, tx, ema_decay)
        return state, metrics | more

    return step


def make_evaluate(loss: Callable[..., Any], seed: int):
    """`evaluate(params, frozen, batch, index) -> metrics`: fixed noise for batch index.

    Every evaluation sees the same timesteps and noise, so its curve moves only because
    the params do.
    """

    @jax.jit
    def evaluate(params, frozen, batch, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return loss(params, frozen, batch, key, deterministic=True)[1]

    return evaluate
