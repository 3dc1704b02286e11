"""Pictures of nothing in particular: latent diffusion without a condition.

    python -m ldm_jax.train --config=configs/unconditional.py --workdir=runs/emoji

trains on emoji in minutes on 2 CPU cores. The other presets are the paper's CelebA-HQ,
FFHQ and LSUN models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels."""
    config = defaults.emoji()
    config.unet = defaults.emoji_unet()
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def celeba256() -> ConfigDict:
    """CelebA-HQ, vq-f4, 274.06M UNet; FFHQ and the bedrooms differ in data only."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.unet = ConfigDict(dict(variant="celeba256"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0195))
    config.diffusion_stage.batch_size = 48
    config.diffusion_stage.optim.learning_rate = 9.6e-5
    return config


def ffhq256() -> ConfigDict:
    """FFHQ: as celeba256 at batch 42."""
    config = celeba256()
    config.diffusion_stage.batch_size = 42
    config.diffusion_stage.optim.learning_rate = 8.4e-5
    return config


def lsun_beds256() -> ConfigDict:
    """LSUN bedrooms: as celeba256, also in batch and rate."""
    return celeba256()


def lsun_churches256() -> ConfigDict:
    """LSUN churches: kl-f8, 294.97M UNet, l1."""
    config = defaults.both_stages()
    config.unet = ConfigDict(dict(variant="churches256"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0155))
    config.diffusion_stage.batch_size = 96
    config.diffusion_stage.loss.loss_type = "l1"
    config.diffusion_stage.optim.update(
        dict(learning_rate=5e-5, schedule="warmup_linear")
    )
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "celeba256": celeba256,
    "ffhq256": ffhq256,
    "lsun_beds256": lsun_beds256,
    "lsun_churches256": lsun_churches256,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
