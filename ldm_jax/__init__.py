"""Latent diffusion models, both stages, from scratch in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:
    from ldm_jax.loaded import LoadedModel

__version__ = "0.1.0"


def load(source: str | os.PathLike, config: str | None = None) -> "LoadedModel":
    """A trained model; `.sample(prompts)` draws from it.

    `source` is a run's workdir, of which the newest checkpoint is taken; or a released
    checkpoint or a folder of diffusers, which is recognised unless `config` says what
    it is ("configs/txt2img.py:sd1", or the original YAML); or with that a hub id.
    """
    from ldm_jax import loaded, released

    if config is None and not released.is_source(source):
        return loaded.load(source)
    return released.load(os.fspath(source), config)
