"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752, §3.1).

`ch_mult` sets the widths of the levels; every level but the last halves the image, so
f = 2^(levels - 1).
"""

import dataclasses
from collections.abc import Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, layers


@flax.struct.dataclass
class Posterior:
    """Diagonal Gaussian over latents; mean and logvar are [b, h, w, c] float32."""

    mean: jax.Array
    logvar: jax.Array

    @classmethod
    def from_moments(cls, moments: jax.Array) -> "Posterior":
        """Splits moments [b, h, w, 2c]; logvar is clamped to [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws z [b, h, w, c]."""
        noise = jax.random.normal(key, self.mean.shape)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def mode(self) -> jax.Array:
        """The most likely z [b, h, w, c]."""
        return self.mean

    def kl(self) -> jax.Array:
        """KL to the standard normal [b], summed (not averaged) over a latent."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, z: jax.Array) -> jax.Array:
        """Negative log-likelihood of z [b], summed over a latent."""
        distance = jnp.square(z - self.mean) * jnp.exp(-self.logvar)
        return 0.5 * (jnp.log(2 * jnp.pi) + self.logvar + distance).sum((1, 2, 3))


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip; unlike the UNet's, no layer starts at zero."""

    features: int
    dropout: float
    norm_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        def norm(name):
            return layers.GroupNorm(self.norm_groups, 1e-6, self.dtype, name=name)

        def conv(name, size=3):
            return layers.Conv(self.features, size, dtype=self.dtype, name=name)

        h = conv("conv1")(nn.silu(norm("norm1")(x)))
        h = nn.silu(norm("norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
        h = conv("conv2")(h)
        if x.shape[-1] != self.features:
            x = conv("skip", 1)(x)
        return x + h


class Coder(nn.Module):
    """What `Encoder` and `Decoder` share: options and the way blocks are made.

    `attn_resolutions` counts from `resolution`, whatever the size of the actual image,
    so the placement of attention is fixed when the net is made.
    """

    ch: int = 128
    out_ch: int = 3
    ch_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    in_channels: int = 3
    resolution: int = 256
    z_channels: int = 4
    double_z: bool = True
    use_linear_attn: bool = False
    attn_type: str = "vanilla"  # vanilla | linear | none
    give_pre_end: bool = False
    tanh_out: bool = False
    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32

    def conv(self, features: int, name: str, **kwargs) -> layers.Conv:
        return layers.Conv(features, dtype=self.dtype, name=name, **kwargs)

    def res(self, h: jax.Array, level: int, name: str, deterministic: bool):
        features = self.ch * self.ch_mult[level]
        return ResBlock(
            features, self.dropout, self.norm_groups, self.dtype, name=name
        )(h, deterministic)

    def attn(self, h: jax.Array, name: str) -> jax.Array:
        kind = "linear" if self.use_linear_attn else self.attn_type
        if kind == "vanilla":
            block = attention.SingleHeadAttention
            return block(self.norm_groups, self.dtype, name=name)(h)
        if kind == "linear":
            return attention.LinearAttention(self.dtype, name=name)(h)
        if kind == "none":
            return h
        raise ValueError(f"attn_type {kind!r}; choose one of vanilla, linear, none")

    def has_attn(self, level: int) -> bool:
        return self.resolution // 2**level in self.attn_resolutions

    def mid(self, h: jax.Array, deterministic: bool) -> jax.Array:
        h = self.res(h, -1, "mid_res_0", deterministic)
        h = self.attn(h, "mid_attn")
        return self.res(h, -1, "mid_res_1", deterministic)

    def finish(self, h: jax.Array) -> jax.Array:
        norm = layers.GroupNorm(self.norm_groups, 1e-6, self.dtype, name="norm_out")
        return nn.silu(norm(h))


class Encoder(Coder):
    """Image [b, H, W, in_channels] to features [b, h, w, z_channels or twice that]."""

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        h = self.conv(self.ch, "conv_in")(x)
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.num_res_blocks):
                h = self.res(h, level, f"down_{level}_res_{i}", deterministic)
                if self.has_attn(level):
                    h = self.attn(h, f"down_{level}_attn_{i}")
            if level == len(self.ch_mult) - 1:
                break
            if self.resamp_with_conv:
                # Pads right and bottom only, as the checkpoints were trained.
                pads = ((0, 1), (0, 1))
                name = f"down_{level}_downsample"
                h = self.conv(self.ch * mult, name, strides=2, padding=pads)(h)
            else:
                h = layers.avg_pool(h)
        h = self.finish(self.mid(h, deterministic))
        return self.conv(self.z_channels * (1 + self.double_z), "conv_out")(h)


class Decoder(Coder):
    """Latent [b, h, w, z_channels] to image [b, H, W, out_ch]; level 0 is the finest.

    With `give_pre_end` it returns the features before the last norm instead.
    """

    def setup(self):
        self.conv_out = layers.Conv(self.out_ch, dtype=self.dtype)

    @nn.compact
    def features(self, z: jax.Array, deterministic: bool) -> jax.Array:
        """Everything before `conv_out`: [b, H, W, ch · ch_mult[0]]."""
        h = self.conv(self.ch * self.ch_mult[-1], "conv_in")(z)
        h = self.mid(h, deterministic)
        for level in reversed(range(len(self.ch_mult))):
            for i in range(self.num_res_blocks + 1):
                h = self.res(h, level, f"up_{level}_res_{i}", deterministic)
                if self.has_attn(level):
                    h = self.attn(h, f"up_{level}_attn_{i}")
            if level > 0:
                h = layers.upsample_nearest(h)
                if self.resamp_with_conv:
                    h = self.conv(h.shape[-1], f"up_{level}_upsample")(h)
        return h if self.give_pre_end else self.finish(h)

    def image(self, features: jax.Array) -> jax.Array:
        """The last layer: features to image."""
        x = self.conv_out(features)
        return jnp.tanh(x) if self.tanh_out else x

    def __call__(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        h = self.features(z, deterministic)
        return h if self.give_pre_end else self.image(h)


class AutoencoderKL(Coder):
    """Encoder, decoder, and the 1x1 convolutions to and from `embed_dim` channels."""

    embed_dim: int = 4
    # The posterior's logvar starts about here: at 0, as in the reference, noise drowns
    # the first latents, and a short run pays for it.
    init_logvar: float = 0.0

    def setup(self):
        if not self.double_z:
            raise ValueError("double_z False: the KL autoencoder needs mean and logvar")
        names = [field.name for field in dataclasses.fields(Coder)]
        options = {n: getattr(self, n) for n in names if n not in ("name", "parent")}
        self.encoder = Encoder(**options)
        self.decoder = Decoder(**options)
        start = (0.0,) * self.embed_dim + (self.init_logvar,) * self.embed_dim
        self.quant_conv = layers.Conv(
            2 * self.embed_dim, 1, bias_offset=start, dtype=self.dtype
        )
        self.post_quant_conv = layers.Conv(self.z_channels, 1, dtype=self.dtype)

    def encode(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Image [b, H, W, in_channels] in [-1, 1] to moments [b, h, w, 2·embed_dim]."""
        return self.quant_conv(self.encoder(x, deterministic=deterministic))

    def decode(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Latent z [b, h, w, embed_dim] to image [b, H, W, out_ch], not clipped."""
        return self.decoder(self.post_quant_conv(z), deterministic=deterministic)

    def decode_features(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`decode` up to the last convolution: `decode(z) == conv_out(this)`."""
        return self.decoder.features(self.post_quant_conv(z), deterministic)

    def conv_out(self, features: jax.Array) -> jax.Array:
        """The decoder's last layer: what `decode_features` gave to image."""
        return self.decoder.image(features)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Reconstructs x through the posterior's mode."""
        moments = self.encode(x, deterministic=deterministic)
        z = Posterior.from_moments(moments).mode()
        return self.decode(z, deterministic=deterministic)


_KL_F4 = dict(ch_mult=(1, 2, 4), z_channels=3, embed_dim=3)
_KL_F8 = dict(ch_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4)
_KL_F16 = dict(
    ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,), z_channels=16, embed_dim=16
)
_KL_F32 = dict(
    ch_mult=(1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8), z_channels=64, embed_dim=64
)

VARIANTS = {
    "kl_f4": _KL_F4,
    "kl_f8": _KL_F8,
    "kl_f16": _KL_F16,
    "kl_f32": _KL_F32,
    "sd": _KL_F8,
    "sd_x4": _KL_F4 | dict(z_channels=4, embed_dim=4),
    "rdm": _KL_F16,
}
