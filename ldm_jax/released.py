"""A released model of CompVis, Stability or diffusers as a run of this package.

A checkpoint holds the UNet, its average, the first stage, the conditions' nets and the
buffers of the noise schedule in one state dict, a folder of diffusers each part by
itself; a preset of configs/ says what they are. What comes out is a workdir like any
other: `ldm_jax.load` and `python -m ldm_jax.sample` draw from it, `--config.init_from`
finetunes it. `load` makes a model in memory of it without one.
"""

import functools
import math
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import frozen as frozen_lib
from ldm_jax import hub, preset_of
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.config import UserError
from ldm_jax.convert import averages, networks, original_yaml, plans, towers, whole
from ldm_jax.convert.whole import FIRST_STAGE, UNET
from ldm_jax.diffusion import schedules
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint, sharding

# All that such a state dict may hold besides the nets and their averages.
BUFFERS = (
    r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*"
    r"|lvlb_weights|scale_factor|logvar|model_ema\..*|loss\..*|low_scale_model\..*"
)
NETS = (UNET, FIRST_STAGE, *whole.CONDITIONS)
# What latents were multiplied by, where the file does not say: by autoencoder.variant.
SCALE_FACTORS = {"kl_f8": 0.18215, "sd": 0.18215, "sd_x4": 0.08333, "rdm": 0.22765929}


class Parts(NamedTuple):
    """What a run holds, as nested params."""

    first_stage: dict[str, Any]
    diffusion: dict[str, Any]
    encoders: dict[str, Any]  # of conditions whose nets are frozen
    scale_factor: float


class Opened(NamedTuple):
    """A released model: no nets where it is a first stage alone."""

    config: ml_collections.ConfigDict
    nets: model_lib.LatentDiffusion | None
    tokenizers: Mapping[str, Any]
    parts: Parts


def is_source(source: str | os.PathLike) -> bool:
    """Whether it is a file of weights or a folder of diffusers, or may be a hub id."""
    path = pathlib.Path(source).expanduser()
    if path.is_file() or whole.is_folder(path):
        return True
    # In a folder that is there it is a path, be it a wrong one.
    return hub.is_id(os.fspath(source)) and not path.parent.exists()


def open_source(source: str) -> whole.Whole:
    """What a file, a folder of diffusers or a hub id of either holds."""
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        path = hub.pipeline(source, "SRC") or hub.first_stage(source, "SRC") or path
    if whole.is_folder(path):
        return whole.read_folder(path, "SRC")
    arrays = whole.with_prefix(frozen_lib.read(source, "SRC"))
    return whole.Whole(whole.without_copy(arrays, "SRC"))


def on_device(path: str, array: np.ndarray) -> jax.Array:
    """A copy of an array, which may lie in a file, on the first device.

    A transposed view is copied by the device, faster than by numpy. An array that lies
    in order might not be copied by `device_put` at all.
    """
    del path
    in_order = array.flags.c_contiguous
    return jnp.array(array) if in_order else jax.device_put(array)


def read(
    source: whole.Whole,
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion | None,
    *,
    averaged: bool = True,
    scale_factor: float | None = None,
    allow_missing: bool = False,
    place: plans.Place = on_device,
) -> Parts:
    """The params of `model` from all that a source has, of a first stage where None.

    `averaged` takes the moving average of the UNet, or of a first stage alone, where
    the file has one. With
    `allow_missing` what the UNet and the autoencoder lack is drawn as for training, and
    warned of. `place` puts params where they shall be, by default on the first device.
    Raises UserError where the file is of another model, or has more in it than is
    known.
    """
    state_dict = source.arrays
    unknown = [
        key
        for key in state_dict
        if not key.startswith(NETS) and not re.fullmatch(BUFFERS, key)
    ]
    if unknown:
        raise UserError(
            f"SRC: {len(unknown)} arrays of no known part, such as {unknown[0]!r}; give"
            " a checkpoint of CompVis or Stability"
        )
    diffusion, encoders = {}, {}
    if model is not None:
        diffusion, encoders = _second_stage(
            source, config, model, averaged, allow_missing, place
        )
    alone = model is None and averaged
    first_stage = _first_stage(source, config, alone, allow_missing, place)
    if scale_factor is None:
        scale_factor = _scale_factor(source, config)
    return Parts(first_stage, diffusion, encoders, scale_factor)


def _second_stage(
    source: whole.Whole,
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    averaged: bool,
    allow_missing: bool,
    place: plans.Place,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params that are trained, those of frozen conditions)"""
    _check_process(source, model)
    state_dict = source.arrays

    def fresh_unet():
        key = jax.random.key(config.seed)
        return model_lib.init_diffusion(config, model, key)["unet"]

    diffusion = {
        "unet": _part(
            "the UNet",
            _params_of,
            model.unet,
            averages.of(averages.UNET, state_dict, averaged),
            place,
            fresh_unet if allow_missing else None,
        ),
        "conditioners": {},
    }
    encoders = {}
    bare = source.pipeline is None and not any(
        key.startswith(whole.CONDITIONS) for key in state_dict
    )
    for name, conditioner in model.conditioners.items():
        if conditioner.has_params:
            own = state_dict
            if bare and conditioner.weights is not None:  # as of Karlo's checkpoints
                option = f"conditioners.{name}.weights"
                own = frozen_lib.read(conditioner.weights, option)
            params = _part(f"conditioners.{name}", _condition, conditioner.net, own)
            of = diffusion["conditioners"] if conditioner.trainable else encoders
            of[name] = _placed(params, place)
    if config.diffusion_stage.loss.get("learn_logvar"):
        if "logvar" not in state_dict:
            raise UserError(
                "diffusion_stage.loss.learn_logvar: True, but SRC has no logvar; set it"
                " to False"
            )
        diffusion["logvar"] = np.asarray(state_dict["logvar"], np.float32)
    _check_shapes(config, model, diffusion)
    return diffusion, encoders


def _first_stage(
    source: whole.Whole,
    config: ml_collections.ConfigDict,
    averaged: bool,
    allow_missing: bool,
    place: plans.Place,
) -> dict[str, Any]:
    net = model_lib.build_autoencoder(config)
    if isinstance(net, autoencoder.Identity):
        return {}

    def fresh():
        key = jax.random.key(config.seed)
        return model_lib.init_autoencoder(config, net, key)[0]["autoencoder"]

    own = averages.of(averages.FIRST_STAGE_ALONE, source.arrays, averaged)
    init = fresh if allow_missing else None
    params = _part("the autoencoder", _params_of, net, own, place, init)
    return {"autoencoder": params}


def _scale_factor(source: whole.Whole, config: ml_collections.ConfigDict) -> float:
    """What latents are multiplied by: as the source says, else as its first stage has.

    A warning where neither does.
    """
    if source.scale_factor is not None:
        return source.scale_factor
    if "scale_factor" in source.arrays:
        found = np.asarray(source.arrays["scale_factor"])
        # By its digits: 0.18215 also where it was a float32.
        value = float(str(found.flat[0])) if found.size == 1 else math.nan
        if not 0 < value < math.inf:
            raise UserError(
                f"SRC: scale_factor is {found.tolist()}, which multiplies no latents;"
                " give one with --scale_factor"
            )
        return value
    known = SCALE_FACTORS.get(config.autoencoder.get("variant"))
    net = model_lib.build_autoencoder(config)
    if known is None and not isinstance(net, autoencoder.Identity):
        warnings.warn(
            "SRC does not say what latents are multiplied by; they are left as they"
            " are. Stable Diffusion's are by --scale_factor=0.18215",
            stacklevel=2,
        )
    return 1.0 if known is None else known


def _check_shapes(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, params: Any
) -> None:
    """Raises UserError unless the nets, put together, take these params."""
    shapes = jax.eval_shape(
        lambda: model_lib.init_diffusion(config, model, jax.random.key(0))
    )
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, shapes):
        raise UserError(
            "SRC: the nets are not those of --config; give another of either"
        )


def _params_of(
    net: Any,
    state_dict: Mapping[str, np.ndarray],
    place: plans.Place,
    init: Callable[[], Any] | None,
) -> dict[str, Any]:
    """Placed array by array, so that no second copy of a net is held.

    What the state dict lacks is taken from the params that `init` draws, if it may be.
    """
    fresh = (
        None if init is None else functools.partial(_fresh, type(net).__name__, init)
    )
    return networks.params_of(net, state_dict, place=place, fresh=fresh)


def on_mesh(mesh: jax.sharding.Mesh) -> plans.Place:
    """Puts every array where training would have it; each device is given its part."""

    def place(path, array):
        spec = sharding.partition_spec(path, array.shape, mesh)
        return jax.make_array_from_callback(
            array.shape,
            jax.sharding.NamedSharding(mesh, spec),
            lambda index: np.array(array[index], order="C"),
        )

    return place


def _placed(tree: Any, place: plans.Place) -> Any:
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    placed = {path: place(path, np.asarray(x)) for path, x in flat.items()}
    return flax.traverse_util.unflatten_dict(placed, sep="/")


def _fresh(
    name: str, init: Callable[[], Any], paths: Sequence[str]
) -> dict[str, np.ndarray]:
    """Params at `paths` of a net, as training would begin with them."""
    warnings.warn(
        f"{len(paths)} arrays of the {name} are not in SRC and are untrained, such as"
        f" {paths[0]}",
        stacklevel=2,
    )

    @jax.jit  # so that nothing else is drawn
    def draw():
        flat = flax.traverse_util.flatten_dict(init(), sep="/")
        return {path: flat[path] for path in paths}

    return jax.tree.map(np.asarray, draw())


def _condition(net: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = {k: v for k, v in state_dict.items() if k.startswith(whole.CONDITIONS)}
    return towers.params_of(net, own or state_dict)


def _part(name: str, convert: Any, *args: Any) -> dict[str, Any]:
    try:
        return convert(*args)
    except (ValueError, UserError) as error:
        words = str(error).splitlines()[0]
        if any(isinstance(e, plans.UnsoundError) for e in (error, error.__cause__)):
            raise UserError(f"SRC: {name}: {words}") from error
        raise UserError(
            f"SRC: {name} is not that of --config ({words}); give another of either"
        ) from error


def _check_process(source: whole.Whole, model: model_lib.LatentDiffusion) -> None:
    """Raises UserError unless the source's noise and prediction are the model's."""
    predicted, tables = preset_of.process_of(source)
    if predicted not in (None, model.parameterization):
        raise UserError(
            f"diffusion.parameterization: {model.parameterization!r}, but SRC's net"
            f" predicts {predicted}; set it to {predicted!r}"
        )
    if not isinstance(model.schedule, schedules.Schedule):
        return
    ours = model.schedule.alphas_cumprod
    for theirs in tables:
        if not preset_of.is_table_of(model.schedule, theirs):
            raise UserError(
                f"diffusion: alphas_cumprod has {len(ours)} values from {ours[0]:.5f}"
                f" to {ours[-1]:.5f}, that of SRC {len(theirs)} from {theirs[0]:.5f} to"
                f" {theirs[-1]:.5f}; set linear_start, linear_end and timesteps to its"
                " own"
            )


def load_tokenizers(
    config: ml_collections.ConfigDict, source: whole.Whole
) -> dict[str, Any]:
    """The source's own, else those that the config names.

    None can be trained without captions.
    """
    made = {}
    for name, section in config.conditioners.items():
        if "tokenizer" not in section:
            continue
        if source.tokenizer is not None:
            made[name] = tokenizers.load(source.tokenizer)
            continue
        if section.tokenizer.train_vocab_size:
            raise UserError(
                f"conditioners.{name}.tokenizer.train_vocab_size:"
                f" {section.tokenizer.train_vocab_size}; a released model has its own"
                " tokenizer, so set it to None and .name to that"
            )
        made[name] = tokenizers.load(section.tokenizer.name)
    return made


def settle(
    path: str,
    spec: str | None = None,
    overrides: Sequence[str] = (),
    predicts: str | None = None,
) -> tuple[whole.Whole, ml_collections.ConfigDict]:
    """(what a source holds, the config that it is of).

    `spec` is a preset, "configs/txt2img.py:sd1", or the original's YAML; None takes the
    YAML beside the file, or recognises the source. `overrides` are "field=value",
    `predicts` is the parameterization where nothing else tells.
    """
    if spec is not None and not spec.endswith(original_yaml.SUFFIXES):
        config = config_lib.load(spec, overrides)
        return open_source(path), config
    source = open_source(path)
    original = spec or original_yaml.find(pathlib.Path(path).expanduser())
    if original is not None:
        source = original_yaml.add(source, pathlib.Path(original))
    hinted = preset_of.with_hints(source, overrides)
    config = preset_of.config_of(hinted, predicts)
    if config.preset == preset_of.READ_OFF:
        preset_of.admit(config, overrides)
    for item in overrides:
        config_lib.override(config, *config_lib.split_override(item))
    return source, config


def open_parts(
    source: whole.Whole, config: ml_collections.ConfigDict, **options: Any
) -> Opened:
    """All of a released model; `options` are those of `read`.

    Where the config is of a first stage alone, that is taken.
    """
    if "diffusion" not in config.stages:
        return Opened(config, None, {}, read(source, config, None, **options))
    tokenizer_of = load_tokenizers(config, source)
    nets = model_lib.build(config, tokenizer_of)
    return Opened(config, nets, tokenizer_of, read(source, config, nets, **options))


def load(
    path: str, spec: str | None = None, mesh: jax.sharding.Mesh | None = None
) -> loaded_lib.LoadedModel:
    """A released model in memory, ready to draw; nothing is written. See `settle`.

    With a `mesh` its params are spread over it as they would be in training.
    """
    source, config = settle(path, spec)
    if "diffusion" not in config.stages:
        raise UserError(
            "SRC: a first stage alone, which draws nothing; make a run of it with"
            " python -m ldm_jax.convert, and train with --config.autoencoder_from=RUN"
        )
    place = on_device if mesh is None else on_mesh(mesh)
    return in_memory(open_parts(source, config, place=place))


def in_memory(opened: Opened) -> loaded_lib.Loaded:
    """A released model as one that was trained here."""
    config, nets, tokenizer_of, parts = opened
    first_stage = first_stage_lib.FirstStage(
        params=parts.first_stage.get("autoencoder", {}),
        **{k: jnp.array(v, jnp.float32) for k, v in _statistics(config, parts).items()},
        encoders=parts.encoders,
    )
    if nets is None:
        net = model_lib.build_autoencoder(config)
        return loaded_lib.LoadedAutoencoder(config, net, first_stage)
    steps = config.diffusion_stage.steps
    return loaded_lib.LoadedModel(
        config, nets, parts.diffusion, first_stage, steps, tokenizer_of
    )


def _statistics(
    config: ml_collections.ConfigDict, parts: Parts
) -> dict[str, list[float]]:
    """The latents' mean and std, by channel, that one factor stands for."""
    c = model_lib.build_autoencoder(config).embed_dim
    return {"mean": [0.0] * c, "std": [1 / parts.scale_factor] * c}


def write(workdir: pathlib.Path, opened: Opened, option: str = "DST") -> None:
    """Writes a finished run, whole or not at all; `workdir` must not be there.

    UserErrors name `option`.
    """
    try:
        _write(workdir, opened, option)
    except checkpoint.DiskFullError as error:  # whose words are for training
        raise UserError(
            f"{option}: the disk of {workdir} is full; free some space, then run the"
            " same command again"
        ) from error


def _write(workdir: pathlib.Path, opened: Opened, option: str) -> None:
    config, _, tokenizer_of, parts = opened
    with workdir_lib.whole(workdir, option) as partial:
        for name, tokenizer in tokenizer_of.items():
            tokenizer.save_pretrained(workdir_lib.tokenizer_path(partial, name))
        frozen_lib.write(partial, parts.encoders)
        for name, params, facts in (
            ("autoencoder", parts.first_stage, {"latent": _statistics(config, parts)}),
            ("diffusion", parts.diffusion, {}),
        ):
            if params:
                steps = config[f"{name}_stage"].steps
                checkpoint.save_params(partial / name, params, steps, **facts)
        path = workdir_lib.config_path(partial)
        workdir_lib.write_text(path, config_lib.to_json(config))
