"""What the YAML of a CompVis or Stability checkpoint says, checked by its weights."""

import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from ldm_jax.config import UserError
from ldm_jax.convert import networks, whole

SUFFIXES = (".yaml", ".yml")
_HEADS = ("num_heads", "num_head_channels", "num_heads_upsample", "legacy")
# Arguments that show in the arrays, so that a YAML of another model is found out.
_SEEN = {
    whole.UNET: (
        "in_channels",
        "out_channels",
        "model_channels",
        "channel_mult",
        "num_res_blocks",
        "context_dim",
        "transformer_depth",
        "use_spatial_transformer",
        "use_linear_in_transformer",
        "num_classes",
        "adm_in_channels",
        "resblock_updown",
        "use_scale_shift_norm",
    ),
    whole.FIRST_STAGE: (
        "ch",
        "ch_mult",
        "in_channels",
        "out_ch",
        "z_channels",
        "embed_dim",
        "n_embed",
        "num_res_blocks",
        "double_z",
    ),
}
_SECTIONS = {whole.UNET: "unet_config", whole.FIRST_STAGE: "first_stage_config"}


def find(source: pathlib.Path) -> pathlib.Path | None:
    """The YAML beside a checkpoint, of its name."""
    paths = (source.with_suffix(suffix) for suffix in SUFFIXES)
    return next((path for path in paths if source.suffix and path.is_file()), None)


def add(source: whole.Whole, path: pathlib.Path) -> whole.Whole:
    """The source with what the YAML says of noise, scale, size and nets.

    Raises UserError in one line where the file is none, or is of another model.
    """
    params = _params(path)
    nets = {}
    for prefix, section in _SECTIONS.items():
        options = dict((params.get(section) or {}).get("params") or {})
        options |= options.pop("ddconfig", {})
        if not options or not any(key.startswith(prefix) for key in source.arrays):
            continue
        _check(path, section, prefix, options, source)
        nets[prefix] = options
    process = dict(
        schedule=params.get("beta_schedule", "linear"),
        timesteps=params.get("timesteps", 1000),
        linear_start=float(params.get("linear_start", 1e-4)),
        linear_end=float(params.get("linear_end", 2e-2)),
        parameterization=params.get("parameterization", "eps"),
    )
    scale_factor = params.get("scale_factor")
    if params.get("scale_by_std") and "scale_factor" in source.arrays:
        scale_factor = None  # the weights have what was measured
    size = params.get("image_size")
    return source._replace(
        process=process,
        scale_factor=source.scale_factor if scale_factor is None else scale_factor,
        image_size=size if isinstance(size, int) else source.image_size,
        nets={**source.nets, **nets},
    )


def _params(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise UserError(
            f"--config: {path} can't be read ({words:.200}); give the YAML of SRC"
        ) from error
    model = tree.get("model") if isinstance(tree, Mapping) else None
    params = model.get("params") if isinstance(model, Mapping) else None
    if not isinstance(params, Mapping) or "unet_config" not in params:
        raise UserError(
            f"--config: {path} has no model.params.unet_config; give the YAML of a"
            " latent diffusion model"
        )
    return params


def _check(
    path: pathlib.Path,
    section: str,
    prefix: str,
    options: Mapping[str, Any],
    source: whole.Whole,
) -> None:
    """Raises UserError where an argument is not what the arrays show."""
    heads = {key: options[key] for key in _HEADS if key in options}
    net = networks.module_of(whole.under(source.arrays, prefix), heads)
    for name in _SEEN[prefix]:
        if name not in options or not hasattr(net, name):
            continue
        said, seen = _plain(options[name]), _plain(getattr(net, name))
        if said != seen:
            raise UserError(
                f"--config: {path} has {section}.params.{name} {said!r}, but SRC's"
                f" arrays are of {seen!r}; give the YAML of SRC, or none"
            )


def _plain(value):
    """Lists and tuples alike; one number for equal ones."""
    if isinstance(value, list | tuple):
        value = tuple(value)
        return value[0] if len(set(value)) == 1 else value
    return value
