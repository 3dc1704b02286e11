"""The prior's keys in diffusers' layout, and in Karlo's own, which is read alone."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.convert import plans
from ldm_jax.nets import prior

_NAMES = {
    "positions_embed": "positional_embedding",
    "query": "prd_embedding",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_1": "time_embedding.linear_2",
    "text_tokens": "encoder_hidden_states_proj",
    "text_vector": "embedding_proj",
    "conv_out": "proj_to_clip_embeddings",
    "attn": "attn1",
    "to_out": "to_out.0",
    "norm2": "norm3",
    "ff_in": "ff.net.0.proj",
    "ff_out": "ff.net.2",
}
# Karlo's own names; its blocks are CLIP's.
_KARLO = {
    r"prd_emb": "prd_embedding",
    r"clip_img_proj\.(.*)": r"proj_in.\1",
    r"text_emb_proj\.(.*)": r"embedding_proj.\1",
    r"text_enc_proj\.(.*)": r"encoder_hidden_states_proj.\1",
    r"time_embed\.0\.(.*)": r"time_embedding.linear_1.\1",
    r"time_embed\.2\.(.*)": r"time_embedding.linear_2.\1",
    r"final_ln\.(.*)": r"norm_out.\1",
    r"out_proj\.(.*)": r"proj_to_clip_embeddings.\1",
    r"transformer\.resblocks\.(\d+)\.ln_1\.(.*)": r"transformer_blocks.\1.norm1.\2",
    r"transformer\.resblocks\.(\d+)\.ln_2\.(.*)": r"transformer_blocks.\1.norm3.\2",
    r"transformer\.resblocks\.(\d+)\.attn\.c_proj\.(.*)": (
        r"transformer_blocks.\1.attn1.to_out.0.\2"
    ),
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.*)": (
        r"transformer_blocks.\1.ff.net.0.proj.\2"
    ),
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.*)": (
        r"transformer_blocks.\1.ff.net.2.\2"
    ),
}
_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.c_qkv\.(weight|bias)")


def heads_of(width: int, config: Mapping[str, Any]) -> int:
    """How many heads share a prior's width; each is 64 wide unless told."""
    return config.get("num_attention_heads") or width // 64


def from_karlo(state: Mapping[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Karlo's own arrays under diffusers' keys.

    There q, k and v are one array, side by side within each head.
    """
    found = {}
    for key, value in state.items():
        match = _QKV.fullmatch(key)
        if match:
            split = value.reshape(heads, 3, -1, *value.shape[1:])
            for i, x in enumerate("qkv"):
                name = f"transformer_blocks.{match[1]}.attn1.to_{x}.{match[2]}"
                found[name] = split[:, i].reshape(-1, *value.shape[1:])
            continue
        for pattern, name in _KARLO.items():
            key, changed = re.subn(rf"^{pattern}$", name, key)
            if changed:
                break
        found[key] = value
    return found


def prior_plan(net: prior.PriorTransformer) -> plans.Plan:
    """The plan of a prior; the embeddings' mean and std belong to the first stage."""
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    blocks = {f"block_{i}": f"transformer_blocks.{i}" for i in range(net.depth)}
    rules = list(plans.plain_rules(shapes, _NAMES | blocks))
    return plans.Plan(rules, shapes, beside="clip_mean|clip_std")
