"""Text-to-image latent diffusion: both stages, from captions and pictures.

    python -m ldm_jax.train --config=configs/txt2img.py --workdir=runs/openmoji

trains the `openmoji` preset on 2 CPU cores; benchmarks/README.md has its minutes and
its scores. The other presets (`--config=configs/txt2img.py:sd2`) are the published
models; none of them has been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config


def base() -> ConfigDict:
    """What the presets share: LDM's objective and optimizer, sizes left to each."""
    config = ConfigDict()
    config.preset = ""
    config.seed = 0
    config.stages = ("autoencoder", "diffusion")
    config.resolution = 256
    config.batch_size = 64
    config.dtype = "auto"  # auto | float32 | bfloat16; auto is float32 on CPU

    config.data = ConfigDict()
    config.data.source = "openmoji"  # openmoji | folder | tfds | synthetic
    config.data.options = ConfigDict()
    config.data.train_split = "train"
    config.data.heldout_split = "compositional"
    config.data.ops = (("to_float", {}),)

    config.autoencoder = ConfigDict(dict(variant="kl_f8"))

    config.autoencoder_stage = stage()
    config.autoencoder_stage.loss = ConfigDict(
        dict(kl_weight=1e-6, logvar_init=0.0, learn_logvar=False)
    )

    config.conditioners = ConfigDict()

    config.diffusion = ConfigDict()
    config.diffusion.parameterization = "eps"  # eps | x0 | v
    config.diffusion.schedule = "linear"  # linear | cosine | sqrt_linear | sqrt | …
    config.diffusion.timesteps = 1000
    config.diffusion.linear_start = 0.00085
    config.diffusion.linear_end = 0.012

    config.unet = ConfigDict()

    config.diffusion_stage = stage()
    config.diffusion_stage.cache_latents = True  # encode the data once; no random ops
    config.diffusion_stage.loss = ConfigDict(
        dict(
            loss_type="l2",  # l2 | l1
            l_simple_weight=1.0,
            original_elbo_weight=0.0,
            learn_logvar=False,
            logvar_init=0.0,
        )
    )

    config.sample = ConfigDict()
    config.sample.steps = 50
    config.sample.guidance_scale = 3.0

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, dcn_data=1))

    # Nothing below changes what is computed, so a run may go on with other values.
    config.report = ConfigDict()
    config.report.log_steps = 100
    config.report.eval_steps = 1000
    config.report.image_steps = 5000
    config.report.checkpoint_steps = 1000
    config.report.max_to_keep = 2
    config.report.eval_images = 256
    config.report.retrieval_captions = 64
    config.report.prompts = ()  # of the panels; empty takes captions from the data
    config.report.profile = False
    return config


def stage() -> ConfigDict:
    """Steps, batch and optimizer of one stage: torch AdamW's defaults."""
    section = ConfigDict()
    section.steps = 100_000
    section.batch_size = None  # None takes config.batch_size
    section.micro_batches = 1  # gradient accumulation
    section.ema_decay = 0.9999  # 0 switches the average off
    section.optim = ConfigDict()
    section.optim.learning_rate = 1e-4
    section.optim.schedule = "constant"  # constant | cosine | linear
    section.optim.warmup_steps = 1000
    section.optim.final_fraction = 0.0
    section.optim.b1 = 0.9
    section.optim.b2 = 0.999
    section.optim.eps = 1e-8
    section.optim.weight_decay = 0.01
    section.optim.clip_norm = 0.0  # 0 switches clipping off
    return section


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
    config = base()
    config.resolution = 32
    config.autoencoder = ConfigDict(
        dict(
            ch=16,
            ch_mult=(1, 2, 4),
            num_res_blocks=1,
            attn_resolutions=(),
            attn_type="none",
            resolution=32,
            in_channels=3,
            out_ch=3,
            z_channels=8,
            double_z=True,
            embed_dim=8,
            dropout=0.0,
            norm_groups=8,
            init_logvar=-6.0,
        )
    )
    config.autoencoder_stage.update(dict(steps=3000, batch_size=8, ema_decay=0.995))
    config.autoencoder_stage.optim.update(
        dict(
            learning_rate=2e-3,
            schedule="cosine",
            final_fraction=0.02,
            warmup_steps=50,
            b2=0.99,
            weight_decay=0.0,
        )
    )
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
    config.diffusion_stage.optim.update(
        dict(
            learning_rate=2e-3,
            schedule="cosine",
            final_fraction=0.02,
            warmup_steps=100,
            b2=0.99,
            weight_decay=0.0,
            clip_norm=1.0,
        )
    )
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
    config = base()
    config.conditioners.text = bert("bert_1p4b")
    config.unet = ConfigDict(dict(variant="ldm_1p4b", remat=True))
    config.diffusion_stage.optim.learning_rate = 5e-5
    return config


def cc256() -> ConfigDict:
    """text2img256 on Conceptual Captions, 403.62M UNet; its vq-f4 is a kl-f4 here."""
    config = base()
    config.autoencoder = ConfigDict(dict(variant="kl_f4"))
    config.conditioners.text = bert("bert_cc")
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0195))
    config.unet = ConfigDict(dict(variant="cc256"))
    config.diffusion_stage.optim.learning_rate = 5.6e-5
    return config


def sd1() -> ConfigDict:
    """Stable Diffusion 1: 859.52M UNet on CLIP-L, 512 pixels."""
    config = base()
    config.resolution = 512
    config.conditioners.text = clip("openai/clip-vit-large-patch14", "clip_l")
    config.unet = ConfigDict(dict(variant="sd1", remat=True))
    return config


def sd2() -> ConfigDict:
    """Stable Diffusion 2 base: 865.91M UNet on OpenCLIP-H, eps, 512 pixels."""
    config = base()
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
