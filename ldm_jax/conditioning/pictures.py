"""Conditions that are pictures: maps, small or holed pictures, depth, embeddings.

Builders of `Conditioner`s, as in kinds.py. Pictures travel as 8 bits and are brought to
[-1, 1], to the latent's size or through the first stage on the device.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.conditioners import Conditioner, Setting, Tools
from ldm_jax.config import UserError, construct, nearest
from ldm_jax.diffusion import denoiser, schedules
from ldm_jax.nets import clip_vision, dpt, embedders, layers

NO_CLASS = 255  # in a map of classes
GREY = 128  # the 8-bit value next to 0 in [-1, 1]


def semantic(
    setting: Setting,
    *,
    num_classes: int,
    channels: int = 3,
    field: str = "segmentation",
    dropout: float = 0.0,
) -> Conditioner:
    """A map of class numbers, one-hot, halved down to the latent's size (§6.7).

    The number 255 is no class at all: zeros in every channel. It guides only where it
    was dropped in training, which the original never did.
    """
    size, n_stages = setting.size, _halvings(setting)

    def prepare(maps: Any) -> np.ndarray:
        rows = np.asarray(maps)
        if rows.shape[1:] != size:
            raise UserError(
                f"{field}: maps of {_by(rows.shape[1:])}; they must have the pictures'"
                f" size, so give {_by(size)}"
            )
        unknown = np.setdiff1d(np.unique(rows), [*range(num_classes), NO_CLASS])
        if unknown.size:
            raise UserError(
                f"{field}: class {unknown[0]} is unknown; choose from 0 to"
                f" {num_classes - 1}, or {NO_CLASS} for none"
            )
        return rows.astype(np.uint8)

    def before(maps: jax.Array, tools: Tools) -> jax.Array:
        del tools
        return jax.nn.one_hot(maps, num_classes)

    return Conditioner(
        fields=(field,),
        slots=("concat",),
        prepare=prepare,
        null=np.full(size, NO_CLASS, np.uint8),
        net=embedders.SpatialRescaler(n_stages=n_stages, out_channels=channels),
        dropout=dropout,
        guided=dropout > 0,  # else nothing has learned what no map looks like
        before=before,
    )


def low_res(
    setting: Setting, *, field: str = "low_res", dropout: float = 0.0, enlarge: int = 1
) -> Conditioner:
    """A small picture of the latent's size, as it is (bsr_sr, §6.8).

    Where it is smaller, by `enlarge`, it is brought to that size by cubic interpolation
    (Karlo's upscaler in pixels).
    """
    h, w = setting.latent_shape[:2]
    if h % enlarge or w % enlarge:
        raise UserError(
            f"conditioners.*.enlarge: {enlarge} does not divide the latent's"
            f" {_by((h, w))}; choose a divisor"
        )
    size = h // enlarge, w // enlarge
    why = f"the latent of {_by(setting.size)} pixels is {_by((h, w))}"
    if enlarge > 1:
        why += f" and enlarge {enlarge}"

    def prepare(values: Any) -> np.ndarray:
        return _pictures(field, values, size, why)

    def before(x: jax.Array, tools: Tools) -> jax.Array:
        del tools
        x = to_float(x)
        return jax.image.resize(x, (len(x), h, w, 3), "cubic") if enlarge > 1 else x

    return Conditioner(
        fields=(field,),
        slots=("concat",),
        prepare=prepare,
        null=np.full((*size, 3), GREY, np.uint8),
        dropout=dropout,
        guided=False,
        before=before,
    )


def noisy_low_res(
    setting: Setting,
    *,
    field: str = "low_res",
    max_noise_level: int = 350,
    noise_level: int = 20,
) -> Conditioner:
    """A small picture with noise, and its level for the UNet (x4-upscaling, §6.3).

    Training draws the level below `max_noise_level`; sampling takes `noise_level`
    unless told otherwise. The level is the UNet's class, so it wants num_classes=1000.
    """
    plain = low_res(setting, field=field)
    schedule = schedules.make_schedule(linear_start=1e-4, linear_end=2e-2)

    def before(x: jax.Array, tools: Tools) -> tuple[jax.Array, jax.Array]:
        x, level = to_float(x), _level(tools, len(x), max_noise_level, noise_level)
        return denoiser.q_sample(schedule, x, level, _noise(tools, x)), level

    return dataclasses.replace(
        plain,
        slots=("concat", "vector"),
        noise_levels=max_noise_level,
        before=before,
    )


def inpainting(setting: Setting, *, convention: str = "sd") -> Conditioner:
    """A picture with a hole: its mask (1 is hole) and the latent of what is known.

    `sd`: mask 0 or 1, then the latent, the hole grey (SD2, §6.2). `ldm`: the latent,
    the hole black, then the mask as -1 or 1 (inpainting_big, §6.1).
    """
    if convention not in ("sd", "ldm"):
        raise UserError(
            f"conditioners.*.convention: {convention!r};"
            f" {nearest(convention, ('sd', 'ldm'))}"
        )
    size = setting.size
    stride = size[0] // setting.latent_shape[0]

    def prepare(images: Any, masks: Any) -> np.ndarray:
        x, m = prepare_images(size, images), prepare_masks(size, masks)
        # What is in the hole isn't known, so it doesn't travel either.
        return np.concatenate([x * (1 - m), m], axis=-1)

    def before(values: jax.Array, tools: Tools) -> jax.Array:
        x, m = to_float(values[..., :3]), values[..., 3:].astype(jnp.float32)
        hole = jnp.float32(0.0 if convention == "sd" else -1.0)
        z = tools.encode_image(jnp.where(m > 0, hole, x), tools.keys)
        m = m[:, ::stride, ::stride]  # nearest, as torch rounds it
        if convention == "sd":
            return jnp.concatenate([m, z], axis=-1)
        return jnp.concatenate([z, 2 * m - 1], axis=-1)

    null = np.zeros((*size, 4), np.uint8)
    null[..., 3] = 1
    return Conditioner(
        fields=("image", "mask"),
        slots=("concat",),
        prepare=prepare,
        null=null,
        guided=False,
        before=before,
    )


def depth(setting: Setting, *, field: str = "depth") -> Conditioner:
    """Inverse relative depth, brought to the latent's size and to [-1, 1] (§6.4).

    Each map is scaled by its own extremes; a constant one becomes -1.
    """
    size, latent_size = setting.size, setting.latent_shape[:2]

    def prepare(maps: Any) -> np.ndarray:
        rows = np.asarray(maps, np.float32)
        if rows.shape[1:] != size:
            raise UserError(
                f"{field}: maps of {_by(rows.shape[1:])}; they must have the pictures'"
                f" size, so give {_by(size)}"
            )
        if not np.isfinite(rows).all():
            raise UserError(f"{field}: has values that are not finite; mend the maps")
        return rows

    def before(maps: jax.Array, tools: Tools) -> jax.Array:
        del tools
        return embedders.scaled_depth(maps[..., None], latent_size)

    return Conditioner(
        fields=(field,),
        slots=("concat",),
        prepare=prepare,
        null=np.zeros(size, np.float32),
        guided=False,
        before=before,
    )


def photo_depth(
    setting: Setting, *, net: Mapping[str, Any], side: int = 384
) -> Conditioner:
    """As `depth`, of a photograph, by a frozen MiDaS: Stable Diffusion 2's (§4.3).

    `net` are the options of nets/dpt.py or its `variant`; `side` is about the size in
    which it looks at pictures.
    """
    size, tower = setting.size, _tower(net, dpt.DPTHybrid, dpt.VARIANTS)

    def before(x: jax.Array, tools: Tools) -> jax.Array:
        del tools
        return to_float(x)

    return Conditioner(
        fields=("image",),
        slots=("concat",),
        prepare=functools.partial(prepare_images, size),
        null=np.full((*size, 3), GREY, np.uint8),
        net=dpt.DepthMap(tower, setting.latent_shape[:2], side),
        trainable=False,
        guided=False,
        before=before,
    )


def image_embedding(
    setting: Setting,
    *,
    cells: int = 2,
    max_noise_level: int = 1000,
    noise_level: int = 0,
    dropout: float = 0.25,
) -> Conditioner:
    """A picture's embedding with noise, and its level, as one vector (SD-unCLIP, §6.5).

    The embedding is the run's own first stage, averaged over cells x cells parts of the
    picture: it needs no pretrained net, and its values have unit variance.
    """
    check_cells(setting, cells)
    size, c = setting.size, setting.latent_shape[-1]
    schedule = schedules.make_schedule(schedule="squaredcos_cap_v2")
    width = cells * cells * c

    def before(x: jax.Array, tools: Tools) -> jax.Array:
        z = tools.encode_image(to_float(x), tools.keys)
        e = pooled(z, cells)
        level = _level(tools, len(x), max_noise_level, noise_level)
        e = denoiser.q_sample(schedule, e, level, _noise(tools, e))
        return jnp.concatenate([e, layers.timestep_embedding(level, width)], axis=-1)

    return Conditioner(
        fields=("image",),
        slots=("vector",),
        prepare=functools.partial(prepare_images, size),
        null=np.full((*size, 3), GREY, np.uint8),
        dropout=dropout,
        drop_output=True,
        noise_levels=max_noise_level,
        before=before,
    )


def clip_image(
    setting: Setting,
    *,
    net: Mapping[str, Any],
    max_noise_level: int = 1000,
    noise_level: int = 0,
    dropout: float = 0.25,
) -> Conditioner:
    """As `image_embedding`, of a frozen CLIP picture tower (SD-unCLIP itself, §6.5).

    With `max_noise_level` 0 it is the embedding alone (Karlo's decoder). `net` are the
    tower's options or its `variant`. Where its weights come with the mean and std of
    embeddings, these are standardised before the noise.
    """
    size, tower = setting.size, clip_tower(net)
    schedule = schedules.make_schedule(schedule="squaredcos_cap_v2")

    def before(x: jax.Array, tools: Tools) -> tuple[jax.Array, ...]:
        like = jnp.zeros([len(x), tower.projection_dim])
        if not max_noise_level:
            return to_float(x), jnp.ones([1, 1]), like, like[:, :0]
        level = _level(tools, len(x), max_noise_level, noise_level)
        signal, sigma = denoiser.levels(schedule, level, like)
        noise = sigma * _noise(tools, like)
        sinusoids = layers.timestep_embedding(level, tower.projection_dim)
        return to_float(x), signal, noise, sinusoids

    return Conditioner(
        fields=("image",),
        slots=("vector",),
        prepare=functools.partial(prepare_images, size),
        null=np.full((*size, 3), GREY, np.uint8),
        net=clip_vision.ImageVector(tower),
        trainable=False,
        dropout=dropout,
        drop_output=True,
        noise_levels=max_noise_level,
        before=before,
    )


# ---- What several of them do ---------------------------------------------------


def to_float(x: jax.Array) -> jax.Array:
    """uint8 to [-1, 1]."""
    return x.astype(jnp.float32) / 127.5 - 1.0


def clip_tower(net: Mapping[str, Any]) -> clip_vision.CLIPVisionTransformer:
    """The CLIP picture tower of a config, by its options or its `variant`."""
    return _tower(net, clip_vision.CLIPVisionTransformer, clip_vision.VARIANTS)


def _tower(net: Mapping[str, Any], make: Any, variants: Mapping[str, Any]) -> Any:
    options = dict(net)
    variant = options.pop("variant", None)
    if variant is not None:
        if variant not in variants:
            hint = nearest(variant, variants)
            raise UserError(f"conditioners.*.net.variant: {variant!r}; {hint}")
        options |= variants[variant]
    return construct("conditioners.*.net", make, options)


def pooled(z: jax.Array, cells: int) -> jax.Array:
    """Latents [b, h, w, c] averaged over cells x cells parts, [b, cells² c]."""
    return einops.reduce(z, "b (i y) (j x) c -> b (i j c)", "mean", i=cells, j=cells)


def check_cells(setting: Setting, cells: int) -> None:
    """Raises UserError unless the latent can be cut into cells x cells parts."""
    h, w = setting.latent_shape[:2]
    if h % cells or w % cells:
        raise UserError(
            f"conditioners.*.cells: {cells} does not divide the latent's {_by((h, w))};"
            " choose a divisor"
        )


def prepare_images(
    size: tuple[int, int], images: Any, field: str = "image"
) -> np.ndarray:
    """8-bit pictures of the model's `size` [H, W], as they are."""
    return _pictures(field, images, size, f"those of the model are {_by(size)}")


def prepare_masks(size: tuple[int, int], masks: Any) -> np.ndarray:
    """Masks [n, H, W] or [n, H, W, 1] of 0 (keep) and 1 (fill), uint8 [n, H, W, 1]."""
    m = np.asarray(masks)
    m = m[..., 0] if m.ndim == 4 else m
    if m.shape[1:] != size:
        raise UserError(
            f"mask: {_by(m.shape[1:])}, but the picture is {_by(size)}; give a mask of"
            " the same size"
        )
    if np.setdiff1d(m, [0, 1]).size:
        raise UserError("mask: has other values than 0 (keep) and 1 (fill)")
    return m[..., None].astype(np.uint8)


def _noise(tools: Tools, like: jax.Array) -> jax.Array:
    """Of every row's own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:]))(
        jax.vmap(jax.random.fold_in, (0, None))(tools.keys, 1)
    )


def _level(tools: Tools, b: int, highest: int, default: int) -> jax.Array:
    """Noise levels int32 [b]: what is asked for, else drawn, else the default."""
    if tools.noise_level is not None:
        return tools.noise_level
    if not tools.training:
        return jnp.full([b], default, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (0, None))(tools.keys, 2)
    return jax.vmap(lambda key: jax.random.randint(key, [], 0, highest))(keys)


def _halvings(setting: Setting) -> int:
    """How often the picture is halved to be as small as its latent."""
    return round(math.log2(setting.size[0] / setting.latent_shape[0]))


def _by(size: Sequence[int]) -> str:
    """[h, w] as people write it."""
    return "x".join(map(str, size))


def _pictures(field: str, values: Any, size: tuple[int, int], why: str) -> np.ndarray:
    """`values` as one uint8 array [n, h, w, 3] of the `size` that is wanted."""
    rows = np.asarray(values)
    if rows.dtype != np.uint8 or rows.ndim != 4 or rows.shape[-1] != 3:
        raise UserError(
            f"{field}: {rows.dtype}{list(rows.shape)}; give 8-bit RGB pictures,"
            " uint8 [n, h, w, 3]"
        )
    if rows.shape[1:3] != tuple(size):
        raise UserError(
            f"{field}: pictures of {_by(rows.shape[1:3])}; {why}, so give {_by(size)}"
        )
    return rows
