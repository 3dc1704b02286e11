"""Losses of an autoencoder that is trained against a discriminator.

The terms and their reductions are those of latent-diffusion's LPIPSWithDiscriminator
(contperceptual.py) and VQLPIPSWithDiscriminator (vqperceptual.py). Images are float32
[b, h, w, c], logits [b, h, w, 1].
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from ldm_jax.config import UserError

# --- the two players


def hinge(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Discriminator loss, zero where real logits are above 1 and fake ones below -1."""
    real, fake = jax.nn.relu(1 - logits_real), jax.nn.relu(1 + logits_fake)
    return 0.5 * (jnp.mean(real) + jnp.mean(fake))


def vanilla(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Discriminator loss: cross-entropy, the mean of real and fake."""
    real, fake = jax.nn.softplus(-logits_real), jax.nn.softplus(logits_fake)
    return 0.5 * (jnp.mean(real) + jnp.mean(fake))


def hinge_with_exemplar_weights(
    logits_real: jax.Array, logits_fake: jax.Array, weights: jax.Array
) -> jax.Array:
    """`hinge` where image i counts with weights [b]; only their ratios matter."""
    terms = jax.nn.relu(1 - logits_real) + jax.nn.relu(1 + logits_fake)
    return 0.5 * jnp.sum(weights * terms.mean((1, 2, 3))) / jnp.sum(weights)


def generator_loss(logits_fake: jax.Array) -> jax.Array:
    """What the autoencoder wants low: minus the mean logit of its pictures."""
    return -jnp.mean(logits_fake)


DISC_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def disc_factor_at(
    step: jax.Array | int, disc_start: int, disc_factor: float = 1.0
) -> jax.Array:
    """The factor of both adversarial terms: 0 before `disc_start`, then active."""
    return jnp.where(step < disc_start, 0.0, disc_factor)


def adaptive_weight(
    nll_grad: jax.Array, g_grad: jax.Array, disc_weight: float
) -> jax.Array:
    """Weight of the generator loss that balances two gradients of the last kernel.

    `disc_weight` times the ratio of their norms, which is held within [0, 1e4]
    (Esser et al., arXiv 2012.09841, equation 7); a constant to differentiation.
    """

    def norm(grad):
        return jnp.sqrt(jnp.sum(jnp.square(grad.astype(jnp.float32))))

    ratio = jnp.clip(norm(nll_grad) / (norm(g_grad) + 1e-4), 0.0, 1e4)
    return jax.lax.stop_gradient(ratio * disc_weight)


# --- reconstruction

PIXEL_LOSSES = {"l1": jnp.abs, "l2": jnp.square}


def kl_reconstruction(
    x: jax.Array,
    x_hat: jax.Array,
    logvar: jax.Array,
    perceptual: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(weighted nll, nll, mean error), each [b]: the first is what a KL model trains.

    A pixel's error is |x - x_hat| plus the image's whole `perceptual` distance [b],
    its weight already in it; the nll, r / exp(logvar) + logvar, is a sum over pixels.
    `weights` [b, h, w, 1 or c] act on the pixels of the first value alone.
    """
    rec = jnp.abs(x - x_hat)
    if perceptual is not None:
        rec = rec + perceptual[:, None, None, None]
    nll = rec / jnp.exp(logvar) + logvar
    weighted = nll if weights is None else weights * nll
    pixels = (1, 2, 3)
    return weighted.sum(pixels), nll.sum(pixels), rec.mean(pixels)


def vq_reconstruction(
    x: jax.Array,
    x_hat: jax.Array,
    perceptual: jax.Array | None = None,
    pixel_loss: str = "l1",  # l1 | l2
) -> tuple[jax.Array, jax.Array]:
    """(nll, mean error), each [b] and one number: a VQ model takes the pixels' mean.

    `perceptual` [b] is added with its weight already in it.
    """
    if pixel_loss not in PIXEL_LOSSES:
        raise UserError(
            f"pixel_loss: {pixel_loss!r} is unknown; choose one of"
            f" {', '.join(PIXEL_LOSSES)}"
        )
    rec = PIXEL_LOSSES[pixel_loss](x - x_hat).mean((1, 2, 3))
    if perceptual is not None:
        rec = rec + perceptual
    return rec, rec


# --- the balanced gradient


@flax.struct.dataclass
class Balanced:
    """Values and gradients of `loss` = nll + d_weight · disc_factor · g."""

    loss: jax.Array
    x_hat: jax.Array  # float32 [b, h, w, c]
    nll: jax.Array
    nll_aux: Any
    g: jax.Array  # 0 and None without g_of_image
    g_aux: Any
    d_weight: jax.Array
    nll_params_grad: Any
    last_params_grad: Any
    features_cotangent: jax.Array


def balanced_cotangents(
    apply_last: Callable[[Any, jax.Array], jax.Array],
    last_params: Any,
    features: jax.Array,
    nll_params: Any,
    nll_of_image: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    g_of_image: Callable[[jax.Array], tuple[jax.Array, Any]] | None,
    *,
    disc_weight: float,
    disc_factor: jax.Array | float = 1.0,
    measured_nll_of_image: Callable[[jax.Array], jax.Array] | None = None,
) -> Balanced:
    """Gradients of nll + adaptive weight · g down to the input of the last layer.

    x_hat = apply_last(last_params, features) in any dtype; nll_of_image(nll_params,
    x_hat) and g_of_image(x_hat) take it as float32 and return (scalar, aux). The
    weight compares the gradients of last_params["kernel"], so that each loss is pulled
    through the last layer; what lies before it is left to the caller, who pulls
    `features_cotangent` back, once:

        features, pull = jax.vjp(features_of, params)
        out = balanced_cotangents(...)
        (grads,) = pull(out.features_cotangent)

    Without `g_of_image` the adversarial term is neither computed nor added. Where the
    trained nll has pixel weights the reference measures the one without them: give
    that as `measured_nll_of_image`.
    """
    x_hat, pull = jax.vjp(apply_last, last_params, features)
    image = x_hat.astype(jnp.float32)

    # A pull gives both, and XLA drops the half that isn't used.
    def pull_to_params(cotangent):
        return pull(cotangent.astype(x_hat.dtype))[0]

    def pull_to_features(cotangent):
        return pull(cotangent.astype(x_hat.dtype))[1]

    nll, pull_nll, nll_aux = jax.vjp(nll_of_image, nll_params, image, has_aux=True)
    nll_params_grad, cotangent = pull_nll(jnp.ones_like(nll))
    last_grad = pull_to_params(cotangent)
    g, g_aux, d_weight, loss = jnp.zeros_like(nll), None, jnp.zeros_like(nll), nll

    if g_of_image is not None:
        g, pull_g, g_aux = jax.vjp(g_of_image, image, has_aux=True)
        (g_cotangent,) = pull_g(jnp.ones_like(g))
        g_last_grad = pull_to_params(g_cotangent)
        measured = last_grad
        if measured_nll_of_image is not None:
            measured = pull_to_params(jax.grad(measured_nll_of_image)(image))
        d_weight = adaptive_weight(
            measured["kernel"], g_last_grad["kernel"], disc_weight
        )
        gain = d_weight * disc_factor
        loss = nll + gain * g
        cotangent = cotangent + gain * g_cotangent
        last_grad = jax.tree.map(lambda a, b: a + gain * b, last_grad, g_last_grad)

    return Balanced(
        loss=loss,
        x_hat=image,
        nll=nll,
        nll_aux=nll_aux,
        g=g,
        g_aux=g_aux,
        d_weight=d_weight,
        nll_params_grad=nll_params_grad,
        last_params_grad=last_grad,
        features_cotangent=pull_to_features(cotangent),
    )
