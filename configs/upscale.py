"""Pictures from small ones with noise of a known level, and a caption.

    python -m ldm_jax.train --config=configs/upscale.py --workdir=runs/upscale

trains on emoji in minutes on 2 CPU cores. `x4` is Stable Diffusion's upscaler; it has
not been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels from 8."""
    config = defaults.emoji()
    config.data.derive.low_res = ConfigDict(dict(factor=4, kind="pil_bicubic"))
    config.conditioners.low_res = ConfigDict(dict(kind="noisy_low_res"))
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(concat=3, context_dim=128)
    config.unet.num_classes = 1000  # levels of noise
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    config = defaults.debug(openmoji())
    config.data.derive.low_res.factor = 2
    return config


def x4() -> ConfigDict:
    """x4-upscaling: 473.4M UNet on an f4 autoencoder, 128 to 512 pixels, v."""
    config = defaults.both_stages()
    config.resolution = 512
    config.autoencoder = ConfigDict(dict(variant="sd_x4"))
    config.data.derive.low_res = ConfigDict(dict(factor=4, kind="pil_bicubic"))
    config.conditioners.low_res = ConfigDict(dict(kind="noisy_low_res"))
    config.conditioners.text = defaults.clip_text()
    config.unet = ConfigDict(dict(variant="x4_upscaler", remat=True))
    config.diffusion.update(
        dict(parameterization="v", linear_start=1e-4, linear_end=2e-2)
    )
    return config


PRESETS = {"openmoji": openmoji, "debug": debug, "x4": x4}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
