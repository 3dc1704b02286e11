"""Weights of conditioning nets that are not trained: fetched once, kept in the run.

A frozen net's section names them: a file (.safetensors, .bin, .pt, .ckpt), a folder of
transformers, or a hub id, REPO or REPO:SUBFOLDER. The run holds its own copy,
conditioners/NAME.safetensors, so that sampling needs neither.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax
import ml_collections
import numpy as np
from safetensors import numpy as safetensors_numpy

from ldm_jax import hub
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.convert import files, towers

FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder or on the hub


def names(model: model_lib.LatentDiffusion) -> list[str]:
    """The conditions whose nets are frozen."""
    return [
        name
        for name, c in model.conditioners.items()
        if c.has_params and not c.trainable
    ]


def missing(model: model_lib.LatentDiffusion, workdir: pathlib.Path) -> list[str]:
    """The frozen conditions of whose nets the run has no copy yet."""
    return [name for name in names(model) if not copy_path(workdir, name).is_file()]


def check(
    model: model_lib.LatentDiffusion,
    workdir: pathlib.Path,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Raises UserError for a frozen net that has no weights.

    They are in the run, or `given`, or the config says where they are.
    """
    for name in missing(model, workdir):
        if model.conditioners[name].weights is None and name not in (given or {}):
            raise UserError(
                f"conditioners.{name}.trainable: False, but a frozen net needs weights;"
                f" set conditioners.{name}.weights to a file, a folder or a hub id, or"
                " trainable to True to train it from scratch"
            )


def load(
    model: model_lib.LatentDiffusion,
    workdir: pathlib.Path,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{name: params} of all frozen nets.

    They are the run's copies, else those that are `given`, else what configs name.
    """
    params = {}
    for name in names(model):
        conditioner, path = model.conditioners[name], copy_path(workdir, name)
        if path.is_file():
            params[name] = read_params(path)
            continue
        if given and name in given:
            params[name] = given[name]
            continue
        option = f"conditioners.{name}.weights"
        if conditioner.weights is None:
            raise UserError(f"--workdir: {path} is missing; set {option} and train")
        state_dict = read(conditioner.weights, option)
        try:
            params[name] = towers.params_of(conditioner.net, state_dict)
        except ValueError as error:
            raise UserError(f"{option}: {conditioner.weights!r}: {error}") from error
    return params


def load_tower(config: ml_collections.ConfigDict, net: Any) -> dict[str, Any]:
    """Params of a first stage's tower, of which `autoencoder.weights` says where."""
    source = config.autoencoder.get("weights")
    if source is None:
        raise UserError(
            "autoencoder.weights: None, but its tower is not trained; set it to a file,"
            " a folder or a hub id of CLIP's"
        )
    try:
        return towers.params_of(net.tower, read(source, "autoencoder.weights"))
    except ValueError as error:
        raise UserError(f"autoencoder.weights: {source!r}: {error}") from error


def write(workdir: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Stores the run's copies, each whole or not at all."""
    for name, tree in params.items():
        write_params(copy_path(workdir, name), tree)


def write_params(path: pathlib.Path, params: Any) -> None:
    """Stores params in float32, whole or not at all, unless they are there."""
    if path.is_file():
        return
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    flat = {k: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}
    with workdir_lib.whole(path) as partial:
        safetensors_numpy.save_file(flat, partial)


def read_params(path: pathlib.Path) -> dict[str, Any]:
    """What `write_params` stored; UserError where it is gone or damaged."""
    # Read whole: the file may be replaced while the params are in use.
    flat = {k: x.copy() for k, x in files.read_safetensors(path, "--workdir").items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def read(source: str, option: str) -> dict[str, np.ndarray]:
    """The state dict of `source`, or of several with commas between as one.

    Each is a file, a folder or a hub id; UserErrors name `option`.
    """
    whole = pathlib.Path(source).expanduser().exists()  # a name may have a comma
    arrays = {}
    for part in [source] if whole else source.split(","):
        arrays |= files.read(_find(part.strip(), option), option)
    return arrays


def _find(source: str, option: str) -> pathlib.Path:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{option}: {source!r} has no {' or '.join(FILES)} in it; give"
                " the file, or the folder that it is in"
            )
        return found[0]
    if path.is_file():
        return path
    if path.suffix in files.SUFFIXES or source.startswith((".", "/", "~")):
        raise UserError(
            f"{option}: no file or folder {source!r}; give one that is there"
        )
    return hub.weights(source, FILES, option)


def copy_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Where a run keeps the frozen net of the condition `name`."""
    return workdir / "conditioners" / f"{name}.safetensors"
