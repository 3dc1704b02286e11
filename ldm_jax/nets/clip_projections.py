"""What Karlo's decoder makes of CLIP's text and picture embeddings (unCLIP, §2.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nets import layers


class ClipProjections(nn.Module):
    """Embeddings to context and to what joins the timestep embedding.

    The text's tokens [b, s, d] and y [b, 2d], the picture's vector and the text's, give
    context [b, tokens + s, context_dim] and a vector [b, width] float32. The picture is
    the first `tokens` of the context, and is added to the timestep as the text is. A
    picture of zeros is no picture: a learned one is in its place (`UnCLIPTextProjModel`
    of diffusers, where guidance does that).
    """

    context_dim: int
    width: int
    tokens: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, context: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        picture, text = jnp.split(y.astype(jnp.float32), 2, axis=-1)
        null = self.param("null", nn.initializers.normal(0.02), picture.shape[1:])
        there = jnp.any(picture != 0, axis=-1, keepdims=True)
        picture = jnp.where(there, picture, null[None])
        vector = layers.Dense(self.width, name="text_vector")(text)
        vector += layers.Dense(self.width, name="picture_vector")(picture)

        def dense(features, name):
            return layers.Dense(features, dtype=self.dtype, name=name)

        tokens = dense(self.tokens * self.context_dim, "picture_tokens")(picture)
        tokens = tokens.reshape(len(y), self.context_dim, self.tokens)
        context = dense(self.context_dim, "text_tokens")(context)
        context = layers.LayerNorm(self.dtype, name="norm")(context)
        return jnp.concatenate([tokens.swapaxes(1, 2), context], axis=1), vector
