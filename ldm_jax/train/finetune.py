"""Finetuning: stage two starts from what another run has trained.

`--config.init_from=runs/openmoji` takes that run's averaged params, its tokenizers, its
frozen nets that fit and, unless `autoencoder_from` names another, its first stage; of a
released model a run is made first, see origin.py. A condition's net that is frozen
there may be trained here, or the other way round. Conditions that it does not have
begin untrained, and the UNet's new input channels at zero, so that at first it draws as
it did: a text-to-image model becomes one of inpainting or depth. With
`--config.init_channels=tiled` the old channels are repeated for the new ones instead.
"""

import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import jax
import ml_collections
import numpy as np

from ldm_jax import adapters
from ldm_jax import frozen as frozen_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, origin, report

CONV_IN = "unet/conv_in/kernel"  # [3, 3, in, out]
SHOWN = 5  # paths of an error


def is_due(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether stage two is to start from another run's params, and has not yet."""
    if not config.get("init_from"):
        return False
    return not checkpoint.Checkpoints(workdir / "diffusion").steps()


def prepare(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    workdir: pathlib.Path,
    encoders: Mapping[str, Any],
    tokenizer_of: Mapping[str, Any],
) -> tuple[Any, Callable[[Any], Any] | None]:
    """Checks that run's params; returns (those that stay, what gives those to start).

    Some stay where little is trained beside them, see adapters.py. The latter makes of
    fresh params those that training starts from; None leaves them. `encoders` {name: …}
    are the frozen nets' params.
    """
    if not config.get("init_from"):
        return None, None
    init = partial(model_lib.init_diffusion, config, model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    due = is_due(config, workdir)
    if due:
        check(config, shapes)
    if not adapters.is_on(config):
        return None, partial(start, config)
    base = load_base(config, workdir, shapes)
    if not due:
        return base, None
    params = {**base["conditioners"], **encoders}
    return base, adapters.start(config, model, params, tokenizer_of)


def encoders(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """{name: params} of the frozen nets that this model and that run both have.

    Those that are in the workdir already are left out.
    """
    names = frozen_lib.missing(model, workdir)
    if not config.get("init_from") or not names:
        return {}
    run, key = origin.run_of(config, "init_from"), jax.random.key(0)

    def fresh():
        def tools():
            return model_lib.untrained_tools(config, model)

        return conditioning.init(model.conditioners, key, tools)

    shapes, found = jax.tree.map(np.shape, jax.eval_shape(fresh)), {}
    for name in names:
        path = frozen_lib.copy_path(run, name)
        params = frozen_lib.read_params(path) if path.is_file() else None
        if params is not None and jax.tree.map(np.shape, params) == shapes[name]:
            found[name] = params
    return found | _trained(config, {k: shapes[k] for k in names if k not in found})


def _trained(
    config: ml_collections.ConfigDict, shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """{name: params} of nets with `shapes` that are frozen here and trained there."""
    if not shapes:
        return {}
    saved, theirs = _checkpoints(config)
    there = jax.tree.map(np.shape, theirs["conditioners"])
    names = [name for name, shape in shapes.items() if there.get(name) == shape]
    if not names:
        return {}
    params, _ = saved.load_averaged(checkpoint.single_device(theirs))
    return {name: params["conditioners"][name] for name in names}


def adopt_first_stage(config: ml_collections.ConfigDict) -> None:
    """Takes that run's first stage too, unless the config names another's."""
    if config.get("init_from") and "autoencoder" in config.stages:
        config.autoencoder_from = config.autoencoder_from or config.init_from


def tokenizer_path(config: ml_collections.ConfigDict, name: str) -> pathlib.Path | None:
    """Where that run keeps the tokenizer of the condition `name`, if it does."""
    if not config.get("init_from"):
        return None
    path = workdir_lib.tokenizer_path(origin.run_of(config, "init_from"), name)
    return path if path.is_dir() else None


def check(config: ml_collections.ConfigDict, fresh: Any) -> None:
    """Raises UserError unless that run's params fit the nets with `fresh` shapes."""
    how = config.get("init_channels")
    if how not in (None, "tiled"):
        raise UserError(f"init_channels: {how!r}; choose None (zeros) or tiled")
    _, theirs = _checkpoints(config)
    old, new = _flat(_for(config, fresh, theirs)), _flat(fresh)
    there, here = ({_part(path) for path in tree} for tree in (old, new))
    missing = [path for path in new if path not in old and _part(path) in there]
    extra = [path for path in old if path not in new and _part(path) in here]
    misshaped = [
        f"{path} {old[path].shape} there, {value.shape} here"
        for path, value in new.items()
        if path in old
        and old[path].shape != value.shape
        and not _widened(path, old, new)
    ]
    problems = {
        "not there": missing,
        "of another shape": misshaped,
        "only there": extra,
    }
    words = [f"{name}: {_listed(paths)}" for name, paths in problems.items() if paths]
    if words:
        raise UserError(
            f"init_from: that run's nets are not these ({'; '.join(words)}); give this"
            " config the unet and the conditioners of that one"
        )


def start(config: ml_collections.ConfigDict, fresh: Any) -> dict[str, Any]:
    """`fresh` params with the averaged ones of that run in their places."""
    saved, abstract = _checkpoints(config)
    theirs, _ = saved.load_averaged(_placed_like(abstract, fresh))
    old, new = _flat(_for(config, fresh, theirs)), _flat(fresh)
    how = config.get("init_channels")
    said = _described(old, new, how or "at zero")
    report.say(f"diffusion: starts from {config.init_from}{said}")
    for path, value in new.items():
        if path in old:
            found = old[path]
            if _widened(path, old, new):
                found = widen(np.asarray(found), value.shape[2], how)
            new[path] = found
    return _nested(new, like=fresh)


def _for(config: ml_collections.ConfigDict, fresh: Any, theirs: Any) -> dict[str, Any]:
    """`theirs` with the conditions' nets that `fresh` has, frozen there or trained.

    Those that are frozen here are left out, see `encoders`.
    """
    run, here = origin.run_of(config, "init_from"), fresh["conditioners"]
    conditioners = {
        name: params
        for name, params in theirs["conditioners"].items()
        if config.conditioners.get(name, {}).get("trainable", True)
    }
    for name in here:
        path = frozen_lib.copy_path(run, name)
        if name not in conditioners and path.is_file():
            conditioners[name] = frozen_lib.read_params(path)
    return {**theirs, "conditioners": conditioners}


def _placed_like(abstract: Any, fresh: Any) -> Any:
    """Shapes placed as the params at their paths, so that each device reads its own.

    The others, and what is widened, are on the first device.
    """
    old, new = _flat(checkpoint.single_device(abstract)), _flat(fresh)
    shardings = {
        path: new[path].sharding
        if path in new and new[path].shape == leaf.shape
        else leaf.sharding
        for path, leaf in old.items()
    }
    return _nested(checkpoint.placed(old, shardings), like=abstract)


def widen(kernel: np.ndarray, channels: int, how: str | None) -> np.ndarray:
    """A kernel [3, 3, in, out] for more input channels: zeros for the new, or `tiled`.

    Tiled are the old ones over and over, each divided by how often it is there, so that
    an input tiled like it gives what it gave (`make_it_fit` of Stable Diffusion 2,
    whose counts are one too high).
    """
    old = kernel.shape[2]
    if how is None:
        return np.pad(kernel, [(0, 0), (0, 0), (0, channels - old), (0, 0)])
    source = np.arange(channels) % old
    times = np.bincount(source)[source]
    return kernel[:, :, source] / times[:, None].astype(kernel.dtype)


def load_base(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, shapes: Any
) -> dict[str, Any]:
    """What stays beside adapters: the run's own copy, else that run's params.

    `shapes` are those of this config's nets, which must be that run's own.
    """
    path = workdir_lib.base_path(workdir)
    if path.is_file():
        flat = _flat(frozen_lib.read_params(path))
        return _nested(flat, like=shapes)
    saved, theirs = _checkpoints(config)
    left = _described(_flat(_for(config, shapes, theirs)), _flat(shapes))
    if left:
        raise UserError(
            f"init_from: starting from {config.init_from} means{left}, which lora or"
            " inversion of diffusion_stage don't train; give this config that run's"
            " nets and conditions, or train without them"
        )
    params, _ = saved.load_averaged(checkpoint.single_device(theirs))
    return _nested(_flat(_for(config, shapes, params)), like=shapes)


def _checkpoints(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Those of that run's stage two, and the shapes of its params."""
    run = origin.run_of(config, "init_from")
    if not workdir_lib.is_run(run):
        raise UserError(
            f"init_from: {run} holds no run (no config.json); give the --workdir of one"
            " that has trained a diffusion model"
        )
    saved = checkpoint.Checkpoints(run / "diffusion")
    if not saved.steps():
        raise UserError(
            f"init_from: {run} has no checkpoint of a diffusion model; train it first"
        )
    theirs = workdir_lib.read_config(run)
    if adapters.is_on(theirs):
        raise UserError(
            f"init_from: {run} has trained a LoRA or embeddings, and no nets; give what"
            f" it started from, {theirs.init_from}"
        )
    model = model_lib.build(theirs, workdir_lib.load_tokenizers(run, theirs))
    key = jax.random.key(0)
    return saved, jax.eval_shape(lambda: model_lib.init_diffusion(theirs, model, key))


def _described(
    old: Mapping[str, Any], new: Mapping[str, Any], how: str = "at zero"
) -> str:
    """What is not taken over as it is, in words; "" if all is."""
    there, here = ({_part(path) for path in tree} for tree in (old, new))
    words = []
    if here - there:
        words.append(f"{', '.join(sorted(here - there))} untrained")
    more = new[CONV_IN].shape[2] - old[CONV_IN].shape[2]
    if more:
        words.append(f"the UNet's {more} new input channels {how}")
    if there - here:
        words.append(f"without its {', '.join(sorted(there - here))}")
    return f" ({'; '.join(words)})" if words else ""


def _flat(tree: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def _nested(flat: Mapping[str, Any], like: Any) -> dict[str, Any]:
    """The tree of `flat`, with the empty parts of `like`, as of frozen conditions."""
    whole = flax.traverse_util.flatten_dict(like, keep_empty_nodes=True, sep="/")
    empty = flax.traverse_util.empty_node
    parts = {path: value for path, value in whole.items() if value is empty}
    return flax.traverse_util.unflatten_dict({**parts, **flat}, sep="/")


def _widened(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `path` is the UNet's input and only its channels have become more."""
    a, b = old[path].shape, new[path].shape
    return path == CONV_IN and a[2] < b[2] and (*a[:2], a[3]) == (*b[:2], b[3])


def _part(path: str) -> str:
    """unet, logvar, or the condition that a param belongs to."""
    first, _, rest = path.partition("/")
    return f"condition {rest.partition('/')[0]}" if first == "conditioners" else first


def _listed(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
