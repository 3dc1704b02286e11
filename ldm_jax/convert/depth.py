"""DPT-hybrid's weights under Hugging Face's or MiDaS's names to this net's params."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import plans
from ldm_jax.nets import dpt

_BACKBONE = "dpt.embeddings.backbone.bit"
_REASSEMBLE = "neck.reassemble_stage"
_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "stem_conv": f"{_BACKBONE}.embedder.convolution",
    "stem_norm": f"{_BACKBONE}.embedder.norm",
    "skip": "downsample.conv",
    "skip_norm": "downsample.norm",
    "patch": "dpt.embeddings.projection",
    "class_emb": "dpt.embeddings.cls_token",
    "pos_emb": "dpt.embeddings.position_embeddings",
    "to_q": "attention.query",
    "to_k": "attention.key",
    "to_v": "attention.value",
    "to_out": "output.dense",
    "attn": "attention",
    "ff_in": "intermediate.dense",
    "ff_out": "output.dense",
    "downsample": f"{_REASSEMBLE}.layers.3.resize",
    "head_0": "head.head.0",
    "head_1": "head.head.2",
    "head_2": "head.head.4",
}
_VIT = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_FUSION = {
    "unit1": "residual_layer1",
    "unit2": "residual_layer2",
    "conv1": "convolution1",
    "conv2": "convolution2",
    "out": "projection",
}
# The transformer's last norm, and the unit that would take in a coarser map than the
# coarsest: the checkpoint has them, nothing uses them.
UNUSED = r"dpt\.layernorm\..*|neck\.fusion_stage\.layers\.0\.residual_layer1\..*"


def _names(block: str) -> dict[str, str]:
    """Names inside one of the net's blocks, such as `stage_0_block_2`."""
    match block.split("_"):
        case "stage", stage, "block", i:
            return {block: f"{_BACKBONE}.encoder.stages.{stage}.layers.{i}"}
        case "layer", i:
            return _VIT | {block: f"dpt.encoder.layer.{i}"}
        case "readout", tap:
            return {block: f"{_REASSEMBLE}.readout_projects.{int(tap) + 2}.0"}
        case "reassemble", tap:
            return {block: f"{_REASSEMBLE}.layers.{int(tap) + 2}.projection"}
        case "neck", i:
            return {block: f"neck.convs.{i}"}
        case "fusion", i:  # theirs count from the coarsest
            return _FUSION | {block: f"neck.fusion_stage.layers.{3 - int(i)}"}
    return {}


def dpt_rules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[plans.Rule]:
    """Rules of every parameter of a `DPTHybrid` whose shapes these are."""
    for path, shape in shapes.items():
        key = plans.rename(path, _NAMES | _names(path.split("/")[0]))
        yield plans.Rule(path, key, plans.plain_layout(path, len(shape)))


def dpt_plan(net: dpt.DPTHybrid) -> plans.Plan:
    """The plan of a DPT-hybrid in the layout of Hugging Face."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = plans.abstract_params(net, x)
    return plans.Plan(list(dpt_rules(shapes)), shapes, UNUSED)


def dpt_params(state_dict: Mapping[str, np.ndarray], net: dpt.DPTHybrid) -> dict:
    """Params of `net` from either's names; ValueError where one misfits."""
    return plans.convert(from_midas(state_dict), dpt_plan(net))


# MiDaS's own names, which Stability's checkpoints have too, and Hugging Face's.
_RESNET = r"pretrained\.model\.patch_embed\.backbone"
_BLOCK, _LAYER = r"pretrained\.model\.blocks\.(\d+)", r"dpt.encoder.layer.\1."
_MIDAS = [
    (rf"{_RESNET}\.stem\.conv", f"{_BACKBONE}.embedder.convolution"),
    (rf"{_RESNET}\.stem\.norm", f"{_BACKBONE}.embedder.norm"),
    (
        rf"{_RESNET}\.stages\.(\d+)\.blocks",
        _BACKBONE + r".encoder.stages.\1.layers",
    ),
    (r"pretrained\.model\.patch_embed\.proj", "dpt.embeddings.projection"),
    (r"pretrained\.model\.cls_token", "dpt.embeddings.cls_token"),
    (r"pretrained\.model\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"pretrained\.model\.norm\.", "dpt.layernorm."),
    (_BLOCK + r"\.norm1", _LAYER + r"layernorm_before"),
    (_BLOCK + r"\.norm2", _LAYER + r"layernorm_after"),
    (_BLOCK + r"\.attn\.proj", _LAYER + r"attention.output.dense"),
    (_BLOCK + r"\.attn\.", _LAYER + r"attention.attention."),
    (_BLOCK + r"\.mlp\.fc1", _LAYER + r"intermediate.dense"),
    (_BLOCK + r"\.mlp\.fc2", _LAYER + r"output.dense"),
    (r"pretrained\.act_postprocess4\.4", f"{_REASSEMBLE}.layers.3.resize"),
    *(
        (rf"pretrained\.act_postprocess{tap + 1}\.{there}", f"{_REASSEMBLE}.{here}")
        for tap in (2, 3)
        for there, here in (
            (r"0\.project\.0", f"readout_projects.{tap}.0"),
            ("3", f"layers.{tap}.projection"),
        )
    ),
    *((rf"scratch\.layer{i + 1}_rn", f"neck.convs.{i}") for i in range(4)),
    *(  # theirs count from the finest
        (rf"scratch\.refinenet{i}", f"neck.fusion_stage.layers.{4 - i}")
        for i in range(1, 5)
    ),
    (r"scratch\.output_conv", "head.head"),
]
_MIDAS_INSIDE = {
    "resConfUnit1.conv1": "residual_layer1.convolution1",
    "resConfUnit1.conv2": "residual_layer1.convolution2",
    "resConfUnit2.conv1": "residual_layer2.convolution1",
    "resConfUnit2.conv2": "residual_layer2.convolution2",
    "out_conv": "projection",
}


def from_midas(state: Mapping[str, Any]) -> dict[str, Any]:
    """MiDaS's state dict under Hugging Face's names, which stay as they are.

    ImageNet's head is left out.
    """
    found = {}
    for key, value in state.items():
        if re.match(r"pretrained\.model\.head", key):
            continue
        for pattern, name in _MIDAS:
            key, count = re.subn(f"^{pattern}", name, key)
            if count:
                break
        if key.startswith("neck.fusion_stage"):
            for there, here in _MIDAS_INSIDE.items():
                key = key.replace(f".{there}.", f".{here}.")
        packed = re.fullmatch(r"(.*\.attention)\.qkv\.(weight|bias)", key)
        if packed is None:
            found[key] = value
            continue
        names = ("query", "key", "value")
        for name, part in zip(names, np.split(value, 3), strict=True):
            found[f"{packed[1]}.{name}.{packed[2]}"] = part
    return found
