"""A whole model's arrays under the prefixes of CompVis, from a file or a folder.

A file of CompVis or Stability has them so. A folder of diffusers is gathered: each of
its parts comes under the prefix of its counterpart, in its own key layout, which the
keys tell later.
"""

import json
import pathlib
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import files, mapped

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
# Whose config.json says nothing but what its arrays do.
_BARE = ("image_normalizer",)
# Parts that judge or mark pictures; nothing is drawn by them.
_ASIDE = ("safety_checker", "watermarker")
_SCHEDULER = "scheduler_config.json"
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
# What diffusers' schedulers name, as our configs do.
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SPACINGS = ("leading", "trailing", "linspace")
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
    given: str | None = None  # what the model is given, as the original's YAML calls it


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


# Keys of an autoencoder alone, in either layout.
_ALONE = (
    "encoder.mid.block_1.norm1.weight",
    "encoder.mid_block.resnets.0.norm1.weight",
)


def with_prefix(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A first stage alone, Karlo's decoder or its upscaler, as whole models have them.

    Of the upscaler's two nets, the one that draws all steps but the last. Others are as
    they were.
    """
    if any(key in arrays for key in _ALONE):
        return {FIRST_STAGE + key: value for key, value in arrays.items()}
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


def without_copy(
    arrays: Mapping[str, np.ndarray], option: str
) -> dict[str, np.ndarray]:
    """A file's arrays, without the first stage where it is the condition's net too.

    torch lists a shared net (`cond_stage_config: __is_first_stage__`, as LDM inpaints)
    under both names. Raises UserError, which names `option`, where the two differ.
    """
    copies = {
        key: FIRST_STAGE + key.removeprefix(CONDITIONS[0])
        for key in arrays
        if key.startswith(CONDITIONS[0])
    }
    if not arrays.keys() >= set(copies.values()):
        return dict(arrays)
    for key, own in copies.items():
        if not np.array_equal(arrays[key], arrays[own]):
            raise UserError(
                f"{option}: {key} and {own} are two names of one array, but differ;"
                " give the file as it was trained"
            )
        mapped.forget(arrays[key])
        mapped.forget(arrays[own])
    return {key: value for key, value in arrays.items() if key not in copies}


def is_folder(path: pathlib.Path) -> bool:
    """Whether diffusers has saved a pipeline or a first stage there."""
    return (path / INDEX).is_file() or _is_first_stage(path)


def _is_first_stage(path: pathlib.Path) -> bool:
    config = path / "config.json"
    text = config.read_text() if config.is_file() else ""
    return '"AutoencoderKL"' in text or '"VQModel"' in text


def read_folder(path: pathlib.Path, option: str) -> Whole:
    """What a pipeline's folder has, or a first stage's; UserErrors name `option`."""
    if not (path / INDEX).is_file():
        return _read_first_stage(path, option)
    index = _read_json(path / INDEX, option)
    listed = _listed(index)
    arrays, of_parts = {}, {}
    for name in listed:
        if name in PARTS:
            own = _weights(path / name, option)
            arrays |= {PARTS[name] + key: value for key, value in own.items()}
            config = path / name / "config.json"
            if name not in _BARE or config.is_file():
                of_parts[name] = _read_json(config, option)
                _check_sizes(of_parts[name], own)
        elif _shards(path / name, option):
            raise UserError(
                f"{option}: {path / name} is a part that is not known here; give a"
                f" pipeline of {', '.join(PARTS)}"
            )
        elif name in NOISE_OF_CONDITIONS:
            _check_noise(path / name / _SCHEDULER, option)
    pipeline = index.values.get("_class_name")
    process = spacing = None
    scheduler = path / "scheduler" / _SCHEDULER
    if "scheduler" in listed or scheduler.is_file():
        settings = _read_json(scheduler, option)
        process, spacing = _process(settings), _spacing(settings, str(pipeline))
    tokenizer = path / "tokenizer"
    if "tokenizer" in listed and not tokenizer.is_dir():
        raise UserError(
            f"{option}: {tokenizer} is not there, though {INDEX} lists it; fetch the"
            " whole folder"
        )
    return Whole(
        arrays,
        process,
        1.0 if pipeline == SUPER_RESOLUTION else _scale_factor(of_parts),
        tokenizer if tokenizer.is_dir() else None,
        {PARTS[name]: settings.values for name, settings in of_parts.items()},
        _image_size(of_parts["unet"]) if "unet" in of_parts else None,
        pipeline,
        noise_levels=index.number("max_noise_level", None, kind=int, above=-1),
        spacing=spacing,
    )


def _read_first_stage(path: pathlib.Path, option: str) -> Whole:
    settings, own = _read_json(path / "config.json", option), _weights(path, option)
    _check_sizes(settings, own)
    return Whole(
        {FIRST_STAGE + key: value for key, value in own.items()},
        scale_factor=_scale_factor({"vae": settings}),
        nets={FIRST_STAGE: settings.values},
    )


_LARGEST = sys.float_info.max


class _Settings(NamedTuple):
    """What a JSON file says; UserErrors name its path and what it has."""

    path: pathlib.Path
    option: str
    values: Mapping[str, Any]

    def number(
        self,
        key: str,
        default: float | None,
        kind: Any = int | float,
        above: float = 0,
        most: float = _LARGEST,
    ) -> Any:
        """A finite number within bounds; None where the default is, if it is none."""
        value = self.values.get(key, default)
        if value is None and default is None:
            return None
        if not _is_number(value, kind, above, most):
            what = "a whole number" if kind is int else "a number"
            up_to = f" and at most {most}" if most < _LARGEST else ""
            raise self.wrong(key, f"give {what} above {above}{up_to}")
        return value

    def wrong(self, key: str, mend: str) -> UserError:
        return UserError(
            f"{self.option}: {self.path} has {key} {self.values.get(key)!r:.80}; {mend}"
        )


def _is_number(value: Any, kind: Any, above: float = 0, most: float = _LARGEST) -> bool:
    # Python reads NaN and Infinity from JSON too, and its True is an int.
    is_kind = isinstance(value, kind) and not isinstance(value, bool)
    return is_kind and above < value <= most


def _read_json(path: pathlib.Path, option: str) -> _Settings:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"{option}: {path} is not there, though {INDEX} lists the part; give the"
            " whole folder"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}: {path} can't be read ({error}); give the whole folder"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{option}: {path} holds {values!r:.80}, which is no object of JSON; give"
            " the file as diffusers saves it"
        )
    return _Settings(path, option, values)


def _listed(index: _Settings) -> list[str]:
    """The parts that an index says are in the folder, without those set aside."""
    return [
        name
        for name, entry in index.values.items()
        if isinstance(entry, list) and any(entry)
        if not name.startswith("_") and name not in _ASIDE
    ]


def _check_sizes(settings: _Settings, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where a part's config.json says other sizes than its arrays."""
    firsts = r"(?:encoder\.)?down_blocks\.(\d+)\.resnets\.0\.conv1\.weight"
    widths = {
        int(found[1]): np.shape(value)[0]
        for key, value in arrays.items()
        if (found := re.fullmatch(firsts, key))
    }
    layers = {
        int(found[1])
        for key in arrays
        if (found := re.search(r"\b(?:encoder|model)\.layers?\.(\d+)\.", key))
    }
    for key, there in (
        ("block_out_channels", [widths[level] for level in sorted(widths)]),
        ("num_hidden_layers", len(layers)),
    ):
        if there and settings.values.get(key, there) != there:
            mend = f"its arrays say {there}, so give the config.json saved with them"
            raise settings.wrong(key, mend)


def _scale_factor(of_parts: Mapping[str, _Settings]) -> float | None:
    """What latents are multiplied with, of the first stage if there is one."""
    settings = of_parts.get("vae", of_parts.get("vqvae"))
    if settings is None:
        return None
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if settings.values.get(key) not in (None, 0):
            raise settings.wrong(key, "only null is computed here")
    return settings.number("scaling_factor", 0.18215)


def _image_size(unet: _Settings) -> int | None:
    """Side of the latents that a UNet was trained on."""
    key = "sample_size"
    size = unet.values.get(key)
    sides = size if isinstance(size, list) and size else [size]
    if size is None:
        return None
    if not all(_is_number(side, int) and side == sides[0] for side in sides):
        raise unet.wrong(key, "give one whole number above 0, the side of a square")
    return sides[0]


def _shards(folder: pathlib.Path, option: str) -> list[pathlib.Path]:
    """The files of a part's weights: safetensors, else torch's, else in half."""
    for suffix in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for name in _WEIGHTS:
            path = folder / f"{name}{suffix}"
            listed = folder / f"{name}{suffix}.index.json"
            if path.is_file():
                return [path]
            if listed.is_file():
                return _shards_of(_read_json(listed, option))
    return []


def _shards_of(index: _Settings) -> list[pathlib.Path]:
    of_keys = index.values.get("weight_map")
    named = list(of_keys.values()) if isinstance(of_keys, dict) else [None]
    if not all(isinstance(shard, str) for shard in named):
        raise index.wrong("weight_map", "give a file's name for each key")
    return [index.path.parent / shard for shard in sorted(set(named))]


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


def _process(settings: _Settings) -> dict[str, Any]:
    """A scheduler's config in the names of our configs' section `diffusion`."""
    schedule = settings.values.get("beta_schedule", "linear")
    prediction = settings.values.get("prediction_type", "epsilon")
    for field, value, known in (
        ("beta_schedule", schedule, SCHEDULES),
        ("prediction_type", prediction, PREDICTIONS),
    ):
        if value not in tuple(known):  # a dict can not be asked for a list
            raise settings.wrong(field, f"only {', '.join(known)} are known here")
    return dict(
        schedule=SCHEDULES[schedule],
        timesteps=settings.number("num_train_timesteps", 1000, kind=int),
        linear_start=settings.number("beta_start", 1e-4, most=1),
        linear_end=settings.number("beta_end", 0.02, most=1),
        given_betas=_betas(settings),
        zero_terminal_snr=settings.values.get("rescale_betas_zero_snr", False),
        parameterization=PREDICTIONS[prediction],
    )


def _betas(settings: _Settings) -> list[float] | None:
    betas = settings.values.get("trained_betas")
    if betas is None:
        return None
    fit = isinstance(betas, list) and betas
    if not fit or not all(_is_number(beta, int | float, most=1) for beta in betas):
        raise settings.wrong("trained_betas", "give numbers above 0 and at most 1")
    return betas


def _spacing(scheduler: _Settings, pipeline: str) -> str | None:
    """How a scheduler spaces its steps, as our samplers say it; None is `uniform`.

    Warns of what DDIM does there and not here. What other schedulers do is left to the
    sampler, but that a model was trained for the last timestep.
    """
    settings = scheduler.values
    theirs = settings.get("timestep_spacing", "leading")
    if theirs not in SPACINGS:
        raise scheduler.wrong(
            "timestep_spacing", f"choose one of {', '.join(SPACINGS)}"
        )
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
            f"{scheduler.path}: its DDIM has {values}, which ours has not; pictures"
            " differ a bit",
            stacklevel=2,
        )
    if from_zero:
        return "leading"
    return theirs if theirs == "trailing" else None


def _check_noise(path: pathlib.Path, option: str) -> None:
    """Raises UserError unless a condition's noise is the one that is known here."""
    theirs = _process(_read_json(path, option))
    ours = NOISE_OF_CONDITIONS[path.parent.name]
    known = {"timesteps": 1000, "given_betas": None} | ours
    for field, value in known.items():
        if theirs[field] != value:
            raise UserError(
                f"{option}: {path} has {field} {theirs[field]!r}; only {value!r} is"
                " known here"
            )
