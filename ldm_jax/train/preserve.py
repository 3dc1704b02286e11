"""DreamBooth's prior preservation: what the model drew before is trained on too.

A few pictures of one thing make a model forget the others of its kind. So the run that
training starts from first draws `diffusion_stage.preserve.pictures` of the prompt of
that kind, and the loss becomes E[own] + weight E[drawn] (Ruiz et al. 2022, eq. 2). The
pictures stay in the workdir, so that a run goes on with those it began with.
"""

import pathlib

import jax
import ml_collections
import numpy as np
from PIL import Image

from ldm_jax import loaded
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import kinds
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.train import origin, report

OPTION = "diffusion_stage.preserve"
PICTURES = 200
WEIGHT = "_weight"  # the column of each example's share in the loss


def settings_of(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
    """The section, where it asks for anything."""
    section = config.diffusion_stage.get("preserve", {})
    return section if section.get("prompt") else None


def check(config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion) -> None:
    """Raises UserError for what can't be drawn, or trained on beside the data."""
    settings = settings_of(config)
    if settings is None:
        return
    prompt = f"{OPTION}.prompt: {settings.prompt!r}"
    if not config.get("init_from"):
        raise UserError(
            f"{prompt}, but no model to draw it; set init_from to one's run"
        )
    if settings.pictures is not None and settings.pictures < 1:
        raise UserError(f"{OPTION}.pictures: {settings.pictures}; choose 1 or more")
    if settings.weight is not None and not settings.weight > 0:
        raise UserError(
            f"{OPTION}.weight: {settings.weight}; choose one above 0, or set"
            f" {OPTION}.prompt to None"
        )
    if set(kinds.required_fields(model.conditioners)) != {"caption"}:
        raise UserError(
            f"{prompt}, but this model is told more, or other things, than a caption;"
            " set it to None"
        )
    if not config.diffusion_stage.cache_latents:
        raise UserError(
            f"{prompt}, but diffusion_stage.cache_latents is False; set it to True"
        )


def drawn(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> sources.Source | None:
    """What `init_from` draws of the prompt: the workdir's own pictures, if there."""
    settings = settings_of(config)
    if settings is None:
        return None
    folder = workdir / "preserve"
    if folder.is_dir():
        images = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])
    else:
        count = settings.pictures or PICTURES
        report.say(
            f"diffusion: {config.init_from} draws {count} pictures of"
            f" {settings.prompt!r}, to be kept in {folder}"
        )
        before = loaded.load(origin.run_of(config, "init_from"))
        images = before.sample(
            settings.prompt,
            count=count,
            size=config.resolution,
            seed=config.seed,
        )
        if jax.process_index() == 0:  # the others have drawn the same
            with workdir_lib.whole(folder) as partial:
                partial.mkdir(parents=True)
                for i, x in enumerate(images):
                    Image.fromarray(x).save(partial / f"{i:05d}.png")
    captions = np.array([settings.prompt] * len(images), object)
    return sources.Source({"image": images, "caption": captions})


def join(
    own: dict[str, np.ndarray], kept: dict[str, np.ndarray], weight: float
) -> dict[str, np.ndarray]:
    """The columns of both, the fewer rows repeated, with a weight for each example.

    The mean of weighted losses is then E[own] + weight E[kept].
    """
    parts = [own, kept]
    rows = [len(next(iter(part.values()))) for part in parts]
    copies = [max(1, round(max(rows) / n)) for n in rows]
    sizes = [n * times for n, times in zip(rows, copies, strict=True)]
    shares = (1.0, weight)
    weights = [
        np.full(n, share * sum(sizes) / n, np.float32)
        for n, share in zip(sizes, shares, strict=True)
    ]
    columns = {
        name: np.concatenate(
            [np.concatenate([p[name]] * k) for p, k in zip(parts, copies, strict=True)]
        )
        for name in own
    }
    return columns | {WEIGHT: np.concatenate(weights)}
