"""The kinds of condition that a config may list; the torch class zoo as configs.

Each builder takes the run's `Setting` and the keys of its config section, and gives a
`Conditioner`. KINDS at the foot names them. Column names are those of data/sources.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax.conditioning import layout as layout_tokens
from ldm_jax.conditioning import neighbours, pictures, tokenizers
from ldm_jax.conditioning.conditioners import (
    SLOTS,
    Conditioner,
    Given,
    Setting,
    Tools,
)
from ldm_jax.config import UserError, construct, nearest
from ldm_jax.nets import embedders, t5, text_encoder

RESERVED = ("image", "moments")  # names of other columns of a batch


def text(
    setting: Setting,
    *,
    length: int,
    net: Mapping[str, Any],
    field: str = "caption",
    slot: str = "context",
    trainable: bool = True,
    dropout: float = 0.1,
    null: str = "",
    placeholder_tokens: Sequence[str] = (),
) -> Conditioner:
    """A caption through a text transformer; `null` is the text of "no caption".

    `placeholder_tokens` are those of textual inversion; their embeddings follow the
    net's own.
    """
    tokenizer, own = setting.tokenizer, len(setting.tokenizer)
    nets = {
        "transformer": text_encoder.TextTransformer,
        "clip": text_encoder.CLIPTextTransformer,
        "t5": t5.T5Encoder,
    }
    net = dict(net)
    kind, variant = net.pop("kind"), net.pop("variant", None)
    if kind not in nets:
        raise UserError(f"conditioners.*.net.kind: {kind!r}; {nearest(kind, nets)}")
    given = {"vocab_size": own}
    if kind != "t5":
        given["max_seq_len"] = length
    net = given | net
    if variant is not None:
        variants = t5.VARIANTS if kind == "t5" else text_encoder.VARIANTS
        if variant not in variants:
            hint = nearest(variant, variants)
            raise UserError(f"conditioners.*.net.variant: {variant!r}; {hint}")
        net |= variants[variant]

    made = construct("conditioners.*.net", nets[kind], net)
    if placeholder_tokens:
        try:
            tokenizer = tokenizers.with_tokens(tokenizer, placeholder_tokens)
        except UserError as error:
            option = f"conditioners.{setting.name}.placeholder_tokens"
            raise UserError(f"{option}: {error}") from error

    def prepare(captions: Sequence[str]) -> np.ndarray:
        texts = [tokenizers.spelled_out(text, placeholder_tokens) for text in captions]
        ids = tokenizers.encode(tokenizer, texts, length)
        if not placeholder_tokens:
            return ids
        # The net's table may have more rows than its tokenizer has tokens.
        return np.where(ids < own, ids, ids - own + made.vocab_size)

    return Conditioner(
        fields=(field,),
        slots=(slot,),
        prepare=prepare,
        null=prepare([null])[0],
        net=made,
        trainable=trainable,
        dropout=dropout,
    )


def class_label(
    setting: Setting,
    *,
    num_classes: int,
    dim: int | None = None,
    field: str = "label",
    slot: str = "context",
    dropout: float = 0.1,
    null_class: bool = True,
) -> Conditioner:
    """A class number: one token [b, 1, dim] of context, or as vector the UNet's own.

    `null_class` adds one class more, of number `num_classes`, for "no class"
    (`ClassEmbedder` of LDM and SD2; cin256-v2 has 1,000 + 1).
    """
    del setting
    if slot == "context" and dim is None:
        raise UserError("conditioners.*.dim: None; a class as context needs a width")

    def prepare(labels: Sequence[int]) -> np.ndarray:
        ids = np.asarray(labels)
        wrong = ids[(ids < 0) | (ids >= num_classes)] if ids.dtype.kind in "iu" else ids
        if wrong.size:
            raise UserError(
                f"{field}: {wrong.flat[0]} is no class; choose from 0 to"
                f" {num_classes - 1}"
            )
        return ids.astype(np.int32)

    rows = num_classes + null_class
    net = Given() if slot == "vector" else embedders.ClassEmbedder(rows, dim)
    return Conditioner(
        fields=(field,),
        slots=(slot,),
        prepare=prepare,
        null=np.asarray(num_classes if null_class else 0, np.int32),
        net=net,
        dropout=dropout,
        guided=null_class,
    )


def layout(
    setting: Setting,
    *,
    net: Mapping[str, Any],
    num_classes: int,
    max_objects: int = 30,
    num_tokens: int = layout_tokens.NUM_TOKENS,
    encode_crop: bool = False,
    slot: str = "context",
    dropout: float = 0.1,
) -> Conditioner:
    """Boxes with categories as tokens through a transformer (Layout2ImgDiffusion).

    The order of objects means nothing, so training draws a new one for every row.
    `num_tokens` is the vocabulary: as fine a grid of corners as fits into it.
    `encode_crop` adds the two tokens of the part of a larger picture that is shown: the
    column `crop` [n, 4] has it (x0, y0, x1, y1), and without such a column it is the
    whole. Boxes are then parts of the larger picture.
    """
    del setting

    if num_tokens < num_classes + 2:
        raise UserError(
            f"conditioners.*.num_tokens: {num_tokens}; the {num_classes} classes and"
            f' "none" need {num_classes + 2} or more'
        )

    def prepare(boxes: Any, categories: Any, *crops: Any) -> np.ndarray:
        layout_tokens.check(boxes, categories, num_classes)
        if crops:
            layout_tokens.check_crops(*crops)
        return layout_tokens.encode(
            layout_tokens.from_corners(boxes),
            categories,
            num_classes=num_classes,
            max_objects=max_objects,
            num_tokens=num_tokens,
            crop=layout_tokens.from_corners(*crops) if crops else None,
            encode_crop=encode_crop,
        )

    def of_window(tokens: jax.Array, frame: jax.Array) -> jax.Array:
        crop = layout_tokens.within_crops(tokens[:, -2:], frame, num_tokens)
        return jnp.concatenate([tokens[:, :-2], crop], axis=1)

    null = prepare(np.zeros((1, 1, 4)), np.full((1, 1), -1))[0]

    def before(tokens: jax.Array, tools: Tools) -> jax.Array:
        if not tools.training:
            return tokens
        objects = tokens[:, : 3 * max_objects].reshape(-1, max_objects, 3)
        objects = jax.vmap(jax.random.permutation)(tools.keys, objects)
        crop = tokens[:, 3 * max_objects :]
        return jnp.concatenate([objects.reshape(len(tokens), -1), crop], axis=1)

    options = dict(vocab_size=num_tokens, max_seq_len=len(null))
    options |= dict(net)
    return Conditioner(
        fields=("boxes", "categories") + ("crop",) * encode_crop,
        slots=(slot,),
        prepare=prepare,
        null=null,
        net=construct("conditioners.*.net", text_encoder.TextTransformer, options),
        dropout=dropout,
        before=before,
        otherwise={"crop": (0.0, 0.0, 1.0, 1.0)},
        of_window=of_window if encode_crop else None,
    )


# What `kind` of a section in config.conditioners may name.
KINDS: dict[str, Callable[..., Conditioner]] = {
    "text": text,
    "class": class_label,
    "layout": layout,
    "semantic": pictures.semantic,
    "low_res": pictures.low_res,
    "noisy_low_res": pictures.noisy_low_res,
    "inpainting": pictures.inpainting,
    "depth": pictures.depth,
    "photo_depth": pictures.photo_depth,
    "image_embedding": pictures.image_embedding,
    "clip_image": pictures.clip_image,
    "neighbours": neighbours.neighbours,
    "clip_neighbours": neighbours.clip_neighbours,
}


def build(
    sections: ml_collections.ConfigDict,
    size: tuple[int, int],
    latent_shape: tuple[int, int, int],
    tokenizer_of: Mapping[str, Any],
) -> dict[str, Conditioner]:
    """Builds the conditioners that a config lists, {name: Conditioner}.

    `size` is the pictures' [H, W], `latent_shape` [h, w, c]; `tokenizer_of` gives the
    tokenizer of every conditioner that reads text.
    """
    conditioners = {}
    for name, section in sections.items():
        kwargs = section.to_dict()
        if name in RESERVED:
            raise UserError(f"conditioners.{name}: the name is taken; choose another")
        kind, slot = kwargs.pop("kind"), kwargs.get("slot", SLOTS[0])
        if kind not in KINDS:
            raise UserError(
                f"conditioners.{name}.kind: {kind!r}; {nearest(kind, KINDS)}"
            )
        if slot not in SLOTS:
            raise UserError(
                f"conditioners.{name}.slot: {slot!r}; {nearest(slot, SLOTS)}"
            )
        kwargs.pop("tokenizer", None)
        weights = kwargs.pop("weights", None)
        setting = Setting(size, latent_shape, tokenizer_of.get(name), name)
        made = construct(
            f"conditioners.{name}", functools.partial(KINDS[kind], setting), kwargs
        )
        conditioners[name] = dataclasses.replace(made, weights=weights)
    return conditioners


def required_fields(conditioners: Mapping[str, Conditioner]) -> tuple[str, ...]:
    """The source columns that a model's conditions must have, each once."""
    fields = [
        f for c in conditioners.values() for f in c.fields if f not in c.otherwise
    ]
    return tuple(dict.fromkeys(fields))


def optional_fields(conditioners: Mapping[str, Conditioner]) -> tuple[str, ...]:
    """The source columns that they also read, where there are any."""
    fields = [f for c in conditioners.values() for f in c.fields if f in c.otherwise]
    return tuple(dict.fromkeys(fields))
