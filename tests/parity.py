"""Reads the parity fixtures: what the reference PyTorch code computes, as data."""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

_REPO = pathlib.Path(__file__).resolve().parents[1]
ROOT = pathlib.Path(
    os.environ.get("LDM_JAX_PARITY", _REPO.parent / "shared" / "parity")
)


def load(name: str, weights: str = "weights.safetensors"):
    """Returns (meta, weights, io) of one fixture; skips the test where it is absent.

    Weights are float16 on disk, exactly; the reference ran on them in float32.
    """
    folder = ROOT / name
    if not folder.is_dir():
        pytest.skip(f"parity fixture {folder} is absent; set LDM_JAX_PARITY")
    meta = json.loads((folder / "meta.json").read_text())
    state_dict = {}
    if (folder / weights).exists():
        state_dict = {
            key: value.astype(np.float32) if value.dtype == np.float16 else value
            for key, value in safetensors_numpy.load_file(folder / weights).items()
        }
    with np.load(folder / "io.npz") as archive:
        io = {key: archive[key] for key in archive.files}
    return meta, state_dict, io


def nhwc(array: np.ndarray) -> np.ndarray:
    """Moves torch's channel axis last."""
    return np.moveaxis(array, 1, -1)
