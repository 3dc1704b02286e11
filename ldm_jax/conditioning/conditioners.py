"""From batch fields to a `Conditioning`: which nets, which slots, which null values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError, construct, nearest
from ldm_jax.nets import text_encoder

SLOTS = ("concat", "context", "vector")


@flax.struct.dataclass
class Conditioning:
    """What a denoising net is told besides z_t and t; any subset may be filled.

    concat [b, h, w, c] joins the latent's channels, context [b, n, d] is attended to,
    vector [b, d] or class ids [b] is added to the timestep embedding. The subsets are
    the conditioning keys of LDM and SD2 (none, concat, crossattn, hybrid, adm, …).
    """

    concat: jax.Array | None = None
    context: jax.Array | None = None
    vector: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Conditioner:
    """One condition: reads source field `field`, fills `slot` through `net`.

    `prepare` turns raw values of the field (captions) into an array [b, …]; `null` is
    one prepared row that stands for "no condition". Training replaces a row by it with
    probability `dropout`, which is what classifier-free guidance needs (Ho & Salimans
    2022).
    """

    field: str
    slot: str
    net: nn.Module
    trainable: bool
    dropout: float
    prepare: Callable[[Sequence[Any]], np.ndarray]
    null: np.ndarray


def text(
    *,
    field: str,
    slot: str,
    trainable: bool,
    dropout: float,
    tokenizer: Any,
    length: int,
    net: Mapping[str, Any],
    null: str = "",
) -> Conditioner:
    """A caption through a text transformer; `null` is the text of "no caption"."""
    nets = {
        "transformer": text_encoder.TextTransformer,
        "clip": text_encoder.CLIPTextTransformer,
    }
    net = {"vocab_size": len(tokenizer), "max_seq_len": length} | dict(net)
    kind, variant = net.pop("kind"), net.pop("variant", None)
    if kind not in nets:
        raise UserError(f"conditioners.*.net.kind: {kind!r}; {nearest(kind, nets)}")
    if variant is not None:
        if variant not in text_encoder.VARIANTS:
            hint = nearest(variant, text_encoder.VARIANTS)
            raise UserError(f"conditioners.*.net.variant: {variant!r}; {hint}")
        net |= text_encoder.VARIANTS[variant]

    def prepare(captions: Sequence[str]) -> np.ndarray:
        return tokenizers.encode(tokenizer, captions, length)

    module = construct("conditioners.*.net", nets[kind], net)
    return Conditioner(
        field=field,
        slot=slot,
        net=module,
        trainable=trainable,
        dropout=dropout,
        prepare=prepare,
        null=prepare([null])[0],
    )


CONDITIONERS = {"text": text}


def build(
    sections: ml_collections.ConfigDict, tokenizer_of: Mapping[str, Any]
) -> dict[str, Conditioner]:
    """Builds the conditioners that a config lists, {name: Conditioner}.

    `tokenizer_of` gives the tokenizer of every conditioner that reads text.
    """
    conditioners = {}
    for name, section in sections.items():
        kwargs = section.to_dict()
        kind = kwargs.pop("kind")
        if kind not in CONDITIONERS:
            raise UserError(
                f"conditioners.{name}.kind: {kind!r}; {nearest(kind, CONDITIONERS)}"
            )
        if kwargs["slot"] not in SLOTS:
            raise UserError(
                f"conditioners.{name}.slot: {kwargs['slot']!r};"
                f" {nearest(kwargs['slot'], SLOTS)}"
            )
        if kind == "text":
            kwargs["tokenizer"] = tokenizer_of[name]
        conditioners[name] = construct(
            f"conditioners.{name}", CONDITIONERS[kind], kwargs
        )
    return conditioners


def init(conditioners: Mapping[str, Conditioner], key: jax.Array) -> dict[str, Any]:
    """Draws the params of every conditioner's net, {name: params}."""
    return {
        name: conditioner.net.init(
            jax.random.fold_in(key, index), jnp.asarray(conditioner.null)[None]
        )["params"]
        for index, (name, conditioner) in enumerate(sorted(conditioners.items()))
    }


def drop(values: jax.Array, null: np.ndarray, rate: float, key: jax.Array) -> jax.Array:
    """Replaces each row of `values` [b, …] by `null` with probability `rate`."""
    dropped = jax.random.bernoulli(key, rate, values.shape[:1])
    dropped = dropped.reshape(dropped.shape + (1,) * (values.ndim - 1))
    return jnp.where(dropped, jnp.asarray(null)[None], values)


def encode(
    conditioners: Mapping[str, Conditioner],
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
) -> Conditioning:
    """Encodes `batch[name]` of every conditioner; with a key, rows drop to null.

    Several conditioners of one slot are joined: contexts along tokens, the others
    along channels.
    """
    slots: dict[str, list[jax.Array]] = {}
    for index, (name, conditioner) in enumerate(sorted(conditioners.items())):
        values, rngs = batch[name], None
        if key is not None:
            drop_key, net_key = jax.random.split(jax.random.fold_in(key, index))
            values = drop(values, conditioner.null, conditioner.dropout, drop_key)
            rngs = {"dropout": net_key}
        variables = {"params": params[name]}
        out = conditioner.net.apply(
            variables, values, deterministic=key is None, rngs=rngs
        )
        slots.setdefault(conditioner.slot, []).append(out)
    joined = {
        slot: jnp.concatenate(parts, axis=1 if slot == "context" else -1)
        for slot, parts in slots.items()
    }
    return Conditioning(**joined)


def encode_null(
    conditioners: Mapping[str, Conditioner], params: Mapping[str, Any], batch_size: int
) -> Conditioning:
    """The `Conditioning` of `batch_size` rows without any condition."""
    batch = {
        name: jnp.broadcast_to(
            jnp.asarray(conditioner.null), (batch_size, *conditioner.null.shape)
        )
        for name, conditioner in conditioners.items()
    }
    return encode(conditioners, params, batch)
