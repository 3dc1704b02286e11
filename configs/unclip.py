"""Pictures like a picture: its embedding, with noise, as a vector.

    python -m ldm_jax.train --config=configs/unclip.py --workdir=runs/unclip

trains on emoji in minutes on 2 CPU cores. Its embedding is the run's own first stage,
averaged over quarters of the picture, since CLIP's image tower can't be had offline.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels that look like another one, called by a name."""
    config = defaults.emoji()
    config.conditioners.alike = ConfigDict(dict(kind="image_embedding", cells=2))
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(context_dim=128)
    config.unet.update(dict(num_classes="sequential", adm_in_channels=2 * 4 * 8))
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


PRESETS = {"openmoji": openmoji, "debug": debug}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
