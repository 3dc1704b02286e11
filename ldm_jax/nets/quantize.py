"""Vector quantisation: every latent becomes the nearest of n_embed learned codes.

taming-transformers' VectorQuantizer2 (Esser et al., arXiv 2012.09841), with three
options that it lacks: lookup by direction (ViT-VQGAN, arXiv 2110.04627), a codebook
moved by averages instead of gradients (van den Oord et al., arXiv 1711.00937, appendix
A.1), and revival of codes that are hardly used.
"""

import math
from collections.abc import Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

EMA_EPS = 1e-5  # Laplace smoothing of the cluster sizes
USE_DECAY = 0.99  # of the moving average of use, where no ema_decay gives one


@flax.struct.dataclass
class Quantized:
    """z_q [b, h, w, d] float32, loss [b], indices [b·h·w] or [b, h, w] int32."""

    z_q: jax.Array
    loss: jax.Array
    indices: jax.Array


class VectorQuantizer(nn.Module):
    """Nearest-code lookup with the straight-through gradient.

    The codebook is the param `embedding` [n_embed, embed_dim] in every mode. Applied
    with `mutable=["codebook"]`, a quantizer with `ema_decay` or `revive_below` keeps
    statistics of its calls in that collection, and `move_codebook` acts on them:
    `cluster_size` [n], the moving average of a code's uses a call; `embed_sum` [n, d]
    (ema_decay), that of the sum of its latents; `candidates` [n, d] (revive_below),
    random latents of the last call. An accumulated step makes several calls.
    """

    n_embed: int
    embed_dim: int
    beta: float = 0.25
    # The reference's slip, which the published models were trained with: beta weights
    # the codebook's term, not the commitment's.
    legacy: bool = True
    remap: Sequence[int] | None = None  # used codes: indices count within this list
    unknown_index: str | int = "random"  # of a code not in remap: random | extra | int
    sane_index_shape: bool = False  # indices [b, h, w], not [b·h·w]
    l2_normalize: bool = False
    ema_decay: float = 0.0  # 0: gradients train the codebook
    revive_below: float = 0.0  # uses a call; 0: dead codes stay dead

    def setup(self):
        if self.unknown_index not in ("random", "extra") and isinstance(
            self.unknown_index, str
        ):
            raise ValueError(
                f"unknown_index {self.unknown_index!r}; choose one of random, extra, or"
                " a number"
            )
        shape, limit = (self.n_embed, self.embed_dim), 1 / self.n_embed
        self.embedding = self.param(
            "embedding",
            lambda key: jax.random.uniform(key, shape, jnp.float32, -limit, limit),
        )
        moves = bool(self.ema_decay or self.revive_below)
        self.observes = moves and self.is_mutable_collection("codebook")
        if self.observes:
            self.cluster_size = self.variable(
                "codebook",
                "cluster_size",
                lambda: jnp.full(self.n_embed, initial_cluster_size(self)),
            )
            if self.ema_decay:
                self.embed_sum = self.variable(
                    "codebook",
                    "embed_sum",
                    lambda: self.embedding * initial_cluster_size(self),
                )
            if self.revive_below:
                self.candidates = self.variable(
                    "codebook", "candidates", lambda: jnp.zeros(shape)
                )

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        """Quantises z [b, h, w, d]; the mean of the returned loss is the reference's.

        The gradient of z_q passes to z unchanged. `key` is needed to collect
        `candidates` and for unknown_index "random".
        """
        keys = (None, None) if key is None else jax.random.split(key)
        z = self.unit(z)
        indices = self._nearest(z)
        z_q = self._codes()[indices]

        def distance(a, b):
            return jnp.square(a - b).mean((1, 2, 3))

        commitment = distance(jax.lax.stop_gradient(z_q), z)
        codebook = distance(z_q, jax.lax.stop_gradient(z))
        if self.ema_decay:
            loss = self.beta * commitment
        elif self.legacy:
            loss = commitment + self.beta * codebook
        else:
            loss = self.beta * commitment + codebook
        if self.observes and not self.is_initializing():
            self._observe(jax.lax.stop_gradient(z), indices, keys[0])
        indices = self.remap_to_used(indices, keys[1])
        if not self.sane_index_shape:
            indices = indices.reshape(-1)
        return Quantized(z + jax.lax.stop_gradient(z_q - z), loss, indices)

    def straight_through(self, z: jax.Array) -> jax.Array:
        """`z_q` of a call, without the rest: z [b, h, w, d] to the nearest codes."""
        z = self.unit(z)
        return z + jax.lax.stop_gradient(self._codes()[self._nearest(z)] - z)

    def unit(self, z: jax.Array) -> jax.Array:
        """z [..., d] as the lookup sees it: float32, of length 1 if l2_normalize."""
        z = z.astype(jnp.float32)
        if not self.l2_normalize:
            return z
        square = jnp.square(z).sum(-1, keepdims=True)
        return z * jax.lax.rsqrt(jnp.maximum(square, 1e-12))

    def get_codebook_entry(
        self, indices: jax.Array, shape: Sequence[int] | None = None
    ) -> jax.Array:
        """Codes [..., d] of indices [...] as a call returned them.

        `shape` (b, h, w, d) restores the axes of flat indices.
        """
        z_q = self._codes()[self.unmap_to_all(indices)]
        return z_q if shape is None else z_q.reshape(shape)

    def remap_to_used(
        self, indices: jax.Array, key: jax.Array | None = None
    ) -> jax.Array:
        """Codes [...] to their places in `remap`; itself where that is None.

        A code that isn't there becomes `unknown_index`; "extra" is the first place
        after the list. Raises ValueError for "random" without a key.
        """
        if self.remap is None:
            return indices
        used = np.asarray(self.remap)
        places = np.full(self.n_embed, -1, np.int32)
        places[used[::-1]] = np.arange(len(used))[::-1]  # of two the first counts
        found = jnp.asarray(places)[indices]
        if self.unknown_index == "random":
            if key is None:
                raise ValueError("unknown_index 'random' needs a key")
            unknown = jax.random.randint(key, indices.shape, 0, len(used))
        else:
            extra = self.unknown_index == "extra"
            unknown = len(used) if extra else self.unknown_index
        return jnp.where(found < 0, unknown, found)

    def unmap_to_all(self, indices: jax.Array) -> jax.Array:
        """Undoes `remap_to_used`; an index outside of the list is its first code."""
        if self.remap is None:
            return indices
        known = (indices >= 0) & (indices < len(self.remap))
        return jnp.asarray(self.remap, jnp.int32)[jnp.where(known, indices, 0)]

    def _codes(self) -> jax.Array:
        codes = self.unit(self.embedding)
        return jax.lax.stop_gradient(codes) if self.ema_decay else codes

    def _nearest(self, z: jax.Array) -> jax.Array:
        """Codes [b, h, w] nearest to z [b, h, w, d], which `unit` gave."""
        z, codes = jax.lax.stop_gradient((z, self._codes()))
        tokens = z.reshape(-1, self.embed_dim)
        # ‖z - e‖² less ‖z‖², which is the same for every code. Two codes are often
        # close: rounded to 16 bits the product would swap them.
        product = jnp.dot(tokens, codes.T, precision=jax.lax.Precision.HIGHEST)
        distances = jnp.square(codes).sum(-1)[None] - 2 * product
        return jnp.argmin(distances, -1).astype(jnp.int32).reshape(z.shape[:-1])

    def _observe(self, z: jax.Array, indices: jax.Array, key: jax.Array | None) -> None:
        """Adds a call to the collection `codebook`; see the class."""
        z, indices = z.reshape(-1, self.embed_dim), indices.reshape(-1)
        decay = self.ema_decay or USE_DECAY

        def move(average, value):
            average.value = decay * average.value + (1 - decay) * value

        move(self.cluster_size, jnp.zeros(self.n_embed).at[indices].add(1.0))
        if self.ema_decay:
            # A product, because a GPU scatters floats in an order that varies.
            chosen = jax.nn.one_hot(indices, self.n_embed)
            sums = jnp.dot(chosen.T, z, precision=jax.lax.Precision.HIGHEST)
            move(self.embed_sum, sums)
        if self.revive_below:
            if key is None:
                raise ValueError("revive_below needs a key to pick latents")
            # No latent twice, unless there are more codes than latents.
            order = jax.random.permutation(key, len(z))
            self.candidates.value = z[order[np.arange(self.n_embed) % len(z)]]


def initial_cluster_size(quantizer: VectorQuantizer) -> float:
    """Uses a call that a new or revived code is credited with.

    It is e · revive_below, so that a code which is never chosen is replaced after
    1 / (1 - decay) calls, not before: 100 at the usual decay of 0.99.
    """
    return math.e * quantizer.revive_below if quantizer.revive_below else 1.0


def move_codebook(
    quantizer: VectorQuantizer, embedding: jax.Array, codebook: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The codebook after a training step: (embedding [n, d], codebook).

    Call it after the optimizer's update with what the quantizer's own collection
    `codebook` then holds. `ema_decay` sets every code to the average of its latents;
    `revive_below` replaces the codes whose `cluster_size` is less by `candidates`.
    """
    codebook = dict(codebook)
    size = codebook["cluster_size"]
    if quantizer.ema_decay:
        total = size.sum()
        smoothed = (size + EMA_EPS) / (total + quantizer.n_embed * EMA_EPS) * total
        embedding = codebook["embed_sum"] / smoothed[:, None]
    if quantizer.revive_below:
        dead = size < quantizer.revive_below
        start, new = initial_cluster_size(quantizer), codebook["candidates"]
        embedding = jnp.where(dead[:, None], new, embedding)
        codebook["cluster_size"] = jnp.where(dead, start, size)
        if quantizer.ema_decay:
            codebook["embed_sum"] = jnp.where(
                dead[:, None], start * new, codebook["embed_sum"]
            )
    return embedding, codebook


def perplexity(histogram: jax.Array) -> jax.Array:
    """exp(entropy) of code uses [n]: n if all are used equally, 1 if only one is."""
    histogram = jnp.asarray(histogram, jnp.float32)
    p = histogram / histogram.sum()
    return jnp.exp(jax.scipy.special.entr(p).sum())


def usage(histogram: jax.Array) -> jax.Array:
    """The fraction of codes that a histogram of uses [n] counts at least once."""
    return jnp.mean(jnp.asarray(histogram) > 0, dtype=jnp.float32)
