"""State dicts from files: safetensors, and what torch or a trainer has saved."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from ldm_jax.config import UserError
from ldm_jax.convert import torch_archive, towers

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt")


def read(path: pathlib.Path, option: str) -> dict[str, Any]:
    """The state dict in a file; UserErrors name `option`.

    A trainer's checkpoint holds more than arrays: of that nothing is built. A pair of
    arrays is taken as the mean and std of embeddings, as Karlo's are.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path, option)
    try:
        tree = torch_archive.load(path, "state_dict")
    except UserError:  # no such entry, or what the next attempt says better
        tree = torch_archive.load(path)
    if isinstance(tree, list | tuple) and len(tree) == 2:
        tree = dict(zip(towers.STATISTICS, tree, strict=True))
    if not isinstance(tree, Mapping):
        raise UserError(f"{option}: {path} holds no dict of arrays; give another file")
    return dict(tree)


def read_safetensors(path: pathlib.Path, option: str) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file, bfloat16 as float32."""
    try:
        arrays = safetensors_numpy.load_file(path)
    except (SafetensorError, OSError, AttributeError, TypeError) as error:
        # AttributeError or TypeError: a dtype that numpy has not.
        raise UserError(
            f"{option}: {path} can't be read ({error!r}); give a whole file of float32"
            " or float16"
        ) from error
    # To numpy bfloat16 is a dtype of somebody else, which not all of it can add up.
    return {
        k: v.astype(np.float32) if v.dtype == jnp.bfloat16 else v
        for k, v in arrays.items()
    }
