"""State dicts of CompVis' classifier of noised latents to this package's parameters.

Keys are unprefixed (`input_blocks.0.0.weight`). Up to the head they are a UNet's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ldm_jax.convert import compvis, plans
from ldm_jax.nets import encoder_unet, unet

# {our layer of the head: its place in torch's sequence}
_HEADS = {
    "adaptive": {"norm_out": "out.0", "logits": "out.3"},
    "attention": {"norm_out": "out.0", "attn_pool": "out.2"},
    "spatial": {"hidden": "out.0", "logits": "out.2"},
    "spatial_v2": {"hidden": "out.0", "norm_out": "out.1", "logits": "out.3"},
}


def encoder_unet_rules(
    net: encoder_unet.EncoderUNet, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[plans.Rule]:
    """Rules of every parameter of `net`, whose `abstract_params` are `shapes`."""
    head = _HEADS[net.pool]
    trunk = {path: s for path, s in shapes.items() if path.split("/")[0] not in head}
    # The names of blocks hang on these options alone.
    whole = unet.UNet(
        in_channels=net.in_channels,
        model_channels=net.model_channels,
        out_channels=net.out_channels,
        num_res_blocks=net.num_res_blocks,
        attention_resolutions=net.attention_resolutions,
        channel_mult=net.channel_mult,
        resblock_updown=net.resblock_updown,
    )
    yield from compvis.unet_rules(whole, trunk)
    for path in sorted(shapes.keys() - trunk.keys()):
        first, *between, leaf = path.split("/")
        key = ".".join([head[first], *between, plans.LEAVES.get(leaf, leaf)])
        yield plans.Rule(path, key, _head_layout(net.pool, path))


def encoder_unet_plan(net: encoder_unet.EncoderUNet) -> plans.Plan:
    """The plan of a classifier."""
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    return plans.Plan(list(encoder_unet_rules(net, shapes)), shapes)


def encoder_unet_params(
    state_dict: Mapping[str, np.ndarray], net: encoder_unet.EncoderUNet
) -> dict[str, Any]:
    """Params of `net` from a classifier's state dict; ValueError where one misfits."""
    return plans.convert(state_dict, encoder_unet_plan(net))


def _head_layout(pool: str, path: str) -> plans.Layout:
    if path.endswith("/positional_embedding"):
        return plans.LINEAR  # [c, tokens] there
    if not path.endswith("/kernel"):
        return plans.AS_IS
    convolutions = {
        "adaptive": plans.POINTWISE_2D,
        "attention": plans.POINTWISE_1D,
    }
    return convolutions.get(pool, plans.LINEAR)
