"""A first stage whose latent is CLIP's embedding of a picture, for the prior of unCLIP.

The tower is frozen; a decoder learns to draw from the embedding what it tells, so that
what the prior makes can be looked at.
"""

import jax
import jax.numpy as jnp

from ldm_jax.nets import autoencoder, clip_vision, layers

CERTAIN = -30.0  # log variance of a latent that isn't drawn


class ClipAutoencoder(autoencoder.AutoencoderKL):
    """Pictures [b, H, H, 3] to embeddings [b, 1, 1, embed_dim], and back to about them.

    `ch_mult` has 1 + log2 H levels. `embed_dim` is the tower's `projection_dim`.
    """

    tower: clip_vision.CLIPVisionTransformer | None = None

    limit = 10.0  # of a predicted latent, in units of its std (Karlo)

    def setup(self):
        if self.tower is None or self.embed_dim != self.tower.projection_dim:
            dim = None if self.tower is None else self.tower.projection_dim
            raise ValueError(
                f"embed_dim {self.embed_dim} is not the tower's projection_dim {dim}"
            )
        self.post_quant_conv = layers.Conv(self.z_channels, 1, dtype=self.dtype)
        self.decoder = autoencoder.Decoder(**self.options_of(autoencoder.Coder))

    def encode(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Image [b, H, H, 3] in [-1, 1] to moments [b, 1, 1, 2 embed_dim]."""
        del deterministic
        e = self.tower(clip_vision.preprocess(x, self.tower.image_size)).embedding
        e = jax.lax.stop_gradient(e.astype(jnp.float32))[:, None, None]
        return jnp.concatenate([e, jnp.full_like(e, CERTAIN)], axis=-1)
