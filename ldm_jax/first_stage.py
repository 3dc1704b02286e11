"""The first stage as the second sees it: unit-variance latents in, images out."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import autoencoder


@flax.struct.dataclass
class FirstStage:
    """Frozen params of the autoencoder with the statistics of its latents.

    mean, std [c] are measured over the training data when stage one ends, and stored
    in its checkpoint. An imported checkpoint with a scale factor s has mean 0, std 1/s.
    """

    params: Any
    mean: jax.Array
    std: jax.Array


def latent_shape(net: nn.Module, resolution: int) -> tuple[int, int, int]:
    """(h, w, c) of the latent of a `resolution`-pixel square image."""
    factor = 2 ** (len(net.ch_mult) - 1)
    return resolution // factor, resolution // factor, net.embed_dim


def encode_moments(net: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    """Image [b, H, W, 3] in [-1, 1] to the posterior's moments [b, h, w, 2c]."""
    return net.apply({"params": params}, x, method="encode").astype(jnp.float32)


def sample_moments(
    first_stage: FirstStage, moments: jax.Array, key: jax.Array
) -> jax.Array:
    """Draws a unit-variance latent z [b, h, w, c] from the posterior's moments."""
    z = autoencoder.Posterior.from_moments(moments).sample(key)
    return (z - first_stage.mean[None, None, None]) / first_stage.std[None, None, None]


def encode(
    net: nn.Module, first_stage: FirstStage, x: jax.Array, key: jax.Array
) -> jax.Array:
    """Image [b, H, W, 3] in [-1, 1] to a unit-variance latent z [b, h, w, c]."""
    return sample_moments(first_stage, encode_moments(net, first_stage.params, x), key)


def decode(net: nn.Module, first_stage: FirstStage, z: jax.Array) -> jax.Array:
    """Unit-variance latent z [b, h, w, c] to an image [b, H, W, 3], about [-1, 1]."""
    z = z * first_stage.std[None, None, None] + first_stage.mean[None, None, None]
    x = net.apply({"params": first_stage.params}, z, method="decode")
    return x.astype(jnp.float32)
