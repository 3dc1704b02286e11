"""A run's folder, which *is* the run: where its config, tokenizers and stages lie.

config.json  tokenizers/NAME/  memory/NAME.npy  autoencoder/STEP/  diffusion/STEP/
logs/  pictures/  conditioners/NAME.safetensors  base.safetensors
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place to write a file or a folder to, which gets its name when all is there.

    Where writing fails, nothing is left.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text)


def config_path(workdir: pathlib.Path) -> pathlib.Path:
    """The config that the run was started with."""
    return workdir / "config.json"


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Reads the run's config; UserError where `workdir` holds no run."""
    if not is_run(workdir):
        raise UserError(
            f"--workdir: {workdir} holds no run (no config.json of one); give the"
            " --workdir of python -m ldm_jax.train"
        )
    return config_lib.from_json(config_path(workdir).read_text())


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder is a run; others too have a config.json."""
    file = config_path(path)
    return file.is_file() and "stages" in json.loads(file.read_text())


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
        with whole(workdir / "memory" / f"{name}.npy") as partial:
            np.save(partial, np.asarray(rows), allow_pickle=False)


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
