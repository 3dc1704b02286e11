"""Parts that the nets share: convolution, dense, norms, resampling, timestep embedding.

Parameters are float32; a layer computes in its `dtype`. Weights start as torch's do,
uniform in ±1/√fan_in, because the learning rates of the papers were found with that.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_SPATIAL = {1: "H", 2: "HW", 3: "DHW"}


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Initializer uniform in ±1/√fan_in, torch's default for weights and biases."""

    def init(key, shape, dtype=jnp.float32):
        limit = fan_in**-0.5
        # The same numbers as drawn in `shape`, but XLA compiles four axes far slower.
        flat = (math.prod(shape[:-1]), shape[-1])
        return jax.random.uniform(key, flat, dtype, -limit, limit).reshape(shape)

    return init


def _per_channel(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def look_up(module: nn.Module, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """The embeddings [b, s, d] of tokens [b, s]: rows of `table` or of what follows.

    Those that textual inversion has trained follow: a param `added_emb` [k, d] that
    `module` may be given beside its own. Ids outside of both give NaN, so that a wrong
    tokenizer shows.
    """
    rows = jnp.take(table, tokens, axis=0)
    if not module.has_variable("params", "added_emb"):
        return rows
    own, added = tokens < len(table), module.get_variable("params", "added_emb")
    more = jnp.take(added, jnp.where(own, 0, tokens - len(table)), axis=0)
    return jnp.where(own[..., None], rows, more)


class Conv(nn.Module):
    """Convolution of [b, *spatial, c]; `padding` None keeps the size at stride 1.

    `padding` is one number for every side, or a (before, after) pair for each axis.
    """

    features: int
    kernel_size: int = 3
    strides: int | Sequence[int] = 1
    padding: int | Sequence[tuple[int, int]] | None = None
    use_bias: bool = True
    dims: int = 2
    zero_init: bool = False
    bias_offset: Sequence[float] | None = None  # added to the bias's initial value
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, padding, strides = self.kernel_size, self.padding, self.strides
        if padding is None:
            padding = size // 2
        if isinstance(padding, int):
            padding = ((padding, padding),) * self.dims
        if isinstance(strides, int):
            strides = (strides,) * self.dims
        fan_in = x.shape[-1] * size**self.dims
        init = nn.initializers.zeros if self.zero_init else torch_uniform(fan_in)
        shape = (size,) * self.dims + (x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape)
        axes = _SPATIAL[self.dims]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            strides,
            padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        if self.use_bias:
            bias = self.param("bias", self._bias_init(init), (self.features,))
            x = x + _per_channel(bias.astype(self.dtype), x.ndim)
        return x

    def _bias_init(self, init: nn.initializers.Initializer):
        if self.bias_offset is None:
            return init
        return lambda *args: init(*args) + jnp.asarray(self.bias_offset)


class Dense(nn.Module):
    """Linear layer over the last axis."""

    features: int
    use_bias: bool = True
    zero_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        init = nn.initializers.zeros if self.zero_init else torch_uniform(width)
        kernel = self.param("kernel", init, (width, self.features))
        x = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (((x.ndim - 1,), (0,)), ((), ())),
        )
        if self.use_bias:
            bias = self.param("bias", init, (self.features,)).astype(self.dtype)
            x = x + _per_channel(bias, x.ndim)
        return x


class GroupNorm(nn.Module):
    """Group normalisation of [b, *spatial, c], statistics in float32.

    The autoencoder and the SpatialTransformer use eps 1e-6, UNet blocks 1e-5.
    """

    groups: int = 32
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, c = x.shape[0], x.shape[-1]
        if c % self.groups:
            raise ValueError(
                f"{c} channels can't be normalised in {self.groups} groups; make every"
                f" width a multiple of {self.groups}"
            )
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        x = x.astype(jnp.float32)
        space = tuple(range(1, x.ndim - 1))

        # Around one value of each group, which cancels out of what follows: a mean far
        # from 0 would take the digits of the variance.
        width = c // self.groups
        near = x[(slice(None), *(n // 2 for n in x.shape[1:-1]), slice(0, c, width))]
        near = jnp.repeat(jax.lax.stop_gradient(near), width, axis=1)
        x = x - jnp.expand_dims(near, space)

        # Per channel first: no reshape of the whole array, and one pass over it.
        def group_mean(channel_means):
            means = channel_means.reshape(b, self.groups, width).mean(-1)
            return jnp.repeat(means, width, axis=1)

        mean = group_mean(x.mean(space))
        variance = group_mean((x * x).mean(space)) - mean * mean
        gain = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + self.eps) * scale[None]
        shift = bias[None] - mean * gain
        return (
            x * jnp.expand_dims(gain, space) + jnp.expand_dims(shift, space)
        ).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, eps 1e-5, statistics in float32."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        x = x * _per_channel(scale, x.ndim) + _per_channel(bias, x.ndim)
        return x.astype(self.dtype)


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of t [b] -> [b, dim] float32: cosines, then sines; t may be fractional.

    Frequencies fall from 1 towards 1e-4 (Vaswani et al. 2017); an odd `dim` gets a
    zero column.
    """
    half = dim // 2
    # Rounded where torch rounds: at t = 1000 the last bit of a frequency is 6e-5 here.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-np.log(10_000))
    freqs = np.exp((exponents / np.float32(half)).astype(np.float64))
    freqs = jnp.asarray(freqs.astype(np.float32))
    angles = t.astype(jnp.float32)[:, None] * freqs[None]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def resampled_axes(dims: int) -> tuple[int, ...]:
    """Axes that a UNet halves and doubles; a video's frames (3-D) keep their number."""
    return (2, 3) if dims == 3 else tuple(range(1, dims + 1))


def upsample_nearest(x: jax.Array, dims: int = 2) -> jax.Array:
    """Doubles the spatial size by repetition."""
    for axis in resampled_axes(dims):
        x = jnp.repeat(x, 2, axis=axis)
    return x


def avg_pool(x: jax.Array, dims: int = 2) -> jax.Array:
    """Halves the spatial size by means of two; an odd last row is left out."""
    for axis in resampled_axes(dims):
        size = x.shape[axis] // 2
        x = jax.lax.slice_in_dim(x, 0, 2 * size, axis=axis)
        x = x.reshape(*x.shape[:axis], size, 2, *x.shape[axis + 1 :]).mean(axis + 1)
    return x
