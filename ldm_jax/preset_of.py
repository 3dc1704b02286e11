"""The config of a released model, by its keys and shapes.

It is the preset of `configs/` whose nets and noise process the source has. Where there
is none, the nets are read off the arrays, and what these can't say is as in Stable
Diffusion; `told` says what that was.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax import defaults
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.convert import networks, whole
from ldm_jax.diffusion import schedules
from ldm_jax.nets import (
    autoencoder,
    clip_vision,
    dpt,
    embedders,
    t5,
    text_encoder,
    unet,
    unet_variants,
)

# linear_start and linear_end of Stable Diffusion, LDM and DDPM.
_ENDS = ((0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0205), (1e-4, 2e-2))
_TOWERS = {
    "transformer": text_encoder.TextTransformer,
    "clip": text_encoder.CLIPTextTransformer,
    "t5": t5.T5Encoder,
}
CONDITION = whole.CONDITIONS[0]
READ_OFF = "read off its weights"  # config.preset where none fits
NAME_IT = "name a preset with --config"


def config_of(
    source: whole.Whole, predicts: str | None = None
) -> ml_collections.ConfigDict:
    """The config that all of a source fits, with its way to sample.

    Of several presets that predict otherwise it is the one that `predicts` names.
    Raises UserError where there is none such, or none fits and the arrays don't tell
    what the model is given.
    """
    if is_first_stage(source):
        return _first_stage_of(source)
    config = _fitting(source, predicts)
    config.sample.update(dict(spacing=source.spacing))
    return config


def is_first_stage(source: whole.Whole) -> bool:
    """Whether it is an autoencoder and no more."""
    return _has(source, whole.FIRST_STAGE) and not _has(source, whole.UNET)


def _first_stage_of(source: whole.Whole) -> ml_collections.ConfigDict:
    """The config of a first stage alone."""
    net = _first_stage(source)
    for spec, config in shipped(diffusion=False):
        ours = model_lib.build_autoencoder(config)
        if _signs_of_first_stage(ours) == _signs_of_first_stage(net):
            config.preset = spec
            return config
    config = defaults.first_stage()
    config.preset = READ_OFF
    config.autoencoder = _section_of(net)
    return config


def _section_of(net: nn.Module) -> ml_collections.ConfigDict:
    """The section `autoencoder` of a first stage."""
    kinds = {cls: kind for kind, cls in autoencoder.KINDS.items()}
    return ml_collections.ConfigDict({"kind": kinds[type(net)]} | _options(net))


def _fitting(source: whole.Whole, predicts: str | None) -> ml_collections.ConfigDict:
    net = _net("UNet", source, whole.UNET)
    first, condition = _first_stage(source), _condition(source)
    fitting = {
        spec: config
        for spec, config in shipped()
        if _signs(net, first) == _signs_of(config)
        and (condition is None or _is_of(condition, config))
        and _has_process(config, source)
    }
    if not fitting:
        return _read_off(source, net, first, condition)
    predicted: dict[str, str] = {}
    for spec, config in fitting.items():
        predicted.setdefault(config.diffusion.parameterization, spec)
    if predicts in predicted:
        predicted = {predicts: predicted[predicts]}
    if len(predicted) > 1:
        said = " or ".join(f"{spec} ({what})" for what, spec in predicted.items())
        raise UserError(
            "--config: none, and what the net predicts is not in the weights; give"
            f" {said}"
        )
    spec = next(iter(predicted.values()))
    config = fitting[spec]
    config.preset = spec
    return config


def shipped(diffusion: bool = True) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """("configs/txt2img.py:sd1", config) of all presets with a diffusion stage.

    Or, where `diffusion` is False, of all without one: first stages alone.
    Of the repository, or of the working directory; none where neither has configs.
    `debug` is left out: it is too small to tell one task from another.
    """
    here = pathlib.Path(__file__).parents[1]
    folder = next((f for f in (here, pathlib.Path()) if (f / "configs").is_dir()), None)
    files = [] if folder is None else sorted((folder / "configs").glob("*.py"))
    for path in files:
        for name, make in config_lib.presets_of(path).items():
            config = make()
            if name == "debug" or ("diffusion" in config.stages) is not diffusion:
                continue
            if diffusion and config.unet.get("kind", "unet") != "unet":
                continue  # no file has a prior alone
            yield f"configs/{path.name}:{name}", config


def _net(name: str, source: whole.Whole, prefix: str, part: str = "") -> nn.Module:
    """The net under a prefix, read off; `part` is what a folder has it under."""
    own = whole.under(source.arrays, prefix)
    own = {prefix + key: value for key, value in own.items()}
    try:
        return networks.module_of(own, source.nets.get(part or prefix))
    except UserError as error:
        words = str(error).partition(";")[0]
        raise UserError(
            f"SRC: its {name} is not told by the arrays alone ({words}); {NAME_IT},"
            f" give the original YAML, or set --config.{_FIELDS[prefix]}.FIELD=VALUE"
        ) from error


# Where a config has the options of the net under a prefix.
_FIELDS = {
    whole.UNET: "unet",
    whole.FIRST_STAGE: "autoencoder",
    CONDITION: "conditioners.text.net",
    whole.PARTS["image_encoder"]: "conditioners.alike.net",
    whole.PARTS["depth_estimator"]: "conditioners.depth.net",
}


def with_hints(source: whole.Whole, overrides: Sequence[str]) -> whole.Whole:
    """The source whose nets have what "field=value" say, as heads no array tells."""
    nets = {prefix: dict(options) for prefix, options in source.nets.items()}
    for item in overrides:
        field, text = config_lib.split_override(item)
        section, _, option = field.rpartition(".")
        for prefix in (p for p, name in _FIELDS.items() if name == section):
            part = whole.PARTS["text_encoder"] if prefix == CONDITION else prefix
            nets.setdefault(part, {})[option] = config_lib.parse_value(text)
    return source._replace(nets=nets)


def admit(config: ml_collections.ConfigDict, overrides: Sequence[str]) -> None:
    """Lets "field=value" name those options of nets that were read off as defaults."""
    classes = {
        "unet": unet.UNet,
        "autoencoder": autoencoder.KINDS[config.autoencoder.kind],
        "conditioners.alike.net": clip_vision.CLIPVisionTransformer,
        "conditioners.depth.net": dpt.DPTHybrid,
    }
    if "text" in config.get("conditioners", {}):
        classes["conditioners.text.net"] = _TOWERS[config.conditioners.text.net.kind]
    for item in overrides:
        name, _, option = config_lib.split_override(item)[0].rpartition(".")
        if name not in classes:
            continue
        section = functools.reduce(
            lambda tree, key: tree.get(key, {}), name.split("."), config
        )
        if not section:
            continue
        field = classes[name].__dataclass_fields__.get(option)
        if field is not None and option not in section:
            section[option] = field.default


def _has(source: whole.Whole, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in source.arrays)


def _first_stage(source: whole.Whole) -> nn.Module:
    if not _has(source, whole.FIRST_STAGE):
        return autoencoder.Identity()
    return _net("first stage", source, whole.FIRST_STAGE)


def _condition(source: whole.Whole) -> nn.Module | None:
    """The net under `cond_stage_model`, if there is one."""
    prefix = CONDITION
    if not _has(source, prefix):
        return None
    return _net("condition", source, prefix, whole.PARTS["text_encoder"])


# --- what two models must have in common


def _is_of(net: nn.Module, config: ml_collections.ConfigDict) -> bool:
    """Whether checkpoints of a config have such a net under that name."""
    nets = {
        "class": embedders.ClassEmbedder,
        "layout": text_encoder.TextTransformer,
        "semantic": embedders.SpatialRescaler,
    }
    for section in config.conditioners.values():
        if section.kind == "text":
            return isinstance(net, _TOWERS[section.net.kind])
        if section.kind == "layout" and isinstance(net, nets["layout"]):
            return net.vocab_size == section.num_tokens
        if section.kind in nets and section.get("slot", "context") != "vector":
            return isinstance(net, nets[section.kind])
    return False


def _signs_of(config: ml_collections.ConfigDict) -> tuple:
    options = model_lib.kwargs_of("unet", config.unet, unet_variants.VARIANTS)
    net = config_lib.construct("unet", unet.UNet, options)
    return _signs(net, model_lib.build_autoencoder(config))


def _signs(net: unet.UNet, first: nn.Module) -> tuple:
    return _signs_of_unet(net), _signs_of_first_stage(first)


def _signs_of_unet(net: unet.UNet) -> tuple:
    """What shows in the shapes of a UNet."""
    attended = [2**i in net.attention_resolutions for i in range(len(net.channel_mult))]
    depth = net.transformer_depth
    depths = [depth] * len(attended) if isinstance(depth, int) else depth
    dims = net.context_dim if net.use_spatial_transformer or net.added_kv else None
    return (
        (net.in_channels, net.out_channels, net.model_channels, net.n_embed, net.dims),
        tuple(net.channel_mult),
        net.res_blocks_of_levels(),
        tuple(d if there else 0 for d, there in zip(depths, attended, strict=True)),
        net.transformer_depth_middle,
        tuple(dims) if isinstance(dims, list | tuple) else dims,
        (net.use_linear_in_transformer, net.added_kv),
        (net.num_classes, net.adm_in_channels),
        (net.resblock_updown, net.use_scale_shift_norm),
    )


def _signs_of_first_stage(net: nn.Module) -> tuple:
    """What shows in the shapes of a first stage."""
    if isinstance(net, autoencoder.Identity):
        return (net.channels,)
    sides = [net.resolution // 2**i for i in range(len(net.ch_mult))]
    return (
        (type(net), net.ch, tuple(net.ch_mult), net.num_res_blocks, net.attn_type),
        tuple(side in net.attn_resolutions for side in sides),
        (net.in_channels, net.out_ch, net.z_channels, net.embed_dim),
        (net.double_z, getattr(net, "n_embed", None)),
        getattr(net, "use_quant_convs", None),
    )


def _has_process(config: ml_collections.ConfigDict, source: whole.Whole) -> bool:
    """Whether what the source says of its noise and prediction is the config's."""
    if config.diffusion.schedule == "sigma":
        return False
    schedule, parameterization = model_lib.build_process(config)
    theirs, tables = process_of(source)
    return theirs in (None, parameterization) and all(
        is_table_of(schedule, table) for table in tables
    )


def process_of(source: whole.Whole) -> tuple[str | None, list[np.ndarray]]:
    """(what a source's net predicts, its tables of alphas_cumprod) where it says so."""
    buffer = source.arrays.get("alphas_cumprod")
    tables = [] if buffer is None else [buffer]
    if source.process is None:
        return None, tables
    settings = dict(source.process)
    parameterization = settings.pop("parameterization")
    return parameterization, [
        *tables,
        schedules.make_schedule(**settings).alphas_cumprod,
    ]


def is_table_of(schedule: schedules.Schedule, table: np.ndarray) -> bool:
    """Whether a table of alphas_cumprod is the schedule's, but for rounding.

    Who halves a checkpoint halves this too.
    """
    ours, given = schedule.alphas_cumprod, np.asarray(table)
    if given.shape != ours.shape:
        return False
    rounding = max(float(jnp.finfo(given.dtype).eps), 1e-5)
    return np.allclose(given.astype(np.float64), ours, rtol=rounding, atol=1e-5)


# --- where no preset fits


def _read_off(
    source: whole.Whole, net: unet.UNet, first: nn.Module, condition: nn.Module | None
) -> ml_collections.ConfigDict:
    config = defaults.both_stages()
    config.preset = READ_OFF
    config.unet = ml_collections.ConfigDict(_options(net))
    config.autoencoder = _section_of(first)
    with config.unlocked(), config.ignore_type():
        config.diffusion.update(_process(source))
    factor = 2 ** (len(first.ch_mult) - 1)
    config.resolution = factor * (source.image_size or 64)
    config.conditioners.update(_conditions(source, net, first, condition))
    return config


def _options(net: nn.Module) -> dict[str, Any]:
    """The constructor's arguments of a net that are not its defaults."""
    fields = type(net).__dataclass_fields__
    given = {
        name: getattr(net, name)
        for name, field in fields.items()
        if name not in ("name", "parent", "dtype")
        and getattr(net, name) != field.default
    }
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _process(source: whole.Whole) -> dict[str, Any]:
    """The section `diffusion`: the source's own, or what its table of noise tells."""
    if source.process is not None:
        said = {k: v for k, v in source.process.items() if v is not None}
        return said
    bar = source.arrays.get("alphas_cumprod")
    if bar is None:
        return {}
    if bar.ndim == 1 and len(bar) > 1:
        first, before, last = (float(bar[i]) for i in (0, -2, -1))
        own = round(1 - first, 6), round(1 - last / max(before, 1e-12), 6)
        # Those of the released models first: half precision leaves no digits of others.
        for start, end in (*_ENDS, own):
            for schedule in schedules.SCHEDULES:
                made = dict(schedule=schedule, timesteps=len(bar))
                made |= dict(linear_start=start, linear_end=end)
                if is_table_of(schedules.make_schedule(**made), bar):
                    return made
    raise UserError(f"SRC: alphas_cumprod is of no schedule known here; {NAME_IT}")


def _conditions(
    source: whole.Whole, net: unet.UNet, first: nn.Module, condition: nn.Module | None
) -> dict[str, ml_collections.ConfigDict]:
    """What the model is given, by the nets of its conditions and its channels."""
    more, found = net.in_channels - first.embed_dim, {}
    vector = net.num_classes
    if net.use_spatial_transformer:
        name = "class" if isinstance(condition, embedders.ClassEmbedder) else "text"
        found[name] = _context(condition)
    if _has(source, whole.PARTS["depth_estimator"]) and more == 1:
        tower = _net("depth estimator", source, whole.PARTS["depth_estimator"])
        found["depth"] = dict(kind="photo_depth", net=_options(tower))
        more = 0
    if _has(source, whole.PARTS["image_encoder"]) and vector == "sequential":
        tower = _net("image encoder", source, whole.PARTS["image_encoder"])
        found["alike"] = dict(kind="clip_image", net=_options(tower))
        if net.adm_in_channels == tower.projection_dim:
            found["alike"]["max_noise_level"] = 0
        vector = None
    if source.pipeline == whole.UPSCALE and more == 3:
        found["low_res"] = dict(kind="noisy_low_res")
        if source.noise_levels is not None:
            found["low_res"]["max_noise_level"] = source.noise_levels
        more, vector = 0, None
    of_pictures = (
        source.pipeline == whole.SUPER_RESOLUTION or source.given == "LR_image"
    )
    if of_pictures and more == 3:
        found["low_res"] = dict(kind="low_res")
        more = 0
    mapper = source.arrays.get(f"{CONDITION}channel_mapper.weight")
    if mapper is not None and more == len(mapper):
        classes = mapper.shape[1]
        found["segmentation"] = dict(
            kind="semantic", num_classes=classes, channels=more
        )
        more = 0
    if source.given == "coordinates_bbox":
        raise UserError(
            "SRC: it is given layouts, and how many classes these have is not in the"
            f" weights; {NAME_IT}, such as configs/layout2img.py:openimages256"
        )
    if more == first.embed_dim + 1:
        convention = "sd" if net.use_spatial_transformer else "ldm"
        found["known"] = dict(kind="inpainting", convention=convention)
        more = 0
    if vector is not None:
        raise UserError(
            f"SRC: its UNet also takes a vector ({vector}), whose meaning is not in the"
            f" weights; {NAME_IT}"
        )
    if more and isinstance(first, autoencoder.Identity):
        raise UserError(
            f"SRC: nothing in it begins with {whole.FIRST_STAGE!r}, and its UNet takes"
            f" {net.in_channels} channels, which are no picture's; give a whole"
            " checkpoint"
        )
    if more:
        raise UserError(
            f"SRC: its UNet takes {more} channels besides the latent's"
            f" {first.embed_dim}, whose meaning is not in the weights; {NAME_IT}"
        )
    return {name: ml_collections.ConfigDict(c) for name, c in found.items()}


def _context(net: nn.Module | None) -> ml_collections.ConfigDict:
    """The condition that is attended to, by its net."""
    if isinstance(net, embedders.ClassEmbedder):
        options = dict(num_classes=net.num_classes, dim=net.dim, null_class=False)
        return ml_collections.ConfigDict(dict(kind="class") | options)
    if isinstance(net, text_encoder.CLIPTextTransformer):
        section, kind = defaults.clip_text(), "clip"
        section.tokenizer.name = "openai/clip-vit-large-patch14"
    elif isinstance(net, text_encoder.TextTransformer):
        section, kind = defaults.bert_text("bert_1p4b"), "transformer"
    else:
        raise UserError(
            f"SRC: what its UNet attends to (a {type(net).__name__}) is not in the"
            f" weights; {NAME_IT}"
        )
    section.net = ml_collections.ConfigDict(dict(kind=kind) | _options(net))
    section.length = net.max_seq_len
    return section


def told(config: ml_collections.ConfigDict) -> list[str]:
    """Lines on a config that `config_of` gave."""
    if config.preset != READ_OFF:
        return [f"recognised as {config.preset}"]
    fields = config_lib.flatten(config)
    sections = ("unet.", "autoencoder.", "diffusion.", "conditioners.", "resolution")
    shown = [f"  {k} = {v!r}" for k, v in fields.items() if k.startswith(sections)]
    return [
        "of no preset; read off its weights, and as Stable Diffusion where they don't"
        " say (set --config.FIELD=VALUE where that is wrong):",
        *shown,
    ]
