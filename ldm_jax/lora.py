"""Low-rank adaptation: small factors are trained beside params that stay.

A kernel W becomes W + (alpha / rank) a b (Hu et al. 2021, eq. 3). With a
[…, in, rank] and b [rank, out] that holds for dense layers and convolutions alike; b
begins at zero, so that at first nothing is changed. `diffusion_stage.lora.targets` is
searched in the kernels' paths: `attn[12]/to_|res_[0-9]/conv[12]` takes the residual
blocks' convolutions too. `lora.init_from` names a file of diffusers, PEFT or kohya
whose factors are trained on.
"""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import convert
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.convert import lora_files
from ldm_jax.nets import text_encoder

TARGETS = r"attn[12]/to_(q|k|v|out)/kernel"


def is_on(config: ml_collections.ConfigDict) -> bool:
    """Whether stage two trains such factors instead of the nets."""
    return config.diffusion_stage.get("lora", {}).get("rank") is not None


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where there is nothing to adapt, or by a wrong rank."""
    if not is_on(config):
        source = config.diffusion_stage.get("lora", {}).get("init_from")
        if source:
            raise UserError(
                f"diffusion_stage.lora.init_from: {source!r}, but no factors are"
                " trained; set diffusion_stage.lora.rank to its rank"
            )
        return
    rank = config.diffusion_stage.lora.rank
    if rank < 1:
        raise UserError(f"diffusion_stage.lora.rank: {rank}; choose 1 or more, or None")
    if not config.get("init_from"):
        raise UserError(
            f"diffusion_stage.lora.rank: {rank}, but there is nothing to adapt; set"
            " init_from to the workdir of a run that has trained a diffusion model"
        )


def initializer(
    config: ml_collections.ConfigDict, init_nets: Callable[[jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """What draws the params to train: `init_nets(key)`, or factors beside them."""
    if not is_on(config):
        return init_nets
    shapes = jax.eval_shape(init_nets, jax.random.key(0))
    return partial(init, config.diffusion_stage.lora, shapes)


def init(
    settings: ml_collections.ConfigDict, shapes: Any, key: jax.Array
) -> dict[str, Any]:
    """Factors {path: {"a", "b"}} of every kernel whose path has `settings.targets`.

    `shapes` are those of the nets' params. Raises UserError where none has.
    """
    flat = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    pattern = TARGETS if settings.targets is None else settings.targets
    try:
        targets = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"diffusion_stage.lora.targets: {pattern!r} is no pattern, {error}"
        ) from error
    found = [path for path, x in flat.items() if targets.search(path) and x.ndim > 1]
    if not found:
        known = next(path for path in flat if path.endswith("kernel"))
        raise UserError(
            f"diffusion_stage.lora.targets: {pattern!r} is in no path of one,"
            f" such as {known}"
        )
    factors = {}
    for index, path in enumerate(sorted(found)):
        *inner, out = flat[path].shape
        a_key = jax.random.fold_in(key, index)
        a = jax.random.normal(a_key, (*inner, settings.rank)) / settings.rank
        factors[f"{path}/a"], factors[f"{path}/b"] = a, jnp.zeros((settings.rank, out))
    return flax.traverse_util.unflatten_dict(factors, sep="/")


def merge(
    settings: ml_collections.ConfigDict,
    base: Mapping[str, Any],
    factors: Mapping[str, Any],
) -> dict[str, Any]:
    """The nets' params: `base` with the products of the factors added."""
    return add(base, factors, (settings.alpha or settings.rank) / settings.rank)


def add(
    base: Mapping[str, Any], factors: Mapping[str, Any], scale: float
) -> dict[str, Any]:
    """`base` params with `scale` times the products of the factors added."""
    params = flax.traverse_util.flatten_dict(dict(base), keep_empty_nodes=True, sep="/")
    flat = flax.traverse_util.flatten_dict(dict(factors), sep="/")
    for path in {name.rpartition("/")[0] for name in flat}:
        change = jnp.matmul(flat[f"{path}/a"], flat[f"{path}/b"])
        params[path] = params[path] + jnp.float32(scale) * change
    return flax.traverse_util.unflatten_dict(params, sep="/")


def read(
    model: model_lib.LatentDiffusion,
    source: str | os.PathLike | Mapping[str, Any],
    option: str,
) -> list[tuple[dict[str, Any], int, float]]:
    """(factors, rank, alpha) of a LoRA for the UNet, and for CLIP's text tower.

    Factors are nested like a model's params. Those of text towers that the model has
    not are left out with a warning. Raises UserError, which names `option`, where
    nothing is left, or a kernel is not the model's.
    """
    held = lora_files.read(source, option)
    there, found = held.nets, []
    texts = _towers(model)
    if "text_encoder" in there and len(texts) == 1:
        ((name, net),) = texts.items()
        factors, rank, alpha = lora_files.factors_of(net, held, option)
        found.append(({"conditioners": {name: factors}}, rank, alpha))
        there.remove("text_encoder")
    left = sorted(there - {"unet"})
    if left:
        warnings.warn(
            f"the factors of {' and '.join(left)} are left out: this model has no such"
            " net",
            stacklevel=3,
        )
    if "unet" in there or not found:
        factors, rank, alpha = lora_files.factors_of(model.unet, held, option)
        found.append(({"unet": factors}, rank, alpha))
    return found


def state_dict(
    model: model_lib.LatentDiffusion,
    factors: Mapping[str, Any],
    settings: ml_collections.ConfigDict,
) -> dict[str, np.ndarray]:
    """Trained factors under diffusers' keys.

    Raises UserError for those of another net than the UNet and CLIP's text tower.
    """
    rank, alpha = settings.rank, settings.alpha or settings.rank
    texts, state = _towers(model), {}
    parts = {"unet": (model.unet, factors.get("unet", {}))}
    for name, tree in factors.get("conditioners", {}).items():
        if list(texts) != [name]:
            raise UserError(
                f"conditioners.{name}: its factors have no names in such a file, which"
                " is of a UNet and of CLIP's text tower; keep lora.targets to unet/"
            )
        parts[name] = texts[name], tree
    for net, tree in parts.values():
        state |= convert.export_lora(net, tree, rank, alpha)
    return state


def _towers(model: model_lib.LatentDiffusion) -> dict[str, Any]:
    """{name: net} of the conditions that are CLIP's text tower."""
    cls = text_encoder.CLIPTextTransformer
    nets = {name: c.net for name, c in model.conditioners.items()}
    return {name: net for name, net in nets.items() if isinstance(net, cls)}


def start(
    settings: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, fresh: Any
) -> Any:
    """`fresh` factors with those of the file `settings.init_from` in their places.

    Where the file's alpha is another, b is scaled. UserError where the ranks differ,
    or the file has factors of a kernel that `settings.targets` leaves out.
    """
    field = "diffusion_stage.lora.init_from"
    option = f"{field}: {settings.init_from!r}"
    started = flax.traverse_util.flatten_dict(dict(fresh), sep="/")
    for factors, rank, alpha in read(model, settings.init_from, field):
        frozen = [
            name
            for name in factors.get("conditioners", {})
            if not model.conditioners[name].trainable
        ]
        if frozen:
            warnings.warn(
                f"{option} has factors of conditioners.{frozen[0]} too, which are left"
                " out: it is frozen",
                stacklevel=2,
            )
            continue
        if rank != settings.rank:
            raise UserError(
                f"{option} is of rank {rank}, diffusion_stage.lora.rank of"
                f" {settings.rank}; set the latter to {rank}"
            )
        ratio = np.float32(alpha / (settings.alpha or settings.rank))
        for path, value in flax.traverse_util.flatten_dict(factors, sep="/").items():
            if path not in started:
                kernel = path.rpartition("/")[0]
                raise UserError(
                    f"{option} has factors of {kernel}, which"
                    " diffusion_stage.lora.targets leaves out; give a pattern that is"
                    " in its path too"
                )
            started[path] = value * ratio if path.endswith("/b") else value
    return flax.traverse_util.unflatten_dict(started, sep="/")
