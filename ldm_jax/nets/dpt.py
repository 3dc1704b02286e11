"""Depth from one picture: MiDaS's DPT-hybrid (Ranftl et al., arXiv 2103.13413), frozen.

A ResNet's maps go through a vision transformer; two maps of each, coarse to fine, are
then fused into one of the picture's size. Stable Diffusion 2's depth-to-image net was
trained on what it says.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, embedders, layers

_PATCH = 16  # pixels of the picture per token
_MULTIPLE = 32  # the coarsest map has half as many


def size_for(height: int, width: int, side: int = 384) -> tuple[int, int]:
    """The (height, width) that a picture is looked at in: multiples of 32.

    Aspect is kept but for the rounding, and the scale is that of height or width,
    whichever has the less to change to become `side` (MiDaS's `minimal`).
    """
    scale = min(side / height, side / width, key=lambda s: abs(1 - s))
    multiples = (round(scale * n / _MULTIPLE) for n in (height, width))
    return tuple(max(m, 1) * _MULTIPLE for m in multiples)


def preprocess(x: jax.Array, side: int = 384) -> jax.Array:
    """Pictures [b, h, w, 3] in [-1, 1] as `DPTHybrid` wants them, near `side` pixels.

    [-1, 1] is what it calls mean 0.5 and std 0.5. Bicubic without antialiasing, whose
    overshoot at edges stays, as in MiDaS.
    """
    return embedders.resize(x, size_for(*x.shape[1:3], side), "bicubic")


def _double(x: jax.Array) -> jax.Array:
    size = (2 * x.shape[1], 2 * x.shape[2])
    return embedders.resize(x, size, "bilinear", corners=True)


class StandardizedConv(nn.Module):
    """Convolution by filters of mean 0 and variance 1 (Qiao et al., arXiv 1903.10520).

    No bias. Padded as TensorFlow does: at stride 2 more after than before.
    """

    features: int
    kernel_size: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        variance = (kernel * kernel).mean((0, 1, 2), keepdims=True)
        return jax.lax.conv_general_dilated(
            x,
            kernel * jax.lax.rsqrt(variance + 1e-8),
            (self.strides, self.strides),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions around a narrow middle, residual."""

    features: int
    groups: int
    strides: int = 1
    project: bool = False  # the skip too, as the first block of a stage does

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv_norm(h, names, *conv):
            h = StandardizedConv(*conv, name=names[0])(h)
            return layers.GroupNorm(self.groups, name=names[1])(h)

        narrow = self.features // 4
        h = nn.relu(conv_norm(x, ("conv1", "norm1"), narrow, 1))
        h = nn.relu(conv_norm(h, ("conv2", "norm2"), narrow, 3, self.strides))
        h = conv_norm(h, ("conv3", "norm3"), self.features, 1)
        if self.project:
            names = ("skip", "skip_norm")
            x = conv_norm(x, names, self.features, 1, self.strides)
        return nn.relu(x + h)


class ViTBlock(nn.Module):
    """Attention, then an MLP of four times the width; each after a norm, residual."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(name):
            return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)

        dim = x.shape[-1]
        attn = attention.CrossAttention(
            self.heads, dim // self.heads, qkv_bias=True, name="attn"
        )
        x = x + attn(norm("norm1")(x))
        h = layers.Dense(4 * dim, name="ff_in")(norm("norm2")(x))
        h = nn.gelu(h, approximate=False)
        return x + layers.Dense(dim, name="ff_out")(h)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, residual."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = layers.Conv(x.shape[-1], name="conv1")(nn.relu(x))
        return x + layers.Conv(x.shape[-1], name="conv2")(nn.relu(h))


class Fusion(nn.Module):
    """Adds a map `skip` to the coarser ones' sum `x`, if there is one; doubles it."""

    @nn.compact
    def __call__(self, x: jax.Array | None, skip: jax.Array) -> jax.Array:
        if x is not None:
            skip = x + ResidualUnit(name="unit1")(skip)
        h = _double(ResidualUnit(name="unit2")(skip))
        return layers.Conv(h.shape[-1], 1, name="out")(h)


class DPTHybrid(nn.Module):
    """Pictures [b, h, w, 3] of `preprocess` -> inverse depth [b, h, w], not negative.

    Depth is relative: up to a scale and a shift of its inverse, which differ from
    picture to picture. Raises ValueError where a side is no multiple of 32.
    """

    stem: int  # the ResNet's width before its three stages
    widths: tuple[int, int, int]  # of these
    depths: tuple[int, int, int]
    dim: int
    heads: int
    grid: int  # side of the learnt positions, resized to the picture's
    taps: tuple[int, int]  # the transformer's layers that are used, the last the last
    reassembled: tuple[int, int]  # width that the two taps are brought to
    fusion: int
    groups: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        if height % _MULTIPLE or width % _MULTIPLE:
            raise ValueError(
                f"a picture of {height} by {width} pixels; make both sides multiples"
                f" of {_MULTIPLE}"
            )
        *maps, h = self._backbone(x.astype(jnp.float32))
        maps += self._transformer(h)
        x = None
        for i in reversed(range(len(maps))):
            conv = layers.Conv(self.fusion, use_bias=False, name=f"neck_{i}")
            x = Fusion(name=f"fusion_{i}")(x, conv(maps[i]))
        x = _double(layers.Conv(self.fusion // 2, name="head_0")(x))
        x = nn.relu(layers.Conv(32, name="head_1")(x))
        return nn.relu(layers.Conv(1, 1, name="head_2")(x))[..., 0]

    def _backbone(self, x: jax.Array) -> list[jax.Array]:
        """The maps of the ResNet's stages, at a 4th, 8th and 16th of the size."""
        x = StandardizedConv(self.stem, 7, 2, name="stem_conv")(x)
        x = nn.relu(layers.GroupNorm(self.groups, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        maps = []
        for stage, features in enumerate(self.widths):
            for i in range(self.depths[stage]):
                strides = 2 if stage > 0 and i == 0 else 1
                name = f"stage_{stage}_block_{i}"
                block = Bottleneck(features, self.groups, strides, i == 0, name=name)
                x = block(x)
            maps.append(x)
        return maps

    def _transformer(self, x: jax.Array) -> list[jax.Array]:
        """The maps of the two taps, at a 16th and a 32nd of the size."""
        b, rows, columns, _ = x.shape
        init = nn.initializers.normal(0.02)
        first = self.param("class_emb", init, (1, 1, self.dim))
        places = self.param("pos_emb", init, (1, 1 + self.grid**2, self.dim))
        square = places[:, 1:].reshape(1, self.grid, self.grid, self.dim)
        square = embedders.resize(square, (rows, columns), "bilinear")
        x = layers.Conv(self.dim, 1, name="patch")(x) + square
        x = einops.rearrange(x, "b h w c -> b (h w) c")
        first = jnp.broadcast_to(first + places[:, :1], (b, 1, self.dim))
        tokens = jnp.concatenate([first, x], axis=1)
        maps = []
        for i in range(self.taps[-1] + 1):
            tokens = ViTBlock(self.heads, name=f"layer_{i}")(tokens)
            if i in self.taps:
                h = self._with_readout(tokens, len(maps))
                h = einops.rearrange(h, "b (h w) c -> b h w c", h=rows)
                features, name = self.reassembled[len(maps)], f"reassemble_{len(maps)}"
                maps.append(layers.Conv(features, 1, name=name)(h))
        last = layers.Conv(self.reassembled[-1], strides=2, name="downsample")
        return [maps[0], last(maps[1])]

    def _with_readout(self, tokens: jax.Array, tap: int) -> jax.Array:
        """Every token told of the class's, which sees the picture as a whole."""
        first, x = tokens[:, :1], tokens[:, 1:]
        both = jnp.concatenate([x, jnp.broadcast_to(first, x.shape)], axis=-1)
        h = layers.Dense(self.dim, name=f"readout_{tap}")(both)
        return nn.gelu(h, approximate=False)


class DepthMap(nn.Module):
    """Pictures [b, h, w, 3] in [-1, 1] to their depth [b, *size, 1], in [-1, 1]."""

    tower: DPTHybrid
    size: tuple[int, int]
    side: int = 384  # of the picture that the tower looks at, about

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic
        depth = self.tower(preprocess(x, self.side))
        # As the reference: back to the picture's size, and then to the latent's.
        depth = embedders.resize(depth[..., None], x.shape[1:3], "bicubic")
        return embedders.scaled_depth(depth, self.size)


VARIANTS = {
    "dpt_hybrid": dict(
        stem=64,
        widths=(256, 512, 1024),
        depths=(3, 4, 9),
        dim=768,
        heads=12,
        grid=384 // _PATCH,
        taps=(8, 11),
        reassembled=(768, 768),
        fusion=256,
    )
}
