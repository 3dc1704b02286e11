"""Latent diffusion models, both stages, from scratch in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:
    from ldm_jax.loaded import LoadedModel

__version__ = "0.1.0"


def load(workdir: str | os.PathLike) -> "LoadedModel":
    """Loads a training run's newest checkpoint; `.sample(prompts)` draws from it."""
    from ldm_jax import loaded

    return loaded.load(workdir)
