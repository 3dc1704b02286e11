"""A whole model's arrays under the prefixes of CompVis, from a file or a folder.

A file of CompVis or Stability has them so. A folder of diffusers is gathered: each of
its parts comes under the prefix of its counterpart, in its own key layout, which the
keys tell later. What its configs say is given as CompVis' buffers are.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import files

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
CONDITIONS = ("cond_stage_model.", "embedder.", "noise_augmentor.", "depth_model.")

INDEX = "model_index.json"
_PARTS = {
    "unet": UNET,
    "vae": FIRST_STAGE,
    "vqvae": FIRST_STAGE,
    "text_encoder": "cond_stage_model.transformer.",
    "image_encoder": "embedder.",
    "image_normalizer": "noise_augmentor.data_",
    "depth_estimator": "depth_model.model.",
}
# Parts that judge or mark pictures; nothing is drawn by them.
_ASIDE = ("safety_checker", "watermarker")
_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Whole(NamedTuple):
    """A model's arrays, and what else its source says; None is nothing."""

    arrays: dict[str, np.ndarray]
    parameterization: str | None = None
    tokenizer: pathlib.Path | None = None


def is_folder(path: pathlib.Path) -> bool:
    """Whether diffusers has saved a pipeline there."""
    return (path / INDEX).is_file()


def read_folder(path: pathlib.Path, option: str) -> Whole:
    """The parts of a pipeline's folder; UserErrors name `option`."""
    index, arrays = _json(path / INDEX, option), {}
    for name, entry in index.items():
        there = isinstance(entry, list | tuple) and any(entry)
        if name.startswith("_") or not there or name in _ASIDE:
            continue
        if name in _PARTS:
            own = _weights(path / name, option)
            arrays |= {_PARTS[name] + key: value for key, value in own.items()}
        elif _shards(path / name):
            raise UserError(
                f"{option}: {path / name} is a part that is not known here; give a"
                f" pipeline of {', '.join(_PARTS)}"
            )
    process = path / "scheduler" / "scheduler_config.json"
    parameterization = None
    if process.is_file():
        settings = _json(process, option)
        arrays["alphas_cumprod"] = _alphas_cumprod(settings, option)
        prediction = settings.get("prediction_type", "epsilon")
        parameterization = PREDICTIONS.get(prediction)
        if parameterization is None:
            raise UserError(
                f"{option}: {process} has prediction_type {prediction!r}; only"
                f" {', '.join(PREDICTIONS)} are known here"
            )
    if "vae" in index:
        scale = _json(path / "vae" / "config.json", option).get("scaling_factor")
        arrays["scale_factor"] = np.array(0.18215 if scale is None else scale)
    tokenizer = path / "tokenizer"
    return Whole(arrays, parameterization, tokenizer if tokenizer.is_dir() else None)


def _json(path: pathlib.Path, option: str) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}: {path} can't be read ({error}); give the whole folder"
        ) from error


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a part's weights: safetensors, else torch's, else in half."""
    for suffix in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"):
        for name in _WEIGHTS:
            path = folder / f"{name}{suffix}"
            listed = folder / f"{name}{suffix}.index.json"
            if path.is_file():
                return [path]
            if listed.is_file():
                of_keys = json.loads(listed.read_text())["weight_map"]
                return [folder / shard for shard in sorted(set(of_keys.values()))]
    return []


def _weights(folder: pathlib.Path, option: str) -> dict[str, np.ndarray]:
    arrays, shards = {}, _shards(folder)
    if not shards:
        raise UserError(
            f"{option}: {folder} has no weights in it, though {INDEX} lists the part;"
            " fetch the whole folder"
        )
    for path in shards:
        arrays |= files.read(path, option)
    if folder.name == "image_normalizer":
        arrays = {key: np.ravel(value) for key, value in arrays.items()}
    return arrays


def _alphas_cumprod(settings: Mapping[str, Any], option: str) -> np.ndarray:
    """Of a scheduler's config, float64 [T]."""
    count = settings.get("num_train_timesteps", 1000)
    start = settings.get("beta_start", 1e-4)
    end = settings.get("beta_end", 0.02)
    kind = settings.get("beta_schedule", "linear")
    if settings.get("trained_betas") is not None:
        betas = np.asarray(settings["trained_betas"], np.float64)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    elif kind == "linear":
        betas = np.linspace(start, end, count)
    elif kind == "squaredcos_cap_v2":
        u = (np.arange(count + 1) / count + 8e-3) / (1 + 8e-3)
        bar = np.cos(u * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise UserError(
            f"{option}: its scheduler has beta_schedule {kind!r}; only scaled_linear,"
            " linear and squaredcos_cap_v2 are known here"
        )
    bar = np.cumprod(1 - betas)
    if settings.get("rescale_betas_zero_snr"):
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return bar
