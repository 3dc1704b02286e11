"""How much should the first stage compress? One preset for each factor f of the paper.

    python -m ldm_jax.train --config=configs/f_sweep.py:f4 --workdir=runs/f4

trains one of them; `python -m benchmarks.f_sweep` trains all for equal compute, which
decides their steps, and compares them (the paper's figures 6 and 7). Emoji at 64 pixels
from their names, sized for 2 CPU cores. `f1` is diffusion on pixels, without a first
stage.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults

# First stages of configs/autoencoder.py's OpenMoji presets: (ch_mult, latent channels).
AUTOENCODERS = {
    2: ((1, 2), 4),
    4: ((1, 2, 4), 8),
    8: ((1, 2, 4, 4), 16),
    16: ((1, 2, 4, 4, 4), 32),
    32: ((1, 2, 4, 4, 4, 4), 64),
}
# One UNet, entered where the latent's size fits: 32 channels at 64 and 32 pixels, 64 at
# 16 and 8, 128 at 4 and 2; res blocks on the way down and attention from 8 pixels on.
# f = 32 and 16 stay at their latent's size, whose half would be next to nothing for
# norms. All have 4.1 to 4.5 million parameters, and f = 1 costs 17 times as much an
# image as f = 32.
UNETS = {
    1: (32, (1, 1, 2, 2, 4), (0, 0, 0, 1, 1), (8, 16)),
    2: (32, (1, 2, 2, 4), (0, 0, 1, 1), (4, 8)),
    4: (64, (1, 1, 2), (0, 1, 1), (2, 4)),
    8: (64, (1, 2), (1, 1), (1, 2)),
    16: (128, (1,), (1,), (1,)),
    32: (128, (1,), (1,), (1,)),
}


def first_stage(f: int) -> dict:
    """Options of the autoencoder of a factor; the identity for 1."""
    if f == 1:
        return dict(kind="identity", channels=3)
    ch_mult, z_channels = AUTOENCODERS[f]
    options = defaults.narrow_autoencoder(64, ch_mult, z_channels)
    return options | dict(kind="kl", double_z=True, init_logvar=-6.0)


def sweep(f: int) -> ConfigDict:
    """Both stages at one factor; only the nets' shapes differ between factors.

    The stages' steps fit 3 TFLOP each at f = 4: two minutes or so on 2 CPU cores.
    """
    config = defaults.both_stages()
    config.resolution = 64
    config.autoencoder = ConfigDict(first_stage(f))
    if f == 1:
        config.stages = ("diffusion",)
    # Small batches: a deep first stage leaves its plateau by steps, not by pictures.
    config.autoencoder_stage.update(dict(steps=600, batch_size=4, ema_decay=0.995))
    config.autoencoder_stage.optim.update(defaults.fast_adam(2e-3, warmup_steps=50))

    config.conditioners.text = defaults.small_text(dim=128)
    model_channels, channel_mult, num_res_blocks, attention_resolutions = UNETS[f]
    channels = AUTOENCODERS[f][1] if f > 1 else 3
    config.unet = ConfigDict(
        defaults.emoji_unet(context_dim=128, channels=channels).to_dict()
        | dict(
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=num_res_blocks,
            attention_resolutions=attention_resolutions,
        )
    )
    config.diffusion.parameterization = "v"
    config.diffusion_stage.update(dict(steps=700, batch_size=8, ema_decay=0.998))
    config.diffusion_stage.optim.update(defaults.fast_adam(1e-3, warmup_steps=50))
    config.diffusion_stage.optim.clip_norm = 1.0
    config.sample.steps = 20
    config.report.update(
        dict(
            image_steps=1_000_000,  # at the end only
            checkpoint_steps=250,
            eval_images=64,
            retrieval_captions=16,
        )
    )
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute, with data made on the spot."""
    config = sweep(2)
    config.data.source = "synthetic"
    config.data.options = ConfigDict(dict(count=32))
    config.resolution = 16
    config.batch_size = 8
    config.autoencoder.update(dict(ch=8, resolution=16))
    config.conditioners.text.net.dim = config.unet.context_dim = 32
    config.unet.update(
        dict(channel_mult=(1,), num_res_blocks=(1,), attention_resolutions=(1,))
    )
    for section in (config.autoencoder_stage, config.diffusion_stage):
        section.steps = 2
        section.batch_size = None
        section.optim.warmup_steps = 1
    config.sample.steps = 2
    config.report.update(dict(log_steps=1, eval_images=8, retrieval_captions=4))
    return config


# The first one is what `--config=configs/f_sweep.py` takes.
PRESETS = {f"f{f}": partial(sweep, f) for f in (4, 1, 2, 8, 16, 32)} | {"debug": debug}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
