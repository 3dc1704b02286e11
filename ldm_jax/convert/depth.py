"""DPT-hybrid's weights under Hugging Face's names to this package's params."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import compvis
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


def dpt_rules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[compvis.Rule]:
    """Rules of every parameter of a `DPTHybrid` whose shapes these are."""
    for path, shape in shapes.items():
        key = compvis.rename(path, _NAMES | _names(path.split("/")[0]))
        yield compvis.Rule(path, key, compvis.plain_layout(path, len(shape)))


def dpt_params(state_dict: Mapping[str, np.ndarray], net: dpt.DPTHybrid) -> dict:
    """Params of `net` from `DPTForDepthEstimation`; ValueError where one misfits."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = compvis.abstract_params(net, x)
    return compvis.convert(state_dict, dpt_rules(shapes), shapes, UNUSED)
