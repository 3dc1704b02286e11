"""A whole model's arrays under the prefixes of CompVis, from a file or a folder.

A file of CompVis or Stability has them so. A folder of diffusers is gathered: each of
its parts comes under the prefix of its counterpart, in its own key layout, which the
keys tell later.
"""

import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import files

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
CONDITIONS = ("cond_stage_model.", "embedder.", "noise_augmentor.", "depth_model.")

INDEX = "model_index.json"
PARTS = {
    "unet": UNET,
    "vae": FIRST_STAGE,
    "vqvae": FIRST_STAGE,
    "text_encoder": "cond_stage_model.transformer.",
    "bert": "cond_stage_model.transformer.",
    "image_encoder": "embedder.",
    "image_normalizer": "noise_augmentor.data_",
    "depth_estimator": "depth_model.model.",
}
# The low resolution pipeline of LDM decodes latents as they are.
SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
UPSCALE = "StableDiffusionUpscalePipeline"
# The noise that conditions are given, as the section `diffusion` of our configs.
NOISE_OF_CONDITIONS = {
    "low_res_scheduler": dict(schedule="linear", linear_start=1e-4, linear_end=2e-2),
    "image_noising_scheduler": dict(schedule="squaredcos_cap_v2"),
}
# Parts that judge or mark pictures; nothing is drawn by them.
_ASIDE = ("safety_checker", "watermarker")
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
# What diffusers' schedulers name, as our configs do.
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}


class Whole(NamedTuple):
    """A model's arrays, and what else its source says; None is nothing."""

    arrays: dict[str, np.ndarray]
    process: dict[str, Any] | None = None  # as the section `diffusion` of our configs
    scale_factor: float | None = None
    tokenizer: pathlib.Path | None = None
    nets: Mapping[str, Mapping[str, Any]] = {}  # {prefix: its constructor's arguments}
    image_size: int | None = None  # side of the latents that it was trained on
    pipeline: str | None = None  # its class in diffusers
    noise_levels: int | None = None  # of a small picture that is given with noise
    spacing: str | None = None  # of the sampler's steps, where not as Stable Diffusion


def under(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What stands under a prefix, without it; UserError where nothing does."""
    found = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    if not found:
        raise UserError(
            f"SRC: nothing in it begins with {prefix!r}; give a whole checkpoint of"
            " CompVis or Stability"
        )
    return found


def with_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Karlo's decoder or upscaler under the prefix that others have their UNet under.

    Of the upscaler's two nets, the one that draws all steps but the last. Others are as
    they were.
    """
    for prefix, sign in (
        ("model.", "cf_param"),
        ("model_first_steps.", "out.2.weight"),
    ):
        if prefix + sign in arrays:
            return {
                UNET + key.removeprefix(prefix): value
                for key, value in arrays.items()
                if not key.startswith("model_last_step.")
            }
    return arrays


def is_folder(path: pathlib.Path) -> bool:
    """Whether diffusers has saved a pipeline there."""
    return (path / INDEX).is_file()


def read_folder(path: pathlib.Path, option: str) -> Whole:
    """The parts of a pipeline's folder; UserErrors name `option`."""
    index, arrays, nets = _json(path / INDEX, option), {}, {}
    for name, entry in index.items():
        there = isinstance(entry, list | tuple) and any(entry)
        if name.startswith("_") or not there or name in _ASIDE:
            continue
        if name in PARTS:
            own = _weights(path / name, option)
            arrays |= {PARTS[name] + key: value for key, value in own.items()}
            if (path / name / "config.json").is_file():
                nets[PARTS[name]] = _json(path / name / "config.json", option)
        elif _shards(path / name, option):
            raise UserError(
                f"{option}: {path / name} is a part that is not known here; give a"
                f" pipeline of {', '.join(PARTS)}"
            )
    for name in NOISE_OF_CONDITIONS.keys() & index.keys():
        _check_noise(path / name / "scheduler_config.json", option)
    scheduler = path / "scheduler" / "scheduler_config.json"
    process = spacing = None
    if scheduler.is_file():
        process = _process(scheduler, option)
        spacing = _spacing(scheduler, option, str(index.get("_class_name")))
    scale_factor = None
    pipeline = index.get("_class_name")
    for name in {"vae", "vqvae"} & index.keys():
        settings = _json(path / name / "config.json", option)
        scale_factor = settings.get("scaling_factor", 0.18215)
    if pipeline == SUPER_RESOLUTION:
        scale_factor = 1.0
    tokenizer = path / "tokenizer"
    tokenizer = tokenizer if tokenizer.is_dir() else None
    image_size = nets.get(UNET, {}).get("sample_size")
    if isinstance(image_size, list):
        if len(set(image_size)) > 1:
            raise UserError(
                f"{option}: the UNet's sample_size is {image_size}; give one of squares"
            )
        image_size = image_size[0]
    levels = index.get("max_noise_level")
    return Whole(
        arrays,
        process,
        scale_factor,
        tokenizer,
        nets,
        image_size,
        pipeline,
        noise_levels=levels,
        spacing=spacing,
    )


def _json(path: pathlib.Path, option: str) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}: {path} can't be read ({error}); give the whole folder"
        ) from error


def _shards(folder: pathlib.Path, option: str) -> list[pathlib.Path]:
    """The files of a part's weights: safetensors, else torch's, else in half."""
    for suffix in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for name in _WEIGHTS:
            path = folder / f"{name}{suffix}"
            listed = folder / f"{name}{suffix}.index.json"
            if path.is_file():
                return [path]
            if listed.is_file():
                of_keys = _json(listed, option).get("weight_map", {})
                return [folder / shard for shard in sorted(set(of_keys.values()))]
    return []


def _weights(folder: pathlib.Path, option: str) -> dict[str, np.ndarray]:
    arrays, shards = {}, _shards(folder, option)
    if not shards:
        raise UserError(
            f"{option}: {folder} has no weights in it, though {INDEX} lists the part;"
            " fetch the whole folder"
        )
    for path in shards:
        arrays |= files.read(path, option)
    return arrays


def _process(path: pathlib.Path, option: str) -> dict[str, Any]:
    """A scheduler's config in the names of our configs' section `diffusion`."""
    settings = _json(path, option)
    betas = settings.get("trained_betas")
    schedule = settings.get("beta_schedule", "linear")
    prediction = settings.get("prediction_type", "epsilon")
    for field, value, known in (
        ("beta_schedule", schedule, SCHEDULES),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if value not in known:
            raise UserError(
                f"{option}: {path} has {field} {value!r}; only {', '.join(known)} are"
                " known here"
            )
    return dict(
        schedule=SCHEDULES[schedule],
        timesteps=settings.get("num_train_timesteps", 1000),
        linear_start=settings.get("beta_start", 1e-4),
        linear_end=settings.get("beta_end", 0.02),
        given_betas=betas,
        zero_terminal_snr=settings.get("rescale_betas_zero_snr", False),
        parameterization=PREDICTIONS[prediction],
    )


def _spacing(path: pathlib.Path, option: str, pipeline: str) -> str | None:
    """How a scheduler spaces its steps, as our samplers say it; None is `uniform`.

    Warns of what DDIM does there and not here. What other schedulers do is left to the
    sampler, but that a model was trained for the last timestep.
    """
    settings = _json(path, option)
    theirs = settings.get("timestep_spacing", "leading")
    if settings.get("_class_name") != "DDIMScheduler":
        return theirs if theirs == "trailing" else None
    # The pipelines of Stable Diffusion set the offset to 1, and don't clip.
    own = not pipeline.startswith("Stable")
    from_zero = own and theirs == "leading" and not settings.get("steps_offset", 0)
    # Here the end is timestep 0, or where that is visited no noise at all.
    to_one = settings.get("set_alpha_to_one", True) != from_zero
    differs = {
        "clip_sample": own and settings.get("clip_sample", True),
        "set_alpha_to_one": to_one,
        "timestep_spacing": theirs == "linspace",  # whose steps end between its points
    }
    differing = [name for name, there in differs.items() if there]
    if differing:
        values = ", ".join(f"{name} {settings.get(name, True)}" for name in differing)
        warnings.warn(
            f"{path}: its DDIM has {values}, which ours has not; pictures differ a bit",
            stacklevel=2,
        )
    if from_zero:
        return "leading"
    return theirs if theirs == "trailing" else None


def _check_noise(path: pathlib.Path, option: str) -> None:
    """Raises UserError unless a condition's noise is the one that is known here."""
    theirs = _process(path, option)
    ours = NOISE_OF_CONDITIONS[path.parent.name]
    known = {"timesteps": 1000, "given_betas": None} | ours
    for field, value in known.items():
        if theirs[field] != value:
            raise UserError(
                f"{option}: {path} has {field} {theirs[field]!r}; only {value!r} is"
                " known here"
            )
