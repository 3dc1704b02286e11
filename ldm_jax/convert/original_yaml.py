"""What the YAML of a CompVis or Stability checkpoint says, checked by its weights."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from ldm_jax.config import UserError
from ldm_jax.convert import networks, whole
from ldm_jax.nets import autoencoder, embedders, text_encoder

SUFFIXES = (".yaml", ".yml")
_HEADS = ("num_heads", "num_head_channels", "num_heads_upsample", "legacy")
# Arguments that show in the arrays, so that a YAML of another model is found out.
_SEEN = {
    whole.UNET: (
        "in_channels",
        "out_channels",
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "context_dim",
        "transformer_depth",
        "use_spatial_transformer",
        "use_linear_in_transformer",
        "num_classes",
        "adm_in_channels",
        "resblock_updown",
        "use_scale_shift_norm",
    ),
    whole.FIRST_STAGE: (
        "ch",
        "ch_mult",
        "in_channels",
        "out_ch",
        "z_channels",
        "embed_dim",
        "n_embed",
        "num_res_blocks",
        "double_z",
    ),
}
# The class of a section's `target` that its arrays must be of, by the last name.
_TARGETS = {
    "AutoencoderKL": autoencoder.AutoencoderKL,
    "VQModel": autoencoder.VQModel,
    "VQModelInterface": autoencoder.VQModel,
    "FrozenCLIPEmbedder": text_encoder.CLIPTextTransformer,
    "FrozenOpenCLIPEmbedder": text_encoder.CLIPTextTransformer,
    "BERTEmbedder": text_encoder.TextTransformer,
    "ClassEmbedder": embedders.ClassEmbedder,
    "SpatialRescaler": embedders.SpatialRescaler,
}
_CONDITION = whole.CONDITIONS[0]
_SECTIONS = {whole.UNET: "unet_config", whole.FIRST_STAGE: "first_stage_config"}


def find(source: pathlib.Path) -> pathlib.Path | None:
    """The YAML beside a checkpoint, of its name."""
    paths = (source.with_suffix(suffix) for suffix in SUFFIXES)
    return next((path for path in paths if source.suffix and path.is_file()), None)


def add(source: whole.Whole, path: pathlib.Path) -> whole.Whole:
    """The source with what the YAML says of noise, scale, size and nets.

    Raises UserError in one line where the file is none, or is of another model.
    """
    params = _params(path)
    nets = {}
    for prefix, section in _SECTIONS.items():
        options = dict((params.get(section) or {}).get("params") or {})
        options |= options.pop("ddconfig", {})
        there = any(key.startswith(prefix) for key in source.arrays)
        if options and not there:
            raise UserError(
                f"SRC: nothing in it begins with {prefix!r}, though {path} has a"
                f" {section}; give a whole checkpoint"
            )
        if not options:
            continue
        _check(path, section, prefix, options, source)
        nets[prefix] = options
    _check_target(path, "first_stage_config", params, whole.FIRST_STAGE, nets, source)
    _check_target(path, "cond_stage_config", params, _CONDITION, {}, source)
    process = dict(
        schedule=params.get("beta_schedule", "linear"),
        timesteps=int(_number(path, params, "timesteps", 1000)),
        linear_start=_number(path, params, "linear_start", 1e-4),
        linear_end=_number(path, params, "linear_end", 2e-2),
        parameterization=params.get("parameterization", "eps"),
    )
    size = params.get("image_size")
    return source._replace(
        process=process,
        scale_factor=_scale_factor(path, params, source),
        image_size=size if isinstance(size, int) else source.image_size,
        nets={**source.nets, **nets},
        given=params.get("cond_stage_key"),
        **_low_scale(params),
    )


def _number(
    path: pathlib.Path, params: Mapping[str, Any], name: str, default: float | None
) -> float | None:
    """A number above 0; 1e-4 without a point is a string to YAML."""
    value = params.get(name)
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"--config: {path} has {name} {value!r}, which is no number above 0"
        )
    return number


def _scale_factor(
    path: pathlib.Path, params: Mapping[str, Any], source: whole.Whole
) -> float | None:
    """What latents are multiplied by; None where the weights have it measured."""
    said, found = _number(path, params, "scale_factor", None), None
    if "scale_factor" in source.arrays:
        found = np.asarray(source.arrays["scale_factor"], np.float64)
    if params.get("scale_by_std") and found is not None:
        return None
    both = said is not None and found is not None
    if both and not np.allclose(found, said, rtol=1e-2):  # it may have been halved
        raise UserError(
            f"--config: {path} has scale_factor {said}, but SRC's is {found.tolist()};"
            " give the YAML of SRC, or none"
        )
    return source.scale_factor if said is None else said


def _low_scale(params: Mapping[str, Any]) -> dict[str, Any]:
    """That a small picture with noise is given, and how many levels that has."""
    section = params.get("low_scale_config")
    if not isinstance(section, Mapping):
        return {}
    levels = (section.get("params") or {}).get("max_noise_level")
    return {"pipeline": whole.UPSCALE, "noise_levels": levels}


def _check_target(
    path: pathlib.Path,
    section: str,
    params: Mapping[str, Any],
    prefix: str,
    nets: Mapping[str, Any],
    source: whole.Whole,
) -> None:
    """Raises UserError where the arrays are of another class than the YAML names."""
    stated = params.get(section)
    target = stated.get("target") if isinstance(stated, Mapping) else None
    wanted = _TARGETS.get(str(target).rpartition(".")[2])
    arrays = {k: v for k, v in source.arrays.items() if k.startswith(prefix)}
    if wanted is None or not arrays:
        return
    # No array tells the number of heads, and any will do to tell the class.
    found = type(networks.module_of(arrays, {"heads": 1} | dict(nets.get(prefix, {}))))
    if found is not wanted:
        raise UserError(
            f"--config: {path} has a {section} of {target}, but SRC's arrays are of a"
            f" {found.__name__}; give the YAML of SRC, or none"
        )


def _params(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"--config: {path} can't be read ({words:.200}); give the YAML of SRC"
        ) from error
    model = tree.get("model") if isinstance(tree, Mapping) else None
    params = model.get("params") if isinstance(model, Mapping) else None
    if not isinstance(params, Mapping) or "unet_config" not in params:
        raise UserError(
            f"--config: {path} has no model.params.unet_config; give the YAML of a"
            " latent diffusion model"
        )
    return params


def _check(
    path: pathlib.Path,
    section: str,
    prefix: str,
    options: Mapping[str, Any],
    source: whole.Whole,
) -> None:
    """Raises UserError where an argument is not what the arrays show."""
    heads = {key: options[key] for key in _HEADS if key in options}
    try:
        net = networks.module_of(whole.under(source.arrays, prefix), heads)
    except UserError as error:
        raise UserError(
            f"SRC: {section} of {path} can't be read off its arrays ({error})"
        ) from error
    for name in _SEEN[prefix]:
        if name not in options or not hasattr(net, name):
            continue
        said, seen = _plain(options[name]), _plain(getattr(net, name))
        if said != seen:
            raise UserError(
                f"--config: {path} has {section}.params.{name} {said!r}, but SRC's"
                f" arrays are of {seen!r}; give the YAML of SRC, or none"
            )


def _plain(value):
    """Lists and tuples alike; one number for equal ones."""
    if isinstance(value, list | tuple):
        value = tuple(value)
        return value[0] if len(set(value)) == 1 else value
    return value
