"""Any conditioning net's params from a state dict, whose layout its keys tell."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import compvis, depth, plans, text_encoders
from ldm_jax.nets import clip_vision, dpt, embedders, t5, text_encoder

_BERT = "cond_stage_model.transformer."  # diffusers' LDMBert there, by its keys
# Of embeddings over training pictures, as SD-unCLIP's checkpoints call them.
STATISTICS = ("noise_augmentor.data_mean", "noise_augmentor.data_std")


def params_of(net: nn.Module, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Params of `net`, float32, from its own state dict or that of a whole model.

    Keys of Hugging Face, OpenCLIP and CompVis are told apart; what belongs to other
    parts is left out. Raises ValueError that says what does not fit.
    """
    if isinstance(net, text_encoder.TextTransformer):
        if any(key.startswith(f"{_BERT}model.layers.") for key in state_dict):
            own = _under(state_dict, _BERT)
            return plans.convert(own, text_encoders.ldm_bert_plan(net))
        return compvis.text_transformer_params(
            _under(state_dict, "cond_stage_model."), net
        )
    if isinstance(net, text_encoder.CLIPTextTransformer):
        return _clip_text(net, state_dict)
    if isinstance(net, t5.T5Encoder):
        state_dict = text_encoders.with_shared(state_dict)
        return plans.convert(state_dict, text_encoders.t5_plan(net))
    if isinstance(net, clip_vision.CLIPVisionTransformer):
        return clip_vision_params(state_dict, net)
    if isinstance(net, clip_vision.ImageVector):
        return _image_vector(net, dict(state_dict))
    if isinstance(net, clip_vision.NearestVectors):
        return {"tower": clip_vision_params(state_dict, net.tower)}
    if isinstance(net, dpt.DepthMap):
        own = _under(state_dict, "depth_model.model.")
        return {"tower": depth.dpt_params(own, net.tower)}
    if isinstance(net, embedders.ClassEmbedder):
        own = _under(state_dict, "cond_stage_model.")
        return plans.convert(own, class_embedder_plan(net))
    if isinstance(net, embedders.SpatialRescaler):
        own = _under(state_dict, "cond_stage_model.")
        return plans.convert(own, rescaler_plan(net, mapped_channels(own)))
    raise ValueError(f"weights of a {type(net).__name__} can't be read")


def _clip_text(net, state_dict):
    if any(key.startswith("cond_stage_model.transformer.") for key in state_dict):
        state_dict = _under(state_dict, "cond_stage_model.transformer.")
    state_dict = _under(state_dict, "cond_stage_model.model.")
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    if any(key.startswith(bare[0]) for key in state_dict):  # since transformers 5
        state_dict = {
            "text_model." * k.startswith(bare) + k: v for k, v in state_dict.items()
        }
    parts = ("text_model.", "text_projection", "logit_scale")
    if any(key.startswith("text_model.") for key in state_dict):
        kept = {k: v for k, v in state_dict.items() if k.startswith(parts)}
        return compvis.clip_params(kept, net)
    return compvis.openclip_params(state_dict, net)


def _image_vector(net, state_dict):
    d = net.tower.projection_dim
    mean, std = (
        np.ravel(state_dict.pop(key, np.full(d, value))).astype(np.float32)
        for key, value in zip(STATISTICS, (0, 1), strict=True)
    )
    if len(mean) != d or len(std) != d or not np.all(std > 0):
        raise ValueError(
            f"{' and '.join(STATISTICS)} are not {d} numbers each, the latter above 0"
        )
    tower = clip_vision_params(_under(state_dict, "embedder."), net.tower)
    return {"tower": tower, "mean": mean, "std": std}


def clip_vision_params(
    state_dict: Mapping[str, np.ndarray], net: clip_vision.CLIPVisionTransformer
) -> dict:
    """Params of a CLIP picture tower from Hugging Face's or OpenCLIP's keys."""
    if any(key.startswith("vision_model.") for key in state_dict):
        return plans.convert(state_dict, clip_vision_plan(net, "huggingface"))
    own = {key.removeprefix("model."): value for key, value in state_dict.items()}
    return plans.convert(own, clip_vision_plan(net, "openclip"))


def clip_vision_plan(net: clip_vision.CLIPVisionTransformer, layout: str) -> plans.Plan:
    """The plan of a CLIP picture tower in the layout "huggingface" or "openclip".

    What else a whole CLIP has is beside it.
    """
    x = jax.ShapeDtypeStruct((1, net.image_size, net.image_size, 3), jnp.float32)
    shapes = plans.abstract_params(net, x)
    if layout == "huggingface":
        names = {
            "class_emb": "vision_model.embeddings.class_embedding",
            "pos_emb": "vision_model.embeddings.position_embedding.weight",
            "patch": "vision_model.embeddings.patch_embedding",
            "norm_in": "vision_model.pre_layrnorm",
            "norm_out": "vision_model.post_layernorm",
            "projection": "visual_projection",
        }
        rules = compvis.clip_rules(shapes, names, "vision_model.encoder.layers")
        beside = r"(text_model|text_projection|logit_scale).*|.*position_ids"
        return plans.Plan(list(rules), shapes, beside)
    names = {
        "class_emb": "visual.class_embedding",
        "pos_emb": "visual.positional_embedding",
        "patch": "visual.conv1",
        "norm_in": "visual.ln_pre",
        "norm_out": "visual.ln_post",
        "projection/kernel": "visual.proj",
    }
    rules = compvis.openclip_rules(shapes, names, "visual.transformer.resblocks")
    return plans.Plan(list(rules), shapes, r"(?!visual\.).*")


def class_embedder_plan(net: embedders.ClassEmbedder) -> plans.Plan:
    """The plan of a class embedder."""
    shapes = plans.abstract_params(net, jax.ShapeDtypeStruct([1], jnp.int32))
    table = {"embed": "", "embedding": "embedding.weight"}
    return plans.Plan(list(plans.plain_rules(shapes, table)), shapes)


def rescaler_plan(net: embedders.SpatialRescaler, channels: int) -> plans.Plan:
    """The plan of a spatial rescaler of maps of so many channels."""
    side = 1  # at the end; each stage rounds down
    for _ in range(net.n_stages):
        side = math.ceil(side / net.multiplier)
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = plans.abstract_params(net, x) if net.out_channels is not None else {}
    rules = [  # a 1x1 convolution there
        rule._replace(layout=plans.POINTWISE_2D)
        if rule.layout is plans.LINEAR
        else rule
        for rule in plans.plain_rules(shapes, {})
    ]
    return plans.Plan(rules, shapes)


def mapped_channels(state_dict: Mapping[str, np.ndarray]) -> int:
    """What a spatial rescaler takes in, which only its weights tell."""
    mapper = state_dict.get("channel_mapper.weight")
    return 1 if mapper is None else np.shape(mapper)[1]


def _under(state_dict, prefix):
    """What stands under a prefix, without it; all where nothing does."""
    found = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    return found or state_dict
