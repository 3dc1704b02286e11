"""What all samplers share: the scan over a grid's steps, times, noise, warm-up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Result = tuple[jax.Array, jax.Array | None]


def scan(
    step: Callable[[Any, Any], tuple[Any, jax.Array]],
    state: tuple[jax.Array, ...],
    rows: Any,
    start: jax.Array | int,
    trajectory: bool,
) -> Result:
    """Runs `step(state, (i, row)) -> (state, x0_hat)` for i = start … S-1.

    `rows` is a pytree of [S, …]; `state[0]` is the latent. `start` may be traced: the
    steps before it are skipped, not computed. Returns the last latent, and x0_hat of
    each step [S, b, …] if `trajectory` (the latent itself in skipped ones), else None.
    """

    def body(state, inputs):
        if isinstance(start, int) and start == 0:
            state, x0_hat = step(state, inputs)
        else:
            state, x0_hat = jax.lax.cond(
                inputs[0] < start,
                lambda state, _: (state, state[0]),
                step,
                state,
                inputs,
            )
        return state, x0_hat if trajectory else None

    steps = len(jax.tree.leaves(rows)[0])
    state, x0_hats = jax.lax.scan(body, state, (jnp.arange(steps), rows))
    return state[0], x0_hats


def times(z: jax.Array, t: np.ndarray) -> jax.Array:
    """Times as the net shall see them: int32 where all are whole timesteps."""
    whole = np.all(t == np.floor(t))
    return jnp.asarray(t, jnp.int32 if whole else z.dtype)


def table(z: jax.Array, *columns: np.ndarray) -> jax.Array:
    """Float64 columns [S, …], computed in numpy, as one array [S, n, …] like `z`."""
    return jnp.asarray(np.stack(columns, axis=1), z.dtype)


def full(z: jax.Array, t: jax.Array) -> jax.Array:
    """The time [b] of every example."""
    return jnp.full(z.shape[:1], t)


def per_example_keys(key: jax.Array, z: jax.Array) -> jax.Array:
    """[b] keys of one key; those that are [b] already make noise independent of b."""
    return jax.random.split(key, z.shape[0]) if key.ndim == 0 else key


def draw(keys: jax.Array, i: jax.Array, z: jax.Array) -> jax.Array:
    """Standard normal noise like `z` [b, …] for step `i`, each row from its own key."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    return jax.vmap(lambda k: jax.random.normal(k, z.shape[1:], z.dtype))(keys)


def by_age(
    steps: int, order: int, weights: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """[order, S, order - 1]: weights of older outputs by how many there are.

    `weights(i, n)` gives n - 1 numbers for step `i` from the n - 1 outputs before it.
    Row [age, i] holds them where the sampler began `age` steps before `i`, so that a
    start part-way warms up as one from the beginning does.
    """
    rows = np.zeros([order, steps, order - 1])
    for age in range(order):
        for i in range(steps):
            known = weights(i, min(age, i) + 1)
            rows[age, i, : len(known)] = known
    return rows


def correction(weights: jax.Array, older: tuple[jax.Array, ...], new: jax.Array):
    """Sum over j of weights[j] (older[j] - new)."""
    return sum(weights[j] * (old - new) for j, old in enumerate(older))
