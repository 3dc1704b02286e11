"""State dicts from files: safetensors, and what torch or a trainer has saved."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from ldm_jax.config import UserError
from ldm_jax.convert import mapped, torch_archive, towers

# Entries that hold the state dict of a trainer's checkpoint, the surest first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "_orig_mod.")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt")


def read(path: pathlib.Path, option: str) -> dict[str, Any]:
    """The state dict in a file, `unwrapped`; UserErrors name `option`.

    A trainer's checkpoint holds more than arrays: of that nothing is built. A pair of
    arrays is taken as the mean and std of embeddings, as Karlo's are.
    """
    if path.suffix == ".safetensors":
        return unwrapped(read_safetensors(path, option))
    try:
        tree = _read_archive(path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error
    if isinstance(tree, list | tuple) and len(tree) == 2:
        tree = dict(zip(towers.STATISTICS, tree, strict=True))
    if not isinstance(tree, Mapping):
        raise UserError(f"{option}: {path} holds no dict of arrays; give another file")
    return unwrapped(tree)


def _read_archive(path: pathlib.Path) -> Any:
    try:
        inner = torch_archive.load(path, WRAPPERS)
    except torch_archive.NoEntryError:
        return torch_archive.load(path)
    # What is no wrapper may have such a name too.
    return inner if _has_arrays(inner) else torch_archive.load(path)


def unwrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what trainers have put around it, and before all its keys.

    That is an entry of `WRAPPERS` with arrays in it; DDP's and torch.compile's prefix.
    """
    tree = dict(tree)
    for _ in WRAPPERS:  # a dict may hold itself
        inner = next((tree[k] for k in WRAPPERS if _has_arrays(tree.get(k))), tree)
        tree = dict(inner)
    while prefix := next((p for p in _PREFIXES if _is_before_all(p, tree)), None):
        tree = {key.removeprefix(prefix): value for key, value in tree.items()}
    return tree


def _has_arrays(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    return any(hasattr(value, "shape") for value in entry.values())


def _is_before_all(prefix: str, tree: Mapping[str, Any]) -> bool:
    names = [isinstance(key, str) and key.startswith(prefix) for key in tree]
    return bool(names) and all(names)


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
