"""One network at a time: a state dict of PyTorch to a module and variables, and back.

The kind of network and its key layout are told by its keys (`recognise`), its options
by shapes and the original's config (`read_unet`, `read_config`), and a table of rules
takes its arrays there and back (`compvis`, `diffusers` and their likes).
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import (
    classifier,
    compvis,
    depth,
    diffusers,
    discriminator,
    files,
    plans,
    pretrained,
    prior,
    read_config,
    read_unet,
    recognise,
    text_encoders,
    towers,
)
from ldm_jax.nets import (
    autoencoder,
    clip_vision,
    dpt,
    embedders,
    encoder_unet,
    lpips,
    t5,
    text_encoder,
    unet,
)
from ldm_jax.nets import discriminator as discriminator_net
from ldm_jax.nets import prior as prior_net


def import_network(
    state_dict_or_path: Mapping[str, Any] | str | os.PathLike,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its float32 variables, from a state dict or a file of one.

    Keys may be under the prefix that a checkpoint gives them. `config` has the
    arguments of the original's constructor, or is a config.json of diffusers or
    transformers; what it leaves out is read off keys and shapes, or is as `read_unet`
    and `read_config` say. `module.apply(variables, …)` takes NHWC. UserError in one
    line where the keys are of no network known here, or don't fit the config.
    """
    net, layout, state = _read(_state_dict(state_dict_or_path), config)
    variables = _converted(net, layout, state)
    return net, variables if _has_collections(net) else {"params": variables}


def module_of(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> nn.Module:
    """The module alone, as `import_network` reads it off keys and shapes."""
    return _read(state_dict, config)[0]


def _read(state_dict, config):
    """(module, key layout, tidied state dict)"""
    config = _plain_config(config or {})
    kind, layout, state = recognise.recognise(state_dict, config)
    layout, state = _tidied(kind, layout, state, config)
    try:
        return _module(kind, layout, state, config), layout, state
    except (TypeError, ValueError) as error:
        words = str(error).splitlines()[0]
        raise UserError(
            f"config: no {kind} can have these options ({words}); mend them"
        ) from error


def params_of(
    net: nn.Module,
    state_dict: Mapping[str, Any],
    place: plans.Place = lambda path, x: x,
    fresh: Callable[[list[str]], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Params of `net`, whose options are known, from a state dict in any layout.

    `place` is that of `plans.convert`. `fresh(paths)` gives {path: array} of params
    that the state dict lacks; None makes that an error. UserError in one line for what
    does not fit.
    """
    kind, layout, state = recognise.recognise(state_dict)
    layout, state = _tidied(
        kind, layout, state, {"num_attention_heads": getattr(net, "heads", None)}
    )
    if fresh is not None:
        plan = plan_of(net, layout, state)
        lacking = [rule for rule in plan.rules if rule.key not in state]
        given = fresh([rule.path for rule in lacking]) if lacking else {}
        state |= plans.revert(
            flax.traverse_util.unflatten_dict(given, sep="/"), lacking
        )
    return _converted(net, layout, state, place)


def _converted(
    net: nn.Module,
    layout: str,
    state: Mapping[str, Any],
    place: plans.Place = lambda path, x: x,
) -> dict[str, Any]:
    try:
        plan = plan_of(net, layout, state)
        return plans.convert(state, plan, place=place)
    except (TypeError, ValueError) as error:  # as flax says what options can't be
        raise UserError(f"{type(net).__name__}, layout {layout}: {error}") from error


def export_network(
    module: nn.Module, variables: Mapping[str, Any], layout: str
) -> dict[str, np.ndarray]:
    """The state dict of `module` with these variables; importing it gives them again.

    `layout` is "compvis" or "diffusers" for UNets, autoencoders and LDM's BERT,
    "openclip" or "huggingface" for CLIP's towers, "huggingface" for T5 and a DPT
    (MiDaS's own names are read, not written), "diffusers" for a prior, "compvis"
    elsewhere. Arrays are float32 under bare keys.
    UserError where the layout can't hold the module.
    """
    variables = jax.tree.map(np.asarray, variables)
    plan = plan_of(module, layout, variables["params"])
    try:
        state = plans.revert(
            variables if _has_collections(module) else variables["params"], plan.rules
        )
    except ValueError as error:
        raise UserError(f"{type(module).__name__}: {error}") from error
    if layout == "diffusers":
        return diffusers.unpack(state)
    if isinstance(module, t5.T5Encoder):  # as transformers has the tokens, twice
        return {**state, text_encoders.T5_SPARE: state["shared.weight"]}
    if isinstance(module, lpips.LPIPS):
        return {pretrained.published_lpips_key(k): v for k, v in state.items()}
    return state


# --- what is given


def _state_dict(source) -> dict[str, np.ndarray]:
    if isinstance(source, str | os.PathLike):
        source = files.read(pathlib.Path(source).expanduser(), "state_dict_or_path")
    source = files.unwrapped(source)
    return {key: as_array(value) for key, value in source.items() if _is_array(value)}


def _is_array(value) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_array(value) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor of torch, which is not imported here
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # numpy knows no such tensor
            value = value.float()
    return np.asarray(value)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the `target` that the original's yaml wraps arguments in."""
    config = config.get("params", config)
    return dict(config)


def _tidied(
    kind: str, layout: str, state: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The layout that rules are written for, and the state dict under their names.

    `config` tells the number of a prior's heads.
    """
    if layout == "karlo":
        width = state["clip_img_proj.weight"].shape[0]
        return "diffusers", prior.from_karlo(state, prior.heads_of(width, config))
    if kind == "unet" and layout == "compvis":
        return layout, compvis.with_middle(state)
    if kind == "t5":
        return layout, text_encoders.with_shared(state)
    if layout == "diffusers" and kind in ("unet", "autoencoder"):
        tidy = diffusers.pack if kind == "unet" else diffusers.modern
        return layout, tidy(state)
    if layout == "midas":
        return "huggingface", depth.from_midas(state)
    if kind == "lpips":
        return layout, {pretrained.plain_lpips_key(k): v for k, v in state.items()}
    return layout, dict(state)


def _module(kind, layout, state, config) -> nn.Module:
    shapes = {key: np.shape(value) for key, value in state.items()}
    if kind == "lpips":
        return lpips.LPIPS()
    if kind in ("unet", "autoencoder"):
        own_order = config.get("use_new_attention_order")
        if "block_out_channels" in config or "_class_name" in config:
            config = read_config.originals(kind, config, shapes)
        if layout == "diffusers":
            shapes = read_config.shapes_in_compvis(kind, shapes)
            if kind == "unet" and own_order is None:
                config["use_new_attention_order"] = True  # as `pack` has them
    readers = {
        "unet": read_unet.unet_of,
        "prior": read_config.prior_of,
        "t5": read_config.t5_of,
        "ldm_bert": read_config.ldm_bert_of,
        "classifier": read_unet.classifier_of,
        "autoencoder": read_config.autoencoder_of,
        "bert": read_config.bert_of,
        "depth": read_config.dpt_of,
        "class_embedder": read_config.class_embedder_of,
        "rescaler": read_config.rescaler_of,
        "discriminator": read_config.discriminator_of,
    }
    towers_of = {
        "clip_text": read_config.clip_text_of,
        "clip_vision": read_config.clip_vision_of,
    }
    if kind in towers_of:
        return towers_of[kind](shapes, config, layout)
    return readers[kind](shapes, config)


# --- rules


def _has_collections(net: nn.Module) -> bool:
    """Whether a plan's paths start with a collection, else they are of params."""
    return isinstance(net, discriminator_net.PatchDiscriminator)


def plan_of(net: nn.Module, layout: str, arrays: Mapping[str, Any]) -> plans.Plan:
    """The plan of `net`; `arrays`, a state dict or params, tell a CLIP's projection."""
    layouts = _layouts(net)
    if layout not in layouts:
        raise UserError(
            f"layout: {layout!r} for a {type(net).__name__}; choose one of"
            f" {', '.join(layouts)}"
        )
    match net:
        case unet.UNet():
            return unet_plan(net, layout)
        case prior_net.PriorTransformer():
            return prior.prior_plan(net)
        case autoencoder.Autoencoder():
            return _autoencoder_plan(net, layout)
        case encoder_unet.EncoderUNet():
            return classifier.encoder_unet_plan(net)
        case text_encoder.TextTransformer():
            if layout == "diffusers":
                return text_encoders.ldm_bert_plan(net)
            return compvis.text_transformer_plan(net)
        case t5.T5Encoder():
            return text_encoders.t5_plan(net)
        case text_encoder.CLIPTextTransformer():
            return _clip_text_plan(net, layout, arrays)
        case clip_vision.CLIPVisionTransformer():
            return towers.clip_vision_plan(net, layout)
        case dpt.DPTHybrid():
            return depth.dpt_plan(net)
        case discriminator_net.PatchDiscriminator():
            return discriminator.discriminator_plan(net)
        case lpips.LPIPS():
            return pretrained.lpips_plan()
        case embedders.ClassEmbedder():
            return towers.class_embedder_plan(net)
    return towers.rescaler_plan(net, _mapped_channels(arrays))


def _layouts(net: nn.Module) -> tuple[str, ...]:
    towers_of_clip = text_encoder.CLIPTextTransformer, clip_vision.CLIPVisionTransformer
    both = unet.UNet | autoencoder.Autoencoder | text_encoder.TextTransformer
    if isinstance(net, both):
        return "compvis", "diffusers"
    if isinstance(net, prior_net.PriorTransformer):
        return ("diffusers",)
    if isinstance(net, towers_of_clip):
        return "huggingface", "openclip"
    if isinstance(net, dpt.DPTHybrid | t5.T5Encoder):
        return ("huggingface",)
    return ("compvis",)


def unet_plan(net: unet.UNet, layout: str) -> plans.Plan:
    plan = compvis.unet_plan(net)
    if layout == "compvis":
        return plan
    if net.n_embed is not None or net.dims != 2:
        raise UserError(
            "layout: diffusers has no UNet with n_embed or of other dims than 2; use"
            " 'compvis'"
        )
    return plan._replace(rules=list(diffusers.unet_rules(net, plan.shapes)))


def _autoencoder_plan(net: autoencoder.Autoencoder, layout: str) -> plans.Plan:
    plan = compvis.autoencoder_plan(net)
    if layout == "compvis":
        return plan
    if net.use_linear_attn or net.attn_type == "linear":
        raise UserError(
            "layout: diffusers has no autoencoder with linear attention; use 'compvis'"
        )
    rules = diffusers.autoencoder_rules(net, plan.shapes)
    return plans.Plan(list(rules), plan.shapes)


def _clip_text_plan(net, layout, arrays: Mapping[str, Any]) -> plans.Plan:
    """Of the whole tower, whatever `net` leaves out, so that nothing is lost."""
    whole = net.clone(layer="last", final_norm=True, projection_dim=_projection(arrays))
    if layout == "huggingface":
        return compvis.clip_plan(whole)
    return compvis.openclip_plan(whole)


def _projection(arrays: Mapping[str, Any]) -> int | None:
    """Width of the projection in a state dict, or in params."""
    if "text_projection.weight" in arrays:
        return arrays["text_projection.weight"].shape[0]
    if "text_projection" not in arrays:
        return None
    there = arrays["text_projection"]
    there = there["kernel"] if isinstance(there, Mapping) else there
    return there.shape[1]


def _mapped_channels(arrays: Mapping[str, Any]) -> int:
    """What a rescaler takes in, by a state dict or by params."""
    if "channel_mapper" in arrays:
        return arrays["channel_mapper"]["kernel"].shape[0]
    return towers.mapped_channels(arrays)
