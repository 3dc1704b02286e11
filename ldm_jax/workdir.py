"""A run's folder, which *is* the run: where its config, tokenizers and stages lie.

config.json  tokenizers/NAME/  memory/NAME.npy  autoencoder/STEP/  diffusion/STEP/
logs/  pictures/  conditioners/NAME.safetensors  base.safetensors
"""

import contextlib
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError


@contextlib.contextmanager
def whole(path: pathlib.Path, option: str | None = None) -> Iterator[pathlib.Path]:
    """A place to write a file or a folder to, which gets its name when all is there.

    Where writing fails, nothing is left. Raises UserError, which names `option` too,
    where the system refuses.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of_files(partial)
        yield partial
        _open_to_others(partial, mode)
        os.replace(partial, path)
    except OSError as error:
        where = f"{option}: {path}" if option else path
        raise UserError(f"{where} can't be written ({error}); name another") from error
    finally:
        if os.path.isdir(partial):
            shutil.rmtree(partial)
        elif os.path.lexists(partial):  # unlike Path's methods, never an error
            partial.unlink()


def _mode_of_files(path: pathlib.Path) -> int:
    """The mode that a new file gets there, by the process's umask."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _open_to_others(path: pathlib.Path, mode: int) -> None:
    """Gives a file, or those in a folder, `mode`: safetensors makes them private."""
    for file in (path, *path.rglob("*.safetensors")):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
            file.chmod(mode)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a run's file whole or not at all."""
    with whole(path, "--workdir") as partial:
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
    path = config_path(workdir)
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise UserError(
            f"--workdir: {path} is damaged ({error}); put a sound copy there"
        ) from error


def check_draws(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a run that has no diffusion model."""
    if "diffusion" not in config:
        raise UserError(
            f"--workdir: {workdir} trains a first stage alone, but drawing needs a"
            f" diffusion stage too; use it by --config.autoencoder_from={workdir}"
        )


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder is a run; others too have a config.json."""
    file = config_path(path)
    return file.is_file() and '"stages"' in file.read_text()


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
