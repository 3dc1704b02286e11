"""A run as a folder that diffusers loads as one of its pipelines.

Which one is told by the kinds of the run's conditions and their nets, see `_MAKERS`.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import numpy as safetensors_numpy

from ldm_jax import loaded, publish
from ldm_jax.config import UserError
from ldm_jax.convert import networks, whole, write_config
from ldm_jax.nets import autoencoder, clip_vision, text_encoder

_SCHEDULES = {ours: theirs for theirs, ours in whole.SCHEDULES.items()}
_PREDICTIONS = {ours: theirs for theirs, ours in whole.PREDICTIONS.items()}
_SPACINGS = ("trailing", "leading")  # that are the same there
# Whose names the configs have; pipelines look whether they are of long ago.
_VERSION = {"_diffusers_version": "0.36.0"}
_FILE_INSTEAD = "give a DST that ends in .safetensors"
_LDM_LENGTH, _LDM_FACTOR = 77, 8  # what its text pipeline takes prompts and latents by


class Part(NamedTuple):
    """One folder of a pipeline: its class, config and, if it has some, arrays."""

    library: str
    cls: str
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] | None = None

    def write(self, folder: pathlib.Path) -> None:
        """Writes it as its library reads it."""
        kinds = {"Scheduler": "scheduler_config", "Processor": "preprocessor_config"}
        name = next((n for end, n in kinds.items() if self.cls.endswith(end)), "config")
        folder.mkdir(parents=True)
        _write_json(folder / f"{name}.json", self.config)
        if self.arrays is not None:
            # Models of transformers have a type instead, also those of diffusers.
            stem = "diffusion_pytorch_" * ("_class_name" in self.config) + "model"
            file = folder / f"{stem}.safetensors"
            safetensors_numpy.save_file(dict(self.arrays), file, publish.META)


class Pipeline(NamedTuple):
    """A pipeline's class, its parts, whose tokenizer it has, and more of its index."""

    cls: str
    parts: Mapping[str, Part]
    text: str | None = None  # name of the condition
    more: Mapping[str, Any] = {}


def write(model: loaded.Loaded, path: pathlib.Path) -> None:
    """Writes a run as a pipeline of diffusers, whole or not at all.

    A first stage alone becomes what is the folder `vae` of one. Raises UserError where
    diffusers has no pipeline of these conditions and nets.
    """
    if isinstance(model, loaded.LoadedAutoencoder):
        scale_factor = publish.one_scale_factor(model.first_stage)
        params, size = model.first_stage.params, model.config.resolution
        part = _first_stage(model.net, params, scale_factor, size)
        with publish.written(path) as partial:
            part.write(partial)
        return
    publish.check(model)
    kinds = tuple(sorted(c.kind for c in model.config.conditioners.values()))
    if kinds not in _MAKERS:
        known = "; ".join(", ".join(kinds) or "none" for kinds in _MAKERS)
        raise UserError(
            f"conditioners: {', '.join(kinds) or 'none'}, but pipelines of diffusers"
            f" have {known}; {_FILE_INSTEAD}"
        )
    pipeline = _MAKERS[kinds](model)
    index = {"_class_name": pipeline.cls, **_VERSION, **pipeline.more}
    index |= {name: [part.library, part.cls] for name, part in pipeline.parts.items()}
    tokenizer = None
    if pipeline.text is not None:
        tokenizer = model.tokenizers[pipeline.text]
        index["tokenizer"] = ["transformers", type(tokenizer).__name__]
    with publish.written(path) as partial:
        for name, part in pipeline.parts.items():
            part.write(partial / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial / "tokenizer")
        _write_json(partial / whole.INDEX, index)


# --- pipelines


def _ldm(model: loaded.LoadedModel) -> Pipeline:
    return Pipeline("LDMPipeline", _core(model, "vqvae"))


def _ldm_super_resolution(model: loaded.LoadedModel) -> Pipeline:
    parts = _core(model, "vqvae")
    factor = parts["vqvae"].config["scaling_factor"]
    if factor != 1.0:
        raise UserError(
            f"autoencoder: its latents are multiplied by {factor}, but"
            f" {whole.SUPER_RESOLUTION} decodes them as they are; {_FILE_INSTEAD}"
        )
    return Pipeline(whole.SUPER_RESOLUTION, parts)


def _of_text(model: loaded.LoadedModel) -> Pipeline:
    ((name, (net, params)),) = model.condition_nets.items()
    if isinstance(net, text_encoder.CLIPTextTransformer):
        parts, name = _stable_diffusion(model)
        return Pipeline("StableDiffusionPipeline", parts, name, _UNJUDGED)
    if not isinstance(net, text_encoder.TextTransformer):
        raise UserError(
            f"conditioners.{name}.net: a {type(net).__name__}, but pipelines of text"
            f" have CLIP's tower or LDM's transformer; {_FILE_INSTEAD}"
        )
    length = model.config.conditioners[name].length
    factor = 2 ** (len(model.model.autoencoder.ch_mult) - 1)
    if (length, factor) != (_LDM_LENGTH, _LDM_FACTOR):
        raise UserError(
            f"conditioners.{name}.length: {length}, with a first stage of f = {factor},"
            f" but LDMTextToImagePipeline has {_LDM_LENGTH} tokens and f ="
            f" {_LDM_FACTOR}; {_FILE_INSTEAD}"
        )
    bert = Part(
        "latent_diffusion",
        "LDMBertModel",
        write_config.ldm_bert_of(net),
        _arrays(net, params, "diffusers"),
    )
    return Pipeline(
        "LDMTextToImagePipeline", _core(model, "vqvae") | {"bert": bert}, name
    )


def _inpainting(model: loaded.LoadedModel) -> Pipeline:
    parts, name = _stable_diffusion(model)
    _, section = _condition(model, "inpainting")
    if section.get("convention", "sd") != "sd":
        raise UserError(
            f"conditioners.*.convention: {section.convention!r}, but"
            " StableDiffusionInpaintPipeline gives what is known as 'sd' has it;"
            f" {_FILE_INSTEAD}"
        )
    return Pipeline("StableDiffusionInpaintPipeline", parts, name, _UNJUDGED)


def _upscale(model: loaded.LoadedModel) -> Pipeline:
    parts, name = _stable_diffusion(model)
    of_pictures, _ = _condition(model, "noisy_low_res")
    levels = model.model.conditioners[of_pictures].noise_levels
    parts |= {"low_res_scheduler": _noise_of_condition("low_res_scheduler")}
    more = {"max_noise_level": levels, "safety_checker": [None, None]}
    return Pipeline(whole.UPSCALE, parts, name, more)


def _depth(model: loaded.LoadedModel) -> Pipeline:
    parts, name = _stable_diffusion(model)
    of_pictures, _ = _condition(model, "photo_depth")
    net, params = model.condition_nets[of_pictures]
    parts["depth_estimator"] = Part(
        "transformers",
        "DPTForDepthEstimation",
        write_config.dpt_of(net.tower),
        _arrays(net.tower, params["tower"], "huggingface"),
    )
    half = [0.5] * 3
    parts["feature_extractor"] = Part(
        "transformers",
        "DPTImageProcessor",
        {
            "image_processor_type": "DPTImageProcessor",
            "size": {"height": net.side, "width": net.side},
            "keep_aspect_ratio": True,
            "ensure_multiple_of": 32,
            "resample": 3,  # bicubic
            "image_mean": half,
            "image_std": half,
        },
    )
    return Pipeline("StableDiffusionDepth2ImgPipeline", parts, name)


def _unclip(model: loaded.LoadedModel) -> Pipeline:
    parts, name = _stable_diffusion(model)
    of_pictures, section = _condition(model, "clip_image")
    net, params = model.condition_nets[of_pictures]
    if not model.model.conditioners[of_pictures].noise_levels:
        raise UserError(
            f"conditioners.{of_pictures}.max_noise_level: 0, but"
            " StableUnCLIPImg2ImgPipeline tells its UNet a level of noise;"
            f" {_FILE_INSTEAD}"
        )
    side = net.tower.image_size
    parts["image_encoder"] = Part(
        "transformers",
        "CLIPVisionModelWithProjection",
        write_config.clip_vision_of(net.tower),
        _arrays(net.tower, params["tower"], "huggingface"),
    )
    parts["feature_extractor"] = Part(
        "transformers",
        "CLIPImageProcessor",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "resample": 3,  # bicubic
            "image_mean": list(clip_vision.MEAN),
            "image_std": list(clip_vision.STD),
        },
    )
    rows = {key: np.asarray(params[key])[None] for key in ("mean", "std")}
    parts["image_normalizer"] = Part(
        "stable_diffusion",
        "StableUnCLIPImageNormalizer",
        {
            "_class_name": "StableUnCLIPImageNormalizer",
            "embedding_dim": net.tower.projection_dim,
            **_VERSION,
        },
        rows,
    )
    parts |= {"image_noising_scheduler": _noise_of_condition("image_noising_scheduler")}
    return Pipeline("StableUnCLIPImg2ImgPipeline", parts, name)


_UNJUDGED = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
# By the kinds of a run's conditions.
_MAKERS: dict[tuple[str, ...], Callable[[loaded.LoadedModel], Pipeline]] = {
    (): _ldm,
    ("text",): _of_text,
    ("inpainting", "text"): _inpainting,
    ("noisy_low_res", "text"): _upscale,
    ("photo_depth", "text"): _depth,
    ("clip_image", "text"): _unclip,
    ("low_res",): _ldm_super_resolution,
}


# --- parts


def _core(model: loaded.LoadedModel, first_name: str) -> dict[str, Part]:
    """UNet, first stage and scheduler."""
    nets, side = model.model, model.model.latent_shape[0]
    if isinstance(nets.autoencoder, autoencoder.Identity):
        raise UserError(
            "autoencoder.kind: 'identity', but these pipelines of diffusers decode"
            f" latents; {_FILE_INSTEAD}"
        )
    params, scale_factor = publish.first_stage(model)
    size = model.config.resolution
    return {
        "unet": _part_of_diffusers(
            nets.unet, write_config.unet_of(nets.unet, side), model.params["unet"]
        ),
        first_name: _first_stage(nets.autoencoder, params, scale_factor, size),
        "scheduler": _scheduler(model),
    }


def _first_stage(net: Any, params: Any, scale_factor: float, size: int) -> Part:
    config = write_config.autoencoder_of(net, scale_factor, size)
    return _part_of_diffusers(net, config, params)


def _part_of_diffusers(net: Any, config: Mapping[str, Any], params: Any) -> Part:
    arrays = _arrays(net, params, "diffusers")
    return Part("diffusers", config["_class_name"], {**config, **_VERSION}, arrays)


def _stable_diffusion(model: loaded.LoadedModel) -> tuple[dict[str, Part], str]:
    """(UNet, VAE, scheduler and CLIP's text tower, the name of the text condition)"""
    name, _ = _condition(model, "text")
    net, params = model.condition_nets[name]
    if not isinstance(net, text_encoder.CLIPTextTransformer) or net.pooled:
        raise UserError(
            f"conditioners.{name}.net: a {type(net).__name__}, but pipelines of Stable"
            f" Diffusion have the tokens of CLIP's text tower; {_FILE_INSTEAD}"
        )
    # diffusers has a tower that stops early as one of so many layers, and a last norm.
    net = net.clone(depth=net.blocks, layer="last", final_norm=True)
    if "norm_out" not in params:
        raise UserError(
            f"conditioners.{name}.net.final_norm: False, but diffusers' tower ends in a"
            f" norm; {_FILE_INSTEAD}"
        )
    config = write_config.clip_text_of(net)
    arrays = _arrays(net, params, "huggingface")
    parts = _core(model, "vae")
    parts["text_encoder"] = Part("transformers", "CLIPTextModel", config, arrays)
    return parts, name


def _condition(model: loaded.LoadedModel, kind: str) -> tuple[str, Any]:
    """(name, section) of the one condition of a kind."""
    sections = model.config.conditioners.items()
    return next((name, section) for name, section in sections if section.kind == kind)


def _arrays(net: Any, params: Any, layout: str) -> dict[str, np.ndarray]:
    return networks.export_network(net, {"params": params}, layout)


def _scheduler(model: loaded.LoadedModel) -> Part:
    """DDIMScheduler; a schedule that it has no name for as numbers."""
    section, spacing = model.config.diffusion, model.config.sample.get("spacing")
    if spacing not in _SPACINGS:  # `uniform` is what is called so with an offset of 1
        spacing = None
    if section.schedule in _SCHEDULES and section.get("given_betas") is None:
        betas = {
            "beta_schedule": _SCHEDULES[section.schedule],
            "beta_start": section.linear_start,
            "beta_end": section.linear_end,
            "rescale_betas_zero_snr": section.zero_terminal_snr,
        }
    else:
        betas = {"trained_betas": model.model.schedule.betas.tolist()}
    config = betas | {
        "_class_name": "DDIMScheduler",
        **_VERSION,
        "num_train_timesteps": section.timesteps,
        "prediction_type": _PREDICTIONS[model.model.parameterization],
        "clip_sample": False,
        "set_alpha_to_one": spacing == "leading",
        "steps_offset": int(spacing != "leading"),
        "timestep_spacing": spacing or "leading",
    }
    return Part("diffusers", "DDIMScheduler", config)


def _noise_of_condition(name: str) -> Part:
    """The scheduler of the noise that pictures or embeddings are given."""
    ours = whole.NOISE_OF_CONDITIONS[name]
    config = {
        "_class_name": "DDPMScheduler",
        **_VERSION,
        "num_train_timesteps": 1000,
        "beta_schedule": _SCHEDULES[ours["schedule"]],
    }
    if "linear_start" in ours:
        ends = {"beta_start": ours["linear_start"], "beta_end": ours["linear_end"]}
        config |= ends
    return Part("diffusers", "DDPMScheduler", config)


def _write_json(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")
