"""The prior of unCLIP and Karlo: a transformer that denoises a picture's embedding.

It stands where the UNet does, takes the same arguments, and knows no convolution.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import attention, layers


class PriorBlock(nn.Module):
    """Self-attention and a feed-forward layer (exact GELU), before each a LayerNorm."""

    heads: int
    dim_head: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        def norm(name):
            return layers.LayerNorm(self.dtype, name=name)

        def dense(features, name):
            return layers.Dense(features, dtype=self.dtype, name=name)

        attend = attention.CrossAttention(
            self.heads, self.dim_head, qkv_bias=True, dtype=self.dtype, name="attn"
        )
        x = x + attend(norm("norm1")(x), None, mask)
        h = nn.gelu(dense(4 * x.shape[-1], "ff_in")(norm("norm2")(x)), False)
        return x + dense(x.shape[-1], "ff_out")(h)


class PriorTransformer(nn.Module):
    """Predicts a latent from a noised one, a timestep and a text.

    Its tokens are the text's `context`, with `vector_dim` the text's pooled vector `y`,
    the timestep, the latent's positions. With `query` a learned token comes last; what
    it becomes is the prediction, for a latent of one position, and each token sees
    those before it: of the text only those that aren't zeros (Karlo). Without, every
    position's token becomes its own prediction, and all see all.
    """

    in_channels: int
    out_channels: int
    context_dim: int
    context_length: int = 77
    positions: int = 1  # of the latent, height times width
    vector_dim: int | None = None  # of y, if there is one
    depth: int = 20
    heads: int = 32
    dim_head: int = 64
    query: bool = True
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    # What else is asked of a denoiser: no size is halved, contexts are one.
    channel_mult = (1,)
    sequential_crossattn = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        context: jax.Array | None = None,
        y: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """z_t [b, h, w, in_channels], t [b] -> [b, h, w, out_channels] in `dtype`.

        `context` [b, context_length, context_dim] must be given, `y` [b, vector_dim]
        iff `vector_dim`; ValueError otherwise, or where h · w is not `positions`.
        """
        del deterministic
        self._check(x, context, y)
        b, width = x.shape[0], self.heads * self.dim_head

        def dense(name):
            return layers.Dense(width, dtype=self.dtype, name=name)

        def learned(name, tokens):
            init = nn.initializers.normal(0.02)
            return self.param(name, init, (1, tokens, width)).astype(self.dtype)

        time = layers.timestep_embedding(t, width)
        time = dense("time_embed_1")(nn.silu(dense("time_embed_0")(time)))
        latent = x.reshape(b, self.positions, self.in_channels)
        tokens = [dense("text_tokens")(context)]
        if self.vector_dim is not None:
            tokens.append(dense("text_vector")(y)[:, None])
        tokens += [time[:, None], dense("proj_in")(latent)]
        if self.query:
            tokens.append(jnp.broadcast_to(learned("query", 1), (b, 1, width)))
        h = jnp.concatenate(tokens, axis=1)
        h += learned("positions_embed", h.shape[1])
        mask = self._mask(context, h.shape[1]) if self.query else None
        block = nn.remat(PriorBlock) if self.remat else PriorBlock
        for i in range(self.depth):
            options = (self.heads, self.dim_head, self.dtype)
            h = block(*options, name=f"block_{i}")(h, mask)
        h = layers.LayerNorm(self.dtype, name="norm_out")(h[:, -self.positions :])
        out = layers.Dense(self.out_channels, dtype=self.dtype, name="conv_out")(h)
        return out.reshape(*x.shape[:-1], self.out_channels)

    def _mask(self, context: jax.Array, length: int) -> jax.Array:
        """[b, 1, length, length]: no token sees a later one, nor a text's padding."""
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        there = jnp.any(context != 0, axis=-1)
        more = length - there.shape[1]
        there = jnp.pad(there, ((0, 0), (0, more)), constant_values=True)
        return causal & there[:, None, None]

    def abstract_inputs(self, size: int | None = None) -> dict:
        """The smallest legal arguments of `__call__`, as shapes, for `eval_shape`."""
        del size
        shapes = {
            "x": (1, 1, self.positions, self.in_channels),
            "t": (1,),
            "context": (1, self.context_length, self.context_dim),
        }
        if self.vector_dim is not None:
            shapes["y"] = (1, self.vector_dim)
        return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}

    def _check(self, x, context, y) -> None:
        for name, value in (("context", context), ("y", y)):
            wanted = self.abstract_inputs().get(name)
            wanted = "none" if wanted is None else list(wanted.shape[1:])
            has = "none" if value is None else list(value.shape[1:])
            if has != wanted:
                raise ValueError(
                    f"{name} is {has} a row, but the prior takes {wanted}; see"
                    " context_length, context_dim and vector_dim"
                )
        h, w, c = x.shape[1:]
        if (h * w, c) != (self.positions, self.in_channels):
            raise ValueError(
                f"x is {h}x{w} with {c} channels, but positions is {self.positions} and"
                f" in_channels {self.in_channels}"
            )
        if self.query and self.positions > 1:
            raise ValueError(
                f"positions {self.positions}; with a query there is one, so set query"
                " to False"
            )


VARIANTS = {
    "karlo": dict(in_channels=768, out_channels=768, context_dim=768, vector_dim=768)
}
