"""Any conditioning net's params from a state dict, whose layout its keys tell."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ldm_jax.convert import compvis
from ldm_jax.nets import text_encoder


def params_of(net: nn.Module, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Params of `net`, float32, from its own state dict or that of a whole model.

    Keys of Hugging Face, OpenCLIP and CompVis are told apart; what belongs to other
    parts is left out. Raises ValueError that says what does not fit.
    """
    if isinstance(net, text_encoder.TextTransformer):
        return compvis.text_transformer_params(
            _under(state_dict, "cond_stage_model."), net
        )
    if isinstance(net, text_encoder.CLIPTextTransformer):
        return _clip_text(net, state_dict)
    raise ValueError(f"weights of a {type(net).__name__} can't be read")


def _clip_text(net, state_dict):
    if any(key.startswith("cond_stage_model.transformer.") for key in state_dict):
        state_dict = _under(state_dict, "cond_stage_model.transformer.")
    state_dict = _under(state_dict, "cond_stage_model.model.")
    parts = ("text_model.", "text_projection", "logit_scale")
    if any(key.startswith("text_model.") for key in state_dict):
        kept = {k: v for k, v in state_dict.items() if k.startswith(parts)}
        return compvis.clip_params(kept, net)
    return compvis.openclip_params(state_dict, net)


def _under(state_dict, prefix):
    """What stands under a prefix, without it; all where nothing does."""
    found = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    return found or state_dict
