"""What the loop trains: a stage gives a state, steps, data and things to look at."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax

from ldm_jax.data import sources
from ldm_jax.train import optim
from ldm_jax.train import state as train_state

# (params, frozen, batch, key, deterministic=False) -> (loss, metrics)
Loss = Callable[..., tuple[jax.Array, train_state.Metrics]]
# (state, frozen, batch) -> (state, metrics), pure; the loop compiles it
Step = Callable[
    [train_state.TrainState, Any, Any],
    tuple[train_state.TrainState, train_state.Metrics],
]


class Phase(NamedTuple):
    """A step that is taken from the update `first` on, until the next phase's."""

    first: int
    step: Step


class Stage(NamedTuple):
    """One stage of training; a third kind would be one more file that returns this.

    frozen is a pytree of arrays that the steps read and that is never trained, nor
    saved with the state.
    """

    name: str
    section: ml_collections.ConfigDict
    create: Callable[[jax.Array], train_state.TrainState]  # from a key
    phases: tuple[Phase, ...]
    evaluate: Callable[..., train_state.Metrics]  # (params, frozen, batch, key)
    schedule: optax.Schedule  # learning rate by update
    frozen: Any
    train_source: sources.Source
    heldout_source: sources.Source
    ops: tuple[Any, ...]
    fields: tuple[str, ...]
    # (params, frozen) -> {name: pictures [n, h, w, 3] in [-1, 1]}
    panels: Callable[[Any, Any], dict[str, np.ndarray]]
    # (mean metrics of some steps, number of steps) -> what is shown of them
    summarize: Callable[[dict[str, np.ndarray], int], dict[str, float]]
    # params -> JSON facts that the last checkpoint must carry for what comes after
    finish: Callable[[Any], dict[str, Any]]
    # fresh params -> those to start from, on the host
    start: Callable[[Any], Any] | None = None


def batch_size(section: ml_collections.ConfigDict, config: ml_collections.ConfigDict):
    """Images per optimizer step, over all devices."""
    return section.batch_size or config.batch_size


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    micro_batches: int,
    ema_decay: float,
) -> Step:
    """The step of a stage that is one loss and one optimizer."""

    def step(state, frozen, batch):
        def gradients(carry, batch, key):
            grads, metrics = jax.grad(loss, has_aux=True)(
                state.params, frozen, batch, key
            )
            return carry, grads, metrics

        key = train_state.step_key(seed, state.step)
        _, grads, metrics = train_state.accumulate(
            gradients, (), batch, key, micro_batches
        )
        new, more = train_state.update(state, grads, tx, ema_decay)
        return train_state.keep_finite(state, new, metrics | more)

    return step


def of_loss(
    name: str,
    config: ml_collections.ConfigDict,
    section: ml_collections.ConfigDict,
    loss: Loss,
    init: Callable[[jax.Array], Any],
    *,
    optimizer: tuple[optax.GradientTransformation, optax.Schedule] | None = None,
    frozen: Any,
    train_source: sources.Source,
    heldout_source: sources.Source,
    ops: tuple[Any, ...],
    panels: Callable[[Any, Any], dict[str, np.ndarray]],
    start: Callable[[Any], Any] | None = None,
) -> Stage:
    """A stage of one loss and one optimizer, by default that of its `section`.

    `init(key)` gives its params. All columns of the sources go to the loss.
    """
    tx, schedule = optimizer or optim.make_optimizer(
        section.optim, section.steps, batch_size(section, config)
    )
    step = make_step(
        loss,
        tx,
        seed=config.seed,
        micro_batches=section.micro_batches,
        ema_decay=section.ema_decay,
    )

    def create(key):
        return train_state.create(init(key), tx, section.ema_decay)

    def evaluate(params, frozen, batch, key):
        return loss(params, frozen, batch, key, deterministic=True)[1]

    return Stage(
        name=name,
        section=section,
        create=create,
        phases=(Phase(0, step),),
        evaluate=evaluate,
        schedule=schedule,
        frozen=frozen,
        train_source=train_source,
        heldout_source=heldout_source,
        ops=ops,
        fields=tuple(train_source.fields),
        panels=panels,
        summarize=scalars,
        finish=lambda params: {},
        start=start,
    )


def make_evaluate(of_key: Callable[..., train_state.Metrics], seed: int):
    """`evaluate(params, frozen, batch, index) -> metrics`: fixed noise for batch index.

    Every evaluation sees the same timesteps and noise, so its curve moves only because
    the params do.
    """

    @jax.jit
    def evaluate(params, frozen, batch, index):
        key = jax.random.fold_in(jax.random.key(seed), index)
        return of_key(params, frozen, batch, key)

    return evaluate


def scalars(values: dict[str, np.ndarray], steps: int) -> dict[str, float]:
    """Means as they are: the `summarize` of a stage without arrays among them."""
    del steps
    return {name: float(value) for name, value in values.items()}
