"""Whether the data is what nets and conditions want, before anything is written."""

import flax.linen as nn
import ml_collections

from ldm_jax import inversion
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.data import pipeline, preprocess, sources

PLACELESS = ("caption", "label")  # conditions that say nothing of where


def pictures(
    config: ml_collections.ConfigDict, net: nn.Module, source: sources.Source
) -> None:
    """Looks at one picture: data.ops must leave what resolution and net want."""
    batches = pipeline.eval_batches(
        source, batch_size=1, ops=config.data.ops, fields=("image",), limit=1
    )
    shape, side = next(batches)["image"].shape[1:], config.resolution
    if shape[:2] != (side, side):
        raise UserError(
            f"data.ops: give pictures of {shape[0]}x{shape[1]}, but resolution is"
            f" {side}; set the sizes of resize and crop to {side}"
        )
    for field in ("in_channels", "out_ch"):
        if getattr(net, field, shape[2]) != shape[2]:
            raise UserError(
                f"autoencoder.{field}: {getattr(net, field)}, but the pictures have"
                f" {shape[2]} channels; set it to {shape[2]}"
            )


def endless(config: ml_collections.ConfigDict, source: sources.Source) -> None:
    """What is made on the way can neither be encoded beforehand nor be reshaped."""
    if source.example is None or "diffusion" not in config.stages:
        return
    if config.diffusion_stage.cache_latents:
        raise UserError(
            "diffusion_stage.cache_latents: True, but the data is endless; set it to"
            " False"
        )
    others = [op for op, _ in config.data.ops if op != "to_float"]
    if others:
        raise UserError(
            f"data.ops: has {others[0]}, but conditions of endless data are those of"
            " the pictures as they are made; leave it out"
        )


def field(name: str, field: str, source: sources.Source) -> None:
    """A conditioner must find what it reads in the data."""
    if field not in source.fields:
        raise UserError(
            f"conditioners.{name}.field: {field!r} is not in the data, which has"
            f" {', '.join(source.fields)}"
        )


def ops(config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion) -> None:
    """Conditions are prepared once, so no random op may move the picture from them."""
    moved = [op for op, _ in config.data.ops if op in preprocess.RANDOM]
    for name, conditioner in model.conditioners.items():
        places = set(conditioner.fields) - set(PLACELESS)
        if places and moved:
            raise UserError(
                f"data.ops: {moved[0]} moves the picture, but not the"
                f" {sorted(places)[0]} of conditioners.{name}; take it out"
            )


def placeholder(config: ml_collections.ConfigDict, source: sources.Source) -> None:
    """Raises UserError where a token is to be trained that no caption has."""
    if not inversion.is_on(config.diffusion_stage):
        return
    token = config.diffusion_stage.inversion.placeholder_token
    column = config.conditioners[inversion.condition(config)].field
    captions = source.fields[column]
    if not any(token in caption for caption in captions):
        raise UserError(
            f"{inversion.OPTION}.placeholder_token: {token!r} is in no {column} of the"
            f" data, such as {captions[0]!r}; write it there, or for a folder set"
            f' data.options.caption="a photo of {token}"'
        )
