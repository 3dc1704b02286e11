"""Latent diffusion models, both stages, from scratch in JAX and Flax."""

import os
import typing

if typing.TYPE_CHECKING:
    import jax

    from ldm_jax.loaded import LoadedModel

__version__ = "0.1.0"


def load(
    source: str | os.PathLike,
    config: str | None = None,
    *,
    mesh: "jax.sharding.Mesh | None" = None,
) -> "LoadedModel":
    """A trained model; `.sample(prompts)` draws from it.

    `source` is a run's workdir, of which the newest checkpoint is taken; or a released
    checkpoint, a folder of diffusers or the hub id of one, which is recognised unless
    `config` says what it is ("configs/txt2img.py:sd1", or the original YAML). The
    params are on the first device, or spread over a `mesh` of train/sharding.py.
    """
    from ldm_jax import loaded, released

    if config is None and not released.is_source(source):
        return loaded.load(source, mesh)
    return released.load(os.fspath(source), config, mesh)
