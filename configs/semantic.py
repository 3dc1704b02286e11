"""Pictures from maps of classes, which join the latent's channels.

    python -m ldm_jax.train --config=configs/semantic.py --workdir=runs/semantic

trains on composed OpenMoji scenes in minutes on 2 CPU cores. The other presets are the
paper's landscapes; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Scenes of one to three emoji at 32 pixels, by the groups' outlines."""
    config = defaults.scenes()
    config.conditioners.map = ConfigDict(
        dict(kind="semantic", num_classes=22, channels=4)
    )
    config.unet = defaults.emoji_unet(concat=4)
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def landscapes256() -> ConfigDict:
    """semantic_synthesis256: 182 classes, vq-f4, 215.23M UNet, l1."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.conditioners.map = ConfigDict(
        dict(kind="semantic", num_classes=182, channels=3)
    )
    config.unet = ConfigDict(dict(variant="semantic"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0205))
    config.diffusion_stage.loss.loss_type = "l1"
    config.diffusion_stage.optim.update(dict(learning_rate=1e-6, scale_lr=True))
    return config


def landscapes512() -> ConfigDict:
    """semantic_synthesis512: the same on crops of 512 pixels, 8 at a time."""
    config = landscapes256()
    config.resolution = 512
    config.diffusion_stage.batch_size = 8
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "landscapes256": landscapes256,
    "landscapes512": landscapes512,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
