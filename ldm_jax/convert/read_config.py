"""Options of every network but the UNets from its keys, shapes and original config.

`config` has the names of the original's constructor, or is a config.json of diffusers
or transformers. What neither tells is as in the released models:
- text towers give the last block's context; heads are 64 wide; OpenCLIP's activation
  is the exact GELU, and so is Hugging Face's but at OpenAI's widths (512, 768);
- picture towers have 16 heads at the widths of ViT-L, H, g and G, else 64 wide ones,
  and the exact GELU but at ViT-L's and ViT-B's widths;
- an autoencoder's attention is vanilla, its norms have 32 groups;
- heads of BERT, LDMBert and a prior are 64 wide; DPT-hybrid's too, its taps are
  layers 8 and 11 of 12.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.convert import diffusers, text_encoders
from ldm_jax.convert import prior as prior_keys
from ldm_jax.convert.read_unet import frozen
from ldm_jax.nets import (
    autoencoder,
    clip_vision,
    discriminator,
    dpt,
    embedders,
    prior,
    text_encoder,
)
from ldm_jax.nets import t5 as t5_net

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that `pattern` catches."""
    found = (re.match(pattern, key) for key in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UserError(f"missing {key}; give the whole state dict of the network")
    return shapes[key]


# --- diffusers' config.json in the original's names

# What is computed otherwise than here where it has another value.
_ONLY = {
    "unet": {
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "act_fn": ("silu", "swish"),
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "resnet_out_scale_factor": (1, 1.0),
        "resnet_skip_time_act": (False,),
        "center_input_sample": (False,),
        "dual_cross_attention": (False,),
        "time_embedding_type": ("positional",),
        "time_cond_proj_dim": (None,),
        "class_embeddings_concat": (False,),
        "attention_type": ("default",),
        "reverse_transformer_layers_per_block": (None,),
    },
    "autoencoder": {
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "lookup_from_codebook": (False,),
    },
}


def originals(kind: str, config: Config, shapes: Shapes) -> dict[str, Any]:
    """A config.json of diffusers in the names of the original's constructor.

    UserError where it asks for what the networks here don't compute.
    """
    for key, values in _ONLY[kind].items():
        if key in config and config[key] not in values:
            raise UserError(
                f"{key}: {config[key]!r} is not computed here; only"
                f" {' or '.join(map(repr, values))}"
            )
    if kind == "autoencoder":
        return {"norm_groups": config.get("norm_num_groups", 32)}
    found = {"legacy": False}
    if "dropout" in config:
        found["dropout"] = config["dropout"]
    if config.get("only_cross_attention"):
        only = config["only_cross_attention"]
        levels = len(config.get("block_out_channels", (0,) * 4))
        only = only if isinstance(only, list | tuple) else [only] * levels
        found["disable_self_attentions"] = tuple(only)
    if config.get("class_embed_type") == "identity":
        found["num_classes"] = "added"
    if config.get("class_embed_type") == "projection":  # else told by its width
        width = config["projection_class_embeddings_input_dim"]
        found |= {"num_classes": "sequential", "adm_in_channels": width}
    if any(".transformer_blocks." in key for key in shapes):
        return found | _diffusers_heads(config)
    # In models without context this is channels a head; None is one head.
    channels = config.get("attention_head_dim", 8)
    return found | ({"num_head_channels": channels} if channels else {"num_heads": 1})


def _diffusers_heads(config):
    """What UNet2DConditionModel calls attention_head_dim is the number of heads."""
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(widths)
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    channels = {w / h for w, h in zip(widths, heads, strict=True)}
    if len(channels) > 1 or channels != {int(c) for c in channels}:
        raise UserError(
            f"attention_head_dim: {heads} heads at widths {list(widths)} are neither"
            " equally many nor equally wide; only such are computed here"
        )
    return {"num_head_channels": int(channels.pop())}


# --- first stages


def autoencoder_of(shapes: Shapes, config: Config) -> autoencoder.Autoencoder:
    """The autoencoder whose arrays have these shapes in CompVis' layout."""
    first, last = (
        _shape(shapes, f"{part}.weight")
        for part in ("encoder.conv_in", "decoder.conv_out")
    )
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    mults, attended = [], []
    for level in range(levels):
        width = _shape(shapes, f"encoder.down.{level}.block.0.conv1.weight")[0]
        mult = width / first[0]
        mults.append(int(mult) if mult == int(mult) else mult)
        if any(key.startswith(f"encoder.down.{level}.attn.") for key in shapes):
            attended.append(level)
    z_channels = _shape(shapes, "decoder.conv_in.weight")[1]
    embed_dim = shapes.get("post_quant_conv.weight", (0, z_channels))[1]
    resolution = 256  # any will do: attention is counted from it
    mid = {key.split(".")[3] for key in shapes if key.startswith("encoder.mid.attn_1.")}
    options = {
        "ch": first[0],
        "in_channels": first[1],
        "out_ch": last[0],
        "ch_mult": tuple(mults),
        "num_res_blocks": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "resolution": resolution,
        "attn_resolutions": tuple(resolution // 2**level for level in attended),
        "attn_type": "none" if not mid else "linear" if "to_qkv" in mid else "vanilla",
        "resamp_with_conv": levels == 1
        or "encoder.down.0.downsample.conv.weight" in shapes,
        "z_channels": z_channels,
        "embed_dim": embed_dim,
    }
    cls = autoencoder.AutoencoderKL
    options["double_z"] = _shape(shapes, "encoder.conv_out.weight")[0] == 2 * z_channels
    if "quantize.embedding.weight" in shapes:
        cls = autoencoder.VQModel
        options["n_embed"] = shapes["quantize.embedding.weight"][0]
    else:
        options["use_quant_convs"] = "quant_conv.weight" in shapes
    given = dict(config) | dict(config.get("ddconfig", {}))
    given |= config.get("encoder_config", {}).get("params", {})  # SGM's engine
    given.pop("remap", None)  # a file there
    if given.get("attn_type") in ("vanilla-xformers", "memory-efficient-cross-attn"):
        given["attn_type"] = "vanilla"
    if {"resolution", "attn_resolutions"} - given.keys():
        given.pop("resolution", None)
        given.pop("attn_resolutions", None)
    return cls(**options | _fields(given, cls))


def _fields(config: Config, cls: type) -> dict[str, Any]:
    names = cls.__dataclass_fields__.keys() - {"name", "parent", "dtype"}
    return {key: frozen(value) for key, value in config.items() if key in names}


def shapes_in_compvis(kind: str, shapes: Shapes) -> Shapes:
    """Shapes under diffusers' keys, under those of CompVis that the readers know."""
    names = diffusers.unet_names if kind == "unet" else diffusers.autoencoder_names
    names = names(shapes)
    return {names.to_compvis(key): shape for key, shape in shapes.items()}


# --- text and pictures


def bert_of(shapes: Shapes, config: Config) -> text_encoder.TextTransformer:
    """LDM's text encoder; its heads are 64 wide unless `config` says otherwise."""
    vocabulary, dim = _shape(shapes, "transformer.token_emb.weight")
    layers = "transformer.attn_layers.layers"
    inner = _shape(shapes, f"{layers}.0.1.to_q.weight")[0]
    width = config.get("dim_head")
    heads = config.get("heads") or inner // (width or 64)
    if not heads or inner % heads:
        raise UserError(f"heads: {heads} can't share a width of {inner}; give config")
    return text_encoder.TextTransformer(
        vocabulary,
        _shape(shapes, "transformer.pos_emb.emb.weight")[0],
        dim,
        _count(shapes, rf"{re.escape(layers)}\.(\d+)\.") // 2,
        heads=heads,
        dim_head=inner // heads,
    )


def ldm_bert_of(shapes: Shapes, config: Config) -> text_encoder.TextTransformer:
    """The encoder whose arrays have these shapes; its heads are 64 wide unless told."""
    act = config.get("activation_function", "gelu")
    if act != "gelu":
        raise UserError(f"activation_function: {act!r} is not computed here; only gelu")
    inner = _shape(shapes, "model.layers.0.self_attn.q_proj.weight")[0]
    heads = config.get("encoder_attention_heads") or inner // 64
    if not heads or inner % heads:
        raise UserError(
            f"encoder_attention_heads: {heads} can't share {inner}; give it"
        )
    vocabulary, dim = _shape(shapes, "model.embed_tokens.weight")
    return text_encoder.TextTransformer(
        vocabulary,
        _shape(shapes, "model.embed_positions.weight")[0],
        dim,
        _count(shapes, r"model\.layers\.(\d+)\."),
        heads=heads,
        dim_head=inner // heads,
    )


def t5_of(shapes: Shapes, config: Config) -> t5_net.T5Encoder:
    """The encoder whose arrays have these shapes; heads are told by its bias."""
    act = config.get("feed_forward_proj", "gated-gelu")
    if act not in ("gated-gelu", "relu"):
        raise UserError(
            f"feed_forward_proj: {act!r} is not computed here; only gated-gelu or relu"
        )
    vocabulary, dim = _shape(shapes, "shared.weight")
    buckets, heads = _shape(shapes, text_encoders.T5_BIAS)
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    dense = "encoder.block.0.layer.1.DenseReluDense"
    return t5_net.T5Encoder(
        vocabulary,
        dim,
        _count(shapes, r"encoder\.block\.(\d+)\."),
        heads,
        _shape(shapes, query)[0] // heads,
        _shape(shapes, f"{dense}.wo.weight")[1],
        gated=f"{dense}.wi_0.weight" in shapes,
        num_buckets=buckets,
        max_distance=config.get("relative_attention_max_distance", 128),
    )


def clip_text_of(
    shapes: Shapes, config: Config, layout: str
) -> text_encoder.CLIPTextTransformer:
    """A CLIP text tower in the layout of "huggingface" or "openclip"."""
    config = _of_tower(config, "text")
    if layout == "huggingface":
        start = "text_model.embeddings"
        vocabulary, dim = _shape(shapes, f"{start}.token_embedding.weight")
        length = _shape(shapes, f"{start}.position_embedding.weight")[0]
        depth = _count(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    else:
        vocabulary, dim = _shape(shapes, "token_embedding.weight")
        length = _shape(shapes, "positional_embedding")[0]
        depth = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    return text_encoder.CLIPTextTransformer(
        vocabulary,
        length,
        dim,
        depth,
        heads=_heads(config, dim),
        activation=_activation(config, layout, openai=dim in (512, 768)),
        **{k: config[k] for k in ("layer", "final_norm") if k in config},
    )


def _of_tower(config: Config, name: str) -> Config:
    """The part of a whole CLIP's config; OpenCLIP's has its activation beside them."""
    own = config.get(f"{name}_config") or config.get(f"{name}_cfg")
    if own is None:
        return config
    return {k: config[k] for k in ("quick_gelu",) if k in config} | dict(own)


def _heads(config: Config, dim: int, guess: int | None = None) -> int:
    for key in ("num_attention_heads", "heads"):
        if config.get(key):
            return config[key]
    if config.get("head_width"):
        return dim // config["head_width"]
    if guess is None and dim % 64:
        raise UserError(
            f"the number of heads of a tower of width {dim} is not in the weights; give"
            " it, as in config={'heads': 8}"
        )
    return guess or dim // 64


def _activation(config: Config, layout: str, openai: bool) -> str:
    if "quick_gelu" in config:
        return "quick_gelu" if config["quick_gelu"] else "gelu"
    if "hidden_act" in config:
        return config["hidden_act"]
    if layout == "openclip":
        return "gelu"
    # Hugging Face's own default, where there is a config that leaves it out.
    is_config = "model_type" in config or "num_attention_heads" in config
    return "quick_gelu" if openai or is_config else "gelu"


def clip_vision_of(
    shapes: Shapes, config: Config, layout: str
) -> clip_vision.CLIPVisionTransformer:
    """A CLIP picture tower in the layout of "huggingface" or "openclip"."""
    config = _of_tower(config, "vision")
    if layout == "huggingface":
        start = "vision_model.embeddings"
        patches = _shape(shapes, f"{start}.patch_embedding.weight")
        places = _shape(shapes, f"{start}.position_embedding.weight")[0]
        depth = _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\.")
        projected = _shape(shapes, "visual_projection.weight")[0]
    else:
        patches = _shape(shapes, "visual.conv1.weight")
        places = _shape(shapes, "visual.positional_embedding")[0]
        depth = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        projected = _shape(shapes, "visual.proj")[1]
    dim, patch = patches[0], patches[-1]
    return clip_vision.CLIPVisionTransformer(
        math.isqrt(places - 1) * patch,
        patch,
        dim,
        depth,
        _heads(config, dim, 16 if dim in (1024, 1280, 1408, 1664) else None),
        projected,
        _activation(config, layout, openai=dim in (768, 1024)),
    )


def dpt_of(shapes: Shapes, config: Config) -> dpt.DPTHybrid:
    """MiDaS's DPT-hybrid in the layout of Hugging Face."""
    backbone = "dpt.embeddings.backbone.bit"
    stages = rf"{re.escape(backbone)}\.encoder\.stages"
    neck = "neck.reassemble_stage.layers"
    depth = _count(shapes, r"dpt\.encoder\.layer\.(\d+)\.")
    dim = _shape(shapes, "dpt.embeddings.projection.weight")[0]
    taps = tuple(config.get("backbone_out_indices", ()))[-2:]
    if not taps and depth != 12:
        raise UserError(
            f"which of the {depth} layers are used is not in the weights; give it, as"
            " in config={'backbone_out_indices': [0, 1, 8, 11]}"
        )
    groups = (config.get("backbone_config") or {}).get("num_groups", 32)
    return dpt.DPTHybrid(
        stem=_shape(shapes, f"{backbone}.embedder.convolution.weight")[0],
        widths=tuple(
            _shape(shapes, f"{backbone}.encoder.stages.{i}.layers.0.conv3.weight")[0]
            for i in range(3)
        ),
        depths=tuple(
            _count(shapes, rf"{stages}\.{i}\.layers\.(\d+)") for i in range(3)
        ),
        dim=dim,
        heads=_heads(config, dim),
        grid=math.isqrt(_shape(shapes, "dpt.embeddings.position_embeddings")[1] - 1),
        taps=taps or (8, 11),
        reassembled=tuple(
            _shape(shapes, f"{neck}.{i}.projection.weight")[0] for i in (2, 3)
        ),
        fusion=_shape(shapes, "neck.convs.0.weight")[0],
        groups=groups,
    )


# --- small ones, and those of losses


def class_embedder_of(shapes: Shapes, config: Config) -> embedders.ClassEmbedder:
    """The class embedder; all of it is in the shape."""
    return embedders.ClassEmbedder(*_shape(shapes, "embedding.weight"))


def rescaler_of(shapes: Shapes, config: Config) -> embedders.SpatialRescaler:
    """The rescaler; stages, method and multiplier are the original's defaults."""
    method = config.get("method", "bilinear")
    mapper = shapes.get("channel_mapper.weight")
    return embedders.SpatialRescaler(
        config.get("n_stages", 1),
        # Its area averages whole bins, which is another name here.
        "adaptive" if method == "area" else method,
        config.get("multiplier", 0.5),
        mapper[0] if mapper else None,
        "channel_mapper.bias" in shapes,
    )


def discriminator_of(
    shapes: Shapes, config: Config
) -> discriminator.PatchDiscriminator:
    """The PatchGAN; its norm is told by what it keeps."""
    ndf, in_channels = _shape(shapes, "main.0.weight")[:2]
    leaves = {key.rsplit(".", 1)[1] for key in shapes}
    if "running_mean" in leaves:
        norm = "batch"
    else:
        norm = "actnorm" if "loc" in leaves else "group"
    # The last convolution is number 3 n_layers + 2.
    layers = (_count(shapes, r"main\.(\d+)\.") - 3) // 3
    return discriminator.PatchDiscriminator(in_channels, ndf, layers, norm)


# --- what draws embeddings


def prior_of(shapes: Shapes, config: Config) -> prior.PriorTransformer:
    """The prior whose arrays have these shapes; heads are 64 wide unless told."""
    for key in ("norm_in.weight", "embedding_proj_norm.weight"):
        if key in shapes:
            raise UserError(f"{key}: a prior with that norm is not computed here")
    width, channels = _shape(shapes, "proj_in.weight")
    heads = prior_keys.heads_of(width, config)
    query = "prd_embedding" in shapes
    tokens = _shape(shapes, "positional_embedding")[1]
    length = config.get("num_embeddings", tokens - 3 - query)
    return prior.PriorTransformer(
        in_channels=channels,
        out_channels=_shape(shapes, "proj_to_clip_embeddings.weight")[0],
        context_dim=_shape(shapes, "encoder_hidden_states_proj.weight")[1],
        context_length=length,
        positions=tokens - length - 2 - query,
        vector_dim=_shape(shapes, "embedding_proj.weight")[1],
        depth=_count(shapes, r"transformer_blocks\.(\d+)\."),
        heads=heads,
        dim_head=width // heads,
        query=query,
    )
