"""The classifier of noised latents: half a UNet, and a head that pools its features.

Its logits at z_t and t steer sampling towards a class (Dhariwal and Nichol 2021).
"""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, layers, res_block

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_HIDDEN = 2048  # width of the spatial heads


class AttentionPool(nn.Module):
    """Pools an image [b, h, w, c] to [b, features]: the mean attends to each position.

    Positions are learned for `size` × `size`, as in CLIP's image tower; ValueError for
    an image of another size.
    """

    size: int
    heads: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        if (h, w) != (self.size, self.size):
            raise ValueError(
                f"pool 'attention' is made for features of size {self.size}x{self.size}"
                f", not {h}x{w}; give x the size that image_size says"
            )
        tokens = x.reshape(b, h * w, c)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        init, shape = nn.initializers.normal(c**-0.5), (h * w + 1, c)
        positions = self.param("positional_embedding", init, shape)
        tokens = tokens + positions[None].astype(self.dtype)
        qkv = layers.Dense(3 * c, dtype=self.dtype, name="qkv_proj")(tokens)
        q, k, v = einops.rearrange(qkv, "b n (i k e) -> i b n k e", i=3, k=self.heads)
        out = attention.attend(q[:, :1], k, v, (c // self.heads) ** -0.5)
        return layers.Dense(self.features, dtype=self.dtype, name="c_proj")(
            out.reshape(b, c)
        )


class EncoderUNet(nn.Module):
    """Logits of classes from a noised latent; options are those of the torch original.

    `pool` is the head: "adaptive" projects the mean of the features, "attention" pools
    them by attention and needs `image_size` (of x) and `num_head_channels`, "spatial"
    and "spatial_v2" are perceptrons on the means of every block's features. Heads of
    attention come from `num_head_channels` where given, else from `num_heads`.
    """

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    dropout: float = 0.0
    channel_mult: Sequence[int] = (1, 2, 4, 8)
    conv_resample: bool = True
    num_heads: int = 1
    num_head_channels: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    pool: str = "adaptive"  # adaptive | attention | spatial | spatial_v2
    image_size: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """z_t [b, h, w, in_channels], t [b] -> logits [b, out_channels] float32.

        t may be fractional. ValueError where x or an option does not fit.
        """
        self._check(x)
        emb = self._embed(t)
        last = len(self.channel_mult) - 1

        def res(h, level, name, resample=None):
            return res_block.ResBlock(
                self.channel_mult[level] * self.model_channels,
                self.dropout,
                self.use_scale_shift_norm,
                resample,
                dtype=self.dtype,
                name=name,
            )(h, emb, deterministic)

        def conv(h, features, name, strides=1):
            return layers.Conv(features, strides=strides, dtype=self.dtype, name=name)(
                h
            )

        h = conv(x, self.model_channels, "conv_in")
        features = [h]  # of every block, for the spatial heads
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = res(h, level, f"down_{level}_res_{i}")
                if 2**level in self.attention_resolutions:
                    h = self._attn(h, f"down_{level}_attn_{i}")
                features.append(h)
            if level < last:
                name = f"down_{level}_downsample"
                if self.resblock_updown:
                    h = res(h, level, name, "down")
                elif self.conv_resample:
                    h = conv(h, h.shape[-1], name, strides=2)
                else:
                    h = layers.avg_pool(h)
                features.append(h)
        h = res(h, last, "mid_res_0")
        h = self._attn(h, "mid_attn")
        h = res(h, last, "mid_res_1")
        features.append(h)
        return self._head(features)

    def abstract_inputs(self) -> dict:
        """The smallest legal arguments of `__call__`, as shapes, for `eval_shape`."""
        size = self.image_size or 2 ** (len(self.channel_mult) - 1)
        x = jax.ShapeDtypeStruct((1, size, size, self.in_channels), jnp.float32)
        return {"x": x, "t": jax.ShapeDtypeStruct((1,), jnp.float32)}

    def _check(self, x: jax.Array) -> None:
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"x has {x.shape[-1]} channels, but in_channels is {self.in_channels}"
            )
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r}; choose one of {', '.join(POOLS)}")
        if self.pool == "attention":
            for field in ("image_size", "num_head_channels"):
                if getattr(self, field) is None:
                    raise ValueError(f"{field}: pool 'attention' needs it; give one")

    def _embed(self, t: jax.Array) -> jax.Array:
        """Embeds the timestep, in float32: small, and every block depends on it."""
        width = 4 * self.model_channels
        emb = layers.timestep_embedding(t, self.model_channels)
        emb = nn.silu(layers.Dense(width, name="time_embed_0")(emb))
        return layers.Dense(width, name="time_embed_1")(emb)

    def _attn(self, h: jax.Array, name: str) -> jax.Array:
        order = self.use_new_attention_order
        heads = self._heads(h.shape[-1])
        return attention.AttentionBlock(heads, order, self.dtype, name=name)(h)

    def _heads(self, channels: int) -> int:
        heads = self.num_heads
        if self.num_head_channels is not None:
            heads = channels // self.num_head_channels
        if heads < 1 or channels % heads:
            raise ValueError(f"{channels} channels can't be split into {heads} heads")
        return heads

    def _head(self, features: Sequence[jax.Array]) -> jax.Array:
        """Logits of the blocks' features, in float32: the loss is taken of them."""
        features = [h.astype(jnp.float32) for h in features]
        if self.pool.startswith("spatial"):
            means = jnp.concatenate([h.mean((1, 2)) for h in features], axis=-1)
            h = layers.Dense(_HIDDEN, name="hidden")(means)
            if self.pool == "spatial":
                h = nn.relu(h)
            else:
                h = nn.silu(layers.GroupNorm(name="norm_out")(h))
            return layers.Dense(self.out_channels, name="logits")(h)
        h = nn.silu(layers.GroupNorm(name="norm_out")(features[-1]))
        if self.pool == "attention":
            size = self.image_size // 2 ** (len(self.channel_mult) - 1)
            heads = self._heads(h.shape[-1])
            return AttentionPool(size, heads, self.out_channels, name="attn_pool")(h)
        logits = layers.Dense(self.out_channels, zero_init=True, name="logits")
        return logits(h.mean((1, 2)))
