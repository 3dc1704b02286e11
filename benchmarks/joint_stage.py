"""python -m benchmarks.joint_stage --workdir=runs/joint --encoder_weight=0.1

Trains the autoencoder and the denoising net of a preset in one stage, for
benchmarks/joint.py to compare: `diffusion_stage.steps` steps, each with the loss of
stage one and that of stage two on the same pictures. Latents have unit variance by
their batch's statistics, through which gradients flow, so that the latent can't just
shrink. The encoder follows the denoising loss, summed over a latent's dimensions as the
reconstruction error is over pixels, times --encoder_weight; at 0 it follows none of it.

The workdir ends as that of a run of two stages, so that all that reads one reads it.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.evaluate import run_report
from ldm_jax.train import (
    autoencoder_loss,
    checkpoint,
    distributed,
    loop,
    optim,
    step_autoencoder,
    step_diffusion,
)
from ldm_jax.train import stage as stage_lib
from ldm_jax.train import state as train_state

NAME = "joint"
PARTS = ("autoencoder", "diffusion")  # of the params, and the stages they end as

# Purposes of a step's key.
RECONSTRUCTION, DENOISING = range(2)


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """`x`, through which gradients flow times `factor`."""
    still = jax.lax.stop_gradient(x)
    return still + factor * (x - still)


def latent_statistics(first: Any, moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and std [c] of the latents that `moments` describe, a batch of them."""
    mean, variance = first_stage_lib.mean_and_variance(first, moments)
    center = jnp.mean(mean, axis=(0, 1, 2))
    square = jnp.mean(jnp.square(mean) + variance, axis=(0, 1, 2))
    return center, jnp.sqrt(square - jnp.square(center))


def make_loss(config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion):
    """`loss(params, frozen, batch, key, deterministic=False) -> (loss, metrics)`.

    The batch holds `image` and one prepared field for each conditioner.
    """
    net, settings = model.autoencoder, config.autoencoder_stage.loss
    denoising = step_diffusion.make_loss(model, config.diffusion_stage)
    dims = model.latent_shape[0] * model.latent_shape[1] * model.latent_shape[2]
    dtype = model_lib.compute_dtype(config.dtype)

    def loss(params, frozen, batch, key, deterministic=False):
        first, x = params["autoencoder"], batch["image"]
        keys = [jax.random.fold_in(key, purpose) for purpose in range(2)]

        # ---- Stage one: reconstruct ---------------------------------------------
        features, bottleneck, moments, _ = autoencoder_loss.encode_and_decode(
            net,
            first["autoencoder"],
            None,
            x,
            None if deterministic else keys[RECONSTRUCTION],
        )
        x_hat = autoencoder_loss.last_layer(
            net, first["autoencoder"]["decoder"]["conv_out"], features
        )
        logvar = first.get("logvar", jnp.float32(settings.logvar_init))
        nll, parts = autoencoder_loss.reconstruction(
            net, settings, frozen, x, x_hat, logvar, dtype
        )
        mask = batch.get("_mask", jnp.ones_like(nll))
        metrics = autoencoder_loss.pooled(
            net, x, x_hat, moments, bottleneck, parts, mask
        )
        first_loss = nll + settings.kl_weight * bottleneck.penalty

        # ---- Stage two, on the latents of this very batch -----------------------
        seen = scale_gradient(moments, config.encoder_weight * dims)
        statistics = latent_statistics(net, seen)
        second_loss, more = denoising(
            params["diffusion"],
            {"first_stage": first_stage_lib.FirstStage({}, *statistics)},
            {k: v for k, v in batch.items() if k != "image"} | {"moments": seen},
            keys[DENOISING],
            deterministic,
        )
        total = jnp.sum(first_loss * mask) / jnp.sum(mask) + second_loss
        return total, {k: metrics[k] for k in ("psnr", "l1", "kl_per_dim")} | more

    return loss


def make_optimizer(
    config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Each part's own optimizer, over the steps and pictures of the one stage.

    Apart, since the gradients of an error summed over pixels would drown the others
    where both are clipped by one norm. The schedule is that of the denoising net.
    """
    section = config.diffusion_stage
    size = stage_lib.batch_size(section, config)
    made = {
        part: optim.make_optimizer(config[f"{part}_stage"].optim, section.steps, size)
        for part in PARTS
    }
    tx = optax.multi_transform(
        {part: tx for part, (tx, _) in made.items()}, {part: part for part in PARTS}
    )
    return tx, made["diffusion"][1]


def init(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, key: jax.Array
) -> dict[str, Any]:
    """Params of both parts."""
    first_key, second_key = jax.random.split(key)
    first, _ = model_lib.init_autoencoder(config, model.autoencoder, first_key)
    second = model_lib.init_diffusion(config, model, second_key)
    return {"autoencoder": first, "diffusion": second}


def make_stage(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    train_source: sources.Source,
    heldout_source: sources.Source,
) -> stage_lib.Stage:
    """Both stages in one; `config.encoder_weight` is the command's."""
    if autoencoder_loss.is_vq(model.autoencoder):
        raise UserError("autoencoder.kind: vq; this trains KL ones, so choose kl")
    prepared = []
    for source in (train_source, heldout_source):
        raw = run_report.raw_conditions(model, source, config.data.ops)
        fields = conditioning.prepare(model.conditioners, raw)
        fields["image"] = source.fields["image"]
        prepared.append(sources.Source(fields, source.attribution))
    return stage_lib.of_loss(
        NAME,
        config,
        config.diffusion_stage,
        make_loss(config, model),
        partial(init, config, model),
        optimizer=make_optimizer(config),
        frozen=step_autoencoder.load_frozen(config),
        train_source=prepared[0],
        heldout_source=prepared[1],
        ops=config.data.ops,
        panels=lambda params, frozen: {},
    )


def split(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    state: train_state.TrainState,
    source: sources.Source,
) -> None:
    """Writes the averaged params as the last checkpoints of two stages."""
    params = train_state.averaged(state)
    latent = step_autoencoder.latent_statistics(
        model.autoencoder,
        params["autoencoder"]["autoencoder"],
        source,
        config.data.ops,
        stage_lib.batch_size(config.diffusion_stage, config),
    )
    for part in PARTS:
        facts = {"latent": latent} if part == "autoencoder" else {}
        if not checkpoint.Checkpoints(workdir / part).finished():
            checkpoint.save_params(
                workdir / part, params[part], int(state.step), **facts
            )


def load_config(
    spec: str, overrides: Sequence[str], encoder_weight: float
) -> ml_collections.ConfigDict:
    """The config of a run; the weight is in it, so that another one is another run."""
    config = config_lib.load(spec, overrides)
    with config.unlocked():
        config.encoder_weight = encoder_weight
    return config


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Trains, from the newest checkpoint if there is one, to the report."""
    mesh = loop.check(config, workdir)
    stop = loop.StopSignal()
    train_source, heldout_source = sources.load_splits(config.data, config.resolution)
    tokenizers = loop.make_tokenizers(config, workdir, train_source)
    model = model_lib.build(config, tokenizers)
    stage = make_stage(config, model, train_source, heldout_source)
    loop.open_workdir(workdir, config, tokenizers)
    state = loop.run_stage(config, stage, mesh, workdir, stop, started=0.0)
    if state is not None:
        split(workdir, config, model, state, train_source)
        run_report.write(workdir, train_source, heldout_source)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.joint_stage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=common.default_config())
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--encoder_weight", type=float, required=True)
    args, rest = parser.parse_known_args(argv)
    with config_lib.exit_on_user_error():
        overrides = [word.removeprefix("--config.") for word in rest]
        config_lib.setup_logging()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        distributed.initialize()
        config = load_config(args.config, overrides, args.encoder_weight)
        train(config, pathlib.Path(args.workdir))


if __name__ == "__main__":
    main()
