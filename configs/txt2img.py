"""Text-to-image latent diffusion: both stages, from captions and pictures.

    python -m ldm_jax.train --config=configs/txt2img.py --workdir=runs/openmoji

trains the `openmoji` preset on 2 CPU cores; benchmarks/README.md has its minutes and
its scores. The other presets (`--config=configs/txt2img.py:sd2`) are the published
models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def bert(variant: str) -> ConfigDict:
    """The paper's jointly trained text transformer on BERT's tokens."""
    return ConfigDict(
        dict(
            kind="text",
            field="caption",
            slot="context",
            trainable=True,
            dropout=0.1,
            tokenizer=dict(name="bert-base-uncased", train_vocab_size=None),
            length=77,
            net=dict(kind="transformer", variant=variant),
        )
    )


def clip(name: str, variant: str) -> ConfigDict:
    """A frozen CLIP text tower, as in Stable Diffusion."""
    return ConfigDict(
        dict(
            kind="text",
            field="caption",
            slot="context",
            trainable=False,
            dropout=0.1,
            tokenizer=dict(name=name, train_vocab_size=None),
            length=77,
            net=dict(kind="clip", variant=variant),
        )
    )


def openmoji() -> ConfigDict:
    """Emoji from their names at 32 pixels: minutes on 2 CPU cores, no download."""
    config = defaults.both_stages()
    config.resolution = 32
    config.autoencoder = ConfigDict(
        defaults.narrow_autoencoder(32, ch_mult=(1, 2, 4), z_channels=8)
        | dict(double_z=True, init_logvar=-6.0)
    )
    config.autoencoder_stage.update(dict(steps=3000, batch_size=8, ema_decay=0.995))
    config.autoencoder_stage.optim.update(defaults.fast_adam(2e-3, warmup_steps=50))
    config.conditioners.text = ConfigDict(
        dict(
            kind="text",
            field="caption",
            slot="context",
            trainable=True,
            dropout=0.1,
            tokenizer=dict(name=None, train_vocab_size=2048),
            length=20,
            net=dict(kind="transformer", dim=128, depth=1),
        )
    )
    config.diffusion.parameterization = "v"
    config.unet = ConfigDict(
        dict(
            in_channels=8,
            out_channels=8,
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2),
            num_head_channels=32,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            transformer_depth=1,
            context_dim=128,
            legacy=False,
        )
    )
    config.diffusion_stage.update(dict(steps=4000, batch_size=32, ema_decay=0.998))
    config.diffusion_stage.optim.update(defaults.fast_adam(2e-3, warmup_steps=100))
    config.diffusion_stage.optim.clip_norm = 1.0
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute, with data made on the spot."""
    config = openmoji()
    config.data.source = "synthetic"
    config.data.options = ConfigDict(dict(count=32))
    config.resolution = 16
    config.batch_size = 8
    config.autoencoder.update(dict(ch=8, ch_mult=(1, 2), resolution=16))
    config.conditioners.text.net.dim = config.unet.context_dim = 32
    config.unet.update(
        dict(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
    )
    for section in (config.autoencoder_stage, config.diffusion_stage):
        section.steps = 2
        section.batch_size = None
        section.optim.warmup_steps = 1
    config.sample.steps = 2
    config.report.update(dict(log_steps=1, eval_images=8, retrieval_captions=4))
    return config


def ldm_1p4b() -> ConfigDict:
    """txt2img-1p4B: kl-f8, 872.30M UNet, text transformer of 32 layers, 256 pixels."""
    config = defaults.both_stages()
    config.conditioners.text = bert("bert_1p4b")
    config.unet = ConfigDict(dict(variant="ldm_1p4b", remat=True))
    config.diffusion_stage.optim.learning_rate = 5e-5
    return config


def cc256() -> ConfigDict:
    """text2img256 on Conceptual Captions: vq-f4, 403.62M UNet."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    config.conditioners.text = bert("bert_cc")
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0195))
    config.unet = ConfigDict(dict(variant="cc256"))
    config.diffusion_stage.optim.learning_rate = 5.6e-5
    return config


def sd1() -> ConfigDict:
    """Stable Diffusion 1: 859.52M UNet on CLIP-L, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.conditioners.text = clip("openai/clip-vit-large-patch14", "clip_l")
    config.unet = ConfigDict(dict(variant="sd1", remat=True))
    return config


def sd2() -> ConfigDict:
    """Stable Diffusion 2 base: 865.91M UNet on OpenCLIP-H, eps, 512 pixels."""
    config = defaults.both_stages()
    config.resolution = 512
    config.conditioners.text = clip("stabilityai/stable-diffusion-2", "openclip_h")
    config.unet = ConfigDict(dict(variant="sd2", remat=True))
    return config


def sd2_v() -> ConfigDict:
    """Stable Diffusion 2 v: as `sd2`, velocity prediction, 768 pixels."""
    config = sd2()
    config.resolution = 768
    config.diffusion.parameterization = "v"
    return config


def folder() -> ConfigDict:
    """Your own pictures: --config.data.options.path=DIR; see the README on captions."""
    config = openmoji()
    config.data.source = "folder"
    config.data.options = ConfigDict(dict(path="", heldout_percent=5))
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
