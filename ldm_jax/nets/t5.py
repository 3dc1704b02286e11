"""The encoder half of T5 1.1 and ByT5 (Raffel et al. 2020; Shazeer 2020), frozen."""

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.nets import layers


class RMSNorm(nn.Module):
    """x over its root mean square, times a learned scale, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        out = x32 * jax.lax.rsqrt(mean + 1e-6) * scale[None, None]
        return out.astype(x.dtype)


def buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """int [length, length]: the bucket of how far key j lies from query i.

    Half of them for keys before, half for keys after; of each half the first half holds
    single distances, the rest grow as their logarithm up to `max_distance`.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), 1)
    place = np.log(far / exact) / math.log(max_distance / exact) * (half - exact)
    log_bucket = np.minimum(exact + np.float32(place).astype(int), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), log_bucket)
    return bucket + half * (distance > 0)


class Block(nn.Module):
    """Self-attention with a bias, and a feed-forward layer; nothing else has biases."""

    heads: int
    dim_head: int
    dim_ff: int
    gated: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        def dense(features, name):
            return layers.Dense(features, False, dtype=self.dtype, name=name)

        def project(name):
            h = dense(self.heads * self.dim_head, name)(normed)
            return einops.rearrange(h, "b n (k e) -> b k n e", k=self.heads)

        normed = RMSNorm(name="norm1")(x)
        q, k, v = project("to_q"), project("to_k"), project("to_v")
        logits = jnp.einsum("bkne,bkse->bkns", q, k).astype(jnp.float32)
        logits += bias[None]  # T5 does not scale by the width of a head
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
        share = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bkns,bkse->bkne", share, v)
        out = einops.rearrange(out, "b k n e -> b n (k e)")
        x = x + dense(x.shape[-1], "to_out")(out)
        normed = RMSNorm(name="norm2")(x)
        h = dense(self.dim_ff, "ff_in")(normed)
        if self.gated:
            gate = dense(self.dim_ff, "ff_gate")(normed)
            h = nn.gelu(gate, approximate=True) * h
        else:
            h = nn.relu(h)
        return x + dense(x.shape[-1], "ff_out")(h)


class T5Encoder(nn.Module):
    """Token ids [b, s] to context [b, s, dim]: `FrozenT5Embedder`.

    Padding is attended to unless `mask` [b, s] (True where there is text) is given; the
    reference never gives it.
    """

    vocab_size: int
    dim: int
    depth: int
    heads: int
    dim_head: int
    dim_ff: int
    gated: bool = True  # T5 1.1; the first T5 has a plain ReLU
    num_buckets: int = 32
    max_distance: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        del deterministic
        init = nn.initializers.normal(1.0)
        table = self.param("token_emb", init, (self.vocab_size, self.dim))
        near = self.param("position_bias", init, (self.num_buckets, self.heads))
        bucket = buckets(tokens.shape[1], self.num_buckets, self.max_distance)
        bias = jnp.moveaxis(near[bucket], -1, 0)
        x = layers.look_up(self, table, tokens).astype(self.dtype)
        for i in range(self.depth):
            block = Block(
                self.heads,
                self.dim_head,
                self.dim_ff,
                self.gated,
                self.dtype,
                name=f"layer_{i}",
            )
            x = block(x, bias, mask)
        return RMSNorm(name="norm_out")(x)


VARIANTS = {
    "t5_v1_1_large": dict(
        vocab_size=32128, dim=1024, depth=24, heads=16, dim_head=64, dim_ff=2816
    ),
    "t5_v1_1_xxl": dict(
        vocab_size=32128, dim=4096, depth=24, heads=64, dim_head=64, dim_ff=10240
    ),
    "byt5_base": dict(
        vocab_size=384, dim=1536, depth=18, heads=12, dim_head=64, dim_ff=3968
    ),
}
