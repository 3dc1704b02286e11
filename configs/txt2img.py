"""Text-to-image latent diffusion: both stages, from captions and pictures.

    python -m ldm_jax.train --config=configs/txt2img.py --workdir=runs/openmoji

trains the `openmoji` preset on 2 CPU cores; benchmarks/README.md has its minutes and
its scores. The other presets (`--config=configs/txt2img.py:sd2`) are the published
models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji from their names at 32 pixels: minutes on 2 CPU cores, no download."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(context_dim=128)
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute, with data made on the spot."""
    return defaults.debug(openmoji())


def ldm_1p4b() -> ConfigDict:
    """txt2img-1p4B: kl-f8, 872.30M UNet, text transformer of 32 layers, 256 pixels."""
    config = defaults.both_stages()
    config.conditioners.text = defaults.bert_text("bert_1p4b")
    config.unet = ConfigDict(dict(variant="ldm_1p4b", remat=True))
    config.diffusion_stage.optim.learning_rate = 5e-5
    return config


def cc256() -> ConfigDict:
    """text2img256 on Conceptual Captions: vq-f4, 403.62M UNet."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.conditioners.text = defaults.bert_text("bert_cc")
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0195))
    config.unet = ConfigDict(dict(variant="cc256"))
    config.diffusion_stage.optim.learning_rate = 5.6e-5
    return config


def sd1() -> ConfigDict:
    """Stable Diffusion 1: 859.52M UNet on CLIP-L, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.conditioners.text = defaults.clip_text(
        "openai/clip-vit-large-patch14", "clip_l", "openai/clip-vit-large-patch14"
    )
    config.unet = ConfigDict(dict(variant="sd1", remat=True))
    return config


def sd2() -> ConfigDict:
    """Stable Diffusion 2 base: 865.91M UNet on OpenCLIP-H, eps, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.conditioners.text = defaults.clip_text()
    config.unet = ConfigDict(dict(variant="sd2", remat=True))
    return config


def sd2_v() -> ConfigDict:
    """Stable Diffusion 2 v: as `sd2`, velocity prediction, 768 pixels."""
    config = sd2()
    config.resolution = 768
    config.diffusion.parameterization = "v"
    return config


def edm() -> ConfigDict:
    """As `openmoji`, over noise levels with EDM's preconditioning and loss."""
    return defaults.sigma_process(openmoji())


def folder() -> ConfigDict:
    """Your own pictures: --config.data.options.path=DIR; see the README on captions."""
    config = openmoji()
    config.data.source = "folder"
    config.data.options = ConfigDict(dict(path="", heldout_percent=5, caption=None))
    config.data.heldout_split = "heldout"
    config.data.ops = (
        ("resize", {"size": config.resolution}),
        ("center_crop", {"size": config.resolution}),
        ("to_float", {}),
    )
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "edm": edm,
    "folder": folder,
    "ldm_1p4b": ldm_1p4b,
    "cc256": cc256,
    "sd1": sd1,
    "sd2": sd2,
    "sd2_v": sd2_v,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
