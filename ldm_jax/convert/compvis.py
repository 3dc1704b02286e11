"""CompVis and Stability state dicts (and CLIP's): the plan of each net."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import plans
from ldm_jax.nets import autoencoder, text_encoder, unet

# --- UNet

# What Karlo's decoder makes of CLIP's embeddings, beside its UNet.
_KARLO = {
    "clip/text_tokens": "text_seq_proj.0",
    "clip/norm": "text_seq_proj.1",
    "clip/picture_tokens": "clip_tok_proj",
    "clip/text_vector": "text_feat_proj",
    "clip/picture_vector": "clip_emb",
    "clip/null": "cf_param",
}


def _unet_blocks(net: unet.UNet, shapes: Mapping[str, Any]) -> dict[str, str]:
    """{our block: torch's}, e.g. {"down_1_attn_0": "input_blocks.4.1"}."""
    present = {path.split("/")[0] for path in shapes}
    depths, last = net.res_blocks_of_levels(), len(net.channel_mult) - 1
    blocks, n = {"conv_in": "input_blocks.0.0"}, 1
    for level, depth in enumerate(depths):
        for i in range(depth):
            blocks[f"down_{level}_res_{i}"] = f"input_blocks.{n}.0"
            blocks[f"down_{level}_attn_{i}"] = f"input_blocks.{n}.1"
            n += 1
        if level < last:
            conv = "" if net.resblock_updown else ".op"
            blocks[f"down_{level}_downsample"] = f"input_blocks.{n}.0{conv}"
            n += 1
    blocks["mid_res_0"] = "middle_block.0"
    blocks["mid_attn"] = "middle_block.1"
    blocks["mid_res_1"] = "middle_block.2"
    n = 0
    for level in range(last, -1, -1):
        for i in range(depths[level] + 1):
            blocks[f"up_{level}_res_{i}"] = f"output_blocks.{n}.0"
            blocks[f"up_{level}_attn_{i}"] = f"output_blocks.{n}.1"
            n += 1
        # Upsampling comes last in the block: after attention where there is any.
        place = 2 if f"up_{level}_attn_{depths[level]}" in present else 1
        conv = "" if net.resblock_updown else ".conv"
        blocks[f"up_{level}_upsample"] = f"output_blocks.{n - 1}.{place}{conv}"
    return blocks


def unet_rules(net: unet.UNet, shapes: Mapping[str, tuple]) -> Iterator[plans.Rule]:
    """Rules of every parameter of a UNet whose `abstract_params` are `shapes`."""
    label = "label_emb.1" if net.num_classes == "timestep" else "label_emb.0"
    table = plans.LEAVES | _unet_blocks(net, shapes)
    table |= {
        "time_embed_0": "time_embed.0",
        "time_embed_1": "time_embed.2",
        "label_embed": "label_emb",
        "label_embed_0": f"{label}.0",
        "label_embed_1": f"{label}.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "id_norm": "id_predictor.0",
        "id_out": "id_predictor.1",
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
        "to_out": "to_out.0",
        "ff/ff_in": "ff.net.0.proj",
        "ff/ff_out": "ff.net.2",
        **_KARLO,
    }
    for path, shape in shapes.items():
        names = dict(table)
        inner = re.search(r"/block_(\d+)/", path)
        if inner:  # inside a transformer block norm1, norm2 keep their names
            names |= {f"block_{inner[1]}": f"transformer_blocks.{inner[1]}"}
            names |= {"norm1": "norm1", "norm2": "norm2"}
        if path == "label_embed":
            yield plans.Rule(path, "label_emb.weight", plans.AS_IS)
            continue
        layout = plans.plain_layout(path, len(shape))
        if re.search(r"(proj_in|proj_out|qkv|encoder_kv)/kernel$", path):
            if not net.use_spatial_transformer:
                layout = plans.POINTWISE_1D
            elif not net.use_linear_in_transformer:
                layout = plans.POINTWISE_2D
        yield plans.Rule(path, plans.rename(path, names), layout)


def unet_plan(net: unet.UNet) -> plans.Plan:
    """The plan of a UNet."""
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    # A net that predicts codebook ids does not use its noise output.
    beside = r"out\..*" if net.n_embed is not None else ""
    return plans.Plan(list(unet_rules(net, shapes)), shapes, beside)


def with_middle(state: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's arrays with its last middle block where it is with attention before.

    Karlo's upscaler has none, and counts on.
    """
    if not any(key.startswith("middle_block.1.in_layers.") for key in state):
        return dict(state)
    old, new = "middle_block.1.", "middle_block.2."
    return {
        k.replace(old, new) if k.startswith(old) else k: v for k, v in state.items()
    }


def unet_params(state_dict: Mapping[str, np.ndarray], net: unet.UNet) -> dict:
    """Params of `net` from a UNet's state dict (`model.diffusion_model.` removed)."""
    return plans.convert(state_dict, unet_plan(net))


# --- autoencoder


def autoencoder_rules(shapes: Mapping[str, tuple]) -> Iterator[plans.Rule]:
    """Rules of every parameter of an autoencoder."""
    table = {
        **plans.LEAVES,
        "mid_res_0": "mid.block_1",
        "mid_attn": "mid.attn_1",
        "mid_res_1": "mid.block_2",
        "skip": "nin_shortcut",
        "embedding": "embedding.weight",
    }
    for path, shape in shapes.items():
        names = dict(table)
        for word in path.split("/"):
            block = re.fullmatch(r"(down|up)_(\d+)_(res|attn)_(\d+)", word)
            if block:
                way, level, kind, i = block.groups()
                kind = {"res": "block", "attn": "attn"}[kind]
                names[word] = f"{way}.{level}.{kind}.{i}"
            resample = re.fullmatch(r"(down|up)_(\d+)_(downsample|upsample)", word)
            if resample:
                way, level, kind = resample.groups()
                names[word] = f"{way}.{level}.{kind}.conv"
        layout = plans.plain_layout(path, len(shape))
        if layout is plans.LINEAR:  # the attention's 1x1 convolutions
            layout = plans.POINTWISE_2D
        yield plans.Rule(path, plans.rename(path, names), layout)


def autoencoder_plan(net: autoencoder.Autoencoder) -> plans.Plan:
    """The plan of an autoencoder.

    The training loss (`loss.…`: discriminator, LPIPS, logvar) and the EMA copy that a
    checkpoint may carry are left out, and so is the list of a remapped codebook.
    """
    size = 2 ** (len(net.ch_mult) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, net.in_channels), jnp.float32)
    shapes = plans.abstract_params(net, x)
    beside = r"(loss|model_ema)\..*|quantize\.used|colorize"
    if net.give_pre_end:  # kept there without a use
        beside += r"|decoder\.(norm|conv)_out\..*"
    return plans.Plan(list(autoencoder_rules(shapes)), shapes, beside)


def autoencoder_params(
    state_dict: Mapping[str, np.ndarray], net: autoencoder.Autoencoder
) -> dict:
    """Params of `net` from an autoencoder, `first_stage_model.` removed."""
    return plans.convert(state_dict, autoencoder_plan(net))


# --- text encoders

_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _text_rules(
    shapes: Mapping[str, tuple], table_of_layer: Callable[[int], Mapping[str, str]]
) -> Iterator[plans.Rule]:
    for path, shape in shapes.items():
        layer = re.match(r"layer_(\d+)/", path)
        table = plans.LEAVES | table_of_layer(int(layer[1]) if layer else -1)
        yield plans.Rule(
            path, plans.rename(path, table), plans.plain_layout(path, len(shape))
        )


def text_transformer_rules(shapes: Mapping[str, tuple]) -> Iterator[plans.Rule]:
    """Rules of LDM's BERT-style encoder, where a block here is two layers."""

    def table(i):
        prefix = "transformer.attn_layers.layers"
        return {
            "token_emb": "transformer.token_emb.weight",
            "pos_emb": "transformer.pos_emb.emb.weight",
            "norm_out": "transformer.norm",
            f"layer_{i}/norm1": f"{prefix}.{2 * i}.0",
            f"layer_{i}/attn": f"{prefix}.{2 * i}.1",
            f"layer_{i}/norm2": f"{prefix}.{2 * i + 1}.0",
            f"layer_{i}/ff_in": f"{prefix}.{2 * i + 1}.1.net.0.0",
            f"layer_{i}/ff_out": f"{prefix}.{2 * i + 1}.1.net.2",
        }

    return _text_rules(shapes, table)


def text_transformer_plan(net: text_encoder.TextTransformer) -> plans.Plan:
    """The plan of LDM's text encoder; to_logits is left out."""
    shapes = plans.abstract_params(net, _TOKENS)
    beside = r"transformer\.to_logits\..*"
    return plans.Plan(list(text_transformer_rules(shapes)), shapes, beside)


def text_transformer_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.TextTransformer
) -> dict:
    """Params of LDM's text encoder (`cond_stage_model.` removed)."""
    return plans.convert(state_dict, text_transformer_plan(net))


_CLIP_TEXT = {
    "token_emb": "text_model.embeddings.token_embedding.weight",
    "pos_emb": "text_model.embeddings.position_embedding.weight",
    "norm_out": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}


def clip_rules(
    shapes: Mapping[str, tuple],
    names: Mapping[str, str] = _CLIP_TEXT,
    layers: str = "text_model.encoder.layers",
) -> Iterator[plans.Rule]:
    """Rules of a CLIP tower in the layout of Hugging Face, by default that of text."""

    def table(i):
        return {
            **names,
            f"layer_{i}": f"{layers}.{i}",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn": "self_attn",
            "to_q": "q_proj",
            "to_k": "k_proj",
            "to_v": "v_proj",
            "to_out": "out_proj",
            "ff_in": "mlp.fc1",
            "ff_out": "mlp.fc2",
        }

    return _text_rules(shapes, table)


def clip_plan(net: text_encoder.CLIPTextTransformer) -> plans.Plan:
    """The plan of a CLIP text tower in Hugging Face's layout (`text_model.…`)."""
    shapes = plans.abstract_params(net, _TOKENS)
    beside = (
        r"text_model\.embeddings\.position_ids|text_projection\.weight|logit_scale"
        r"|vis(ion|ual)_.*"
        + _unused_norm(r"text_model\.final_layer_norm", net)
        + _unused_block(r"text_model\.encoder\.layers", net)
    )
    return plans.Plan(list(clip_rules(shapes)), shapes, beside)


def clip_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.CLIPTextTransformer
) -> dict:
    """Params of a CLIP text tower from Hugging Face's keys."""
    return plans.convert(state_dict, clip_plan(net))


_OPENCLIP_TEXT = {
    "token_emb": "token_embedding.weight",
    "pos_emb": "positional_embedding",
    "norm_out": "ln_final",
    "text_projection/kernel": "text_projection",
}


def openclip_rules(
    shapes: Mapping[str, tuple],
    names: Mapping[str, str] = _OPENCLIP_TEXT,
    layers: str = "transformer.resblocks",
) -> Iterator[plans.Rule]:
    """Rules of a CLIP tower in the layout of OpenCLIP: q, k, v are one array.

    Its projections are stored as they are here, [in, out].
    """

    def table(i):
        return {
            **names,
            f"layer_{i}": f"{layers}.{i}",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "to_out": "out_proj",
            "ff_in": "mlp.c_fc",
            "ff_out": "mlp.c_proj",
        }

    for rule in _text_rules(shapes, table):
        packed = re.fullmatch(r"(.*)\.to_([qkv])\.(weight|bias)", rule.key)
        if packed:
            key = f"{packed[1]}.in_proj_{packed[3]}"
            rule = rule._replace(key=key, part=("qkv".index(packed[2]), 3))
        if rule.path.endswith("projection/kernel"):
            rule = rule._replace(layout=plans.AS_IS)
        yield rule


def openclip_plan(net: text_encoder.CLIPTextTransformer) -> plans.Plan:
    """The plan of a CLIP text tower in OpenCLIP's layout."""
    shapes = plans.abstract_params(net, _TOKENS)
    beside = (
        r"text_projection|logit_scale|logit_bias|attn_mask|visual\..*"
        + _unused_norm("ln_final", net)
        + _unused_block(r"transformer\.resblocks", net)
    )
    return plans.Plan(list(openclip_rules(shapes)), shapes, beside)


def openclip_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.CLIPTextTransformer
) -> dict:
    """Params of a CLIP text tower from OpenCLIP's keys."""
    return plans.convert(state_dict, openclip_plan(net))


def _unused_block(prefix: str, net: text_encoder.CLIPTextTransformer) -> str:
    """Pattern for the last block where the net stops before it."""
    unused = range(net.blocks, net.depth)
    return "".join(rf"|{prefix}\.{i}\..*" for i in unused)


def _unused_norm(prefix: str, net: text_encoder.CLIPTextTransformer) -> str:
    """Pattern for the last norm where the net leaves it out."""
    return "" if net.final_norm else rf"|{prefix}\..*"
