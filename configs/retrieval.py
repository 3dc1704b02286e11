"""Pictures from a caption and from pictures like one: retrieval.

    python -m ldm_jax.train --config=configs/retrieval.py --workdir=runs/retrieval

trains on emoji in minutes on 2 CPU cores. What is alike is told by the run's own first
stage, averaged over parts of the picture, since CLIP's towers can't be had offline.
`rdm768` is the published model on CLIP's vectors; it has not been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels from their names and the four that are nearest to one."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.conditioners.neighbours = ConfigDict(
        dict(kind="neighbours", k=4, cells=4, dim=128)
    )
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(context_dim=128)
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def rdm768() -> ConfigDict:
    """The retrieval-augmented model at 768 pixels: kl-f16, 20 neighbours."""
    config = defaults.both_stages()
    config.resolution = 768
    config.autoencoder = ConfigDict(dict(variant="rdm"))
    config.conditioners.neighbours = ConfigDict(
        dict(
            kind="clip_neighbours",
            k=20,
            net=dict(variant="clip_l"),
            weights="openai/clip-vit-large-patch14",
        )
    )
    config.unet = ConfigDict(dict(variant="rdm768", remat=True))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.015))
    return config


PRESETS = {"openmoji": openmoji, "debug": debug, "rdm768": rdm768}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
