"""T5 in the layout of transformers and LDM's text encoder in that of diffusers."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.config import UserError
from ldm_jax.convert import plans
from ldm_jax.nets import t5, text_encoder

Shapes = Mapping[str, tuple[int, ...]]
_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)
_T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_SPARE = "encoder.embed_tokens.weight"  # the same array as shared.weight


def t5_plan(net: t5.T5Encoder) -> plans.Plan:
    """The plan of T5's encoder; a decoder is beside it."""
    table = {
        "token_emb": "shared.weight",
        "position_bias": _T5_BIAS,
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


def t5_of(shapes: Shapes, config: Mapping[str, Any]) -> t5.T5Encoder:
    """The encoder whose arrays have these shapes; heads are told by its bias."""
    attention = "encoder.block.0.layer.0.SelfAttention.q.weight"
    for key in ("shared.weight", _T5_BIAS, attention):
        if key not in shapes:
            raise UserError(f"missing {key}; give the whole state dict of the network")
    act = config.get("feed_forward_proj", "gated-gelu")
    if act not in ("gated-gelu", "relu"):
        raise UserError(
            f"feed_forward_proj: {act!r} is not computed here; only gated-gelu or relu"
        )
    vocabulary, dim = shapes["shared.weight"]
    buckets, heads = shapes[_T5_BIAS]
    inner = shapes[attention][0]
    dense = "encoder.block.0.layer.1.DenseReluDense"
    return t5.T5Encoder(
        vocabulary,
        dim,
        _count(shapes, r"encoder\.block\.(\d+)\."),
        heads,
        inner // heads,
        shapes[f"{dense}.wo.weight"][1],
        gated=f"{dense}.wi_0.weight" in shapes,
        num_buckets=buckets,
        max_distance=config.get("relative_attention_max_distance", 128),
    )


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


def ldm_bert_of(
    shapes: Shapes, config: Mapping[str, Any]
) -> text_encoder.TextTransformer:
    """The encoder whose arrays have these shapes; its heads are 64 wide unless told."""
    act = config.get("activation_function", "gelu")
    if act != "gelu":
        raise UserError(f"activation_function: {act!r} is not computed here; only gelu")
    query, tokens = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens"
    for key in (query, f"{tokens}.weight", "model.embed_positions.weight"):
        if key not in shapes:
            raise UserError(f"missing {key}; give the whole state dict of the network")
    inner = shapes[query][0]
    heads = config.get("encoder_attention_heads") or inner // 64
    if not heads or inner % heads:
        raise UserError(
            f"encoder_attention_heads: {heads} can't share {inner}; give it"
        )
    vocabulary, dim = shapes[f"{tokens}.weight"]
    return text_encoder.TextTransformer(
        vocabulary,
        shapes["model.embed_positions.weight"][0],
        dim,
        _count(shapes, r"model\.layers\.(\d+)\."),
        heads=heads,
        dim_head=inner // heads,
    )


def _plan(net, table: Mapping[str, str], beside: str) -> plans.Plan:
    shapes = plans.abstract_params(net, _TOKENS)
    rules = [
        plans.Rule(
            path,
            plans.rename(path, plans.LEAVES | table),
            plans.plain_layout(path, len(shape)),
        )
        for path, shape in shapes.items()
    ]
    return plans.Plan(rules, shapes, beside)


def _count(shapes: Shapes, pattern: str) -> int:
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)
