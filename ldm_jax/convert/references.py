"""Nets of torch, diffusers and transformers that compute what ours do, to check them.

Options go there by `write_config`. Needs torch, only while it runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import depth, text_encoders, write_config
from ldm_jax.convert import diffusers as names
from ldm_jax.nets import (
    autoencoder,
    clip_vision,
    dpt,
    embedders,
    layers,
    prior,
    t5,
    text_encoder,
    unet,
)

State = Mapping[str, np.ndarray]
# What torch's `interpolate` calls the methods of `resample` that it has.
_INTERPOLATIONS = {name: name for name in ("nearest", "bilinear", "bicubic")}
_INTERPOLATIONS["adaptive"] = "area"


class Call(NamedTuple):
    """The same inputs to both: a method of ours with its arguments, and theirs."""

    method: str
    args: tuple
    theirs: Callable[[], Any]


class Reference(NamedTuple):
    """What a net is compared with: `layout` has the keys of `theirs`, a torch module.

    `net` and `params` are ours as they are exported: more layers than run, of a text
    tower that stops early. `complete` gives the state dict of theirs what ours has not,
    or `spare` is a pattern of its keys. Outputs of `unlike` blocks are other things
    there than here.
    """

    net: nn.Module
    params: Mapping[str, Any]
    layout: str
    theirs: Any
    calls: Sequence[Call]
    complete: Callable[[State], State] = dict
    spare: str = ""
    unlike: tuple[str, ...] = ()


def libraries() -> tuple[Any, Any, Any]:
    """torch, diffusers and transformers; UserError where one is missing."""
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--check: {error.name} is not installed; pip install 'ldm_jax[parity]'"
        ) from error
    return torch, diffusers, transformers


def of(net: nn.Module, params: Mapping[str, Any], seed: int) -> Reference:
    """The reference of a net, on random inputs. UserError where there is none."""
    makers = {
        unet.UNet: _unet,
        prior.PriorTransformer: _prior,
        autoencoder.Autoencoder: _autoencoder,
        text_encoder.CLIPTextTransformer: _clip_text,
        text_encoder.TextTransformer: _bert,
        t5.T5Encoder: _t5,
        clip_vision.CLIPVisionTransformer: _clip_vision,
        dpt.DPTHybrid: _dpt,
        embedders.ClassEmbedder: _class_embedder,
        embedders.SpatialRescaler: _rescaler,
    }
    for kind, maker in makers.items():
        if isinstance(net, kind):
            return maker(net, params, np.random.default_rng(seed))
    raise UserError(f"there is no reference for a {type(net).__name__}")


# --- denoisers


def _unet(net: unet.UNet, params, rng) -> Reference:
    torch, diffusers, _ = libraries()
    size = max(8, 2 ** (len(net.channel_mult) - 1))
    config = write_config.unet_of(net, size)
    x = _normal(rng, 2, size, size, net.in_channels)
    t = np.array([801, 7], np.int32)
    y, given = _labels(net, rng)
    context = None
    if net.use_spatial_transformer:
        context = given["encoder_hidden_states"] = _normal(rng, 2, 5, net.context_dim)
    given = jax.tree.map(torch.from_numpy, given | {"timestep": t})
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    call = Call("__call__", (x, t, context, y), partial(theirs, _nchw(x), **given))
    return Reference(net, params, "diffusers", theirs, [call])


def _labels(net: unet.UNet, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """(y, what diffusers is given for it)."""
    if net.num_classes is None:
        return None, {}
    if net.adm_in_channels in names.SDXL_WIDTHS:
        text = _normal(rng, 2, 1280)
        sizes = _normal(rng, 2, (net.adm_in_channels - 1280) // 256)
        waves = np.asarray(layers.timestep_embedding(sizes.ravel(), 256))
        y = np.concatenate([text, waves.reshape(2, -1)], axis=-1)
        return y, {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
    if isinstance(net.num_classes, int):
        y = np.array([0, net.num_classes - 1], np.int32)
    elif net.num_classes == "timestep":
        y = np.array([3, 250], np.float32)
    else:
        y = _normal(rng, 2, net.adm_in_channels or 1)
    return y, {"class_labels": y}


def _prior(net: prior.PriorTransformer, params, rng) -> Reference:
    torch, diffusers, _ = libraries()
    config = write_config.prior_of(net)
    z = _normal(rng, 2, net.positions, net.in_channels)
    t = np.array([801, 7], np.int32)
    context = _normal(rng, 2, net.context_length, net.context_dim)
    y = _normal(rng, 2, net.vector_dim)
    theirs = diffusers.PriorTransformer.from_config(config)
    mask = torch.ones(context.shape[:2], dtype=torch.bool) if net.query else None
    given = map(torch.from_numpy, (z[:, 0] if net.query else z, t, y, context))
    call = Call(
        "__call__",
        (z[:, :, None], t, context, y),
        partial(theirs, *given, attention_mask=mask),
    )
    return Reference(
        net,
        params,
        "diffusers",
        theirs,
        [call],
        spare="clip_mean|clip_std",
        unlike=("norm_out",),  # of all tokens there, of the predicted ones here
    )


# --- first stages


def _autoencoder(net: autoencoder.Autoencoder, params, rng) -> Reference:
    """The picture is random; both decoders see our encoder's latent."""
    _, diffusers, _ = libraries()
    size = 8 * 2 ** (len(getattr(net, "ch_mult", ())) - 1)
    config = write_config.autoencoder_of(net, 1.0, size)
    x = _normal(rng, 2, size, size, net.in_channels)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    encoded = net.apply({"params": params}, x, method="encode")
    z = np.asarray(net.apply({}, encoded, method="latent"), np.float32)
    calls = [
        Call("encode", (x,), lambda: theirs.encode(_nchw(x))),
        Call("decode", (z,), lambda: theirs.decode(_nchw(z))),
    ]
    return Reference(net, params, "diffusers", theirs, calls, names.modern)


# --- conditions


def _clip_text(net: text_encoder.CLIPTextTransformer, params, rng) -> Reference:
    torch, _, transformers = libraries()
    whole = net.clone(depth=net.blocks, layer="last", final_norm=True, normalize=False)
    config = write_config.clip_text_of(whole)
    tokens = _tokens(rng, net.vocab_size - 1, net.max_seq_len)
    tokens[:, -1] = net.vocab_size - 1  # the text's end
    norm = {"scale": np.ones(net.dim), "bias": np.zeros(net.dim)}
    cls = getattr(transformers, config["architectures"][0])
    theirs = cls(cls.config_class(**config))
    call = Call("__call__", (tokens,), partial(theirs, torch.from_numpy(tokens).long()))
    params = {"norm_out": norm} | dict(params)
    return Reference(whole, params, "huggingface", theirs, [call])


def _bert(net: text_encoder.TextTransformer, params, rng) -> Reference:
    torch, *_ = libraries()
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm

    tokens = _tokens(rng, net.vocab_size, net.max_seq_len)
    theirs = ldm.LDMBertModel(ldm.LDMBertConfig(**write_config.ldm_bert_of(net)))
    run = partial(theirs.model, torch.from_numpy(tokens).long())
    call = Call("__call__", (tokens,), run)
    # The head is of its training, which predicted the text, and is not computed.
    head = r"to_logits\..*"
    return Reference(net, params, "diffusers", theirs, [call], spare=head)


def _t5(net: t5.T5Encoder, params, rng) -> Reference:
    torch, _, transformers = libraries()
    tokens = _tokens(rng, net.vocab_size, 12)
    config = transformers.T5Config(**write_config.t5_of(net))
    theirs = transformers.T5EncoderModel(config)
    call = Call("__call__", (tokens,), partial(theirs, torch.from_numpy(tokens).long()))
    complete = text_encoders.with_shared
    return Reference(net, params, "huggingface", theirs, [call], complete)


def _clip_vision(net: clip_vision.CLIPVisionTransformer, params, rng) -> Reference:
    *_, transformers = libraries()
    x = _normal(rng, 2, net.image_size, net.image_size, 3)
    config = transformers.CLIPVisionConfig(**write_config.clip_vision_of(net))
    theirs = transformers.CLIPVisionModelWithProjection(config)
    call = Call("__call__", (x,), partial(theirs, _nchw(x)))
    return Reference(net, params, "huggingface", theirs, [call])


def _dpt(net: dpt.DPTHybrid, params, rng) -> Reference:
    *_, transformers = libraries()
    side = max(64, 16 * net.grid // 32 * 32)
    x = _normal(rng, 2, side, side, 3)
    config = transformers.DPTConfig(**write_config.dpt_of(net))
    theirs = transformers.DPTForDepthEstimation(config)
    return Reference(
        net,
        params,
        "huggingface",
        theirs,
        [Call("__call__", (x,), partial(theirs, _nchw(x)))],
        spare=depth.UNUSED,
        unlike=("stem_norm",),  # with the activation behind it there
    )


def _class_embedder(net: embedders.ClassEmbedder, params, rng) -> Reference:
    torch, *_ = libraries()
    ids = rng.integers(0, net.num_classes, (2,), np.int32)
    table = torch.nn.Embedding(net.num_classes, net.dim)
    theirs = torch.nn.ModuleDict({"embedding": table})
    call = Call("__call__", (ids,), partial(table, torch.from_numpy(ids).long()))
    return Reference(net, params, "compvis", theirs, [call])


def _rescaler(net: embedders.SpatialRescaler, params, rng) -> Reference:
    torch, *_ = libraries()
    if net.method not in _INTERPOLATIONS:
        raise UserError(f"method: {net.method!r}, which torch has not")
    channels = params["channel_mapper"]["kernel"].shape[0]
    side = 8 * round(net.multiplier**-net.n_stages)
    x = _normal(rng, 2, side, side, channels)
    mapper = torch.nn.Conv2d(channels, net.out_channels, 1, bias=net.bias)
    options = dict(scale_factor=net.multiplier, mode=_INTERPOLATIONS[net.method])

    def run():
        h = _nchw(x)
        for _ in range(net.n_stages):
            h = torch.nn.functional.interpolate(h, **options)
        return mapper(h)

    theirs = torch.nn.ModuleDict({"channel_mapper": mapper})
    return Reference(net, params, "compvis", theirs, [Call("__call__", (x,), run)])


# --- inputs


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def _tokens(rng: np.random.Generator, vocabulary: int, length: int) -> np.ndarray:
    return rng.integers(0, vocabulary, (2, length), np.int32)


def _nchw(x: np.ndarray):
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())
