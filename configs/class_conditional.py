"""Pictures of a class: an embedded label, one token of context.

    python -m ldm_jax.train --config=configs/class_conditional.py --workdir=runs/classes

trains on the groups of OpenMoji in minutes on 2 CPU cores. The other presets are the
paper's ImageNet models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults

GROUPS = 21  # of OpenMoji


def classes(num_classes: int, dim: int, null_class: bool = True) -> ConfigDict:
    """A class as context; `null_class` is one more, for guidance."""
    return ConfigDict(
        dict(
            kind="class",
            num_classes=num_classes,
            dim=dim,
            null_class=null_class,
            dropout=0.1 if null_class else 0.0,
        )
    )


def openmoji() -> ConfigDict:
    """Emoji of a group at 32 pixels."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.conditioners.label = classes(GROUPS, 128)
    config.unet = defaults.emoji_unet(context_dim=128)
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    config = defaults.debug(openmoji())
    config.conditioners.label.num_classes = 24  # four shapes in six colours
    return config


def cin256() -> ConfigDict:
    """ImageNet, vq-f8, 394.98M UNet; no null class, so no guidance."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f8"))
    config.conditioners.label = classes(1000, 512, null_class=False)
    config.unet = ConfigDict(dict(variant="cin256"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0195))
    config.diffusion_stage.optim.learning_rate = 6.4e-5
    return config


def cin256_v2() -> ConfigDict:
    """ImageNet, vq-f4, 400.92M UNet, with the null class 1000."""
    config = cin256()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.conditioners.label = classes(1000, 512)
    config.unet = ConfigDict(dict(variant="cin256_v2"))
    config.diffusion_stage.optim.learning_rate = 1e-4
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "cin256": cin256,
    "cin256_v2": cin256_v2,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
