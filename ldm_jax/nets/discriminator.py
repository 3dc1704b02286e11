"""The PatchGAN discriminator (Isola et al., arXiv 1611.07004, appendix 6.1.2).

Sizes and initial values are those of NLayerDiscriminator in taming-transformers, which
the autoencoders of latent diffusion were trained with.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import layers


def _near_one(key, shape, dtype=jnp.float32):
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation of [b, h, w, c], statistics in float32, eps 1e-5.

    Under jit a mean over the batch is one over all devices that hold it. With `groups`
    above 1 each of that many contiguous runs of rows is normalised by its own
    statistics. In train mode `batch_stats` move a tenth of the way to the batch's mean
    and unbiased variance (means over groups); otherwise x is normalised by them.
    """

    groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        b, h, w, c = x.shape
        groups = self.groups if train else 1
        if b % groups:
            raise ValueError(
                f"a batch of {b} can't be normalised in {groups} statistic_groups; make"
                " it a multiple of that"
            )
        scale = self.param("scale", _near_one, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))

        x = x.astype(jnp.float32).reshape(groups, b // groups, h, w, c)
        within = (1, 2, 3)
        if train:
            mean = x.mean(within)
            variance = jnp.square(x - jnp.expand_dims(mean, within)).mean(within)
        else:
            mean, variance = running_mean.value[None], running_var.value[None]
        if train and not self.is_initializing():
            n = b // groups * h * w
            unbiased = variance * (n / max(n - 1, 1))
            running_mean.value += 0.1 * (mean.mean(0) - running_mean.value)
            running_var.value += 0.1 * (unbiased.mean(0) - running_var.value)
        gain = jax.lax.rsqrt(variance + 1e-5) * scale[None]
        shift = bias[None] - mean * gain
        x = x * jnp.expand_dims(gain, within) + jnp.expand_dims(shift, within)
        return x.reshape(b, h, w, c).astype(self.dtype)


class ActNorm(nn.Module):
    """scale · (x + loc) of [b, h, w, c], set once to give a batch mean 0 and std 1.

    `initialize` does that, unless `initialized` in `batch_stats` says that it is done.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, initialize: bool) -> jax.Array:
        c = x.shape[-1]
        loc = self.param("loc", nn.initializers.zeros, (c,))
        scale = self.param("scale", nn.initializers.ones, (c,))
        done = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.bool_)
        x = x.astype(jnp.float32)
        if initialize:
            batch = (0, 1, 2)
            loc = jnp.where(done.value, loc, -x.mean(batch))
            scale = jnp.where(done.value, scale, 1 / (x.std(batch, ddof=1) + 1e-6))
            self.put_variable("params", "loc", loc)
            self.put_variable("params", "scale", scale)
            done.value = jnp.ones_like(done.value)
        per_channel = (None, None, None)
        return (scale[per_channel] * (x + loc[per_channel])).astype(self.dtype)


class PatchDiscriminator(nn.Module):
    """Image [b, H, W, in_channels] to one float32 logit a patch [b, h, w, 1].

    h = H / 2^n_layers - 2; the default's patches are 70 pixels wide. `norm`:
    - "batch": statistics of the whole batch, on all devices.
    - "batch_per_device": of each of `statistic_groups` runs of rows, as torch's DDP
      without synchronised statistics has them.
    - "actnorm": starts as the identity; give it its data-dependent start by
      `_, variables = net.apply(variables, x, train=True, initialize=True,
      mutable=["params", "batch_stats"])`.
    - "group": 32 groups in each image; needs no `batch_stats`.
    """

    in_channels: int = 3
    ndf: int = 64
    n_layers: int = 3
    norm: str = "batch"  # batch | batch_per_device | actnorm | group
    statistic_groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, initialize: bool = False
    ) -> jax.Array:
        if min(x.shape[1:3]) < self._least_size():
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} leave no patch after n_layers"
                f" {self.n_layers}; give it {self._least_size()} pixels or fewer layers"
            )
        h = nn.leaky_relu(self._conv(x, self.ndf, 2, "conv_0"), 0.2)
        for i in range(1, self.n_layers + 1):
            features = self.ndf * min(2**i, 8)
            h = self._conv(h, features, 2 if i < self.n_layers else 1, f"conv_{i}")
            h = self._normalised(h, f"norm_{i}", train, initialize)
            h = nn.leaky_relu(h, 0.2)
        return self._conv(h, 1, 1, "conv_out").astype(jnp.float32)

    def abstract_inputs(self) -> dict:
        """The smallest legal arguments of `__call__`, as shapes, for `eval_shape`."""
        size = self._least_size()
        shape = (self.statistic_groups, size, size, self.in_channels)
        return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def _least_size(self) -> int:
        return 3 * 2**self.n_layers

    def _conv(self, x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
        # A batch norm would take away what a bias before it adds.
        use_bias = name in ("conv_0", "conv_out") or not self.norm.startswith("batch")
        return nn.Conv(
            features,
            (4, 4),
            stride,
            padding=1,
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(0.02),
            bias_init=layers.torch_uniform(16 * x.shape[-1]),
            dtype=self.dtype,
            name=name,
        )(x)

    def _normalised(self, h, name, train, initialize):
        if self.norm == "batch":
            return BatchNorm(dtype=self.dtype, name=name)(h, train)
        if self.norm == "batch_per_device":
            return BatchNorm(self.statistic_groups, self.dtype, name=name)(h, train)
        if self.norm == "actnorm":
            return ActNorm(self.dtype, name=name)(h, initialize)
        if self.norm == "group":
            return layers.GroupNorm(dtype=self.dtype, name=name)(h)
        raise ValueError(
            f"norm {self.norm!r}; choose one of batch, batch_per_device, actnorm, group"
        )
