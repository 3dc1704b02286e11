"""After stage two, if wanted: a classifier of noisy latents, to guide samples by.

`NoisyLatentImageClassifier` of the CompVis code: cross-entropy of the class of z_t, at
timesteps drawn uniformly. It belongs to the first stage and the noise schedule, not to
the denoiser.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.diffusion import denoiser, objective, schedules
from ldm_jax.train import stage as stage_lib
from ldm_jax.train import step_diffusion

NAME = "classifier"


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where there is no classifier, or no timesteps to learn it at."""
    if "diffusion" not in config.stages:
        raise UserError(
            "stages: has 'classifier' without 'diffusion', whose samples it guides; add"
            " that"
        )
    if "classifier" not in config:
        raise UserError(
            "stages: has 'classifier', but the config has no section of that name; see"
            " configs/unconditional.py:classifier"
        )
    schedule, _ = model_lib.build_process(config)
    if isinstance(schedule, schedules.SigmaSchedule):
        raise UserError(
            "stages: a classifier learns at timesteps, but diffusion.schedule is"
            " 'sigma'; choose another schedule, or leave the stage out"
        )


def check_labels(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    source: sources.Source,
) -> None:
    """Raises UserError unless the data has a class that the net knows for each row."""
    field, classes = config.classifier.field, model.classifier.out_channels
    if field not in source.fields:
        have = ", ".join(source.fields)
        raise UserError(
            f"classifier.field: {field!r} is not in the data, which has {have}"
        )
    labels = np.asarray(source.fields[field])
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"classifier.num_classes: {classes}, but {field} goes from"
            f" {labels.min()} to {labels.max()}; set it to {int(labels.max()) + 1}"
        )


def make_loss(model: model_lib.LatentDiffusion):
    """`loss(params, frozen, batch, key, deterministic=False) -> (loss, metrics)`.

    The batch holds `moments` or `image`, and `class` [b]. Metrics are the loss, top-1
    and top-5 accuracy, and top-1 by quartile of the timesteps, as (sum, count) pairs.
    """
    steps = len(model.schedule.betas)

    def loss(params, frozen, batch, key, deterministic=False):
        latent_key, t_key, eps_key, dropout_key = jax.random.split(key, 4)
        first_stage = frozen["first_stage"]
        moments = batch.get("moments")
        if moments is None:
            moments = first_stage_lib.encode_moments(
                model.autoencoder, first_stage.params, batch["image"]
            )
        z = first_stage_lib.sample_moments(
            model.autoencoder, first_stage, moments, latent_key
        )
        t = jax.random.randint(t_key, [len(z)], 0, steps)
        z_t = denoiser.q_sample(
            model.schedule, z, t, jax.random.normal(eps_key, z.shape)
        )
        logits = model.classifier.apply(
            {"params": params["classifier"]},
            z_t,
            t,
            deterministic=deterministic,
            rngs=None if deterministic else {"dropout": dropout_key},
        ).astype(jnp.float32)
        labels = batch["class"]
        error = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        rank = jnp.sum(logits > own, axis=-1)
        values = {
            "loss": error,
            "top1": (rank < 1).astype(jnp.float32),
            "top5": (rank < 5).astype(jnp.float32),
        }
        quartile = t * objective.QUARTILES // steps
        return objective.pooled(values, "top1", quartile, batch.get("_mask"))

    return loss


def make_stage(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    first_stage: first_stage_lib.FirstStage,
    train_source: sources.Source,
    heldout_source: sources.Source,
) -> stage_lib.Stage:
    """The stage of `config.classifier_stage` behind a finished first stage."""
    section, ops = config.classifier_stage, config.data.ops

    def prepared(source):
        fields: dict[str, Any] = {
            "class": np.asarray(source.fields[config.classifier.field], np.int32)
        }
        if section.cache_latents:
            fields["moments"] = step_diffusion.encode_source(
                model, first_stage, source, ops
            )
        else:
            fields["image"] = source.fields["image"]
        return sources.Source(fields, source.attribution)

    return stage_lib.of_loss(
        NAME,
        config,
        section,
        make_loss(model),
        lambda key: model_lib.init_classifier(model, key),
        frozen={"first_stage": first_stage},
        train_source=prepared(train_source),
        heldout_source=prepared(heldout_source),
        ops=() if section.cache_latents else ops,
        panels=lambda params, frozen: {},
    )
