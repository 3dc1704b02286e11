"""Training pictures that are like one, as context: retrieval (RDM, section 6.6)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import pictures
from ldm_jax.conditioning.conditioners import Conditioner, Given, Setting, Tools
from ldm_jax.config import UserError
from ldm_jax.nets import clip_vision, embedders


def neighbours(
    setting: Setting,
    *,
    k: int = 4,
    cells: int = 4,
    dim: int | None = None,
    dropout: float = 0.1,
) -> Conditioner:
    """The `k` nearest training pictures to a given one, a token [b, k, dim] each.

    Near by the cosine of the run's own first stage, averaged over cells x cells parts
    of the picture. They are scaled to unit variance and go through a learned layer
    where `dim` is given. In training a picture is none of its own neighbours.
    """
    pictures.check_cells(setting, cells)
    width = cells * cells * setting.latent_shape[-1]

    def embed(x: jax.Array, tools: Tools) -> jax.Array:
        z = tools.encode_image(x, tools.keys)
        return embedders.unit(pictures.pooled(z, cells))

    def before(x: jax.Array, tools: Tools) -> jax.Array:
        e = embed(pictures.to_float(x), tools)
        known = _memory(setting, tools, k)
        found = embedders.nearest(e, known, k, tools.training)
        return found * jnp.float32(width**0.5)

    return Conditioner(
        fields=("image",),
        slots=("context",),
        prepare=functools.partial(pictures.prepare_images, setting.size),
        null=np.full((*setting.size, 3), pictures.GREY, np.uint8),
        net=Given() if dim is None else embedders.Projection(dim),
        dropout=dropout,
        drop_output=True,
        before=before,
        remembered=lambda x, tools, params: embed(x, tools),
        remembered_dim=width,
    )


def clip_neighbours(
    setting: Setting, *, net: Mapping[str, Any], k: int = 4, dropout: float = 0.1
) -> Conditioner:
    """As `neighbours`, by a frozen CLIP picture tower; its unit vectors are the tokens.

    That is RDM itself; `net` are the tower's options or its `variant`.
    """
    tower = pictures.clip_tower(net)

    def before(x: jax.Array, tools: Tools) -> tuple[jax.Array, ...]:
        known = _memory(setting, tools, k)
        return pictures.to_float(x), known, jnp.asarray(tools.training)

    def remembered(x: jax.Array, tools: Tools, params: Any) -> jax.Array:
        del tools
        return clip_vision.embed_unit(tower.bind({"params": params["tower"]}), x)

    return Conditioner(
        fields=("image",),
        slots=("context",),
        prepare=functools.partial(pictures.prepare_images, setting.size),
        null=np.full((*setting.size, 3), pictures.GREY, np.uint8),
        net=clip_vision.NearestVectors(tower, k),
        trainable=False,
        dropout=dropout,
        drop_output=True,
        before=before,
        remembered=remembered,
        remembered_dim=tower.projection_dim,
    )


def _memory(setting: Setting, tools: Tools, k: int) -> jax.Array:
    """What was remembered of the training pictures [n, d], n > k."""
    known = tools.memory[setting.name]
    if len(known) <= k:
        raise UserError(
            f"conditioners.{setting.name}.k: {k}, but there are {len(known)} training"
            " pictures; choose fewer"
        )
    return known
