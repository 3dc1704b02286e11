"""The first stages of latent diffusion (Rombach et al., arXiv 2112.10752, §3.1).

`ch_mult` sets the widths of the levels; every level but the last halves the image, so
f = 2^(levels - 1). `AutoencoderKL`, `VQModel` and `Identity` have the same methods:
encode, latent, bottleneck, decode.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, layers, quantize


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


@flax.struct.dataclass
class Bottleneck:
    """What training decodes, z [b, h, w, c] float32, and its price, penalty [b].

    The penalty is the KL or the codebook's loss of an image. `indices` are the codes
    of a VQModel, None elsewhere.
    """

    z: jax.Array
    penalty: jax.Array
    indices: jax.Array | None = None


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

    def options_of(self, cls: type[nn.Module]) -> dict[str, Any]:
        """Constructor arguments of `cls` that are options of this module too."""
        names = {field.name for field in dataclasses.fields(cls)} - {"name", "parent"}
        return {name: getattr(self, name) for name in names}

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

    bias_offset: Sequence[float] | None = None  # of the last convolution

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
        features = self.z_channels * (1 + self.double_z)
        return self.conv(features, "conv_out", bias_offset=self.bias_offset)(h)


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


class Autoencoder(Coder):
    """What the KL and the VQ autoencoder share; their `setup` makes the parts."""

    embed_dim: int = 4

    def encode(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Image [b, H, W, in_channels] in [-1, 1] to what `latent` takes [b, h, w, d].

        KL: the moments of the posterior, d = 2·embed_dim. VQ: the latent before it is
        quantised, d = embed_dim, which is what diffusion works on.
        """
        return self.quant_conv(self.encoder(x, deterministic=deterministic))

    def decode_features(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`decode` up to the last convolution: `decode(z) == conv_out(this)`.

        A VQModel takes z as `bottleneck` gives it, already quantised.
        """
        return self.decoder.features(self.post_quant_conv(z), deterministic)

    def conv_out(self, features: jax.Array) -> jax.Array:
        """The decoder's last layer: what `decode_features` gave to image."""
        return self.decoder.image(features)


class AutoencoderKL(Autoencoder):
    """Encoder, decoder, and the 1x1 convolutions to and from `embed_dim` channels."""

    # The posterior's logvar starts about here: at 0, as in the reference, noise drowns
    # the first latents, and a short run pays for it.
    init_logvar: float = 0.0
    use_quant_convs: bool = True  # False: no 1x1 convolutions, as Stability trains it

    def setup(self):
        if not self.double_z:
            raise ValueError("double_z False: the KL autoencoder needs mean and logvar")
        if not self.use_quant_convs and self.embed_dim != self.z_channels:
            raise ValueError(
                f"embed_dim {self.embed_dim} differs from z_channels {self.z_channels},"
                " which needs use_quant_convs True"
            )
        options = self.options_of(Coder)
        start = (0.0,) * self.embed_dim + (self.init_logvar,) * self.embed_dim
        if self.use_quant_convs:
            self.encoder = Encoder(**options)
            self.quant_conv = layers.Conv(
                2 * self.embed_dim, 1, bias_offset=start, dtype=self.dtype
            )
            self.post_quant_conv = layers.Conv(self.z_channels, 1, dtype=self.dtype)
        else:
            self.encoder = Encoder(**options, bias_offset=start)
            self.quant_conv = self.post_quant_conv = lambda h: h
        self.decoder = Decoder(**options)

    def latent(self, encoded: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """z [b, h, w, embed_dim] of moments: drawn with `key`, the mode without."""
        posterior = Posterior.from_moments(encoded)
        return posterior.mode() if key is None else posterior.sample(key)

    def bottleneck(
        self, encoded: jax.Array, key: jax.Array | None = None
    ) -> Bottleneck:
        """`latent`, and the KL of every image."""
        z = self.latent(encoded, key)
        return Bottleneck(z, Posterior.from_moments(encoded).kl())

    def decode(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Latent z [b, h, w, embed_dim] to image [b, H, W, out_ch], not clipped."""
        return self.decoder(self.post_quant_conv(z), deterministic=deterministic)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Reconstructs x through the posterior's mode."""
        z = self.latent(self.encode(x, deterministic=deterministic))
        return self.decode(z, deterministic=deterministic)


class VQModel(Autoencoder):
    """An autoencoder whose decoder sees codes only; see `quantize.VectorQuantizer`.

    Its latent is the one before quantisation, and `decode` quantises: diffusion need
    not hit the codes (the reference's VQModelInterface).
    """

    z_channels: int = 3
    double_z: bool = False
    embed_dim: int = 3
    n_embed: int = 8192
    beta: float = 0.25
    legacy: bool = True
    remap: Sequence[int] | None = None
    unknown_index: str | int = "random"
    sane_index_shape: bool = False
    l2_normalize: bool = False
    ema_decay: float = 0.0
    revive_below: float = 0.0

    def setup(self):
        if self.double_z:
            raise ValueError("double_z True: a VQ autoencoder has no logvar")
        options = self.options_of(Coder)
        self.encoder, self.decoder = Encoder(**options), Decoder(**options)
        self.quant_conv = layers.Conv(self.embed_dim, 1, dtype=self.dtype)
        self.post_quant_conv = layers.Conv(self.z_channels, 1, dtype=self.dtype)
        self.quantize = self.make_quantizer()

    @property
    def num_indices(self) -> int:
        """How many values the indices take: the codes, or those of `remap`."""
        if self.remap is None:
            return self.n_embed
        highest = {"random": 0, "extra": len(self.remap)}.get(
            self.unknown_index, self.unknown_index
        )
        return max(len(self.remap), highest + 1)

    @nn.nowrap
    def make_quantizer(self) -> quantize.VectorQuantizer:
        """The quantizer, whose param is `quantize/embedding` of this net's."""
        cls = quantize.VectorQuantizer
        return cls(**self.options_of(cls))

    def latent(self, encoded: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """z [b, h, w, embed_dim]: `encoded` itself."""
        return encoded.astype(jnp.float32)

    def bottleneck(
        self, encoded: jax.Array, key: jax.Array | None = None
    ) -> Bottleneck:
        """Codes with the straight-through gradient, the codebook's loss, indices."""
        quantized = self.quantize(encoded, key)
        return Bottleneck(quantized.z_q, quantized.loss, quantized.indices)

    def decode(
        self, z: jax.Array, *, quantize: bool = True, deterministic: bool = True
    ) -> jax.Array:
        """Latent z [b, h, w, embed_dim] to image [b, H, W, out_ch], not clipped.

        z is quantised first. With `quantize` False it is decoded as is, but for its
        length if the codes have length 1.
        """
        step = self.quantize.straight_through if quantize else self.quantize.unit
        z = self.post_quant_conv(step(z))
        return self.decoder(z, deterministic=deterministic)

    def decode_code(
        self, indices: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Indices [b, h, w], as `bottleneck` gives them, to image [b, H, W, out_ch]."""
        z = self.post_quant_conv(self.quantize.get_codebook_entry(indices))
        return self.decoder(z, deterministic=deterministic)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Reconstructs x through the codes."""
        z = self.latent(self.encode(x, deterministic=deterministic))
        return self.decode(z, deterministic=deterministic)


class Identity(nn.Module):
    """The first stage of diffusion on pixels: the image is the latent; no params."""

    channels: int = 3

    ch_mult = (1,)  # f = 1
    limit = 1.0  # of a predicted latent

    @property
    def in_channels(self) -> int:
        return self.channels

    @property
    def embed_dim(self) -> int:
        return self.channels

    def encode(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return x

    def latent(self, encoded: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return encoded

    def bottleneck(
        self, encoded: jax.Array, key: jax.Array | None = None
    ) -> Bottleneck:
        return Bottleneck(encoded, jnp.zeros(len(encoded)))

    def decode(self, z: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return z

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return x


_KL_F4 = dict(kind="kl", ch_mult=(1, 2, 4), z_channels=3, embed_dim=3)
_KL_F8 = dict(kind="kl", ch_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4)
_F16 = dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,))
_KL_F16 = dict(kind="kl", **_F16, z_channels=16, embed_dim=16)
_KL_F32 = dict(
    kind="kl",
    ch_mult=(1, 1, 2, 2, 4, 4),
    attn_resolutions=(16, 8),
    z_channels=64,
    embed_dim=64,
)
_VQ_F4 = dict(kind="vq", ch_mult=(1, 2, 4), z_channels=3, embed_dim=3, n_embed=8192)
_VQ_F8 = dict(
    kind="vq",
    ch_mult=(1, 2, 2, 4),
    attn_resolutions=(32,),
    z_channels=4,
    embed_dim=4,
    n_embed=16384,
)

# What is not named here is a default: 128 channels, two blocks a level, 256 pixels.
VARIANTS = {
    "kl_f4": _KL_F4,
    "kl_f8": _KL_F8,
    "kl_f16": _KL_F16,
    "kl_f32": _KL_F32,
    "vq_f4": _VQ_F4,
    "vq_f4_noattn": _VQ_F4 | dict(attn_type="none"),
    "vq_f8": _VQ_F8,
    "vq_f8_n256": _VQ_F8 | dict(n_embed=256),
    "vq_f16": dict(kind="vq", **_F16, z_channels=8, embed_dim=8, n_embed=16384),
    "vqgan_f16_1024": dict(
        kind="vq", **_F16, z_channels=256, embed_dim=256, n_embed=1024
    ),
    "inpainting_big": _VQ_F4 | dict(attn_type="none"),
    "sd": _KL_F8,
    "sd_x4": _KL_F4 | dict(z_channels=4, embed_dim=4),
    "rdm": _KL_F16,
    "sgm_kl_f4": _KL_F4
    | dict(
        z_channels=4,
        embed_dim=4,
        num_res_blocks=4,
        attn_type="none",
        use_quant_convs=False,
    ),
    "sgm_kl_f8": _KL_F8 | dict(z_channels=8, embed_dim=8, use_quant_convs=False),
    "identity": dict(kind="identity"),
}

KINDS = {"kl": AutoencoderKL, "vq": VQModel, "identity": Identity}
