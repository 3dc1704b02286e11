"""Small runs for tests: the `debug` preset, and a workdir made without training."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.train import checkpoint
from ldm_jax.train import state as train_state

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TXT2IMG = str(CONFIGS / "txt2img.py")
AUTOENCODER = str(CONFIGS / "autoencoder.py")
CAPTIONS = ["a red circle on blue", "a blue square on red", "a green cross on white"]


def debug(*overrides: str) -> ml_collections.ConfigDict:
    """The debug preset with "key=value" overrides."""
    return config_lib.load(f"{TXT2IMG}:debug", overrides)


def tokenizer():
    """A WordPiece vocabulary of a few captions."""
    return tokenizers.train_wordpiece(CAPTIONS, 64)


def build(config: ml_collections.ConfigDict) -> model_lib.LatentDiffusion:
    """The nets of a config, its captions read by `tokenizer`."""
    return model_lib.build(config, dict.fromkeys(config.conditioners, tokenizer()))


def random_like(abstract, seed: int = 0, spread: float = 0.3):
    """Float32 arrays of given shapes without the zeros that a fresh net starts with."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        value = spread * rng.normal(size=x.shape) + (path[-1].key == "scale")
        return jnp.asarray(value.astype(np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_params(config, model, seed: int = 0, spread: float = 0.3):
    """Params of stage one and of stage two."""
    key = jax.random.key(0)
    first = jax.eval_shape(
        lambda: model_lib.init_autoencoder(config, model.autoencoder, key)[0]
    )
    second = jax.eval_shape(lambda: model_lib.init_diffusion(config, model, key))
    return random_like(first, seed, spread), random_like(second, seed + 1, spread)


def untrained(
    workdir: pathlib.Path, config: ml_collections.ConfigDict, spread: float = 0.3
) -> None:
    """Writes what a finished run of `config` leaves, with random params.

    A `spread` of 0.1 for what is drawn elsewhere too: a larger one enlarges rounding.
    """
    workdir_lib.write_text(workdir_lib.config_path(workdir), config_lib.to_json(config))
    for name in (n for n, c in config.conditioners.items() if "tokenizer" in c):
        tokenizer().save_pretrained(workdir_lib.tokenizer_path(workdir, name))
    model = build(config)
    c = model.latent_shape[-1]
    facts = {"latent": {"mean": [0.1] * c, "std": [1.5] * c}}
    for name, params in zip(
        ("autoencoder", "diffusion"),
        random_params(config, model, spread=spread),
        strict=True,
    ):
        state = train_state.create(params, optax.sgd(0.1, momentum=0.9), 0.9)
        state = state.replace(step=jnp.int32(config[f"{name}_stage"].steps))
        saved = checkpoint.Checkpoints(workdir / name)
        saved.save(state, {"step": int(state.step), "complete": True} | facts)
        saved.close()
