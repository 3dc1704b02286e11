"""The notebook runs, cell by cell, on a workdir whose nets have not learned a thing."""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.train import checkpoint, state

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "sample_colab.ipynb"
SKIPPED = {"install", "display"}


def _save(folder, params, meta):
    saved = checkpoint.Checkpoints(folder)
    saved.save(state.create(params, optax.trace(0.0), ema_decay=0.0), meta)
    saved.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run of the debug preset, as far as its files go."""
    folder = tmp_path_factory.mktemp("run")
    config = config_lib.load(str(ROOT / "configs" / "txt2img.py:debug"))
    (folder / "config.json").write_text(config_lib.to_json(config))
    tokenizer = tokenizers.train_wordpiece(["strawberry red heart"], 64)
    tokenizer.save_pretrained(workdir_lib.tokenizer_path(folder, "text"))
    model = model_lib.build(config, {"text": tokenizer})
    key, c = jax.random.key(0), model.latent_shape[-1]
    first, _ = model_lib.init_autoencoder(config, model.autoencoder, key)
    second = model_lib.init_diffusion(config, model, key)
    latent = {"mean": [0.0] * c, "std": [1.0] * c}
    _save(folder / "autoencoder", first, {"step": 0, "latent": latent})
    _save(folder / "diffusion", second, {"step": 0})
    return folder


def _cells():
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "clear the notebook's outputs before a commit"
        tags = set(cell["metadata"].get("tags", ()))
        if cell["cell_type"] == "code" and not tags & SKIPPED:
            yield tags, "".join(cell["source"])


@pytest.mark.slow
def test_notebook_draws_its_prompts(workdir):
    names = {}
    for tags, source in _cells():
        exec(compile(source, str(NOTEBOOK), "exec"), names)
        if "parameters" in tags:
            names |= {"WORKDIR": str(workdir), "STEPS": 2}
    images, n = names["images"], len(names["PROMPTS"])
    assert images.dtype == np.uint8
    assert images.shape[0] == n and images.shape[-1] == 3
    assert names["grid"].size[0] >= n * images.shape[2]
