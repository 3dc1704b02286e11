"""The residual block of the UNet and of its encoder half, told of the timestep."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import layers


class ResBlock(nn.Module):
    """Two 3x3 convolutions told of the timestep by `emb` [b, 4·model_channels].

    `resample` "down" or "up" changes the size between the first activation and
    convolution (and on the skip). The second convolution starts at zero.
    """

    features: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    resample: str | None = None
    dims: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
        def conv(name, **kwargs):
            return layers.Conv(
                self.features, dims=self.dims, dtype=self.dtype, name=name, **kwargs
            )

        h = nn.silu(layers.GroupNorm(dtype=self.dtype, name="norm1")(x))
        if self.resample is not None:
            resamplers = {"down": layers.avg_pool, "up": layers.upsample_nearest}
            resample = resamplers[self.resample]
            h, x = resample(h, self.dims), resample(x, self.dims)
        h = conv("conv1")(h)
        width = self.features * (2 if self.use_scale_shift_norm else 1)
        emb = layers.Dense(width, dtype=self.dtype, name="emb_proj")(nn.silu(emb))
        emb = jnp.expand_dims(emb, tuple(range(1, self.dims + 1)))
        norm2 = layers.GroupNorm(dtype=self.dtype, name="norm2")
        if self.use_scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + emb)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=deterministic)
        h = conv("conv2", zero_init=True)(h)
        if x.shape[-1] != self.features:
            x = conv("skip", kernel_size=1)(x)
        return x + h
