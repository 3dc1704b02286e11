"""T5 in the layout of transformers and LDM's text encoder in that of diffusers."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.convert import plans
from ldm_jax.nets import t5, text_encoder

_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_SPARE = "encoder.embed_tokens.weight"  # the same array as shared.weight


def t5_plan(net: t5.T5Encoder) -> plans.Plan:
    """The plan of T5's encoder; a decoder is beside it."""
    table = {
        "token_emb": "shared.weight",
        "position_bias": T5_BIAS,
        "norm_out": "encoder.final_layer_norm",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "to_q": "layer.0.SelfAttention.q",
        "to_k": "layer.0.SelfAttention.k",
        "to_v": "layer.0.SelfAttention.v",
        "to_out": "layer.0.SelfAttention.o",
        "ff_gate": "layer.1.DenseReluDense.wi_0",
        "ff_in": f"layer.1.DenseReluDense.{'wi_1' if net.gated else 'wi'}",
        "ff_out": "layer.1.DenseReluDense.wo",
    }
    table |= {f"layer_{i}": f"encoder.block.{i}" for i in range(net.depth)}
    beside = rf"{re.escape(T5_SPARE)}|decoder\..*|lm_head\..*"
    return _plan(net, table, beside)


def with_shared(state: Mapping[str, Any]) -> dict[str, Any]:
    """T5's state dict with its tokens under `shared`, also that of an encoder alone."""
    if "shared.weight" in state or T5_SPARE not in state:
        return dict(state)
    return {**state, "shared.weight": state[T5_SPARE]}


def ldm_bert_plan(net: text_encoder.TextTransformer) -> plans.Plan:
    """The plan of `LDMBertModel`; to_logits is left out."""
    table = {
        "token_emb": "model.embed_tokens.weight",
        "pos_emb": "model.embed_positions.weight",
        "norm_out": "model.layer_norm",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
        "to_q": "self_attn.q_proj",
        "to_k": "self_attn.k_proj",
        "to_v": "self_attn.v_proj",
        "to_out": "self_attn.out_proj",
        "attn": "",
        "ff_in": "fc1",
        "ff_out": "fc2",
    }
    table |= {f"layer_{i}": f"model.layers.{i}" for i in range(net.depth)}
    return _plan(net, table, r"to_logits\..*")


def _plan(net, table: Mapping[str, str], beside: str) -> plans.Plan:
    shapes = plans.abstract_params(net, _TOKENS)
    return plans.Plan(list(plans.plain_rules(shapes, table)), shapes, beside)
