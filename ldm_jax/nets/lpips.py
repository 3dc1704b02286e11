"""LPIPS, the distance of two images in the features of VGG16 (Zhang et al. 2018).

Version 0.1, as `lpips` 0.1.4 and the autoencoders' losses of latent diffusion have it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import layers

WIDTHS, DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)  # of VGG16's five blocks

# ImageNet's means and deviations, for pixels in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _max_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima [b, h // 2, w // 2, c]; gradients go to the first of equals.

    So they do in torch and in `nn.max_pool`, whose backward pass on CPU takes three to
    five times as long.
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c)

    def first_max(a, b):
        return jnp.where(a >= b, a, b)

    x = first_max(x[:, :, :, :, 0], x[:, :, :, :, 1])
    return first_max(x[:, :, 0], x[:, :, 1])


class VGG16Features(nn.Module):
    """Convolutions of VGG16: normalised image [b, h, w, 3] to five feature maps.

    They are taken after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, in `dtype`.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        taps = []
        for block, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True), 1):
            if block > 1:
                x = _max_pool(x)
            for i in range(1, depth + 1):
                name = f"conv_{block}_{i}"
                x = nn.relu(layers.Conv(width, dtype=self.dtype, name=name)(x))
            taps.append(x)
        return taps


class LPIPS(nn.Module):
    """Distance of images x and y, [b, h, w, 3] in [-1, 1], h and w at least 16.

    Features are computed in `dtype`, all else in float32. A gradient with respect to y
    alone costs x no backward pass: the two go through VGG16 one after the other, since
    a batch of both would be differentiated whole.
    """

    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vgg = VGG16Features(dtype=self.dtype)
        self.heads = [
            self.param(f"head_{i}", nn.initializers.ones, (width,))
            for i, width in enumerate(WIDTHS)
        ]

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """[b] float32: the sum of the means of `maps`."""
        return sum(distances.mean((1, 2)) for distances in self.maps(x, y))

    def maps(self, x: jax.Array, y: jax.Array) -> list[jax.Array]:
        """Distances at each position of the five feature maps, [b, h', w'] float32."""
        of_x, of_y = self.vgg(_normalised(x)), self.vgg(_normalised(y))
        # A product with the heads, not a matmul, which TPUs round to bfloat16.
        return [
            (jnp.square(_unit(a) - _unit(b)) * head[None, None, None]).sum(-1)
            for a, b, head in zip(of_x, of_y, self.heads, strict=True)
        ]


def _normalised(x: jax.Array) -> jax.Array:
    if min(x.shape[1:3]) < 16:
        raise ValueError(
            f"images of {x.shape[1]}x{x.shape[2]} leave no feature of VGG16's fifth"
            " block; give LPIPS 16 pixels or more"
        )
    shift, scale = (jnp.array(v)[None, None, None] for v in (_SHIFT, _SCALE))
    return (x.astype(jnp.float32) - shift) / scale


def _unit(features: jax.Array) -> jax.Array:
    """Features [..., c] divided by their norm, which 1e-10 keeps from 0."""
    features = features.astype(jnp.float32)
    square = jnp.square(features).sum(-1, keepdims=True)
    # Where all features are 0, √ has an infinite slope, and 0 times that is NaN.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return features / (jnp.where(square > 0, norm, 0.0) + 1e-10)
