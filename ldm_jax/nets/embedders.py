"""Small conditioning nets: a class as a token, a map brought to the latent's size."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax import resample
from ldm_jax.nets import layers


def resize(
    x: jax.Array,
    size: tuple[int, int],
    method: str,
    *,
    corners: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """[b, h, w, c] to [b, *size, c] in float32, as torch; see `resample`.

    `jax.image.resize` antialiases and has another cubic, so published weights would
    see other pictures.
    """
    rows, columns = (
        jnp.asarray(
            resample.matrix(n, m, method, corners=corners, scale=scale), jnp.float32
        )
        for n, m in zip(x.shape[1:3], size, strict=True)
    )
    # With weights in bfloat16 an even surface would come out in steps.
    exact = jax.lax.Precision.HIGHEST
    x = x.astype(jnp.float32)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=exact)


def scaled_depth(depth: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[b, h, w, 1] resized to `size`, each map scaled by its own extremes to [-1, 1].

    A constant one becomes -1 (`LatentDepth2ImageDiffusion`).
    """
    d = resize(depth, size, "bicubic")
    low, high = (f(d, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    return 2 * (d - low) / (high - low + 1e-3) - 1


class ClassEmbedder(nn.Module):
    """Class ids [b] -> one token each, [b, 1, dim] (`ClassEmbedder`)."""

    num_classes: int
    dim: int

    @nn.compact
    def __call__(self, ids: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic
        # torch's nn.Embedding starts at unit variance.
        init = nn.initializers.normal(1.0)
        table = nn.Embed(self.num_classes, self.dim, embedding_init=init, name="embed")
        return table(ids)[:, None, :]


class SpatialRescaler(nn.Module):
    """Maps [b, h, w, c] resized `n_stages` times by `multiplier` (`SpatialRescaler`).

    `method` is one of resample.METHODS; the reference's area is `adaptive`.

    `out_channels` adds a 1x1 convolution, the channel mapper.
    """

    n_stages: int = 1
    method: str = "bilinear"
    multiplier: float = 0.5
    out_channels: int | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic
        for _ in range(self.n_stages):
            h, w = (int(side * self.multiplier) for side in x.shape[1:3])
            scale = None if self.method == "adaptive" else 1 / self.multiplier
            x = resize(x, (h, w), self.method, scale=scale)
        if self.out_channels is not None:
            mapper = layers.Dense(
                self.out_channels, use_bias=self.bias, name="channel_mapper"
            )
            x = mapper(x)
        return x


class Projection(nn.Module):
    """Vectors [b, …, c] to [b, …, dim] by one learned layer."""

    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic
        return layers.Dense(self.dim, name="proj")(x)


def unit(e: jax.Array) -> jax.Array:
    """Vectors [b, d] at length 1; those of length 0 stay."""
    return e / jnp.maximum(jnp.linalg.norm(e, axis=-1, keepdims=True), 1e-6)


def nearest(
    e: jax.Array, known: jax.Array, k: int, without_first: jax.Array | bool
) -> jax.Array:
    """The `k` of `known` [n, d], n > k, of the greatest product with `e` [b, d]."""
    _, order = jax.lax.top_k(e @ known.T, k + 1)
    return known[jnp.where(without_first, order[:, 1:], order[:, :-1])]
