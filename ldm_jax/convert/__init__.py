"""Networks of PyTorch and back, `import_network` and `export_network`; LoRA too."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import flax.linen as nn
    import numpy as np


def import_network(
    state_dict_or_path: "Mapping[str, Any] | str | os.PathLike",
    config: Mapping[str, Any] | None = None,
) -> "tuple[nn.Module, dict[str, Any]]":
    """A network and its variables from its state dict; as `networks` has it."""
    from ldm_jax.convert import networks

    return networks.import_network(state_dict_or_path, config)


def export_network(
    module: "nn.Module", variables: Mapping[str, Any], layout: str
) -> "dict[str, np.ndarray]":
    """The state dict of a network, in a layout; as `networks` has it."""
    from ldm_jax.convert import networks

    return networks.export_network(module, variables, layout)


def import_lora(
    net: "nn.Module",
    state_dict_or_path: "Mapping[str, Any] | str | os.PathLike",
) -> tuple[dict[str, Any], int, float]:
    """A net's factors, rank and alpha from a LoRA; as `lora_files` has it."""
    from ldm_jax.convert import lora_files

    return lora_files.import_lora(net, state_dict_or_path)


def export_lora(
    net: "nn.Module", factors: Mapping[str, Any], rank: int, alpha: float
) -> "dict[str, np.ndarray]":
    """The state dict of such factors for diffusers; as `lora_files` has it."""
    from ldm_jax.convert import lora_files

    return lora_files.export_lora(net, factors, rank, alpha)
