"""From batch fields to a `Conditioning`: the one way that every condition goes.

source columns -> `prepare` (host, once) -> rows of the batch -> some rows dropped to
`null` -> `before` (device, frozen) -> `net` (trained or frozen) -> slots.
What each kind of condition does at these places stands in kinds.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SLOTS = ("concat", "context", "vector")


@flax.struct.dataclass
class Conditioning:
    """What a denoising net is told besides z_t and t; any subset may be filled.

    concat [b, h, w, c] joins the latent's channels, context [b, n, d] is attended to,
    vector [b, d] or class ids [b] is added to the timestep embedding. The subsets are
    the conditioning keys of LDM and SD2 (none, concat, crossattn, hybrid, adm, …).
    With `sequential_crossattn` context is a list, one array for each block in turn.
    """

    concat: jax.Array | None = None
    context: jax.Array | list[jax.Array] | None = None
    vector: jax.Array | None = None


class Setting(NamedTuple):
    """What a condition must fit: pictures [H, W] and their latents; what it is called.

    `tokenizer` is that of its text, if it reads any.
    """

    size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    tokenizer: Any = None
    name: str = ""


class Tools(NamedTuple):
    """What `before` may use besides the values of its own condition.

    encode_image: pictures [b, H, W, 3] in [-1, 1], typed keys [b] -> latents
        [b, h, w, c] of unit variance, by the run's frozen first stage.
    keys: one typed key a row, for what is random besides dropping: noise, order.
    noise_level: of noise-augmented conditions, int32 [b]; None draws it in training
        and takes the conditioner's own otherwise.
    memory: {name of a condition: what it `remembered` of all training pictures}.
    training: whether levels and orders are drawn; `encode` sets it.
    """

    encode_image: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    keys: jax.Array | None = None
    noise_level: jax.Array | None = None
    memory: Mapping[str, jax.Array] | None = None
    training: bool = False


class Given(nn.Module):
    """No net: what comes in goes out."""

    @nn.compact
    def __call__(self, values, deterministic: bool = True):
        del deterministic
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Conditioner:
    """One condition: reads the source columns `fields`, fills `slots` through `net`.

    `prepare(*columns)` makes one array [n, …] of raw columns; `before(values, tools)`
    is what happens to it on the device without a gradient. A net that fills two slots
    returns a tuple.

    Training drops a row with probability `dropout`, which is what classifier-free
    guidance needs (Ho & Salimans 2022): its values become `null`, one prepared row that
    stands for "no condition", or where `drop_output` what the net gives becomes zeros.
    Guidance drops all rows in its unconditional half, unless `guided` is False: a
    picture to be completed is part of the task, not of the prompt. `noise_levels` is
    how many levels of noise it can be given. `remembered(x, tools, params)` makes of
    training pictures [b, H, W, 3] in [-1, 1] what `before` will look up, [b, d], where
    d is `remembered_dim`. `weights` says where those of a net that is not trained are,
    see frozen.py. `otherwise` has the value of columns that rows need not have.
    `of_window(values, frame)` is what `values` [b, …] are for a part of the picture,
    where they differ there: `frame` [4] is x, y, width and height in parts of it.
    """

    fields: tuple[str, ...]
    slots: tuple[str, ...]
    prepare: Callable[..., np.ndarray]
    null: np.ndarray
    net: nn.Module = Given()
    trainable: bool = True
    dropout: float = 0.0
    drop_output: bool = False
    guided: bool = True
    noise_levels: int = 0
    before: Callable[[jax.Array, Tools], Any] | None = None
    remembered: Callable[[jax.Array, Tools, Any], jax.Array] | None = None
    remembered_dim: int = 0
    weights: str | None = None
    otherwise: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of_window: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    @property
    def has_params(self) -> bool:
        """Whether there is anything to train, import or store."""
        return not isinstance(self.net, Given)


def prepare(
    conditioners: Mapping[str, Conditioner], columns: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """One prepared array [n, …] per conditioner, of the raw columns that it reads."""
    n = len(next(iter(columns.values()), ()))

    def column(conditioner, field):
        if field not in columns and field in conditioner.otherwise:
            return np.repeat(np.asarray(conditioner.otherwise[field])[None], n, axis=0)
        return columns[field]

    return {
        name: conditioner.prepare(*(column(conditioner, f) for f in conditioner.fields))
        for name, conditioner in conditioners.items()
    }


def init(
    conditioners: Mapping[str, Conditioner],
    key: jax.Array,
    make_tools: Callable[[], Tools] = Tools,
) -> dict[str, Any]:
    """Draws the params of every conditioner's net that has some, {name: params}.

    `make_tools` is called only for the shapes of what `before` gives.
    """
    drawn = {}
    for index, (name, conditioner) in enumerate(sorted(conditioners.items())):
        if conditioner.has_params:
            values = jnp.asarray(conditioner.null)[None]
            if conditioner.before is not None:
                shapes = jax.eval_shape(
                    lambda c=conditioner, x=values: c.before(x, make_tools())
                )
                values = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            net_key = jax.random.fold_in(key, index)
            drawn[name] = conditioner.net.init(net_key, values)["params"]
    return drawn


def draw_dropped(
    conditioners: Mapping[str, Conditioner], b: int, key: jax.Array
) -> dict[str, jax.Array]:
    """Which rows a training step drops, {name: bool [b]}, each on its own."""
    dropped = {}
    for index, (name, conditioner) in enumerate(sorted(conditioners.items())):
        row_key, _ = jax.random.split(jax.random.fold_in(key, index))
        dropped[name] = jax.random.bernoulli(row_key, conditioner.dropout, [b])
    return dropped


def encode(
    conditioners: Mapping[str, Conditioner],
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    tools: Tools = Tools(),  # noqa: B008  a tuple of constants
    dropped: Mapping[str, jax.Array] | None = None,
    sequential: bool = False,
) -> Conditioning:
    """Encodes `batch[name]` of every conditioner; a key means training.

    Then rows are dropped, unless `dropped` {name: bool [b]} says which, and the nets'
    own dropout is on. Several conditioners of one slot are joined in the order of their
    names: contexts along tokens, or if `sequential` kept apart; the others along
    channels.
    """
    if key is not None and dropped is None and conditioners:
        b = len(next(iter(batch[name] for name in conditioners)))
        dropped = draw_dropped(conditioners, b, key)
    tools = tools._replace(training=key is not None)
    slots: dict[str, list[jax.Array]] = {}
    for index, (name, conditioner) in enumerate(sorted(conditioners.items())):
        values, rngs = batch[name], None
        gone = None if dropped is None else dropped.get(name)
        if gone is not None and not conditioner.drop_output:
            values = drop(values, conditioner.null, gone)
        if conditioner.before is not None:
            values = jax.lax.stop_gradient(conditioner.before(values, tools))
        if key is not None:
            _, net_key = jax.random.split(jax.random.fold_in(key, index))
            rngs = {"dropout": net_key}
        out = conditioner.net.apply(
            {"params": params.get(name, {})},
            values,
            deterministic=key is None,
            rngs=rngs,
        )
        outs = out if isinstance(out, tuple) else (out,)
        for slot, part in zip(conditioner.slots, outs, strict=True):
            if gone is not None and conditioner.drop_output:
                part = drop(part, np.zeros(part.shape[1:], part.dtype), gone)
            if slot == "context" and part.ndim == 2:  # a vector is one token
                part = part[:, None]
            slots.setdefault(slot, []).append(part)
    joined: dict[str, Any] = {
        slot: jnp.concatenate(parts, axis=1 if slot == "context" else -1)
        for slot, parts in slots.items()
        if not (sequential and slot == "context") and parts[0].ndim > 1
    }
    # Class ids are one number a row, and can't be joined with anything.
    joined |= {slot: p[0] for slot, p in slots.items() if p[0].ndim == 1}
    if sequential and "context" in slots:
        joined["context"] = slots["context"]
    return Conditioning(**joined)


def drop(values: jax.Array, null: np.ndarray, dropped: jax.Array) -> jax.Array:
    """`values` [b, …] with `null` […] in the rows that are `dropped` [b]."""
    where = dropped.reshape(dropped.shape + (1,) * (values.ndim - 1))
    return jnp.where(where, jnp.asarray(null)[None], values)


def null_rows(conditioners: Mapping[str, Conditioner], b: int) -> dict[str, np.ndarray]:
    """`b` prepared rows of no condition, {name: [b, …]}."""
    return {
        name: np.broadcast_to(conditioner.null, (b, *conditioner.null.shape))
        for name, conditioner in conditioners.items()
    }
