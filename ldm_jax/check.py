"""All nets of a run beside those of diffusers and transformers, as one table."""

from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn

from ldm_jax import loaded
from ldm_jax.config import UserError
from ldm_jax.convert import check as blocks
from ldm_jax.nets import autoencoder, text_encoder, unet

TOLERANCE = 1e-3  # of the greatest difference, in units of the output's spread


def check(model: loaded.LoadedModel) -> str:
    """Prints and returns a Markdown table: a row for each block of each net.

    Differences are absolute. A block is marked that is off by more than `TOLERANCE` of
    its output's standard deviation: the first such one in a net is where to look. Nets
    that have no counterpart get one row that says why. UserError without torch.
    """
    blocks.libraries()  # of the whole command, not of a net
    lines = ["| Net | Block | max | mean | std | |", "| --- " * 6 + "|"]
    for name, net, params in _nets(model):
        try:
            rows = _compare(net, {"params": params})
        except UserError as error:
            lines.append(f"| {name} | not compared: {error} | | | | |")
            continue
        lines += [f"| {name} {_line(row)}" for row in rows]
    table = "\n".join(lines)
    print(table)
    return table


def first_wrong(rows: Sequence[blocks.Row]) -> blocks.Row | None:
    """The first block that is off by more than `TOLERANCE`, None where none is."""
    return next((row for row in rows if _is_wrong(row)), None)


def _is_wrong(row: blocks.Row) -> bool:
    # A NaN is no less than anything.
    return not row.max_difference <= TOLERANCE * max(row.std, 1e-3)


def _line(row: blocks.Row) -> str:
    numbers = f"{row.max_difference:.1e} | {row.mean_difference:.1e} | {row.std:.3g}"
    return f"| {row.block} | {numbers} | {'differs' if _is_wrong(row) else ''} |"


def _nets(model: loaded.LoadedModel) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, net, its params) of all that have params."""
    if not isinstance(model.model.autoencoder, autoencoder.Identity):
        yield "autoencoder", model.model.autoencoder, model.first_stage.params
    yield "unet", model.model.unet, model.params["unet"]
    params = {**model.params["conditioners"], **model.first_stage.encoders}
    for name, conditioner in sorted(model.model.conditioners.items()):
        if conditioner.has_params:
            yield f"conditioners.{name}", conditioner.net, params[name]


def _compare(net: nn.Module, variables: dict[str, Any]) -> list[blocks.Row]:
    match net:
        case autoencoder.Autoencoder():
            return blocks.compare_autoencoder(net, variables)
        case text_encoder.CLIPTextTransformer():
            return blocks.compare_clip_text(net, variables)
        case unet.UNet():
            return blocks.compare_unet(net, variables)
    raise UserError(f"there is no reference for a {type(net).__name__}")
