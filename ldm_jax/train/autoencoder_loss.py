"""What stage one minimises: reconstruction, penalty of the latent, the discriminator.

The losses are those of latent-diffusion's LPIPSWithDiscriminator (KL: errors summed
over a picture) and VQLPIPSWithDiscriminator (VQ: their mean). Both players see the same
reconstruction, where the reference makes it anew for the discriminator.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import model as model_lib
from ldm_jax.nets import autoencoder, lpips, quantize
from ldm_jax.train import adversarial
from ldm_jax.train import state as train_state

# Purposes of a step's key.
LATENT, DROPOUT = range(2)


def is_vq(net: nn.Module) -> bool:
    """Whether an autoencoder has a codebook, and so the losses of one."""
    return isinstance(net, autoencoder.VQModel)


def encode_and_decode(
    net: nn.Module, params: Any, variables: Any, x: jax.Array, key: jax.Array | None
):
    """The autoencoder up to its last layer: (features, bottleneck, encoded, variables).

    Without a key no latent is drawn and `variables` stay as they are.
    """
    training = key is not None
    keys = [jax.random.fold_in(key, n) for n in range(2)] if training else [None] * 2
    if is_vq(net) and not training:
        keys[LATENT] = jax.random.key(0)  # of codes that a remap doesn't know
    options = {
        "deterministic": not training,
        "rngs": {"dropout": keys[DROPOUT]} if training else None,
    }
    encoded = net.apply({"params": params}, x, method="encode", **options)
    bottleneck, moved = net.apply(
        {"params": params, **(variables or {})},
        encoded,
        keys[LATENT],
        method="bottleneck",
        mutable=list(variables or {}) if training else [],
    )
    features = net.apply(
        {"params": params}, bottleneck.z, method="decode_features", **options
    )
    return features, bottleneck, encoded, (dict(moved) if training else variables)


def last_layer(net: nn.Module, params: Any, features: jax.Array) -> jax.Array:
    """Features to image, float32, by the params of the decoder's last convolution."""
    variables = {"params": {"decoder": {"conv_out": params}}}
    return net.apply(variables, features, method="conv_out").astype(jnp.float32)


def reconstruction(
    net: nn.Module,
    settings: ml_collections.ConfigDict,
    frozen: Any,
    x: jax.Array,
    x_hat: jax.Array,
    logvar: jax.Array,
    dtype: jnp.dtype,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood [b] of a reconstruction, and its parts, each [b]."""
    parts, weighted = {}, None
    if settings.perceptual_weight:
        distance = lpips.LPIPS(dtype=dtype).apply({"params": frozen["lpips"]}, x, x_hat)
        weighted = settings.perceptual_weight * distance
        parts["lpips"] = distance
    if is_vq(net):
        nll, _ = adversarial.vq_reconstruction(
            x, x_hat, weighted, pixel_loss=settings.pixel_loss
        )
    else:
        _, nll, _ = adversarial.kl_reconstruction(x, x_hat, logvar, weighted)
    return nll, parts | {"nll": nll, "l1": jnp.mean(jnp.abs(x - x_hat), axis=(1, 2, 3))}


def pooled(
    net: nn.Module,
    x: jax.Array,
    x_hat: jax.Array,
    encoded: jax.Array,
    bottleneck: autoencoder.Bottleneck,
    parts: dict[str, jax.Array],
    mask: jax.Array,
) -> train_state.Metrics:
    """(sum, count) pairs of what both training and evaluation show."""
    z = net.apply({}, encoded, method="latent")
    squared = jnp.mean(jnp.square((x - x_hat.clip(-1, 1)) / 2), axis=(1, 2, 3))
    values = parts | {
        "psnr": -10 * jnp.log10(jnp.maximum(squared, 1e-10)),
        "latent_mean": jnp.mean(z, axis=(1, 2)),
        "latent_square": jnp.mean(jnp.square(z), axis=(1, 2)),
    }
    if bottleneck.indices is None:
        values["kl"] = bottleneck.penalty
        values["kl_per_dim"] = bottleneck.penalty / z[0].size
    else:
        values["codebook_loss"] = bottleneck.penalty
    count = jnp.sum(mask)
    metrics = {
        name: (jnp.sum(v * mask.reshape(-1, *[1] * (v.ndim - 1)), axis=0), count)
        for name, v in values.items()
    }
    if bottleneck.indices is not None:
        indices = bottleneck.indices.reshape(x.shape[0], -1)
        weights = jnp.broadcast_to(mask[:, None], indices.shape)
        uses = jnp.zeros(net.num_indices).at[indices].add(weights)
        metrics["code_uses"] = (uses, jnp.ones([]))
    return metrics


def summarize(values: dict[str, np.ndarray], steps: int) -> dict[str, float]:
    """Statistics of the latent by channel, and use of the codebook, as numbers."""
    shown = {k: float(v) for k, v in values.items() if not np.ndim(v)}
    if "latent_mean" in values:
        mean = values["latent_mean"]
        std = np.sqrt(np.maximum(values["latent_square"] - mean**2, 0))
        shown |= {
            "latent_mean": float(np.mean(mean)),
            "latent_std": float(np.mean(std)),
        }
        for channel, pair in enumerate(zip(mean, std, strict=True)):
            for name, value in zip(("latent_mean", "latent_std"), pair, strict=True):
                shown[f"{name}/{channel}"] = float(value)
    if "code_uses" in values:
        uses = values["code_uses"]
        shown |= {
            "perplexity": float(quantize.perplexity(uses)),
            "dead_codes": 1 - float(quantize.usage(uses)),
            "code_tokens": float(uses.sum()) * steps,
            "codes": float(len(uses)),
        }
    return shown


def make_evaluate(config: ml_collections.ConfigDict, net: nn.Module):
    """`evaluate(params, frozen, batch, key) -> metrics` of reconstructions by the mode.

    The discriminator takes no part: as in the reference, its weight has no meaning
    without gradients.
    """
    settings, dtype = (
        config.autoencoder_stage.loss,
        model_lib.compute_dtype(config.dtype),
    )

    def evaluate(params, frozen, batch, key):
        del key
        x, net_params = batch["image"], params["autoencoder"]
        features, bottleneck, encoded, _ = encode_and_decode(
            net, net_params, None, x, None
        )
        x_hat = last_layer(net, net_params["decoder"]["conv_out"], features)
        logvar = params.get("logvar", jnp.float32(settings.logvar_init))
        nll, parts = reconstruction(net, settings, frozen, x, x_hat, logvar, dtype)
        parts["loss"] = nll + penalty_weight(net, settings) * bottleneck.penalty
        mask = batch.get("_mask", jnp.ones_like(nll))
        return pooled(net, x, x_hat, encoded, bottleneck, parts, mask)

    return evaluate


def penalty_weight(net: nn.Module, settings: ml_collections.ConfigDict) -> float:
    """Of the bottleneck's own loss: KL or codebook."""
    return settings.codebook_weight if is_vq(net) else settings.kl_weight


def make_gradients(
    config: ml_collections.ConfigDict, net: nn.Module, disc: nn.Module | None
):
    """`gradients(params, disc_params, frozen) -> f`, and f is what `accumulate` wants.

    f(carry, batch, key) -> (carry, (grads, disc_grads), metrics), its carry being the
    variables of both nets. Without `disc` nothing of a discriminator is computed.
    """
    section = config.autoencoder_stage
    settings, game = section.loss, section.adversarial
    dtype = model_lib.compute_dtype(config.dtype)
    disc_loss_fn = adversarial.DISC_LOSSES[game.disc_loss]

    def judge(disc_params, disc_variables, x):
        logits, moved = disc.apply(
            {"params": disc_params, **disc_variables},
            x,
            train=True,
            mutable=list(disc_variables),
        )
        return logits, dict(moved)

    def gradients(params, disc_params, frozen):
        def of_batch(carry, batch, key):
            variables, disc_variables = carry
            x, net_params = batch["image"], params["autoencoder"]

            # ---- Forward to the last layer's features ---------------------------
            def to_features(net_params):
                features, bottleneck, encoded, moved = encode_and_decode(
                    net, net_params, variables, x, key
                )
                penalty = jnp.mean(bottleneck.penalty)
                return (features, penalty), (bottleneck, encoded, moved)

            (features, penalty), pull_back, (bottleneck, encoded, variables) = jax.vjp(
                to_features, net_params, has_aux=True
            )

            # ---- Last layer, losses of the image, adaptive weight ---------------
            def nll_of_image(trained, x_hat):
                logvar = trained.get("logvar", jnp.float32(settings.logvar_init))
                nll, parts = reconstruction(
                    net, settings, frozen, x, x_hat, logvar, dtype
                )
                return jnp.mean(nll), parts

            def g_of_image(x_hat):
                logits, moved = judge(disc_params, disc_variables, x_hat)
                return adversarial.generator_loss(logits), moved

            balanced = adversarial.balanced_cotangents(
                partial(last_layer, net),
                net_params["decoder"]["conv_out"],
                features,
                {k: v for k, v in params.items() if k == "logvar"},
                nll_of_image,
                None if disc is None else g_of_image,
                disc_weight=game.disc_weight,
                disc_factor=game.disc_factor,
            )

            # ---- One pull-back through the rest ---------------------------------
            weight = penalty_weight(net, settings)
            (net_grads,) = pull_back((balanced.features_cotangent, jnp.float32(weight)))
            decoder = net_grads["decoder"] | {"conv_out": balanced.last_params_grad}
            grads = {"autoencoder": net_grads | {"decoder": decoder}}
            grads |= balanced.nll_params_grad

            one = jnp.ones([])
            more, disc_grads = {}, None
            if disc is not None:

                def disc_loss(disc_params):
                    real, moved = judge(disc_params, balanced.g_aux, x)
                    fake, moved = judge(
                        disc_params, moved, jax.lax.stop_gradient(balanced.x_hat)
                    )
                    value = game.disc_factor * disc_loss_fn(real, fake)
                    return value, (moved, jnp.mean(real), jnp.mean(fake))

                (value, aux), disc_grads = jax.value_and_grad(disc_loss, has_aux=True)(
                    disc_params
                )
                disc_variables, real, fake = aux
                more = {
                    "g_loss": (balanced.g, one),
                    "d_weight": (balanced.d_weight, one),
                    "disc_loss": (value, one),
                    "logits_real": (real, one),
                    "logits_fake": (fake, one),
                }
                if game.disc_weight:
                    more["grad_ratio"] = (balanced.d_weight / game.disc_weight, one)
            if "logvar" in params:
                more["logvar"] = (params["logvar"], one)
            metrics = pooled(
                net,
                x,
                balanced.x_hat,
                encoded,
                bottleneck,
                balanced.nll_aux,
                jnp.ones(x.shape[0]),
            )
            metrics |= {"loss": (balanced.loss + weight * penalty, one)} | more
            return (variables, disc_variables), (grads, disc_grads), metrics

        return of_batch

    return gradients
