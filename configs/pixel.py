"""Diffusion on pixels, without a first stage.

    python -m ldm_jax.train --config=configs/pixel.py --workdir=runs/pixel

trains on emoji in minutes on 2 CPU cores: what latent diffusion is measured against.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji from their names at 32 pixels."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.stages = ("diffusion",)
    config.autoencoder = ConfigDict(dict(kind="identity", channels=3))
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(context_dim=128, channels=3)
    config.unet.update(
        dict(model_channels=32, channel_mult=(1, 2, 4), attention_resolutions=(4,))
    )
    config.diffusion_stage.steps = 1500
    return config


def learned_variance() -> ConfigDict:
    """As Karlo's decoder, small: the variance is learned, attention is GLIDE's."""
    config = openmoji()
    config.diffusion.update(dict(schedule="squaredcos_cap_v2", parameterization="eps"))
    config.unet = defaults.emoji_unet(channels=3)
    config.unet.update(
        dict(
            out_channels=6,
            model_channels=32,
            channel_mult=(1, 2, 4),
            attention_resolutions=(4,),
            added_kv=True,
            context_dim=128,
            use_scale_shift_norm=True,
            resblock_updown=True,
        )
    )
    config.diffusion_stage.loss.variance_weight = 1e-3
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


PRESETS = {
    "openmoji": openmoji,
    "learned_variance": learned_variance,
    "debug": debug,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
