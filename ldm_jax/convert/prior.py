"""The prior's keys in diffusers' layout, and its options from their shapes."""

import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.convert import plans
from ldm_jax.nets import prior

_NAMES = plans.LEAVES | {
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


def prior_plan(net: prior.PriorTransformer) -> plans.Plan:
    """The plan of a prior; the embeddings' mean and std belong to the first stage."""
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    rules = []
    for path, shape in shapes.items():
        block = re.match(r"block_(\d+)/", path)
        names = dict(_NAMES)
        if block:
            names[f"block_{block[1]}"] = f"transformer_blocks.{block[1]}"
        layout = plans.plain_layout(path, len(shape))
        rules.append(plans.Rule(path, plans.rename(path, names), layout))
    return plans.Plan(rules, shapes, beside="clip_mean|clip_std")


def prior_of(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> prior.PriorTransformer:
    """The prior whose arrays have these shapes; heads are 64 wide unless told."""
    for key in ("norm_in.weight", "embedding_proj_norm.weight"):
        if key in shapes:
            raise UserError(f"{key}: a prior with that norm is not computed here")
    for key in ("encoder_hidden_states_proj.weight", "positional_embedding"):
        if key not in shapes:
            raise UserError(f"missing {key}; give the whole state dict of the network")
    width, channels = shapes["proj_in.weight"]
    heads = config.get("num_attention_heads") or width // 64
    query = "prd_embedding" in shapes
    tokens = shapes["positional_embedding"][1]
    length = config.get("num_embeddings", tokens - 3 - query)
    blocks = (re.match(r"transformer_blocks\.(\d+)\.", key) for key in shapes)
    return prior.PriorTransformer(
        in_channels=channels,
        out_channels=shapes["proj_to_clip_embeddings.weight"][0],
        context_dim=shapes["encoder_hidden_states_proj.weight"][1],
        context_length=length,
        positions=tokens - length - 2 - query,
        vector_dim=shapes["embedding_proj.weight"][1],
        depth=max(int(match[1]) for match in blocks if match) + 1,
        heads=heads,
        dim_head=width // heads,
        query=query,
    )
