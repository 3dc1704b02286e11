"""Stage two: the denoising net and its trained conditioners, in the latent space."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from ldm_jax import adapters, draw, shown
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError, nearest
from ldm_jax.data import pipeline, sources
from ldm_jax.diffusion import edm, objective, schedules
from ldm_jax.evaluate import run_report
from ldm_jax.train import preserve
from ldm_jax.train import stage as stage_lib

NAME = "diffusion"

PANEL = 8  # pictures

# Purposes of a step's key.
LATENT, CONDITION, NOISE, DROPOUT, TOOLS = range(5)


def make_loss(model: model_lib.LatentDiffusion, section: ml_collections.ConfigDict):
    """`loss(params, frozen, batch, key, deterministic=False) -> (loss, metrics)`.

    The batch holds `moments`, or `image` to be encoded here, and one prepared field
    for each conditioner.
    """
    settings = section.loss.to_dict()
    for name in ("learn_logvar", "logvar_init"):  # they say what is a param
        settings.pop(name, None)
    sigma = isinstance(model.schedule, schedules.SigmaSchedule)

    def loss(params, frozen, batch, key, deterministic=False):
        keys = [jax.random.fold_in(key, purpose) for purpose in range(5)]
        params, first_stage = whole(section, params, frozen)
        if "moments" in batch:
            moments = batch["moments"]
        else:
            moments = first_stage_lib.encode_moments(
                model.autoencoder, first_stage.params, batch["image"]
            )
        z = first_stage_lib.sample_moments(
            model.autoencoder, first_stage, moments, keys[LATENT]
        )
        row_keys = jax.random.split(keys[TOOLS], len(z))
        tools = model_lib.make_tools(model, first_stage, row_keys)
        cond = conditioning.encode(
            model.conditioners,
            {**params["conditioners"], **first_stage.encoders},
            batch,
            None if deterministic else keys[CONDITION],
            tools,
            sequential=model.unet.sequential_crossattn,
        )

        def apply(z_t, t, cond):
            dropout_key = None if deterministic else keys[DROPOUT]
            return model_lib.apply_unet(
                model, params["unet"], z_t, t, cond, dropout_key
            )

        if sigma:
            return edm.sigma_loss(
                apply,
                z,
                cond,
                keys[NOISE],
                scaling=model.parameterization,
                sigma_data=model.schedule.sigma_data,
                mask=batch.get("_mask"),
                weight=batch.get(preserve.WEIGHT),
                **settings,
            )
        return objective.diffusion_loss(
            apply,
            model.schedule,
            z,
            cond,
            keys[NOISE],
            parameterization=model.parameterization,
            logvar=params.get("logvar"),
            mask=batch.get("_mask"),
            weight=batch.get(preserve.WEIGHT),
            learned_variance=model.learned_variance,
            **settings,
        )

    return loss


def whole(
    section: ml_collections.ConfigDict, params: Any, frozen: Any
) -> tuple[Any, first_stage_lib.FirstStage]:
    """(the nets' params, first stage), also where `params` are those of adapters."""
    if "base" not in frozen:
        return params, frozen["first_stage"]
    return adapters.merge(section, frozen["base"], frozen["first_stage"], params)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a wrong noise process or an option of the loss."""
    adapters.check(config)
    schedule, parameterization = model_lib.build_process(config)
    settings = config.diffusion_stage.loss.to_dict()
    learned = {"learn_logvar", "logvar_init"}
    if isinstance(schedule, schedules.SigmaSchedule):
        known = set(inspect.signature(edm.sigma_loss).parameters)
    else:
        known = set(inspect.signature(objective.diffusion_loss).parameters) | learned
    for name in settings:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"diffusion_stage.loss.{name}: no such option; {hint}")
    objective.check_loss_type(settings["loss_type"])
    if isinstance(schedule, schedules.SigmaSchedule):
        edm.check_weighting(settings["weighting"])
        return
    objective.check_timestep_sampling(settings["timestep_sampling"])
    gamma = settings["min_snr_gamma"]
    if gamma is not None:
        objective.min_snr_weights(schedule, parameterization, gamma)


def _prepared_example(model: model_lib.LatentDiffusion, source: sources.Source):
    """What an endless source makes, with its conditions prepared."""
    if source.example is None:
        return None

    def example(index):
        row = source.example(index)
        columns = {}
        for field, value in row.items():
            text = isinstance(value, str)
            columns[field] = [value] if text else np.asarray(value)[None]
        fields = conditioning.prepare(model.conditioners, columns)
        conditions = {name: rows[0] for name, rows in fields.items()}
        return conditions | {"image": row["image"]}

    return example


def encode_source(
    model: model_lib.LatentDiffusion,
    first_stage: first_stage_lib.FirstStage,
    source: sources.Source,
    ops: Any,
    batch: int = 64,
) -> np.ndarray:
    """What `first_stage.encode_moments` gives of every image, float32 [n, h, w, d]."""
    encode = jax.jit(partial(first_stage_lib.encode_moments, model.autoencoder))
    return of_images(encode, first_stage.params, source, ops, batch)


def of_images(
    function: Any, params: Any, source: sources.Source, ops: Any, batch: int = 64
) -> Any:
    """`function(params, images)` of all images of a source: a tree of arrays [n, …]."""
    parts = []
    for x in pipeline.eval_batches(
        source, batch_size=batch, ops=ops, fields=("image",)
    ):
        keep = x["_mask"] > 0
        out = function(params, x["image"])
        parts.append(jax.tree.map(lambda a, keep=keep: np.asarray(a)[keep], out))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def remember(
    model: model_lib.LatentDiffusion,
    first_stage: first_stage_lib.FirstStage,
    source: sources.Source,
    ops: Any,
) -> first_stage_lib.FirstStage:
    """`first_stage` with what conditions look up of the training pictures, if any."""
    looking = {k: c for k, c in model.conditioners.items() if c.remembered is not None}
    if not looking:
        return first_stage

    def embed(first_stage, x):
        def encode_image(x, keys):  # to the posterior's mode
            del keys
            moments = first_stage_lib.encode_moments(
                model.autoencoder, first_stage.params, x
            )
            z, _ = first_stage_lib.mean_and_variance(model.autoencoder, moments)
            return first_stage_lib.standardize(first_stage, z)

        tools, of = conditioning.Tools(encode_image), first_stage.encoders.get
        return {k: c.remembered(x, tools, of(k)) for k, c in looking.items()}

    memory = of_images(jax.jit(embed), first_stage, source, ops)
    return first_stage.replace(memory=memory)


def panel_rows(
    config: ml_collections.ConfigDict, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Raw conditions of the panels: `report.prompts`, or eight rows of the data."""
    if config.report.prompts and set(fields) == {"caption"}:
        return {"caption": list(config.report.prompts)}
    n = len(next(iter(fields.values()), ()))
    chosen = np.arange(0, n, max(n // PANEL, 1))[:PANEL]
    return {name: column[chosen] for name, column in fields.items()}


def make_stage(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    first_stage: first_stage_lib.FirstStage,
    train_source: sources.Source,
    heldout_source: sources.Source,
    base: Any = None,
    start: Callable[[Any], Any] | None = None,
    kept: sources.Source | None = None,
) -> stage_lib.Stage:
    """The stage of `config.diffusion_stage` behind a finished first stage.

    `base` and `start` are those of finetune.py's `prepare`; what is `kept` is trained
    on beside the data, see preserve.py.
    """
    section, ops = config.diffusion_stage, config.data.ops

    def columns(source):
        raw = run_report.raw_conditions(model, source, ops)
        fields = conditioning.prepare(model.conditioners, raw)
        if section.cache_latents:
            fields["moments"] = encode_source(model, first_stage, source, ops)
        else:
            fields["image"] = source.fields["image"]
        return raw, fields

    prepared = []
    for source in (train_source, heldout_source):
        raw, fields = columns(source)
        if kept is not None and source is train_source:
            fields = preserve.join(
                fields, columns(kept)[1], section.preserve.weight or 1.0
            )
        elif kept is not None:
            fields[preserve.WEIGHT] = np.ones(len(source), np.float32)
        example = _prepared_example(model, source)
        prepared.append(sources.Source(fields, source.attribution, example))
        if source is train_source:
            shown_fields = panel_rows(config, raw)

    def panels(params, frozen):
        drawn = draw.draw(
            model,
            *whole(section, params, frozen),
            conditioning.prepare(model.conditioners, shown_fields),
            count=PANEL,
            settings=draw.Settings(
                steps=config.sample.steps,
                spacing=config.sample.get("spacing"),
                trajectory=True,
            ),
            guidance_scale=config.sample.guidance_scale,
        )
        row = drawn.trajectory[0]
        every = max(len(row) // 8, 1)
        panel = {"samples": drawn.images, "denoising": row[::-every][:8][::-1]}
        condition = shown.picture(shown_fields, config.resolution)
        if condition is not None:
            panel["condition"] = condition / 127.5 - 1.0
        return panel

    frozen = {"first_stage": first_stage}
    if base is not None:
        frozen["base"] = base
    return stage_lib.of_loss(
        NAME,
        config,
        section,
        make_loss(model, section),
        adapters.initializer(config, model),
        frozen=frozen,
        train_source=prepared[0],
        heldout_source=prepared[1],
        ops=() if section.cache_latents else ops,
        panels=panels,
        start=start,
    )
