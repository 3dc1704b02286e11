"""State dicts of taming-transformers' NLayerDiscriminator to PatchDiscriminator.

Keys are unprefixed (`main.0.weight`); a CompVis autoencoder checkpoint has them under
`loss.discriminator.`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np

from ldm_jax.convert import plans
from ldm_jax.nets import discriminator

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_PER_CHANNEL = plans.Layout(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])
_FLAG = plans.Layout(lambda a: a > 0, lambda a: np.asarray(a, np.uint8))
_ACTNORM = {"loc": _PER_CHANNEL, "scale": _PER_CHANNEL, "initialized": _FLAG}


def abstract_variables(net: discriminator.PatchDiscriminator) -> dict[str, tuple]:
    """{"collection/path/of/variable": shape} of a discriminator."""
    shapes = jax.eval_shape(
        lambda x: net.init(jax.random.key(0), x, train=False),
        net.abstract_inputs()["x"],
    )
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def discriminator_rules(
    net: discriminator.PatchDiscriminator, shapes: Mapping[str, tuple]
) -> Iterator[plans.Rule]:
    """Rules of every variable of `net`, whose `abstract_variables` are `shapes`.

    torch numbers its layers: convolution, activation, then triples of convolution,
    norm, activation.
    """
    for path in shapes:
        _, layer, leaf = path.split("/")
        kind, place = layer.split("_")
        i = net.n_layers + 1 if place == "out" else int(place)
        index = max(3 * i - 1, 0) + (kind == "norm")
        layout = plans.CONV if leaf == "kernel" else plans.AS_IS
        if kind == "norm" and net.norm == "actnorm":
            yield plans.Rule(path, f"main.{index}.{leaf}", _ACTNORM[leaf])
        else:
            yield plans.Rule(path, f"main.{index}.{_LEAVES[leaf]}", layout)


def discriminator_plan(net: discriminator.PatchDiscriminator) -> plans.Plan:
    """The plan of a discriminator's variables; step counters are left out."""
    shapes = abstract_variables(net)
    beside = r"main\.\d+\.num_batches_tracked"
    return plans.Plan(list(discriminator_rules(net, shapes)), shapes, beside)


def discriminator_variables(
    state_dict: Mapping[str, np.ndarray], net: discriminator.PatchDiscriminator
) -> dict[str, Any]:
    """{"params", "batch_stats"} of `net` from a state dict."""
    return plans.convert(state_dict, discriminator_plan(net))
