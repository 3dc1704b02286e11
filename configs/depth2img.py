"""Pictures from depth and a caption.

    python -m ldm_jax.train --config=configs/depth2img.py --workdir=runs/depth

trains on composed OpenMoji scenes, whose depth is known, in minutes on 2 CPU cores.
`sd2` is Stable Diffusion 2's model; it has not been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Scenes of one to three emoji at 32 pixels, by layer."""
    config = defaults.scenes()
    config.conditioners.depth = ConfigDict(dict(kind="depth"))
    config.conditioners.text = defaults.small_text(dim=128, length=32)
    config.unet = defaults.emoji_unet(concat=1, context_dim=128)
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def sd2() -> ConfigDict:
    """Stable Diffusion 2: depth of photographs by MiDaS, text, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.conditioners.depth = ConfigDict(
        dict(
            kind="photo_depth",
            net=dict(variant="dpt_hybrid"),
            weights="Intel/dpt-hybrid-midas",
        )
    )
    config.conditioners.text = defaults.clip_text()
    config.unet = ConfigDict(dict(variant="sd2_depth", remat=True))
    config.diffusion_stage.optim.learning_rate = 5e-7
    return config


PRESETS = {"openmoji": openmoji, "debug": debug, "sd2": sd2}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
