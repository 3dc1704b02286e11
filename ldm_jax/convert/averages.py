"""Moving averages in a checkpoint: under the arrays' names without dots (LitEma)."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.config import UserError
from ldm_jax.convert import whole


class Averaged(NamedTuple):
    """A net's prefix, that of its averages, and which of its arrays have one."""

    name: str
    prefix: str
    averages: str
    needed: str = ""  # the pattern that their keys begin with


UNET = Averaged("the UNet", whole.UNET, "model_ema.diffusion_model")
# In a whole model nothing takes it. Codebooks that are averages themselves have none.
FIRST_STAGE_ALONE = Averaged(
    "the autoencoder",
    whole.FIRST_STAGE,
    f"{whole.FIRST_STAGE}model_ema.",
    r"encoder\.|decoder\.|(post_)?quant_conv\.",
)


def of(
    net: Averaged, state_dict: Mapping[str, Any], averaged: bool = True
) -> dict[str, Any]:
    """A net's arrays without prefix, their averages in their places where it has some.

    Where not `averaged`, the raw ones. UserError where some averages are lacking.
    """
    own, size = whole.under(state_dict, net.prefix), len(net.averages)
    averages = {
        k[size:]: v for k, v in state_dict.items() if k.startswith(net.averages)
    }
    if not averages or not averaged:
        return own
    short = {key: key.replace(".", "") for key in own}
    missing = [
        short[key]
        for key in own
        if short[key] not in averages and re.match(net.needed, key)
    ]
    if missing:
        raise UserError(
            f"SRC: {net.name}'s average lacks {len(missing)} arrays, such as"
            f" {net.averages + missing[0]!r}; take the raw weights with --raw_weights"
        )
    return {key: averages.get(short[key], value) for key, value in own.items()}
