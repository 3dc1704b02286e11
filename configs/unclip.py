"""Pictures like a picture: its embedding, with noise, as a vector.

    python -m ldm_jax.train --config=configs/unclip.py --workdir=runs/unclip

trains on emoji in minutes on 2 CPU cores. Its embedding is the run's own first stage,
averaged over quarters of the picture, since CLIP's image tower can't be had offline.
`unclip_h` and `unclip_l` are Stable Diffusion's, `karlo_decoder` and `karlo_sr` are
Karlo's, on pixels; none of the four has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji at 32 pixels that look like another one, called by a name."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.conditioners.alike = ConfigDict(dict(kind="image_embedding", cells=2))
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = defaults.emoji_unet(context_dim=128)
    config.unet.update(dict(num_classes="sequential", adm_in_channels=2 * 4 * 8))
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def _unclip(unet: str, tower: str, weights: str) -> ConfigDict:
    """Stable Diffusion 2.1 unCLIP: 768 pixels, velocity prediction."""
    config = defaults.both_stages()
    config.resolution = 768
    config.conditioners.text = defaults.clip_text()
    config.conditioners.alike = ConfigDict(
        dict(kind="clip_image", net=dict(variant=tower), weights=weights)
    )
    config.unet = ConfigDict(dict(variant=unet, remat=True))
    config.diffusion.parameterization = "v"
    return config


def unclip_h() -> ConfigDict:
    """Alike by OpenCLIP's ViT-H, 870.17M UNet."""
    return _unclip("unclip_h", "openclip_h", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


def unclip_l() -> ConfigDict:
    """Alike by CLIP's ViT-L, 869.52M UNet.

    `conditioners.alike.weights` may name Karlo's statistics of embeddings too: "the
    tower,ViT-L-14_stats.th". Those of `unclip_h` are in its checkpoint.
    """
    return _unclip("unclip_l", "clip_l", "openai/clip-vit-large-patch14")


def _karlo(resolution: int) -> ConfigDict:
    """On pixels, with the cosine schedule."""
    config = defaults.both_stages()
    config.stages = ("diffusion",)
    config.resolution = resolution
    config.autoencoder = ConfigDict(dict(kind="identity", channels=3))
    config.diffusion.schedule = "squaredcos_cap_v2"
    config.diffusion_stage.optim.learning_rate = 1.2e-4
    return config


def karlo_decoder() -> ConfigDict:
    """Karlo's decoder: 64 pixels from CLIP's embeddings of text and picture, 893.32M.

    It learns the variance too. Its pictures are CLIP's own here; Karlo draws them with
    a prior, `configs/prior.py:karlo`.
    """
    config = _karlo(64)
    config.conditioners.update(defaults.karlo_texts())
    # Vectors are joined in the order of names, and the net takes the picture's first.
    config.conditioners.picture = ConfigDict(
        dict(
            kind="clip_image",
            net=dict(variant="clip_l"),
            weights="openai/clip-vit-large-patch14",
            max_noise_level=0,
            dropout=0.1,
        )
    )
    config.unet = ConfigDict(dict(variant="karlo_decoder", remat=True))
    config.diffusion_stage.loss.variance_weight = 1e-3
    config.sample.update(dict(steps=25, guidance_scale=8.0))
    return config


def karlo_sr() -> ConfigDict:
    """Karlo's upscaler, 64 to 256 pixels, 729.70M; Karlo has another for its last step.

    Six steps of one and one of the other are its seven.
    """
    config = _karlo(256)
    config.data.derive.low_res = ConfigDict(dict(factor=4, kind="pil_bicubic"))
    config.conditioners.low_res = ConfigDict(dict(kind="low_res", enlarge=4))
    config.unet = ConfigDict(dict(variant="karlo_sr", remat=True))
    config.sample.steps = 7
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "unclip_h": unclip_h,
    "unclip_l": unclip_l,
    "karlo_decoder": karlo_decoder,
    "karlo_sr": karlo_sr,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
