"""A run's folder, which *is* the run: where its config, tokenizers and stages lie.

config.json  tokenizers/NAME/  memory/NAME.npy  autoencoder/STEP/  diffusion/STEP/
logs/  pictures/  conditioners/NAME.safetensors  base.safetensors
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def config_path(workdir: pathlib.Path) -> pathlib.Path:
    """The config that the run was started with."""
    return workdir / "config.json"


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads the run's config; UserError where `workdir` holds no run."""
    path = config_path(workdir)
    if not path.is_file():
        raise UserError(
            f"--workdir: {workdir} holds no run (no config.json); give the --workdir of"
            " python -m ldm_jax.train"
        )
    return config_lib.from_json(path.read_text())


def base_path(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run that trains factors of low rank keeps what they are added to."""
    return workdir / "base.safetensors"


def tokenizer_path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Where the tokenizer of conditioner `name` is stored."""
    return workdir / "tokenizers" / name


def load_tokenizers(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> Mapping[str, Any]:
    """The tokenizer of every conditioner that has one, as training stored it."""
    return {
        name: tokenizers.load(tokenizer_path(workdir, name))
        for name, section in config.conditioners.items()
        if "tokenizer" in section
    }


def write_memory(workdir: pathlib.Path, memory: Mapping[str, Any]) -> None:
    """Stores what conditions look up of the training pictures, {name: [n, d]}."""
    for name, rows in memory.items():
        path = workdir / "memory" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.{os.getpid()}.npy")
        np.save(partial, np.asarray(rows), allow_pickle=False)
        os.replace(partial, path)


def load_memory(workdir: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What `write_memory` stored; UserError where it is gone."""
    memory = {}
    for name in names:
        path = workdir / "memory" / f"{name}.npy"
        if not path.is_file():
            raise UserError(
                f"--workdir: {path} is missing; run the training command again, which"
                " makes it"
            )
        memory[name] = np.load(path, allow_pickle=False)
    return memory
