"""First stages: every autoencoder of the paper, and small ones on OpenMoji.

    python -m ldm_jax.train --config=configs/autoencoder.py --workdir=runs/kl_f4

trains `openmoji_kl_f4` on 2 CPU cores. The published models (`kl_f8`, `vq_f4`, …) want
an accelerator and VGG16's weights, which are fetched once (autoencoder_stage.loss.vgg
takes a path); give them your data by --config.data.source and data.options.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def published(
    variant: str,
    *,
    steps: int,
    batch_size: int,
    disc_start: int = 50_001,
    disc_weight: float = 0.5,
    n_layers: int = 3,
    micro_batches: int = 1,
) -> ConfigDict:
    """The recipe of the paper's first stages: 256 pixels, Adam(.5, .9), no average.

    `batch_size` is that of one GPU in the published config; eight of them are assumed
    here, for the learning rate is 4.5e-6 times the images of a step.
    """
    config = defaults.first_stage()
    config.autoencoder = ConfigDict(dict(variant=variant))
    config.batch_size = 8 * batch_size * micro_batches
    section = config.autoencoder_stage
    section.update(dict(steps=steps, micro_batches=micro_batches, ema_decay=0.0))
    section.loss.perceptual_weight = 1.0
    section.adversarial.update(dict(disc_start=disc_start, disc_weight=disc_weight))
    section.adversarial.net.n_layers = n_layers
    for optim in (section.optim, section.adversarial.optim):
        optim.update(
            dict(
                learning_rate=4.5e-6,
                scale_lr=True,
                warmup_steps=0,
                b1=0.5,
                b2=0.9,
                weight_decay=0.0,
            )
        )
    return config


def sgm(variant: str) -> ConfigDict:
    """Stability's retraining: KL weight 1, learned logvar, perceptual weight 1/4."""
    config = published(variant, steps=200_000, batch_size=8, disc_start=20_001)
    config.autoencoder_stage.loss.update(
        dict(kl_weight=1.0, learn_logvar=True, perceptual_weight=0.25)
    )
    return config


# latent_channels by f at 64 pixels. The paper's f = 4, 8, 16, 32 have 3, 4, 16, 64; a
# narrow net of some minutes needs more at f = 4 and 8.
OPENMOJI_CHANNELS = {1: 3, 2: 4, 4: 8, 8: 16, 16: 32, 32: 64}
OPENMOJI_LEVELS = {
    1: (1,),
    2: (1, 2),
    4: (1, 2, 4),
    8: (1, 2, 4, 4),
    16: (1, 2, 4, 4, 4),
    32: (1, 2, 4, 4, 4, 4),
}


def openmoji(kind: str, f: int) -> ConfigDict:
    """Emoji at 64 pixels, 20 minutes on 2 CPU cores; no download, no discriminator."""
    config = defaults.first_stage()
    config.resolution = 64
    z_channels = OPENMOJI_CHANNELS[f]
    config.autoencoder = ConfigDict(
        defaults.narrow_autoencoder(64, OPENMOJI_LEVELS[f], z_channels)
        | dict(kind=kind)
    )
    if kind == "kl":
        config.autoencoder.update(dict(double_z=True, init_logvar=-6.0))
    else:
        config.autoencoder.update(
            dict(
                double_z=False,
                n_embed=1024,
                legacy=False,
                ema_decay=0.99,
                revive_below=0.01,
                remap=None,  # an .npy of the codes that are used
            )
        )
    section = config.autoencoder_stage
    # A deep net leaves its first plateau by the number of steps, not of pictures.
    batch_size = 8 if f < 8 else 4
    steps = 28_000 // batch_size
    section.update(dict(steps=steps, batch_size=batch_size, ema_decay=0.995))
    section.optim.update(defaults.fast_adam(2e-3, warmup_steps=50))
    section.adversarial.net.update(dict(ndf=16, n_layers=2))
    section.adversarial.optim.update(
        dict(learning_rate=1e-4, warmup_steps=0, b1=0.5, b2=0.9, weight_decay=0.0)
    )
    return config


def openmoji_adversarial(kind: str = "kl", f: int = 4) -> ConfigDict:
    """`openmoji`, then 2,000 steps against a discriminator at a 20th of its rate."""
    config = openmoji(kind, f)
    section = config.autoencoder_stage
    section.adversarial.disc_start = section.steps
    section.optim.schedule = "warmup_cosine2"
    section.optim.cycles = ConfigDict(
        dict(
            warm_up_steps=(50, 10),
            f_start=(0.02, 0.02),
            f_max=(1.0, 0.05),
            f_min=(0.02, 0.02),
            cycle_lengths=(section.steps, 2000),
        )
    )
    section.steps += 2000
    return config


def debug(kind: str = "kl") -> ConfigDict:
    """Two steps, the second against a discriminator, tiny, in under a minute."""
    config = openmoji(kind, 2)
    config.data.source = "synthetic"
    config.data.options = ConfigDict(dict(count=32))
    config.resolution = 16
    config.batch_size = 8
    config.autoencoder.update(dict(ch=8, resolution=16))
    if kind == "vq":
        config.autoencoder.n_embed = 32
    section = config.autoencoder_stage
    section.update(dict(steps=2, batch_size=None))
    section.optim.warmup_steps = 1
    section.adversarial.update(dict(disc_start=1))
    section.adversarial.net.update(dict(ndf=8, n_layers=1))
    config.report.update(dict(log_steps=1, eval_images=8))
    return config


OPENMOJI = {
    f"openmoji_{kind}_f{f}": partial(openmoji, kind, f)
    for kind in ("kl", "vq")
    for f in OPENMOJI_LEVELS
}

# Steps are those of the released models. disc_start 250,001 stands for a run from
# scratch, as in the released vq-f16 and vq-f8-n256; the configs of vq-f4, vq-f4-noattn
# and vq-f8 say 0, 11 and 1 since they are those of the last of several resumed runs.
_from_scratch = dict(disc_start=250_001, disc_weight=0.75)
PUBLISHED = {
    "kl_f4": partial(published, "kl_f4", steps=176_991, batch_size=10),
    "kl_f8": partial(published, "kl_f8", steps=246_803, batch_size=4),
    "kl_f16": partial(published, "kl_f16", steps=442_998, batch_size=6),
    "kl_f32": partial(published, "kl_f32", steps=406_763, batch_size=6),
    "vq_f4": partial(published, "vq_f4", steps=533_066, batch_size=8, **_from_scratch),
    "vq_f4_noattn": partial(
        published, "vq_f4_noattn", steps=658_131, batch_size=8, **_from_scratch
    ),
    "vq_f8": partial(
        published,
        "vq_f8",
        steps=971_043,
        batch_size=10,
        disc_start=250_001,
        disc_weight=0.6,
        n_layers=2,
    ),
    "vq_f8_n256": partial(
        published, "vq_f8_n256", steps=1_608_649, batch_size=10, **_from_scratch
    ),
    "vq_f16": partial(
        published,
        "vq_f16",
        steps=1_101_166,
        batch_size=14,
        n_layers=2,
        **_from_scratch,
    ),
    # configs/autoencoder of the repository: two batches of 12 accumulated.
    "kl_64x64x3": partial(
        published, "kl_f4", steps=176_991, batch_size=12, micro_batches=2
    ),
    "kl_32x32x4": partial(
        published, "kl_f8", steps=246_803, batch_size=12, micro_batches=2
    ),
    "kl_16x16x16": partial(
        published, "kl_f16", steps=442_998, batch_size=12, micro_batches=2
    ),
    "kl_8x8x64": partial(
        published, "kl_f32", steps=406_763, batch_size=12, micro_batches=2
    ),
    # The first stages of Stable Diffusion, its upscaler and the retrieval model came
    # without a training config: the paper's recipe.
    "sd": partial(published, "sd", steps=246_803, batch_size=4),
    "sd_x4": partial(published, "sd_x4", steps=176_991, batch_size=10),
    "rdm": partial(published, "rdm", steps=442_998, batch_size=6),
    "inpainting_big": partial(
        published, "vq_f4_noattn", steps=658_131, batch_size=8, **_from_scratch
    ),
    "vqgan_f16_1024": partial(
        published,
        "vqgan_f16_1024",
        steps=500_000,
        batch_size=12,
        disc_start=250_001,
        disc_weight=0.8,
    ),
    "sgm_kl_f4": partial(sgm, "sgm_kl_f4"),
    "sgm_kl_f8": partial(sgm, "sgm_kl_f8"),
}

PRESETS = {
    "openmoji_kl_f4": OPENMOJI["openmoji_kl_f4"],
    **OPENMOJI,
    "openmoji_adversarial": openmoji_adversarial,
    "debug": debug,
    "debug_vq": partial(debug, "vq"),
    **PUBLISHED,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
