"""Training pictures that are like one, as context: retrieval (RDM, section 6.6)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning import pictures
from ldm_jax.conditioning.conditioners import Conditioner, Given, Setting, Tools
from ldm_jax.config import UserError
from ldm_jax.nets import embedders


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
    of the picture; the original takes CLIP's embeddings. They are scaled to unit
    variance and go through a learned layer where `dim` is given. In training a picture
    is none of its own neighbours.
    """
    pictures.check_cells(setting, cells)
    size = setting.size
    width = cells * cells * setting.latent_shape[-1]

    def before(x: jax.Array, tools: Tools) -> jax.Array:
        e = embed(tools.encode_image(pictures.to_float(x), tools.keys), cells=cells)
        known = tools.memory[setting.name]
        if len(known) <= k:
            raise UserError(
                f"conditioners.{setting.name}.k: {k}, but there are {len(known)}"
                " training pictures; choose fewer"
            )
        own = int(tools.training)  # the nearest of all, then
        _, nearest = jax.lax.top_k(e @ known.T, k + own)
        return known[nearest[:, own:]] * jnp.float32(width**0.5)

    return Conditioner(
        fields=("image",),
        slots=("context",),
        prepare=functools.partial(pictures.prepare_images, size),
        null=np.full((*size, 3), pictures.GREY, np.uint8),
        net=Given() if dim is None else embedders.Projection(dim),
        dropout=dropout,
        drop_output=True,
        before=before,
        remembered=functools.partial(embed, cells=cells),
    )


def embed(z: jax.Array, cells: int) -> jax.Array:
    """Latents [b, h, w, c] to unit vectors [b, cells * cells * c]."""
    e = pictures.pooled(z, cells)
    return e / jnp.maximum(jnp.linalg.norm(e, axis=-1, keepdims=True), 1e-6)
