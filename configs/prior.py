"""A picture's embedding from a text, by a transformer: the prior of unCLIP.

    python -m ldm_jax.train --config=configs/prior.py --workdir=runs/prior

trains on emoji in minutes on 2 CPU cores. Its embedding is the run's own first stage, a
token for each position of the latent, since CLIP's image tower can't be had offline.
`karlo` is Karlo's, one vector a picture; it has not been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def openmoji() -> ConfigDict:
    """Emoji from their names at 32 pixels: 64 tokens of 8 numbers."""
    config = defaults.mostly_noisy(defaults.emoji())
    config.conditioners.text = defaults.small_text(dim=128)
    config.unet = ConfigDict(
        dict(
            kind="prior",
            in_channels=8,
            out_channels=8,
            positions=8 * 8,
            query=False,
            context_dim=128,
            context_length=config.conditioners.text.length,
            depth=4,
            heads=4,
            dim_head=64,
        )
    )
    config.diffusion_stage.steps = 1500
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def karlo() -> ConfigDict:
    """Karlo's prior: CLIP's embedding of a picture from that of a text, 1022.03M.

    Stage one trains a decoder that draws what an embedding tells, at 256 pixels.
    """
    config = defaults.both_stages()
    config.resolution = 256
    config.autoencoder = ConfigDict(
        dict(
            kind="clip",
            tower=dict(variant="clip_l"),
            weights="openai/clip-vit-large-patch14",
            ch=64,
            ch_mult=(1, 1, 2, 2, 4, 4, 8, 8, 8),
            num_res_blocks=1,
            attn_type="none",
            z_channels=768,
            embed_dim=768,
        )
    )
    config.diffusion_stage.optim.learning_rate = 1.1e-4
    config.autoencoder_stage.optim.train_only = "decoder|post_quant_conv|logvar"
    config.conditioners.update(defaults.karlo_texts())
    config.diffusion.update(dict(schedule="squaredcos_cap_v2", parameterization="x0"))
    config.unet = ConfigDict(dict(kind="prior", variant="karlo", remat=True))
    config.sample.update(dict(steps=25, guidance_scale=4.0))
    return config


PRESETS = {"openmoji": openmoji, "debug": debug, "karlo": karlo}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
