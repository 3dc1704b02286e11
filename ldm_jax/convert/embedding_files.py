"""Embeddings of textual inversion in files, as the tools that share them write them.

diffusers               {TOKEN: [k, d] or [d]}   learned_embeds.safetensors, .bin
CompVis, the web UI     {"string_to_param": {"*": [k, d]}, "name": TOKEN}   .pt
the web UI's later ones {"emb_params": [k, d]}   .safetensors
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import files, torch_archive

NAMELESS = ("*", "emb_params")  # keys that stand for any token
MEND = "give a file of one token of textual inversion for this text net"


def read(
    source: str | pathlib.Path | Mapping[str, Any], token: str | None, dim: int
) -> tuple[str, np.ndarray]:
    """(token, float32 [k, dim]) of a file or what one holds.

    `token` is what to call it instead of what the file says; where neither says
    anything, the file's name without its ending. Raises UserError for a file of
    something else, or of another width.
    """
    option = "tokens_file" if isinstance(source, Mapping) else f"tokens_file: {source}"
    tree = source if isinstance(source, Mapping) else _open(pathlib.Path(source))
    name = tree.get("name")
    if "string_to_param" in tree:
        tree = tree["string_to_param"]
    if not isinstance(tree, Mapping) or len(tree) != 1:
        held = f"{len(tree)} entries" if isinstance(tree, Mapping) else "no dict"
        raise UserError(f"{option} holds {held}; {MEND}")
    ((key, value),) = tree.items()
    try:
        rows = np.array(value, np.float32, ndmin=2)
    except (TypeError, ValueError) as error:
        raise UserError(f"{option} holds no array; {MEND}") from error
    if rows.ndim != 2 or rows.shape[1] != dim or not len(rows):
        raise UserError(
            f"{option} holds {list(np.shape(value))} under {key!r}, but the text net's"
            f" embeddings are {dim} wide; {MEND}"
        )
    if not np.isfinite(rows).all():
        raise UserError(f"{option} has values that are infinite or NaN; {MEND}")
    if key in NAMELESS:
        key = name if isinstance(name, str) else None
    token = token or key
    if token is None and not isinstance(source, Mapping):
        token = pathlib.Path(source).stem
    if token is None:
        raise UserError(f"{option} doesn't say what its token is called; give token=")
    return token, rows


def _open(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"tokens_file: no file {str(path)!r}; {MEND}")
    if path.suffix == ".safetensors":
        return files.read_safetensors(path, "tokens_file")
    try:
        tree = torch_archive.load(path)
    except UserError as error:
        try:  # a trainer's own things may be beside it, of which nothing is built
            tree = {"string_to_param": torch_archive.load(path, "string_to_param")}
        except UserError:
            raise error from None
    return tree if isinstance(tree, Mapping) else {}
