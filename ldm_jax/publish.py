"""A run as others read it, in one file of CompVis' layout; see publish_folder.py too.

Both multiply latents by one number. Where a run has measured a mean and a spread for
each channel, these go into the 1x1 convolutions around the latent of a KL autoencoder,
and the number is 1: its latents are then the run's, and so are its pictures.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from ldm_jax import first_stage as first_stage_lib
from ldm_jax import loaded
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.convert import networks, towers, whole
from ldm_jax.diffusion import schedules
from ldm_jax.nets import autoencoder, clip_vision, dpt, embedders, prior, text_encoder

META = {"format": "pt"}  # readers of torch ask for it


def write_file(model: loaded.Loaded, path: pathlib.Path) -> None:
    """Writes a run as a checkpoint of CompVis or Stability, whole or not at all.

    A first stage alone has no prefix there. Raises UserError for nets that have no such
    layout.
    """
    if isinstance(model, loaded.LoadedAutoencoder):
        variables = {"params": model.first_stage.params}
        _save(networks.export_network(model.net, variables, "compvis"), path)
        return
    check(model)
    params, scale_factor = first_stage(model)
    arrays = {
        "alphas_cumprod": np.float32(model.model.schedule.alphas_cumprod),
        "betas": np.float32(model.model.schedule.betas),
        "scale_factor": np.array(scale_factor),
    }
    unet = {"params": model.params["unet"]}
    arrays |= _under(whole.UNET, model.model.unet, unet, "compvis")
    net = model.model.autoencoder
    if not isinstance(net, autoencoder.Identity):
        arrays |= _under(whole.FIRST_STAGE, net, {"params": params}, "compvis")
    if "logvar" in model.params:
        arrays["logvar"] = np.asarray(model.params["logvar"])
    for name, (net, params) in model.condition_nets.items():
        own = _condition(net, params)
        if {key.split(".")[0] for key in own} & {key.split(".")[0] for key in arrays}:
            raise UserError(
                f"conditioners.{name}: CompVis' layout has one place for such nets, and"
                " another condition has it; export them by"
                " ldm_jax.convert.export_network"
            )
        arrays |= own
    _save(arrays, path)


def check(model: loaded.LoadedModel) -> None:
    """Raises UserError for what is in no other layout, and warns of what stays."""
    if isinstance(model.model.unet, prior.PriorTransformer):
        raise UserError(
            "unet.kind: 'prior', which has no place in a whole model of other layouts;"
            " export its network by ldm_jax.convert.export_network"
        )
    for name in model.first_stage.memory:
        raise UserError(
            f"conditioners.{name}: looks up the training pictures, which no other"
            " layout holds; convert a run without it"
        )
    for name, section in model.config.conditioners.items():
        if section.get("placeholder_tokens"):
            raise UserError(
                f"conditioners.{name}: has a token of textual inversion, which goes"
                " into a file of its own; write it with save_tokens of ldm_jax.load and"
                " convert the model that it was added to"
            )
    if isinstance(model.model.schedule, schedules.SigmaSchedule):
        raise UserError(
            "diffusion.schedule: 'sigma', which no other layout has; convert a run over"
            " timesteps"
        )
    if model.classifier is not None:
        warnings.warn(
            "classifier: the one that this run trained is left out, no other layout has"
            " a place for it; export it by ldm_jax.convert.export_network",
            stacklevel=3,
        )


def _condition(net: Any, params: Any) -> dict[str, np.ndarray]:
    """A condition's arrays under the prefix that CompVis' loaders look for."""
    of = {"params": params}
    match net:
        case text_encoder.CLIPTextTransformer() if net.activation == "gelu":
            net = net.clone(depth=net.blocks)
            return _under("cond_stage_model.model.", net, of, "openclip")
        case text_encoder.CLIPTextTransformer():
            return _under("cond_stage_model.transformer.", net, of, "huggingface")
        case text_encoder.TextTransformer() | embedders.ClassEmbedder():
            return _under("cond_stage_model.", net, of, "compvis")
        case embedders.SpatialRescaler():
            return _under("cond_stage_model.", net, of, "compvis")
        case clip_vision.ImageVector():
            tower = {"params": params["tower"]}
            arrays = _under("embedder.", net.tower, tower, "huggingface")
            values = (np.asarray(params[key]) for key in ("mean", "std"))
            return arrays | dict(zip(towers.STATISTICS, values, strict=True))
        case dpt.DepthMap():
            tower = {"params": params["tower"]}
            return _under("depth_model.model.", net.tower, tower, "huggingface")
    raise UserError(
        f"conditioners: a {type(net).__name__} has no place in CompVis' layout; export"
        " its network by ldm_jax.convert.export_network"
    )


def _under(prefix: str, net: Any, variables: Any, layout: str) -> dict[str, Any]:
    state = networks.export_network(net, variables, layout)
    return {prefix + key: value for key, value in state.items()}


# --- the latent's scale


def first_stage(model: loaded.LoadedModel) -> tuple[Mapping[str, Any], float]:
    """The autoencoder's params, and the number that latents are multiplied by."""
    frozen = model.first_stage
    mean, std, factor = _statistics(frozen)
    if factor is not None:
        return frozen.params, factor
    net = model.model.autoencoder
    if not isinstance(net, autoencoder.AutoencoderKL) or not net.use_quant_convs:
        raise UserError(
            "autoencoder: its latents have a mean and a spread for each channel, which"
            f" a {type(net).__name__} without 1x1 convolutions can't take up"
        )
    return _folded(frozen.params, mean, std), 1.0


def _reciprocal(std: float) -> float:
    """The shortest number whose reciprocal is `std` in float32: what was imported."""
    shortened = (float(f"{1 / std:.{digits}g}") for digits in range(3, 17))
    return next(s for s in shortened if np.float32(1 / s) == np.float32(std))


def _folded(params: Mapping[str, Any], mean: np.ndarray, std: np.ndarray) -> dict:
    """Params of a KL autoencoder whose latents are (z - mean) / std of what they were.

    The first half of quant_conv's outputs are means, the second log-variances.
    """
    c = len(mean)
    quant, post = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), params[name])
        for name in ("quant_conv", "post_quant_conv")
    )
    kernel, bias = quant["kernel"].copy(), quant["bias"].copy()
    kernel[..., :c] /= std
    bias[:c] = (bias[:c] - mean) / std
    bias[c:] -= 2 * np.log(std)
    inner = post["kernel"].reshape(c, -1)
    folded = {
        "quant_conv": {"kernel": kernel, "bias": bias},
        "post_quant_conv": {
            "kernel": post["kernel"] * std[:, None],
            "bias": post["bias"] + mean @ inner,
        },
    }
    return {**params, **jax.tree.map(np.float32, folded)}


def one_scale_factor(first_stage: first_stage_lib.FirstStage) -> float:
    """The number that brings latents to unit variance, all channels taken together.

    As LDM measures it (`scale_by_std`), of the mean and spread of each channel; where a
    number was imported, that one.
    """
    mean, std, factor = _statistics(first_stage)
    if factor is not None:
        return factor
    variance = np.mean(std**2 + mean**2) - np.mean(mean) ** 2
    return float(1 / np.sqrt(variance))


def _statistics(
    first_stage: first_stage_lib.FirstStage,
) -> tuple[np.ndarray, np.ndarray, float | None]:
    """(mean, std, the one number that stands for both, as of what was imported)"""
    mean, std = (np.asarray(x, np.float64) for x in (first_stage.mean, first_stage.std))
    even = not mean.any() and np.all(std == std[0])
    return mean, std, _reciprocal(std[0]) if even else None


# --- files


def _save(arrays: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    with written(path) as partial:
        safetensors_numpy.save_file(dict(arrays), partial, META)


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`workdir.whole`, and a line where the disk refuses."""
    try:
        with workdir_lib.whole(path, "DST") as partial:
            yield partial
    except safetensors.SafetensorError as error:  # the system's too
        raise UserError(
            f"DST: {path} can't be written ({error}); name another"
        ) from error
