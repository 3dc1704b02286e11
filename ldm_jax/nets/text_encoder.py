"""Text transformers: LDM's BERT-style encoder, and the text towers of CLIP."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, layers


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextBlock(nn.Module):
    """Self-attention and feed-forward, each after a LayerNorm, residual."""

    heads: int
    dim_head: int
    qkv_bias: bool
    activation: Callable[[jax.Array], jax.Array]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> jax.Array:
        def drop(h):
            return nn.Dropout(self.dropout)(h, deterministic=deterministic)

        width = x.shape[-1]
        h = layers.LayerNorm(self.dtype, name="norm1")(x)
        attn = attention.CrossAttention(
            self.heads, self.dim_head, self.qkv_bias, self.dtype, name="attn"
        )
        x = x + drop(attn(h, mask=mask))
        h = layers.LayerNorm(self.dtype, name="norm2")(x)
        h = layers.Dense(4 * width, dtype=self.dtype, name="ff_in")(h)
        h = layers.Dense(width, dtype=self.dtype, name="ff_out")(self.activation(h))
        return x + drop(h)


class _TextEncoder(nn.Module):
    """What both encoders start with."""

    vocab_size: int
    max_seq_len: int
    dim: int
    depth: int

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token plus learned position embedding; raises ValueError if too long."""
        length = tokens.shape[1]
        if length > self.max_seq_len:
            raise ValueError(
                f"{length} tokens were given, but max_seq_len is {self.max_seq_len}"
            )
        init = nn.initializers.normal(0.02)
        table = self.param("token_emb", init, (self.vocab_size, self.dim))
        positions = self.param("pos_emb", init, (self.max_seq_len, self.dim))
        return layers.look_up(self, table, tokens) + positions[None, :length]


class TextTransformer(_TextEncoder):
    """Token ids [b, s] to context [b, s, dim]: the encoder that LDM trains itself.

    Inner width is heads × dim_head whatever `dim` is. Padding is attended to unless
    `mask` [b, s] (True where there is text) is given; the reference never gives it.
    """

    heads: int = 8
    dim_head: int = 64
    emb_dropout: float = 0.0
    dropout: float = 0.0  # on the output of every attention and feed-forward layer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        x = self.embed(tokens).astype(self.dtype)
        x = nn.Dropout(self.emb_dropout)(x, deterministic=deterministic)
        if mask is not None:
            mask = mask[:, None, None, :]
        for i in range(self.depth):
            block = TextBlock(
                self.heads,
                self.dim_head,
                qkv_bias=False,
                activation=gelu,
                dropout=self.dropout,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            x = block(x, mask, deterministic)
        return layers.LayerNorm(self.dtype, name="norm_out")(x)


LAYERS = ("last", "penultimate", "pooled")


class CLIPTextTransformer(_TextEncoder):
    """Token ids [b, s] to context [b, s, dim]: CLIP's causal text tower, frozen.

    With `layer` "penultimate" the last block is left out (it has no parameters here);
    the final LayerNorm is applied either way, as Stable Diffusion 2 does, unless
    `final_norm` is False, as in SGM.

    With `layer` "pooled" it gives one vector [b, dim] instead: the text's, at its end
    token, the last of the vocabulary. With `projection_dim` that is taken to the space
    that CLIP shares with pictures, [b, projection_dim], and `normalize` gives it length
    1. Either comes of the last block and the final LayerNorm, whatever `layer` and
    `final_norm` say of the context.

    With `zero_padding` the context is zeros behind the end token, for nets that take
    such tokens to be none (Karlo's).
    """

    heads: int
    activation: str = "quick_gelu"  # quick_gelu | gelu
    layer: str = "last"  # last | penultimate | pooled
    final_norm: bool = True
    projection_dim: int | None = None
    normalize: bool = False
    zero_padding: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def blocks(self) -> int:
        """How many of the `depth` blocks are run."""
        return self.depth - (self.layer == "penultimate" and not self.pooled)

    @property
    def pooled(self) -> bool:
        """Whether it gives one vector a text."""
        return self.layer == "pooled" or self.projection_dim is not None

    @nn.compact
    def __call__(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        if self.layer not in LAYERS:
            raise ValueError(f"layer {self.layer!r}; choose one of {', '.join(LAYERS)}")
        if self.activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation {self.activation!r}; choose one of {names}")
        x = self.embed(tokens).astype(self.dtype)
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        for i in range(self.blocks):
            block = TextBlock(
                self.heads,
                self.dim // self.heads,
                qkv_bias=True,
                activation=ACTIVATIONS[self.activation],
                dropout=0.0,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            x = block(x, causal, deterministic)
        if self.final_norm or self.pooled:
            x = layers.LayerNorm(self.dtype, name="norm_out")(x)
        end = jnp.argmax(jnp.where(tokens < self.vocab_size, tokens, 0), axis=-1)
        if not self.pooled:
            there = jnp.arange(length)[None] <= end[:, None]
            return jnp.where(there[..., None], x, 0) if self.zero_padding else x
        out = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        if self.projection_dim is not None:
            project = layers.Dense(
                self.projection_dim, False, dtype=self.dtype, name="text_projection"
            )
            out = project(out)
        if self.normalize:
            out = out / jnp.linalg.norm(out, axis=-1, keepdims=True)
        return out


_BERT = dict(vocab_size=30522, max_seq_len=77)
_CLIP = dict(vocab_size=49408, max_seq_len=77)

VARIANTS = {
    "bert_1p4b": _BERT | dict(dim=1280, depth=32),
    "bert_cc": _BERT | dict(dim=640, depth=32),
    "bert_layout": dict(vocab_size=8192, max_seq_len=92, dim=512, depth=16),
    "clip_l": _CLIP | dict(dim=768, depth=12, heads=12),
    "openclip_h": _CLIP
    | dict(dim=1024, depth=24, heads=16, activation="gelu", layer="penultimate"),
}
