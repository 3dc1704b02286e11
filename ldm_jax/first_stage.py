"""The first stage as the second sees it: unit-variance latents in, images out."""

from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import autoencoder


@flax.struct.dataclass
class FirstStage:
    """Frozen params of the autoencoder with what was measured behind them.

    mean, std [c] are measured over the training data when stage one ends, and stored
    in its checkpoint. An imported checkpoint with a scale factor s has mean 0, std 1/s.
    memory {name: [n, d]} is what conditions look up of the training pictures, encoders
    {name: params} those of conditions that are not trained either.
    """

    params: Any
    mean: jax.Array
    std: jax.Array
    memory: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)
    encoders: Mapping[str, Any] = flax.struct.field(default_factory=dict)


def downsampling(net: nn.Module) -> int:
    """The factor f by which a latent is smaller than its image."""
    return 2 ** (len(net.ch_mult) - 1)


def latent_shape(net: nn.Module, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, c) of the latent of an image of `size` [H, W]."""
    factor = downsampling(net)
    return size[0] // factor, size[1] // factor, net.embed_dim


def encode_moments(net: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    """Image [b, H, W, 3] in [-1, 1] to what its latent is drawn from, [b, h, w, d].

    KL: the posterior's moments, d = 2c. VQ: the latent before quantisation, d = c.
    """
    return net.apply({"params": params}, x, method="encode").astype(jnp.float32)


def mean_and_variance(
    net: nn.Module, moments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the latent that `moments` describe, each [b, h, w, c]; VQ has no variance."""
    if isinstance(net, autoencoder.AutoencoderKL):
        posterior = autoencoder.Posterior.from_moments(moments)
        return posterior.mean, jnp.exp(posterior.logvar)
    return moments, jnp.zeros_like(moments)


def sample_moments(
    net: nn.Module, first_stage: FirstStage, moments: jax.Array, key: jax.Array
) -> jax.Array:
    """Draws a unit-variance latent z [b, h, w, c] from what `encode_moments` gave."""
    return standardize(first_stage, net.apply({}, moments, key, method="latent"))


def standardize(first_stage: FirstStage, z: jax.Array) -> jax.Array:
    """Latents [b, h, w, c] as the autoencoder has them, at unit variance."""
    return (z - first_stage.mean[None, None, None]) / first_stage.std[None, None, None]


def encode(
    net: nn.Module, first_stage: FirstStage, x: jax.Array, key: jax.Array
) -> jax.Array:
    """Image [b, H, W, 3] in [-1, 1] to a unit-variance latent z [b, h, w, c]."""
    moments = encode_moments(net, first_stage.params, x)
    return sample_moments(net, first_stage, moments, key)


def decode(net: nn.Module, first_stage: FirstStage, z: jax.Array) -> jax.Array:
    """Unit-variance latent z [b, h, w, c] to an image [b, H, W, 3], about [-1, 1].

    A VQ autoencoder takes the nearest codes first.
    """
    z = z * first_stage.std[None, None, None] + first_stage.mean[None, None, None]
    x = net.apply({"params": first_stage.params}, z, method="decode")
    return x.astype(jnp.float32)
