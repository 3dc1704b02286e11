"""What the config files share: the sections of a run, with the references' defaults.

Imports neither JAX nor TensorFlow; a config file starts from one of these and sets what
is its own.
"""

from ml_collections import ConfigDict


def run() -> ConfigDict:
    """Data, devices and what is shown; no stage yet."""
    config = ConfigDict()
    config.preset = ""
    config.seed = 0
    config.stages = ()
    config.resolution = 256
    config.batch_size = 64
    config.dtype = "auto"  # auto | float32 | bfloat16; auto is float32 on CPU

    config.data = ConfigDict()
    config.data.source = "openmoji"  # see data/sources.py
    config.data.options = ConfigDict()
    config.data.train_split = "train"
    config.data.heldout_split = "compositional"
    config.data.ops = (("to_float", {}),)
    config.data.derive = ConfigDict()  # columns made of the pictures: low_res, mask

    config.conditioners = ConfigDict()
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
    config.report.max_skipped = 50  # steps in a row that were not finite; then it stops
    return config


def optim() -> ConfigDict:
    """torch AdamW's defaults."""
    section = ConfigDict()
    section.learning_rate = 1e-4
    section.scale_lr = False  # True: learning_rate is per image of the batch
    section.schedule = "constant"  # see train/optim.py
    # Of the references' own schedules, one number for each cycle: Stable Diffusion's.
    section.cycles = ConfigDict(
        dict(
            warm_up_steps=(10_000,),
            f_start=(1e-6,),
            f_max=(1.0,),
            f_min=(1.0,),
            cycle_lengths=(10_000_000_000_000,),
        )
    )
    section.warmup_steps = 1000
    section.final_fraction = 0.0
    section.b1 = 0.9
    section.b2 = 0.999
    section.eps = 1e-8
    section.weight_decay = 0.01
    section.clip_norm = 0.0  # 0 switches clipping off
    section.train_only = None  # pattern of the params' paths; the others stay
    return section


def stage() -> ConfigDict:
    """Steps, batch and optimizer of one stage."""
    section = ConfigDict()
    section.steps = 100_000
    section.batch_size = None  # None takes config.batch_size
    section.micro_batches = 1  # gradient accumulation
    section.ema_decay = 0.9999  # 0 switches the average off
    section.optim = optim()
    return section


def autoencoder_stage() -> ConfigDict:
    """Stage one: reconstruction, and what may join it."""
    section = stage()
    section.loss = ConfigDict(
        dict(
            pixel_loss="l1",  # l1 | l2, of a VQ autoencoder; KL's is l1
            kl_weight=1e-6,
            codebook_weight=1.0,
            perceptual_weight=0.0,  # the references' 1.0 needs VGG16's weights
            vgg=None,  # path of them; None takes the cache, or downloads once
            lpips_heads=None,
            logvar_init=0.0,
            learn_logvar=False,
        )
    )
    section.adversarial = ConfigDict(
        dict(
            disc_start=None,  # updates before the discriminator joins; None is never
            disc_weight=0.5,
            disc_factor=1.0,
            disc_loss="hinge",  # hinge | vanilla
            net=dict(ndf=64, n_layers=3, norm="batch"),
        )
    )
    section.adversarial.optim = optim()
    return section


def first_stage() -> ConfigDict:
    """A run that trains an autoencoder and nothing else."""
    config = run()
    config.stages = ("autoencoder",)
    config.autoencoder = ConfigDict(dict(variant="kl_f8"))
    config.autoencoder_stage = autoencoder_stage()
    return config


def both_stages() -> ConfigDict:
    """An autoencoder, then a diffusion model behind it: the paper's two stages."""
    config = first_stage()
    config.stages = ("autoencoder", "diffusion")
    config.autoencoder_from = None  # workdir of a run whose first stage this one takes
    config.init_from = None  # workdir of a run whose diffusion model this one finetunes
    config.init_channels = None  # the UNet's new ones then: None are zeros | tiled

    config.diffusion = ConfigDict()
    config.diffusion.parameterization = "eps"  # eps | x0 | v
    config.diffusion.schedule = "linear"  # linear | cosine | sqrt_linear | sqrt | …
    config.diffusion.timesteps = 1000
    config.diffusion.linear_start = 0.00085
    config.diffusion.linear_end = 0.012
    config.diffusion.zero_terminal_snr = False  # True wants v or x0

    config.unet = ConfigDict()

    config.diffusion_stage = stage()
    config.diffusion_stage.cache_latents = True  # encode the data once; no random ops
    config.diffusion_stage.lora = ConfigDict(
        dict(
            rank=None,  # None trains the nets themselves
            alpha=None,  # None takes the rank
            targets=None,  # pattern of kernels' paths; None takes the UNet's attention
            init_from=None,  # a LoRA's file, whose factors are trained on
        )
    )
    config.diffusion_stage.inversion = ConfigDict(  # a new word for what is shown
        dict(
            placeholder_token=None,  # as it stands in the captions, such as <toy>
            initializer_token=None,  # a word to start from; None is all words' mean
            num_vectors=None,  # embeddings of the token; None is 1
        )
    )
    config.diffusion_stage.preserve = ConfigDict(  # DreamBooth's prior preservation
        dict(
            prompt=None,  # what init_from draws, to be trained on beside the data
            pictures=None,  # None draws 200
            weight=None,  # of their loss; None is 1
        )
    )
    config.diffusion_stage.loss = ConfigDict(
        dict(
            loss_type="l2",  # l2 | l1
            l_simple_weight=1.0,
            original_elbo_weight=0.0,
            learn_logvar=False,
            logvar_init=0.0,
            min_snr_gamma=None,  # 5.0 is the paper's
            offset_noise=0.0,  # 0.05 to 0.1 where it is wanted
            timestep_sampling="uniform",  # uniform | logit_normal
            logit_mean=0.0,
            logit_std=1.0,
        )
    )

    config.sample = ConfigDict()
    config.sample.steps = 50
    config.sample.spacing = None  # of the steps; None is as the sampler has it
    config.sample.guidance_scale = 3.0
    return config


def add_classifier(config: ConfigDict, num_classes: int, net: dict) -> ConfigDict:
    """A classifier of noisy latents as a third stage, to guide samples by."""
    config.stages = (*config.stages, "classifier")
    config.classifier = ConfigDict(dict(field="label", num_classes=num_classes))
    config.classifier.net = net  # of nets/encoder_unet.py
    config.classifier_stage = stage()
    config.classifier_stage.cache_latents = True
    return config


def sigma_process(config: ConfigDict, scaling: str = "edm") -> ConfigDict:
    """Diffusion over noise levels instead of timesteps, as in EDM and SGM.

    Latents have unit variance, so `sigma_data` is 1.
    """
    config.diffusion = ConfigDict(
        dict(
            schedule="sigma",
            parameterization=scaling,  # edm | eps | v | v_edm_noise
            sigma_min=0.002,
            sigma_max=80.0,
            sigma_data=1.0,
        )
    )
    config.diffusion_stage.loss = ConfigDict(
        dict(
            loss_type="l2",
            weighting="edm",  # edm | eps | v | unit
            log_mean=-0.4,  # of ln sigma; EDM's -1.2 is for a sigma_data of 0.5
            log_std=1.2,
            offset_noise=0.0,
        )
    )
    return config


def fast_adam(learning_rate: float, warmup_steps: int) -> dict:
    """Optimizer of the small presets: minutes, not days, so a high rate that falls."""
    return dict(
        learning_rate=learning_rate,
        schedule="cosine",
        final_fraction=0.02,
        warmup_steps=warmup_steps,
        b2=0.99,
        weight_decay=0.0,
    )


def narrow_autoencoder(resolution: int, ch_mult: tuple, z_channels: int) -> dict:
    """A first stage without attention, 16 channels wide: minutes on a laptop."""
    return dict(
        ch=16,
        ch_mult=ch_mult,
        num_res_blocks=1,
        attn_resolutions=(),
        attn_type="none",
        resolution=resolution,
        in_channels=3,
        out_ch=3,
        z_channels=z_channels,
        embed_dim=z_channels,
        dropout=0.0,
        norm_groups=8,
    )


# ---- Conditions that several files list ------------------------------------------


def _text(
    tokenizer: dict, length: int, net: dict, weights: str | None = None
) -> ConfigDict:
    return ConfigDict(
        dict(
            kind="text",
            field="caption",
            slot="context",
            trainable=weights is None,
            weights=weights,  # of a frozen net: a file, a folder or a hub id
            dropout=0.1,
            tokenizer=tokenizer,
            length=length,
            net=net,
        )
    )


def bert_text(variant: str) -> ConfigDict:
    """The paper's jointly trained text transformer on BERT's tokens."""
    tokenizer = dict(name="bert-base-uncased", train_vocab_size=None)
    net = dict(kind="transformer", variant=variant)
    return _text(tokenizer, 77, net)


def clip_text(
    name: str = "stabilityai/stable-diffusion-2",
    variant: str = "openclip_h",
    weights: str = "stabilityai/stable-diffusion-2:text_encoder",
) -> ConfigDict:
    """A frozen CLIP text tower, as in Stable Diffusion."""
    tokenizer = dict(name=name, train_vocab_size=None)
    return _text(tokenizer, 77, dict(kind="clip", variant=variant), weights)


def karlo_texts() -> dict[str, ConfigDict]:
    """CLIP's tokens of a text, and its vector, of frozen towers, as Karlo has them."""
    clip_l = "openai/clip-vit-large-patch14"
    tokens, pooled = (clip_text(clip_l, "clip_l", clip_l) for _ in range(2))
    tokens.net.zero_padding = True
    pooled.slot = "vector"
    pooled.net.projection_dim = 768
    return {"text": tokens, "pooled": pooled}


def small_text(dim: int = 128, length: int = 20) -> ConfigDict:
    """One layer over a vocabulary that is trained on the captions."""
    tokenizer = dict(name=None, train_vocab_size=2048)
    net = dict(kind="transformer", dim=dim, depth=1)
    return _text(tokenizer, length, net)


# ---- Runs of minutes on two CPU cores ----------------------------------------------


def emoji(channels: int = 8) -> ConfigDict:
    """Both stages at 32 pixels, f = 4, on OpenMoji; conditions and UNet are to come."""
    config = both_stages()
    config.resolution = 32
    config.autoencoder = ConfigDict(
        narrow_autoencoder(32, ch_mult=(1, 2, 4), z_channels=channels)
        | dict(double_z=True, init_logvar=-6.0)
    )
    config.autoencoder_stage.update(dict(steps=3000, batch_size=8, ema_decay=0.995))
    config.autoencoder_stage.optim.update(fast_adam(2e-3, warmup_steps=50))
    config.diffusion.parameterization = "v"
    config.diffusion_stage.update(dict(steps=3000, batch_size=32, ema_decay=0.998))
    config.diffusion_stage.optim.update(fast_adam(2e-3, warmup_steps=100))
    config.diffusion_stage.optim.clip_norm = 1.0
    return config


def mostly_noisy(config: ConfigDict) -> ConfigDict:
    """More of the timesteps where what is drawn is decided, and only then how.

    For conditions that say what, such as captions: a short run follows them sooner.
    """
    loss = config.diffusion_stage.loss
    loss.update(dict(timestep_sampling="logit_normal", logit_mean=0.5))
    return config


def scenes(count: int = 8192) -> ConfigDict:
    """The same on composed scenes, for shorter: what a task needs to show itself."""
    config = emoji()
    config.data.source = "openmoji_scenes"
    options = dict(count=count, objects=(1, 3), crop=None, endless=False)
    config.data.options = ConfigDict(options)
    config.autoencoder_stage.steps = 5000
    config.diffusion_stage.steps = 1500
    return config


def emoji_unet(
    concat: int = 0, context_dim: int | None = None, channels: int = 8
) -> ConfigDict:
    """A narrow UNet; `concat` channels join the latent, tokens are `context_dim` wide.

    Without context its attention is plain.
    """
    options = dict(
        in_channels=channels + concat,
        out_channels=channels,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        num_head_channels=32,
    )
    if context_dim is not None:
        options |= dict(
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            transformer_depth=1,
            context_dim=context_dim,
            legacy=False,
        )
    return ConfigDict(options)


def debug(config: ConfigDict) -> ConfigDict:
    """Shrinks an emoji run to two steps of everything, at 16 pixels and tiny widths.

    Single emoji give way to shapes that are made on the spot.
    """
    config.resolution = 16
    config.batch_size = 8
    if config.data.source == "openmoji":
        config.data.source = "synthetic"
        config.data.options = ConfigDict(dict(count=32))
    else:
        config.data.options.count = 64
    if config.autoencoder.get("kind") != "identity":
        config.autoencoder.update(dict(ch=8, ch_mult=(1, 2), resolution=16))
    if config.unet.get("kind") == "prior":
        config.unet.update(dict(depth=1, heads=2, dim_head=8))
    else:
        config.unet.update(
            dict(model_channels=32, channel_mult=(1,), attention_resolutions=(1,))
        )
    if "context_dim" in config.unet:
        config.unet.context_dim = 32
    for section in config.conditioners.values():
        for place in (section, section.get("net", {})):
            if "dim" in place:
                place["dim"] = 32
    if "classifier" in config:
        config.classifier.net.update(dict(model_channels=32, channel_mult=(1,)))
    for name in config.stages:
        section = config[f"{name}_stage"]
        section.steps = 2
        section.batch_size = None
        section.optim.warmup_steps = 1
    config.sample.steps = 2
    config.report.update(dict(log_steps=1, eval_images=8, retrieval_captions=4))
    return config
