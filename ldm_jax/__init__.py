"""Latent diffusion models, both stages, from scratch in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:
    from ldm_jax.loaded import LoadedModel

__version__ = "0.1.0"


def load(source: str | os.PathLike, config: str | None = None) -> "LoadedModel":
    """A trained model; `.sample(prompts)` draws from it.

    `source` is a run's workdir, of which the newest checkpoint is taken; or, with the
    `config` that it is of ("configs/txt2img.py:sd1"), a released checkpoint, a folder
    of diffusers or a hub id.
    """
    from ldm_jax import config as config_lib
    from ldm_jax import loaded

    if config is None:
        return loaded.load(source)
    from ldm_jax import released

    return released.load(os.fspath(source), config_lib.load(config))
