"""The nets and tables of one config, assembled; what train and sample share."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import first_stage
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.conditioning import kinds, pictures
from ldm_jax.config import UserError, construct, nearest
from ldm_jax.diffusion import denoiser, edm, guidance, schedules, tiling
from ldm_jax.nets import (
    autoencoder,
    clip_autoencoder,
    encoder_unet,
    prior,
    unet,
    unet_variants,
)

FIRST_STAGES = autoencoder.KINDS | {"clip": clip_autoencoder.ClipAutoencoder}
# What `unet.kind` may name: (net, its variants).
DENOISERS = {
    "unet": (unet.UNet, unet_variants.VARIANTS),
    "prior": (prior.PriorTransformer, prior.VARIANTS),
}


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDiffusion:
    """Nets, schedule and shapes; the params live elsewhere and are passed in."""

    autoencoder: nn.Module
    unet: nn.Module
    conditioners: dict[str, conditioning.Conditioner]
    schedule: denoiser.Schedule
    parameterization: str
    latent_shape: tuple[int, int, int]
    classifier: nn.Module | None = None  # of noisy latents

    @property
    def learned_variance(self) -> bool:
        """Whether the net gives v of learned_variance.py in as many channels more."""
        return self.unet.out_channels == 2 * self.latent_shape[-1]


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype: {name!r}; choose one of auto, float32, bfloat16")
    return jnp.dtype(name)


def kwargs_of(
    name: str, section: Mapping[str, Any], variants: Mapping[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of a config section, on top of its `variant` if it has one.

    Raises UserError for an unknown variant.
    """
    kwargs = dict(section)
    variant = kwargs.pop("variant", None)
    if variant is None:
        return kwargs
    if variant not in variants:
        raise UserError(f"{name}.variant: {variant!r}; {nearest(variant, variants)}")
    return variants[variant] | kwargs


def build_autoencoder(config: ml_collections.ConfigDict) -> nn.Module:
    """The first stage of `config.autoencoder`, checked against `config.resolution`."""
    kwargs = kwargs_of("autoencoder", config.autoencoder, autoencoder.VARIANTS)
    kind = kwargs.pop("kind", "kl")
    if kind not in FIRST_STAGES:
        raise UserError(f"autoencoder.kind: {kind!r}; {nearest(kind, FIRST_STAGES)}")
    if kind == "clip":
        kwargs.pop("weights", None)  # where training begins, see frozen.py
        kwargs["tower"] = pictures.clip_tower(kwargs.get("tower", {}))
    if kwargs.get("remap"):
        kwargs["remap"] = read_remap(kwargs["remap"], kwargs["n_embed"])
    if kind != "identity":
        kwargs["dtype"] = compute_dtype(config.dtype)
    net = construct("autoencoder", FIRST_STAGES[kind], kwargs)
    factor = first_stage.downsampling(net)
    if config.resolution % factor:
        near = config.resolution // factor * factor or factor
        raise UserError(
            f"resolution: {config.resolution} is not divisible by the autoencoder's"
            f" f = {factor}; use {near} or {near + factor}, or fewer"
            " autoencoder.ch_mult levels"
        )
    return net


def read_remap(path: str, n_embed: int) -> tuple[int, ...]:
    """The used codes of a VQ autoencoder from an .npy file, as taming writes it."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"autoencoder.remap: no file {path!r}; give an .npy of codes")
    try:
        used = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(
            f"autoencoder.remap: {path!r} is no array of numbers ({error}); save one"
            " with numpy.save"
        ) from error
    if used.ndim != 1 or used.dtype.kind not in "iu" or not used.size:
        raise UserError(
            f"autoencoder.remap: {path!r} holds {used.dtype}{list(used.shape)}; it must"
            " be a list of code indices"
        )
    if used.min() < 0 or used.max() >= n_embed:
        wrong = used.min() if used.min() < 0 else used.max()
        raise UserError(
            f"autoencoder.n_embed: {n_embed}, but {path!r} of autoencoder.remap names"
            f" code {wrong}; use n_embed={max(int(used.max()) + 1, n_embed)} or another"
            " file"
        )
    return tuple(int(code) for code in used)


def build(
    config: ml_collections.ConfigDict,
    tokenizer_of: Mapping[str, Any],
    size: tuple[int, int] | None = None,
) -> LatentDiffusion:
    """Assembles the nets of a config; `tokenizer_of` names each text conditioner's.

    `size` [H, W] is that of the pictures, the config's resolution unless given.
    """
    net = build_autoencoder(config)
    size = size or (config.resolution, config.resolution)
    schedule, parameterization = build_process(config)
    shape = first_stage.latent_shape(net, size)
    denoising = build_unet(config)
    check_out_channels(denoising.out_channels, shape[-1], schedule)
    model = LatentDiffusion(
        autoencoder=net,
        unet=denoising,
        conditioners=kinds.build(config.conditioners, size, shape, tokenizer_of),
        schedule=schedule,
        parameterization=parameterization,
        latent_shape=shape,
        classifier=build_classifier(config, shape),
    )
    check_channels(config, model)
    check_positions(model)
    return model


def build_unet(config: ml_collections.ConfigDict) -> nn.Module:
    """The denoising net of `config.unet`: a UNet, or what its `kind` names."""
    kind = config.unet.get("kind", "unet")
    if kind not in DENOISERS:
        raise UserError(f"unet.kind: {kind!r}; {nearest(kind, DENOISERS)}")
    make, variants = DENOISERS[kind]
    kwargs = kwargs_of("unet", config.unet, variants)
    kwargs.pop("kind", None)
    kwargs["dtype"] = compute_dtype(config.dtype)
    return construct("unet", make, kwargs)


def check_out_channels(
    out_channels: int, channels: int, schedule: denoiser.Schedule
) -> None:
    """Raises UserError unless the net predicts a latent, or its variance besides."""
    sigma = isinstance(schedule, schedules.SigmaSchedule)
    if out_channels == channels or (out_channels == 2 * channels and not sigma):
        return
    more = "" if sigma else f", or {2 * channels} to learn the variance too"
    raise UserError(
        f"unet.out_channels: {out_channels}, but the autoencoder's latent has"
        f" {channels} channels; set it to {channels}{more}"
    )


def build_classifier(
    config: ml_collections.ConfigDict, latent_shape: tuple[int, int, int]
) -> nn.Module | None:
    """The classifier of noisy latents that a config may have."""
    if "classifier" not in config:
        return None
    options = dict(
        image_size=latent_shape[0],
        in_channels=latent_shape[-1],
        out_channels=config.classifier.num_classes,
        dtype=compute_dtype(config.dtype),
    )
    options |= config.classifier.net
    return construct("classifier.net", encoder_unet.EncoderUNet, options)


def build_process(
    config: ml_collections.ConfigDict,
) -> tuple[denoiser.Schedule, str]:
    """The noise process of `config.diffusion`, and what the net predicts under it.

    With the schedule "sigma" the time is the noise level, and the parameterization
    names a preconditioning of edm.py.
    """
    section = config.diffusion.to_dict()
    parameterization = section.pop("parameterization")
    if section["schedule"] == "sigma":
        del section["schedule"]
        edm.check_scaling(parameterization)
        schedule = construct("diffusion", schedules.SigmaSchedule, section)
    else:
        schedule = construct("diffusion", schedules.make_schedule, section)
        schedules.check_learnable(schedule, parameterization)
    return schedule, parameterization


def check_positions(model: LatentDiffusion) -> None:
    """Raises UserError unless a prior is of this latent's size, the only one it has."""
    h, w, _ = model.latent_shape
    if getattr(model.unet, "positions", h * w) != h * w:
        raise UserError(
            f"unet.positions: {model.unet.positions}, but the latent is {h}x{w}; a"
            " prior has one size, so train and draw at that"
        )


def check_channels(config: ml_collections.ConfigDict, model: LatentDiffusion) -> None:
    """Raises UserError unless the UNet takes the latent and what joins its channels."""
    channels = model.latent_shape[-1]
    if any("concat" in c.slots for c in model.conditioners.values()):
        channels += conditioning_shapes(config, model).concat.shape[-1]
    if model.unet.in_channels != channels:
        raise UserError(
            f"unet.in_channels: {model.unet.in_channels}, but the latent has"
            f" {model.latent_shape[-1]} channels and conditions add"
            f" {channels - model.latent_shape[-1]}; set it to {channels}"
        )


def init_autoencoder(
    config: ml_collections.ConfigDict, net: nn.Module, key: jax.Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage one's trained params and the collections that its steps move besides.

    The params are those of the autoencoder and, if learned, its logvar [].
    """
    x = jnp.zeros((1, config.resolution, config.resolution, net.in_channels))
    variables = dict(net.init(key, x))
    params = {"autoencoder": variables.pop("params", {})}
    settings = config.autoencoder_stage.loss
    if settings.learn_logvar:
        params["logvar"] = jnp.float32(settings.logvar_init)
    return params, variables


def init_diffusion(
    config: ml_collections.ConfigDict, model: LatentDiffusion, key: jax.Array
) -> dict[str, Any]:
    """Stage two's trained params: unet, conditioners and, if learned, logvar [T]."""
    unet_key, cond_key = jax.random.split(key)
    cond_params = conditioning.init(
        model.conditioners, cond_key, lambda: untrained_tools(config, model)
    )
    cond = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), conditioning_shapes(config, model)
    )
    z = jnp.zeros((1, *model.latent_shape))
    if cond.concat is not None:
        z = jnp.concatenate([z, cond.concat], axis=-1)
    t = jnp.zeros([1], jnp.int32)
    variables = model.unet.init(unet_key, z, t, context=cond.context, y=cond.vector)
    trained = {
        name: cond_params[name]
        for name, conditioner in model.conditioners.items()
        if conditioner.trainable and conditioner.has_params
    }
    params = {"unet": variables["params"], "conditioners": trained}
    settings = config.diffusion_stage.loss
    if settings.get("learn_logvar"):
        steps = len(model.schedule.betas)
        params["logvar"] = jnp.full([steps], settings.logvar_init, jnp.float32)
    return params


def init_classifier(model: LatentDiffusion, key: jax.Array) -> dict[str, Any]:
    """The params of the classifier of noisy latents, {"classifier": …}."""
    z = jnp.zeros((1, *model.latent_shape))
    t = jnp.zeros([1], jnp.int32)
    return {"classifier": model.classifier.init(key, z, t)["params"]}


def make_tools(
    model: LatentDiffusion,
    frozen: first_stage.FirstStage,
    keys: jax.Array,
    noise_level: jax.Array | None = None,
) -> conditioning.Tools:
    """What conditions may use: the first stage, and a typed key for every row [b]."""

    def encode_image(x, keys):
        moments = first_stage.encode_moments(model.autoencoder, frozen.params, x)

        def draw(moments, key):  # a row's latent depends on its own key alone
            return first_stage.sample_moments(
                model.autoencoder, frozen, moments[None], key
            )[0]

        return jax.vmap(draw)(moments, keys)

    return conditioning.Tools(encode_image, keys, noise_level, frozen.memory)


def untrained_tools(
    config: ml_collections.ConfigDict, model: LatentDiffusion
) -> conditioning.Tools:
    """Tools of an untrained first stage for one row; for shapes only."""
    key, c = jax.random.key(0), model.latent_shape[-1]
    params, _ = init_autoencoder(config, model.autoencoder, key)
    memory = {  # of more pictures than any condition looks up
        name: jnp.zeros((1024, conditioner.remembered_dim))
        for name, conditioner in model.conditioners.items()
        if conditioner.remembered is not None
    }
    frozen = first_stage.FirstStage(
        params["autoencoder"], jnp.zeros([c]), jnp.ones([c]), memory
    )
    return make_tools(model, frozen, jax.random.split(key, 1))


def conditioning_shapes(
    config: ml_collections.ConfigDict, model: LatentDiffusion
) -> conditioning.Conditioning:
    """Shapes of one row of all conditions; nothing is computed."""

    def make(key):
        tools = untrained_tools(config, model)
        return conditioning.encode(
            model.conditioners,
            conditioning.init(model.conditioners, key, lambda: tools),
            jax.tree.map(jnp.asarray, conditioning.null_rows(model.conditioners, 1)),
            tools=tools,
            sequential=model.unet.sequential_crossattn,
        )

    return jax.eval_shape(make, jax.random.key(0))


def classifier_score(
    model: LatentDiffusion, params: Any, label: jax.Array, scale: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What the classifier adds for classes `label` [b], `scale` times."""

    def log_prob(z_t, t):
        logits = model.classifier.apply({"params": params}, z_t, t)
        rows = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(rows, label[:, None], axis=-1)[:, 0]

    return guidance.classifier_score(log_prob, scale)


def apply_unet(
    model: LatentDiffusion,
    params: Any,
    z_t: jax.Array,
    t: jax.Array,
    cond: conditioning.Conditioning,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The net's raw output [b, h, w, c] in float32; a key switches dropout on."""
    inputs = z_t
    if cond.concat is not None:
        inputs = jnp.concatenate([z_t, cond.concat], axis=-1)
    out = model.unet.apply(
        {"params": params},
        inputs,
        t,
        context=cond.context,
        y=cond.vector,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return out.astype(jnp.float32)


def make_denoiser(
    model: LatentDiffusion,
    params: Mapping[str, Any],
    conds: Sequence[conditioning.Conditioning],
    scales: Sequence[denoiser.Scale] = (),
    *,
    guidance_rescale: jax.Array | float | None = None,
    score: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    window: tuple[int, int] | None = None,
) -> denoiser.Denoise:
    """`denoise(z_t, t) -> (x0_hat, eps_hat)` of these params, guided by `scales`.

    `conds` are for more and more conditions; these and `score` are those of
    `denoiser.make_denoiser`. `window` is how much of a latent the net sees at once,
    [h, w], see tiling.py.
    """

    def apply(z_t, t, cond):
        return apply_unet(model, params["unet"], z_t, t, cond)

    if window is not None:
        apply = tiling.tiled_apply(apply, window)
    parameterization = model.parameterization
    if isinstance(model.schedule, schedules.SigmaSchedule):
        apply = edm.precondition(apply, parameterization, model.schedule.sigma_data)
        parameterization = "x0"
    limit = getattr(model.autoencoder, "limit", None)
    return denoiser.make_denoiser(
        apply,
        model.schedule,
        parameterization,
        conds,
        scales,
        guidance_rescale=guidance_rescale,
        score=score,
        constrain=limit and (lambda x: jnp.clip(x, -limit, limit)),
        learned_variance=model.learned_variance,
    )
