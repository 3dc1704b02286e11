"""Which network a state dict is of, in whose key layout, and under which prefix."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ldm_jax.config import UserError


class Recognised(NamedTuple):
    """`state` is under the keys of the network alone."""

    kind: str
    layout: str  # the name export_network takes
    state: dict[str, Any]


class _Sign(NamedTuple):
    """A key that only one kind of network has; what stands before it is a prefix."""

    kind: str
    layout: str
    key: str
    start: str = ""  # of the keys, where a part of the network was saved alone
    also: str = ""  # another key that tells it from its likes
    absent: str = ""


_SIGNS = (
    _Sign("unet", "compvis", "input_blocks.0.0.weight", also="output_blocks."),
    _Sign("classifier", "compvis", "input_blocks.0.0.weight", absent="output_blocks."),
    _Sign("unet", "diffusers", "time_embedding.linear_1.weight", also="conv_in."),
    _Sign("prior", "diffusers", "proj_to_clip_embeddings.weight"),
    _Sign("prior", "karlo", "prd_emb"),
    _Sign("autoencoder", "compvis", "encoder.mid.block_1.norm1.weight"),
    _Sign("autoencoder", "diffusers", "encoder.mid_block.resnets.0.norm1.weight"),
    _Sign("ldm_bert", "diffusers", "model.layers.0.self_attn_layer_norm.weight"),
    _Sign("t5", "huggingface", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    _Sign("bert", "compvis", "transformer.attn_layers.layers.0.0.weight"),
    _Sign("clip_text", "huggingface", "text_model.embeddings.token_embedding.weight"),
    _Sign(
        "clip_text",
        "huggingface",
        "embeddings.token_embedding.weight",
        start="text_model.",
    ),
    _Sign("clip_text", "openclip", "token_embedding.weight", also="ln_final."),
    _Sign(
        "clip_vision", "huggingface", "vision_model.embeddings.patch_embedding.weight"
    ),
    _Sign("clip_vision", "openclip", "visual.conv1.weight"),
    _Sign(
        "clip_vision",
        "openclip",
        "conv1.weight",
        start="visual.",
        also="transformer.resblocks.0.",
    ),
    _Sign("depth", "huggingface", "dpt.encoder.layer.0.layernorm_before.weight"),
    _Sign("depth", "midas", "pretrained.model.blocks.0.norm1.weight"),
    _Sign("discriminator", "compvis", "main.0.weight"),
    _Sign("lpips", "compvis", "net.slice1.0.weight"),
    _Sign("lpips", "compvis", "features.0.weight", also="lin0."),
    _Sign("class_embedder", "compvis", "embedding.weight"),
    _Sign("rescaler", "compvis", "channel_mapper.weight"),
)
# Arguments of a rescaler alone, which needs no arrays.
_RESCALED = {"n_stages", "multiplier", "method"}
# What a trainer wraps around a network, and a checkpoint calls it.
_PREFIX = re.compile(
    r"(module\.|_orig_mod\.)*"
    r"(model\.diffusion_model\.|diffusion_model\.|unet\.|first_stage_model\.|vae\."
    r"|cond_stage_model\.(model\.|transformer\.|embedder\.model\.)?"
    r"|conditioner\.embedders\.\d+\.(model\.|transformer\.)?"
    r"|text_encoder\.|image_encoder\.|embedder\.(model\.)?|classifier\.|model\."
    r"|model_first_steps\.|model_last_step\.|depth_model\.(model\.)?|(loss\.)?discriminator\.|(loss\.)?perceptual_loss\.)?"
)
_NAMES = {
    "unet": "a UNet",
    "prior": "a prior",
    "classifier": "a classifier",
    "autoencoder": "an autoencoder",
    "bert": "a BERT encoder",
    "ldm_bert": "diffusers' LDMBert",
    "t5": "a T5 encoder",
    "clip_text": "a CLIP text tower",
    "clip_vision": "a CLIP picture tower",
    "depth": "a DPT",
    "discriminator": "a discriminator",
    "lpips": "LPIPS",
    "class_embedder": "a class embedder",
    "rescaler": "a spatial rescaler",
}


def recognise(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Recognised:
    """The network in `state_dict`, and its arrays under its own keys.

    A whole CLIP is read as its text tower, unless `config` is of a picture tower. A
    dict without arrays is a rescaler's. UserError where it is no network known here,
    or more than one.
    """
    if not state_dict and config is not None and _RESCALED & config.keys():
        return Recognised("rescaler", "compvis", {})
    found = _found(state_dict)
    # The nets of a first stage's loss lie beside it in its own checkpoint.
    found = [pair for pair in found if not pair[1].startswith("loss.")] or found
    if {sign.kind for sign, _ in found} == {"clip_text", "clip_vision"}:
        wanted = "clip_vision" if _of_pictures(config) else "clip_text"
        found = [(sign, prefix) for sign, prefix in found if sign.kind == wanted]
    if not found:
        known = ", ".join(_NAMES.values())
        raise UserError(
            f"the {len(state_dict)} keys, such as {_some(state_dict)}, are of no"
            f" network known here; give the state dict of one of: {known}"
        )
    kinds = sorted({f"{_NAMES[s.kind]} under {p!r}" for s, p in found})
    if len(kinds) > 1:
        raise UserError(
            f"the state dict holds {len(kinds)} networks: {', '.join(kinds)}; give the"
            " keys of one of them"
        )
    sign, prefix = found[0]
    own = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    if sign.start:
        # A projection stands beside the tower, not in it.
        own = {
            k if "projection" in k or k.startswith(sign.start) else sign.start + k: v
            for k, v in own.items()
        }
    return Recognised(sign.kind, sign.layout, own)


def _found(keys: Iterable[str]) -> list[tuple[_Sign, str]]:
    """Every sign in `keys` that follows a known prefix; the first for each prefix."""
    keys, found, taken = list(keys), [], set()
    for sign in _SIGNS:
        ends = [k for k in keys if k.endswith(sign.key) and _is_prefix(k, sign.key)]
        for prefix in (key.removesuffix(sign.key) for key in ends):
            if sign.also and not _any(keys, prefix + sign.also):
                continue
            if sign.absent and _any(keys, prefix + sign.absent):
                continue
            whole = prefix.removesuffix(sign.start) if sign.start else prefix
            if (sign.kind, whole) not in taken:
                taken.add((sign.kind, whole))
                found.append((sign, prefix))
    return found


def _is_prefix(key: str, end: str) -> bool:
    return _PREFIX.fullmatch(key.removesuffix(end)) is not None


def _any(keys: Iterable[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


def _of_pictures(config: Mapping[str, Any] | None) -> bool:
    return config is not None and ("patch_size" in config or "vision_config" in config)


def _some(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in sorted(keys)[:3])
