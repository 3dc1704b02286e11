"""State dicts from files: safetensors, and what torch or a trainer has saved."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from ldm_jax.config import UserError
from ldm_jax.convert import mapped, torch_archive, towers

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
    """The arrays of a .safetensors file, read-only, read where and when they are used.

    UserError names `option` where the file is damaged.
    """
    try:
        with safetensors.safe_open(path, "np"):  # checks its table against its size
            pass
        return mapped.read_safetensors(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{option}: {path} can't be read ({error!r}); give a whole file of float32"
            " or float16"
        ) from error
