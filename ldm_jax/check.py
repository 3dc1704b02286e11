"""All nets of a run beside those of diffusers and transformers, as one table."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from ldm_jax import loaded
from ldm_jax.config import UserError
from ldm_jax.convert import check as blocks
from ldm_jax.convert import references
from ldm_jax.nets import autoencoder, clip_vision, dpt

TOLERANCE = 1e-3  # of the greatest difference, in units of the output's spread
_AROUND_A_TOWER = clip_vision.ImageVector, clip_vision.NearestVectors, dpt.DepthMap


def check(model: loaded.Loaded) -> str:
    """Prints and returns a Markdown table: a row for each block of each net.

    Theirs compute with our params as they are exported; differences are absolute. A
    block is marked that is off by more than `TOLERANCE` of its output's standard
    deviation: the first such one in a net is where to look. Nets that have no
    counterpart get one row that says why. UserError without torch.
    """
    references.libraries()  # of the whole command, not of a net
    lines = ["| Net | Block | max | mean | std | |", "| --- " * 6 + "|"]
    for name, net, params in _nets(model):
        try:
            rows = _compare(net, {"params": params})
        except UserError as error:
            lines.append(f"| {name} | not compared: {error} | | | | |")
            continue
        lines += [f"| {name} {line(row)}" for row in rows]
    table = "\n".join(lines)
    print(table)
    return table


def line(row: blocks.Row) -> str:
    """A row of the table, behind the net's name."""
    numbers = f"{row.max_difference:.1e} | {row.mean_difference:.1e} | {row.std:.3g}"
    # A NaN is no less than anything.
    differs = not row.max_difference <= TOLERANCE * max(row.std, 1e-3)
    return f"| {row.block} | {numbers} | {'differs' if differs else ''} |"


def _nets(model: loaded.Loaded) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, net, its params) of all that have params."""
    if isinstance(model, loaded.LoadedAutoencoder):
        yield "autoencoder", model.net, model.first_stage.params
        return
    if not isinstance(model.model.autoencoder, autoencoder.Identity):
        yield "autoencoder", model.model.autoencoder, model.first_stage.params
    yield "unet", model.model.unet, model.params["unet"]
    for name, (net, params) in sorted(model.condition_nets.items()):
        yield f"conditioners.{name}", net, params


def _compare(net: nn.Module, variables: dict[str, Any]) -> list[blocks.Row]:
    if isinstance(net, _AROUND_A_TOWER):
        net, variables = net.tower, {"params": variables["params"]["tower"]}
    return blocks.compare(net, variables)
