"""The picture towers of CLIP and OpenCLIP (Radford et al. 2021), frozen."""

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import embedders, layers, text_encoder

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(x: jax.Array, size: int) -> jax.Array:
    """Pictures [b, h, w, 3] in [-1, 1] as CLIP wants them, [b, size, size, 3].

    Bicubic from corner to corner, without antialiasing, as the references' image
    embedders have it.
    """
    x = embedders.resize(x, (size, size), "bicubic", corners=True)
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std


class Encoded(NamedTuple):
    """tokens [b, 1 + n, dim] of the last block, the class's first; embedding [b, d]."""

    tokens: jax.Array
    embedding: jax.Array


class CLIPVisionTransformer(nn.Module):
    """Preprocessed pictures [b, image_size, image_size, 3] to `Encoded`."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    heads: int
    projection_dim: int
    activation: str = "quick_gelu"  # quick_gelu | gelu
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Encoded:
        if self.activation not in text_encoder.ACTIVATIONS:
            names = ", ".join(text_encoder.ACTIVATIONS)
            raise ValueError(f"activation {self.activation!r}; choose one of {names}")
        patch = layers.Conv(
            self.dim,
            self.patch_size,
            strides=self.patch_size,
            padding=0,
            use_bias=False,
            dtype=self.dtype,
            name="patch",
        )
        h = einops.rearrange(patch(x), "b h w c -> b (h w) c")
        init = nn.initializers.normal(self.dim**-0.5)
        first = self.param("class_emb", init, (self.dim,)).astype(self.dtype)
        first = jnp.broadcast_to(first[None, None], (len(h), 1, self.dim))
        positions = (self.image_size // self.patch_size) ** 2 + 1
        place = self.param("pos_emb", init, (positions, self.dim)).astype(self.dtype)
        h = jnp.concatenate([first, h], axis=1) + place[None]
        h = layers.LayerNorm(self.dtype, name="norm_in")(h)
        for i in range(self.depth):
            block = text_encoder.TextBlock(
                self.heads,
                self.dim // self.heads,
                qkv_bias=True,
                activation=text_encoder.ACTIVATIONS[self.activation],
                dropout=0.0,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            h = block(h, None, True)
        pooled = layers.LayerNorm(self.dtype, name="norm_out")(h[:, 0])
        project = layers.Dense(
            self.projection_dim, False, dtype=self.dtype, name="projection"
        )
        return Encoded(h, project(pooled))


class ImageVector(nn.Module):
    """What SD-unCLIP is told of a picture: its embedding, noised, and how much.

    Takes (pictures, signal [b, 1], noise [b, d], level [b, d]): d is projection_dim,
    `level` the level's sinusoids. Gives [b, 2 d] (`CLIPEmbeddingNoiseAugmentation`).
    `mean` and `std` [d] among the params are those of embeddings of training pictures.
    """

    tower: CLIPVisionTransformer

    @nn.compact
    def __call__(
        self, values: tuple[jax.Array, ...], deterministic: bool = True
    ) -> jax.Array:
        del deterministic
        x, signal, noise, level = values
        x = preprocess(x, self.tower.image_size)
        e = self.tower(x).embedding.astype(jnp.float32)
        mean = self.param("mean", nn.initializers.zeros, e.shape[-1:])
        std = self.param("std", nn.initializers.ones, e.shape[-1:])
        noised = noised_embedding(e, signal, noise, mean, std)
        return jnp.concatenate([noised, level], axis=-1)


def noised_embedding(
    e: jax.Array, signal: jax.Array, noise: jax.Array, mean: jax.Array, std: jax.Array
) -> jax.Array:
    """signal e [b, d] + noise, in units where e has `mean` [d] 0 and `std` [d] 1."""
    mean, std = mean[None], std[None]
    return (signal * ((e - mean) / std) + noise) * std + mean


class NearestVectors(nn.Module):
    """The `k` known embeddings that are nearest to a picture's, as tokens [b, k, d].

    Takes (pictures, known unit vectors [n, d], whether the nearest is the picture
    itself and left out), as retrieval-augmented diffusion's context is made.
    """

    tower: CLIPVisionTransformer
    k: int

    def __call__(
        self, values: tuple[jax.Array, ...], deterministic: bool = True
    ) -> jax.Array:
        del deterministic
        x, known, without_first = values
        e = embed_unit(self.tower, x)
        return embedders.nearest(e, known, self.k, without_first)


def embed_unit(tower: CLIPVisionTransformer, x: jax.Array) -> jax.Array:
    """Pictures [b, H, W, 3] in [-1, 1] to unit embeddings [b, d], by a bound tower."""
    e = tower(preprocess(x, tower.image_size)).embedding
    return embedders.unit(e.astype(jnp.float32))


_CLIP = dict(image_size=224, patch_size=14, heads=16)

VARIANTS = {
    "clip_l": _CLIP | dict(dim=1024, depth=24, projection_dim=768),
    "openclip_h": _CLIP
    | dict(dim=1280, depth=32, projection_dim=1024, activation="gelu"),
}
