"""Stage one: the KL autoencoder.

The loss is latent-diffusion's LPIPSWithDiscriminator without its perceptual and
adversarial terms: absolute error over exp(logvar), learned or fixed, summed over a
picture, plus the weighted KL.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import first_stage
from ldm_jax import model as model_lib
from ldm_jax.data import pipeline, sources
from ldm_jax.nets import autoencoder
from ldm_jax.train.stage import Stage

NAME = "autoencoder"


def reconstruction_nll(x: jax.Array, x_hat: jax.Array, logvar: jax.Array) -> jax.Array:
    """Negative log-likelihood [b] of a Laplace with scale exp(logvar), up to log 2.

    A perceptual distance [b, 1, 1, 1] would be added to the absolute error.
    """
    error = jnp.abs(x - x_hat)
    return jnp.sum(error / jnp.exp(logvar) + logvar, axis=(1, 2, 3))


def make_loss(net: nn.Module, section: ml_collections.ConfigDict):
    """`loss(params, frozen, batch, key, deterministic=False) -> (loss, metrics)`."""

    def loss(params, frozen, batch, key, deterministic=False):
        del frozen
        x = batch["image"]
        sample_key, encode_key, decode_key = jax.random.split(key, 3)
        variables = {"params": params["autoencoder"]}
        moments = net.apply(
            variables,
            x,
            deterministic=deterministic,
            rngs={"dropout": encode_key},
            method="encode",
        )
        posterior = autoencoder.Posterior.from_moments(moments.astype(jnp.float32))
        z = posterior.mode() if deterministic else posterior.sample(sample_key)
        x_hat = net.apply(
            variables,
            z,
            deterministic=deterministic,
            rngs={"dropout": decode_key},
            method="decode",
        ).astype(jnp.float32)

        logvar = params.get("logvar", jnp.float32(section.loss.logvar_init))
        nll, kl = reconstruction_nll(x, x_hat, logvar), posterior.kl()
        per_image = nll + section.loss.kl_weight * kl
        mask = batch.get("_mask", jnp.ones_like(kl))
        squared = jnp.mean(jnp.square((x - x_hat.clip(-1, 1)) / 2), axis=(1, 2, 3))
        values = {
            "loss": per_image,
            "nll": nll,
            "l1": jnp.mean(jnp.abs(x - x_hat), axis=(1, 2, 3)),
            "kl": kl,
            "psnr": -10 * jnp.log10(jnp.maximum(squared, 1e-10)),
            "latent_mean": jnp.mean(posterior.mean, axis=(1, 2, 3)),
            "latent_square": jnp.mean(jnp.square(posterior.mean), axis=(1, 2, 3)),
        }
        count = jnp.sum(mask)
        metrics = {k: (jnp.sum(v * mask), count) for k, v in values.items()}
        return jnp.sum(per_image * mask) / count, metrics

    return loss


def latent_statistics(
    net: nn.Module, params: Any, source: sources.Source, ops: Any, batch: int
) -> dict[str, Any]:
    """Mean and std of every latent channel over a whole source, in float64."""
    encode = jax.jit(partial(first_stage.encode_moments, net))
    total, square, count, images = 0.0, 0.0, 0, 0
    for x in pipeline.eval_batches(
        source, batch_size=batch, ops=ops, fields=("image",)
    ):
        posterior = autoencoder.Posterior.from_moments(encode(params, x["image"]))
        keep = x["_mask"] > 0
        mean = np.asarray(posterior.mean, np.float64)[keep]
        variance = np.exp(np.asarray(posterior.logvar, np.float64)[keep])
        total = total + mean.sum(axis=(0, 1, 2))
        square = square + (np.square(mean) + variance).sum(axis=(0, 1, 2))
        count, images = count + mean[..., 0].size, images + len(mean)
    mean = total / count
    std = np.sqrt(square / count - np.square(mean))
    return {"mean": mean.tolist(), "std": std.tolist(), "images": images}


def make_stage(
    config: ml_collections.ConfigDict,
    net: nn.Module,
    train_source: sources.Source,
    heldout_source: sources.Source,
) -> Stage:
    """The stage of `config.autoencoder_stage`."""
    section = config.autoencoder_stage

    looked_at = next(
        iter(
            pipeline.eval_batches(
                heldout_source, batch_size=8, ops=config.data.ops, limit=8
            )
        )
    )["image"]

    reconstruct = jax.jit(net.apply)

    def panels(params, frozen):
        del frozen
        variables = {"params": params["autoencoder"]}
        x_hat = np.asarray(reconstruct(variables, looked_at), np.float32)
        return {"input": looked_at, "reconstruction": x_hat}

    def finish(params):
        return {
            "latent": latent_statistics(
                net, params["autoencoder"], train_source, config.data.ops, 64
            )
        }

    return Stage(
        name=NAME,
        section=section,
        init=lambda key: model_lib.init_autoencoder(config, net, key),
        loss=make_loss(net, section),
        frozen={},
        train_source=train_source,
        heldout_source=heldout_source,
        ops=config.data.ops,
        fields=("image",),
        panels=panels,
        finish=finish,
    )
