"""Pictures of nothing in particular: latent diffusion without a condition.

    python -m ldm_jax.train --config=configs/unconditional.py --workdir=runs/emoji

trains on emoji in minutes on 2 CPU cores. The other presets are the paper's CelebA-HQ,
FFHQ and LSUN models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults

GROUPS = 21  # of OpenMoji, as labels of its pictures


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels."""
    config = defaults.emoji()
    config.unet = defaults.emoji_unet()
    config.diffusion_stage.steps = 1500
    return config


def classifier() -> ConfigDict:
    """As `openmoji`, and a classifier of the emoji's groups to guide it by."""
    net = dict(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=32,
        pool="attention",
        dropout=0.1,
    )
    config = defaults.add_classifier(openmoji(), num_classes=GROUPS, net=net)
    section = config.classifier_stage
    section.update(dict(steps=1000, batch_size=32, ema_decay=0.995))
    section.optim.update(defaults.fast_adam(1e-3, warmup_steps=50))
    section.optim.weight_decay = 1e-2
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    config = defaults.debug(classifier())
    config.classifier.num_classes = 24  # shapes
    return config


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
    "classifier": classifier,
    "debug": debug,
    "celeba256": celeba256,
    "ffhq256": ffhq256,
    "lsun_beds256": lsun_beds256,
    "lsun_churches256": lsun_churches256,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
