"""Pictures with a hole, completed.

    python -m ldm_jax.train --config=configs/inpainting.py --workdir=runs/inpainting

trains on emoji in minutes on 2 CPU cores. The other presets are the published models of
LDM and Stable Diffusion, whose conventions differ; none has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels; strokes, boxes and now and then the whole are missing."""
    config = defaults.emoji()
    config.data.derive.mask = ConfigDict(dict(full=0.1))
    config.conditioners.known = ConfigDict(dict(kind="inpainting", convention="sd"))
    config.unet = defaults.emoji_unet(concat=9)
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def inpainting_big() -> ConfigDict:
    """LDM: vq-f4 without attention, 387.25M UNet, l1."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="inpainting_big"))
    config.data.derive.mask = ConfigDict(dict(full=0.0))
    config.conditioners.known = ConfigDict(dict(kind="inpainting", convention="ldm"))
    config.unet = ConfigDict(dict(variant="inpainting_big"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0205))
    config.diffusion_stage.loss.loss_type = "l1"
    config.diffusion_stage.optim.update(
        dict(learning_rate=1e-6, scale_lr=True, schedule="warmup_cosine")
    )
    config.diffusion_stage.optim.cycles.update(
        dict(
            warm_up_steps=(1000,),
            f_start=(1e-3,),
            f_max=(0.1,),
            f_min=(1e-4,),
            cycle_lengths=(50_000,),
        )
    )
    return config


def sd1() -> ConfigDict:
    """Stable Diffusion 1.5 inpainting: 859.54M UNet on CLIP-L, 512 pixels."""
    config = sd2()
    config.conditioners.text = defaults.clip_text(
        "openai/clip-vit-large-patch14", "clip_l", "openai/clip-vit-large-patch14"
    )
    config.unet.variant = "sd1_inpaint"
    return config


def sd2() -> ConfigDict:
    """Stable Diffusion 2: 865.93M UNet, mask, latent and text, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.data.derive.mask = ConfigDict(dict(full=0.25))
    config.conditioners.known = ConfigDict(dict(kind="inpainting", convention="sd"))
    config.conditioners.text = defaults.clip_text()
    config.unet = ConfigDict(dict(variant="sd2_inpaint", remat=True))
    config.diffusion_stage.optim.learning_rate = 5e-5
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "inpainting_big": inpainting_big,
    "sd1": sd1,
    "sd2": sd2,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
