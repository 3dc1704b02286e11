"""The config.json that diffusers or transformers need for a net: `read_config` back.

Beside `networks.export_network` it makes a folder that they load. What only training
knows (dropout of autoencoders, losses, a codebook's averages) is left out; what they
can't compute is a UserError.
"""

from collections.abc import Sequence
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.convert import diffusers
from ldm_jax.nets import (
    autoencoder,
    clip_autoencoder,
    clip_vision,
    dpt,
    prior,
    t5,
    text_encoder,
    unet,
)


def _refuse(net: Any, faults: dict[str, str]) -> None:
    """UserError for the first of `faults`, {field: what diffusers has instead}."""
    if faults:
        field, instead = next(iter(faults.items()))
        raise UserError(
            f"{field}: {getattr(net, field)!r} is not in diffusers, which {instead};"
            " export it in the layout 'compvis'"
        )


def _widths(first: int, mults: Sequence[float]) -> list[int]:
    return [int(first * mult) for mult in mults]


# --- UNets


def unet_of(net: unet.UNet, sample_size: int) -> dict[str, Any]:
    """config.json of UNet2DConditionModel, or of UNet2DModel for nets without context.

    `sample_size` is the side of the latents that a pipeline draws unless told.
    """
    attended = _attended_levels(net)
    _refuse(net, _faults_of_unet(net, attended))
    depths = net.res_blocks_of_levels()
    config = {
        "sample_size": sample_size,
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "block_out_channels": _widths(net.model_channels, net.channel_mult),
        "layers_per_block": depths[0] if len(set(depths)) == 1 else list(depths),
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": net.dropout,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": (
            "scale_shift" if net.use_scale_shift_norm else "default"
        ),
        **_label(net),
    }
    if net.use_spatial_transformer:
        return config | _with_context(net, attended)
    return config | _without_context(net, attended)


def _with_context(net: unet.UNet, attended: Sequence[bool]) -> dict[str, Any]:
    depth = net.transformer_depth
    config = {
        "_class_name": "UNet2DConditionModel",
        **_blocks(attended, "CrossAttn", net.resblock_updown),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": net.context_dim,
        "transformer_layers_per_block": depth if isinstance(depth, int) else [*depth],
        # The number of heads; diffusers took its name from elsewhere.
        "attention_head_dim": _heads(net),
        "use_linear_projection": net.use_linear_in_transformer,
    }
    if any(net.disable_self_attentions or ()):
        only = [bool(disabled) for disabled in net.disable_self_attentions]
        config["only_cross_attention"] = only
    return config


def _without_context(net: unet.UNet, attended: Sequence[bool]) -> dict[str, Any]:
    kind = "resnet" if net.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        **_blocks(attended, "Attn", net.resblock_updown),
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": _head_channels(net, attended),
        # With scale and shift it would leave the middle's norm out unless told.
        "attn_norm_num_groups": 32,
        "add_attention": not net.disable_middle_transformer,
    }


def _blocks(attended: Sequence[bool], attn: str, updown: bool) -> dict[str, Any]:
    def types(way, levels):
        plain = f"Resnet{way}sample" if updown else way
        return [f"{attn + way if a else plain}Block2D" for a in levels]

    return {
        "down_block_types": types("Down", attended),
        "up_block_types": types("Up", attended[::-1]),
    }


def _attended_levels(net: unet.UNet) -> list[bool]:
    """Whether a level has attention, which it has after each res block or none."""
    counts = net.num_attention_blocks or (max(net.res_blocks_of_levels()) + 1,) * len(
        net.channel_mult
    )
    return [
        2**level in net.attention_resolutions and count > 0
        for level, count in enumerate(counts)
    ]


def _faults_of_unet(net: unet.UNet, attended: Sequence[bool]) -> dict[str, str]:
    """{field: what diffusers has instead}."""
    resamples = len(net.channel_mult) > 1
    blocks, depths = net.num_attention_blocks, net.res_blocks_of_levels()
    found = {
        "dims": net.dims != 2 and "has UNets of pictures only",
        "n_embed": net.n_embed is not None and "has no UNet that predicts codes",
        "channel_mult": net.channel_mult[0] != 1
        and "has the first level as wide as model_channels",
        "conv_resample": resamples
        and not (net.conv_resample or net.resblock_updown)
        and "resamples by convolutions or res blocks",
        "num_attention_blocks": blocks is not None
        and any(a and n <= d for a, n, d in zip(attended, blocks, depths, strict=True))
        and "attends after every res block of a level or after none",
    }
    if net.use_spatial_transformer:
        found |= {
            "transformer_depth_middle": net.transformer_depth_middle is not None
            and "has a middle as deep as the last level",
            "context_dim": not isinstance(net.context_dim, int)
            and "has one context for all blocks",
            "resblock_updown": net.resblock_updown
            and resamples
            and any(attended)
            and "resamples by res blocks only where there is no attention",
            "disable_middle_self_attn": net.disable_middle_self_attn
            and "has self-attention in the middle",
            "disable_middle_transformer": net.disable_middle_transformer
            and "has attention in the middle",
        }
    else:
        found |= {
            "num_res_blocks": len(set(depths)) > 1
            and "has equally many on every level of nets without context",
            "num_classes": net.num_classes in ("sequential", "continuous")
            and "has no vector conditions for nets without context",
        }
    return {field: instead for field, instead in found.items() if instead}


def _label(net: unet.UNet) -> dict[str, Any]:
    if isinstance(net.num_classes, int):
        return {"class_embed_type": None, "num_class_embeds": net.num_classes}
    if net.num_classes == "continuous":
        kind, width = "simple_projection", 1
    elif net.num_classes == "sequential":
        kind, width = "projection", net.adm_in_channels
    else:
        return {"class_embed_type": net.num_classes}  # "timestep" or None
    size = {"projection_class_embeddings_input_dim": width}
    if width in diffusers.SDXL_WIDTHS:
        return size | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
        }
    return size | {"class_embed_type": kind}


def _heads(net: unet.UNet) -> int | list[int]:
    """Number of heads, of each level where they are equally wide."""
    width = net.num_head_channels
    if width is None:
        return net.num_heads
    widths = _widths(net.model_channels, net.channel_mult)
    attended = _attended_levels(net)
    attended[-1] = True  # as is the middle
    if not net.legacy and any(
        w // (w // width) != width for w, a in zip(widths, attended, strict=True) if a
    ):
        _refuse(net, {"num_head_channels": "spreads a block's channels over its heads"})
    return [max(1, w // width) for w in widths]


def _head_channels(net: unet.UNet, attended: Sequence[bool]) -> int | None:
    """Channels a head, which are equal everywhere; None is one head."""
    widths = _widths(net.model_channels, net.channel_mult)
    used = {
        (w, net.heads_of(w, upward)[0])
        for w, a in zip(widths, attended, strict=True)
        for upward in (False, True)
        if a
    }
    if not net.disable_middle_transformer:
        used.add((widths[-1], net.heads_of(widths[-1], False)[0]))
    if all(heads == 1 for _, heads in used):
        return None
    channels = {w // heads for w, heads in used}
    if len(channels) > 1:
        field = "num_heads" if net.num_head_channels is None else "num_head_channels"
        _refuse(
            net, {field: "has equally wide heads everywhere in nets without context"}
        )
    return channels.pop()


# --- first stages


def autoencoder_of(
    net: autoencoder.Autoencoder, scaling_factor: float, sample_size: int
) -> dict[str, Any]:
    """config.json of AutoencoderKL or VQModel.

    `scaling_factor` is what latents are multiplied with before diffusion,
    `sample_size` the side of the pictures.
    """
    of_clip = isinstance(net, clip_autoencoder.ClipAutoencoder)
    if of_clip or not isinstance(net, autoencoder.Autoencoder):
        raise UserError(
            f"autoencoder: a {type(net).__name__} is not in diffusers; leave it out"
        )
    is_kl = isinstance(net, autoencoder.AutoencoderKL)
    _refuse(net, _faults_of_autoencoder(net, is_kl))
    levels = range(len(net.ch_mult))
    has_attn = net.attn_type != "none"
    attended = [has_attn and net.has_attn(level) for level in levels]
    config = {
        "in_channels": net.in_channels,
        "out_channels": net.out_ch,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attended],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in attended[::-1]],
        "block_out_channels": _widths(net.ch, net.ch_mult),
        "layers_per_block": net.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": net.z_channels,
        "norm_num_groups": net.norm_groups,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": has_attn,
    }
    if not is_kl:
        return config | {
            "_class_name": "VQModel",
            "num_vq_embeddings": net.n_embed,
            "vq_embed_dim": net.embed_dim,
        }
    return config | {
        "_class_name": "AutoencoderKL",
        "use_quant_conv": net.use_quant_convs,
        "use_post_quant_conv": net.use_quant_convs,
    }


def _faults_of_autoencoder(net: autoencoder.Autoencoder, is_kl: bool) -> dict[str, str]:
    found = {
        "use_linear_attn": net.use_linear_attn and "has softmax attention only",
        "attn_type": net.attn_type == "linear" and "has softmax attention only",
        "ch_mult": net.ch_mult[0] != 1 and "has the first level as wide as ch",
        "resamp_with_conv": len(net.ch_mult) > 1
        and not net.resamp_with_conv
        and "resamples by convolutions",
        "tanh_out": net.tanh_out and "leaves the picture as it is",
        "give_pre_end": net.give_pre_end and "decodes to a picture",
    }
    if is_kl:
        differs = net.embed_dim != net.z_channels
        found["embed_dim"] = differs and f"has z_channels ({net.z_channels}) of them"
    else:
        found["l2_normalize"] = net.l2_normalize and "compares codes as they are"
    return {field: instead for field, instead in found.items() if instead}


# --- CLIP


def clip_text_of(net: text_encoder.CLIPTextTransformer) -> dict[str, Any]:
    """config.json of CLIPTextModel, or CLIPTextModelWithProjection if `net` projects.

    Where `net` stops before its last block and applies the last norm (Stable Diffusion
    2), that is the whole tower there: export `net.clone(depth=net.blocks,
    layer="last")`. Without the norm it is a layer inside the whole tower.
    """
    if net.normalize:
        raise UserError(
            "normalize: True is not in transformers; set it to False and divide its"
            " embeddings by their length"
        )
    projects = net.projection_dim is not None
    return {
        "architectures": ["CLIPTextModel" + "WithProjection" * projects],
        "model_type": "clip_text_model",
        **_tower(net, net.blocks if net.final_norm else net.depth),
        "vocab_size": net.vocab_size,
        "max_position_embeddings": net.max_seq_len,
        "projection_dim": net.projection_dim or net.dim,
        "bos_token_id": 0,
        "eos_token_id": 2,  # there it means the highest id, as here
        "pad_token_id": 1,
    }


def clip_vision_of(net: clip_vision.CLIPVisionTransformer) -> dict[str, Any]:
    """config.json of CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_tower(net, net.depth),
        "image_size": net.image_size,
        "patch_size": net.patch_size,
        "num_channels": 3,
        "projection_dim": net.projection_dim,
    }


def _tower(net: Any, depth: int) -> dict[str, Any]:
    return {
        "hidden_size": net.dim,
        "intermediate_size": 4 * net.dim,
        "num_hidden_layers": depth,
        "num_attention_heads": net.heads,
        "hidden_act": net.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }


# --- depth


def dpt_of(net: dpt.DPTHybrid) -> dict[str, Any]:
    """config.json of DPTForDepthEstimation."""
    backbone = {
        "model_type": "bit",
        "embedding_size": net.stem,
        "hidden_sizes": list(net.widths),
        "depths": list(net.depths),
        "num_groups": net.groups,
        "layer_type": "bottleneck",
        "global_padding": "same",
        "embedding_dynamic_padding": True,
        "out_features": ["stage1", "stage2", "stage3"],
    }
    return {
        "architectures": ["DPTForDepthEstimation"],
        "model_type": "dpt",
        "is_hybrid": True,
        "backbone_config": backbone,
        "hidden_size": net.dim,
        "intermediate_size": 4 * net.dim,
        "num_hidden_layers": net.taps[-1] + 1,
        "num_attention_heads": net.heads,
        "image_size": 16 * net.grid,
        "patch_size": 16,
        "backbone_out_indices": [0, 1, *net.taps],
        "backbone_featmap_shape": [1, net.widths[-1], net.grid, net.grid],
        "reassemble_factors": [1, 1, 1, 0.5],
        "neck_hidden_sizes": [*net.widths[:2], *net.reassembled],
        "fusion_hidden_size": net.fusion,
    }


# --- T5, LDM's text encoder


def t5_of(net: t5.T5Encoder) -> dict[str, Any]:
    """config.json of T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": net.vocab_size,
        "d_model": net.dim,
        "d_kv": net.dim_head,
        "d_ff": net.dim_ff,
        "num_layers": net.depth,
        "num_heads": net.heads,
        "relative_attention_num_buckets": net.num_buckets,
        "relative_attention_max_distance": net.max_distance,
        "feed_forward_proj": "gated-gelu" if net.gated else "relu",
        "dropout_rate": 0.0,
    }


def ldm_bert_of(net: text_encoder.TextTransformer) -> dict[str, Any]:
    """config.json of LDMBertModel."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": net.vocab_size,
        "max_position_embeddings": net.max_seq_len,
        "d_model": net.dim,
        "encoder_layers": net.depth,
        "encoder_attention_heads": net.heads,
        "head_dim": net.dim_head,
        "encoder_ffn_dim": 4 * net.dim,
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }


# --- priors


def prior_of(net: prior.PriorTransformer) -> dict[str, Any]:
    """config.json of PriorTransformer."""
    if net.vector_dim is None or net.context_dim != net.in_channels:
        raise UserError(
            f"vector_dim, context_dim: {net.vector_dim} and {net.context_dim}, but the"
            " prior of diffusers has a pooled vector, and texts as wide as latents"
            f" ({net.in_channels})"
        )
    return {
        "_class_name": "PriorTransformer",
        "num_attention_heads": net.heads,
        "attention_head_dim": net.dim_head,
        "num_layers": net.depth,
        "embedding_dim": net.in_channels,
        "num_embeddings": net.context_length,
        # Beside the text's: its vector, the timestep, the latent, the query.
        "additional_embeddings": 2 + net.positions + net.query,
        "added_emb_type": "prd" if net.query else None,
        "embedding_proj_dim": net.vector_dim,
        "clip_embed_dim": net.out_channels,
        "dropout": 0.0,
    }
