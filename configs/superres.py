"""Pictures from small copies of them: super-resolution.

    python -m ldm_jax.train --config=configs/superres.py --workdir=runs/superres

trains on emoji in minutes on 2 CPU cores. `bsr_sr` is the published model; it has not
been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels from 8, after blur, noise and JPEG."""
    config = defaults.emoji()
    config.data.derive.low_res = ConfigDict(dict(factor=4, kind="bsrgan_light"))
    config.conditioners.low_res = ConfigDict(dict(kind="low_res"))
    config.unet = defaults.emoji_unet(concat=3)
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    config = defaults.debug(openmoji())
    config.data.derive.low_res.factor = 2
    return config


def bsr_sr() -> ConfigDict:
    """OpenImages, 64 to 256 pixels, vq-f4, 113.62M UNet."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.data.derive.low_res = ConfigDict(dict(factor=4, kind="bsrgan_light"))
    config.conditioners.low_res = ConfigDict(dict(kind="low_res"))
    config.unet = ConfigDict(dict(variant="bsr_sr"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0155))
    config.diffusion_stage.optim.update(dict(learning_rate=1e-6, scale_lr=True))
    return config


PRESETS = {"openmoji": openmoji, "debug": debug, "bsr_sr": bsr_sr}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
