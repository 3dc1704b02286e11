"""Attention blocks of the UNet, the autoencoder and the text encoders."""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import layers


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention: q [b n k e], k and v [b s k e] -> [b n k e].

    Logits and softmax are float32 whatever the inputs are: in 16 bits the logits of
    Stable Diffusion 2 overflow. `mask`, boolean [b|1, k|1, n|1, s], is True where
    attention is allowed.
    """
    logits = scale * jnp.einsum(
        "bnke,bske->bkns", q, k, preferred_element_type=jnp.float32
    )
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkns,bske->bnke", weights, v)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to `context`, or to themselves where it is None.

    Heads × dim_head may differ from the tokens' width.
    """

    heads: int
    dim_head: int
    qkv_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        context = x if context is None else context

        def project(name, tokens):
            inner = self.heads * self.dim_head
            dense = layers.Dense(inner, self.qkv_bias, dtype=self.dtype, name=name)
            return einops.rearrange(dense(tokens), "b n (k e) -> b n k e", k=self.heads)

        q = project("to_q", x)
        k, v = project("to_k", context), project("to_v", context)
        out = attend(q, k, v, self.dim_head**-0.5, mask)
        out = einops.rearrange(out, "b n k e -> b n (k e)")
        return layers.Dense(x.shape[-1], dtype=self.dtype, name="to_out")(out)


class FeedForward(nn.Module):
    """Feed-forward layer with GEGLU: value · gelu(gate) (Shazeer 2020)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]
        h = layers.Dense(8 * d, dtype=self.dtype, name="ff_in")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        h = value * nn.gelu(gate, approximate=False)
        return layers.Dense(d, dtype=self.dtype, name="ff_out")(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each after a LayerNorm, residual.

    With `disable_self_attn` the first attention looks at the context too.
    """

    heads: int
    dim_head: int
    disable_self_attn: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        def norm(name):
            return layers.LayerNorm(dtype=self.dtype, name=name)

        def attn(name):
            return CrossAttention(
                self.heads, self.dim_head, dtype=self.dtype, name=name
            )

        first = context if self.disable_self_attn else None
        x = x + attn("attn1")(norm("norm1")(x), first)
        x = x + attn("attn2")(norm("norm2")(x), context)
        return x + FeedForward(dtype=self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of an image [b, *spatial, c], residual.

    `context` [b, s, d] serves every block, or is a list with one array for each. The
    projections are 1x1 convolutions in some checkpoints, linear in others: the same.
    """

    heads: int
    dim_head: int
    depth: int = 1
    disable_self_attn: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | Sequence[jax.Array]
    ) -> jax.Array:
        b, *space, c = x.shape
        contexts = context
        if not isinstance(context, list | tuple):
            contexts = [context] * self.depth
        h = layers.GroupNorm(eps=1e-6, dtype=self.dtype, name="norm")(x)
        h = layers.Dense(self.heads * self.dim_head, dtype=self.dtype, name="proj_in")(
            h.reshape(b, -1, c)
        )
        block = BasicTransformerBlock
        if self.remat:
            block = nn.remat(block)
        for depth, tokens in enumerate(contexts[: self.depth]):
            h = block(
                self.heads,
                self.dim_head,
                self.disable_self_attn,
                self.dtype,
                name=f"block_{depth}",
            )(h, tokens)
        h = layers.Dense(c, zero_init=True, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(b, *space, c)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of an image [b, *spatial, c], residual.

    The features of `qkv` are ordered (q k v, head, dim) where `new_order`, else
    (head, q k v, dim). With a context [b, s, d] its keys and values come before the
    image's own (GLIDE); `mask` [b, s] is True where it may be attended to.
    """

    heads: int
    new_order: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        b, *space, c = x.shape
        h = layers.GroupNorm(dtype=self.dtype, name="norm")(x).reshape(b, -1, c)

        def project(tokens, parts, name):
            out = layers.Dense(parts * c, dtype=self.dtype, name=name)(tokens)
            order = "(i k e)" if self.new_order else "(k i e)"
            order = f"b n {order} -> i b n k e"
            return einops.rearrange(out, order, i=parts, k=self.heads)

        q, k, v = project(h, 3, "qkv")
        if context is not None:
            more = project(context, 2, "encoder_kv")
            k, v = (jnp.concatenate(pair, 1) for pair in zip(more, (k, v), strict=True))
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, h.shape[1])), constant_values=True)
            mask = mask[:, None, None]
        h = attend(q, k, v, (c // self.heads) ** -0.5, mask).reshape(b, -1, c)
        h = layers.Dense(c, zero_init=True, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(b, *space, c)


class SingleHeadAttention(nn.Module):
    """The autoencoder's attention over positions [b, h, w, c], one head, residual."""

    norm_groups: int = 32
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        tokens = layers.GroupNorm(self.norm_groups, 1e-6, self.dtype, name="norm")(x)
        tokens = tokens.reshape(b, h * w, c)
        q, k, v = (
            layers.Dense(c, dtype=self.dtype, name=name)(tokens)[:, :, None]
            for name in ("q", "k", "v")
        )
        out = attend(q, k, v, c**-0.5).reshape(b, h, w, c)
        return x + layers.Dense(c, dtype=self.dtype, name="proj_out")(out)


class LinearAttention(nn.Module):
    """The autoencoder's `linear` attention: neither norm nor residual.

    Keys are softmaxed over positions, so its cost is linear in their number
    (Shen et al., arXiv 1812.01243).
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        dense = layers.Dense(3 * c, use_bias=False, dtype=self.dtype, name="to_qkv")
        q, k, v = jnp.split(dense(x.reshape(b, h * w, c)), 3, axis=-1)
        k = jax.nn.softmax(k.astype(jnp.float32), axis=1).astype(self.dtype)
        memory = jnp.einsum("bsd,bse->bde", k, v)
        out = jnp.einsum("bnd,bde->bne", q, memory).reshape(b, h, w, c)
        return layers.Dense(c, dtype=self.dtype, name="to_out")(out)
