"""From prepared conditions to pictures: one compiled program per model and settings."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, editing, grids, guidance, samplers, tiling

CONDITION, INIT = 2, 3  # purposes of a picture's key

# A number, or several that are spread over the steps from the first to the last.
Scale = float | Sequence[float]
# Of all conditions together, or {name: scale} of some, each guided apart.
Guidance = Scale | Mapping[str, Scale]


class Drawn(NamedTuple):
    """Pictures float32 [b, H, W, 3] in [-1, 1], and how they came about."""

    images: np.ndarray
    trajectory: np.ndarray | None  # decoded x0_hat [b, steps, H, W, 3]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled in. Guidance scales, seed, strength, noise level are traced.

    `dropped` names the conditions that each of the guided halves goes without, the
    emptiest first. `window` is the latent's [h, w] that the net sees at once; None is
    all of it.
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None
    spacing: str | None = None
    dropped: tuple[tuple[str, ...], ...] = ()
    window: tuple[int, int] | None = None
    trajectory: bool = False

    def grid(self, schedule: denoiser.Schedule) -> grids.Grid:
        """Where the sampler stops."""
        return samplers.SAMPLERS[self.sampler].grid(schedule, self.steps, self.spacing)


class Rows(NamedTuple):
    """A batch: prepared conditions {name: [b, …]} and a typed key [b] a picture.

    `noise` are standard normal latents [b, h, w, c] in place of what the keys draw.
    """

    fields: Mapping[str, jax.Array]
    keys: jax.Array
    noise: jax.Array | None = None


class Classifier(NamedTuple):
    """What guides by class: the net's params, a class [b] a picture, and how much."""

    params: Any
    label: jax.Array
    scale: jax.Array | float


class Start(NamedTuple):
    """Where pictures begin, if not from noise alone.

    init: pictures [b, H, W, 3] in [-1, 1]; `strength` of the way is gone from them.
    mask: [b, H, W, 1], 1 where `init` is drawn anew; elsewhere it is kept.
    """

    init: jax.Array | None = None
    strength: jax.Array | float = 1.0
    mask: jax.Array | None = None


def encode(
    model: model_lib.LatentDiffusion,
    params: Mapping[str, Any],
    rows: Rows,
    first_stage: first_stage_lib.FirstStage,
    noise_level: jax.Array | None,
    dropped: Sequence[Sequence[str]],
    window: tuple[int, int] | None = None,
) -> list[conditioning.Conditioning | tiling.PerWindow]:
    """The conditions of every guided half, then all of them.

    They are told of each window where one of them is of a part of the picture.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, CONDITION)
    tools = model_lib.make_tools(model, first_stage, keys, noise_level)
    b = len(keys)

    def halves(fields):
        return [
            conditioning.encode(
                model.conditioners,
                {**params["conditioners"], **first_stage.encoders},
                fields,
                tools=tools,
                dropped={name: jnp.ones(b, bool) for name in names},
                sequential=model.unet.sequential_crossattn,
            )
            for names in (*dropped, ())
        ]

    placed = {n: c.of_window for n, c in model.conditioners.items() if c.of_window}
    if window is None or not placed:
        return halves(rows.fields)

    def of_window(frame):
        there = {name: of(rows.fields[name], frame) for name, of in placed.items()}
        return halves({**rows.fields, **there})

    frames = tiling.frames(model.latent_shape[:2], window)
    conds = jax.lax.map(of_window, jnp.asarray(frames))
    conds = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), conds)
    return [tiling.PerWindow(cond) for cond in conds]


def mixed(begin: Any, end: Any, weight: jax.Array) -> Any:
    """Conditions between two, `weight` [b] of the way; numbers of classes switch."""

    def mix(a, b):
        w = denoiser.per_example(weight, a)
        if jnp.issubdtype(a.dtype, jnp.integer):
            return jnp.where(w.reshape(w.shape[: a.ndim]) < 0.5, a, b)
        return (1 - w) * a + w * b

    return jax.tree.map(mix, begin, end)


def _noise(model, rows):
    """(noise [b, h, w, c] to begin with, keys [b] of what the sampler draws).

    Both depend on a picture's own key alone, not on its batch.
    """
    keys = jax.vmap(jax.random.split)(rows.keys)
    if rows.noise is not None:
        return rows.noise, keys[:, 1]
    draw = jax.vmap(lambda key: jax.random.normal(key, model.latent_shape))
    return draw(keys[:, 0]), keys[:, 1]


def _kept(mask, shape):
    """[b, h, w, 1]: 1 where no pixel of a latent's cell is drawn anew."""
    b, height, width, _ = mask.shape
    h, w = shape[:2]
    cells = mask.reshape(b, h, height // h, w, width // w, 1)
    return 1 - jnp.max(cells, (2, 4))


@functools.lru_cache(maxsize=16)
def _draw_fn(model: model_lib.LatentDiffusion, settings: Settings):
    """The compiled program."""
    grid = settings.grid(model.schedule)

    @jax.jit
    def draw(
        params,
        first_stage,
        rows,
        end,
        weight,
        start,
        scales,
        rescale,
        level,
        classifier,
    ):
        given = first_stage, level, settings.dropped, settings.window
        conds = encode(model, params, rows, *given)
        noise, keys = _noise(model, rows)
        if end is not None:
            others = encode(model, params, end, *given)
            conds = mixed(conds, others, weight)
            noise = editing.slerp(noise, _noise(model, end)[0], weight)
        score = None
        if classifier is not None:
            score = model_lib.classifier_score(model, *classifier)
        denoise = model_lib.make_denoiser(
            model,
            params,
            conds,
            [s if s.ndim == 0 else guidance.scale_per_step(grid.t, s) for s in scales],
            guidance_rescale=rescale,
            score=score,
            window=settings.window,
        )
        init = None
        if start.init is not None:
            init_keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, INIT)
            tools = model_lib.make_tools(model, first_stage, init_keys)
            init = tools.encode_image(start.init, init_keys)
        if start.mask is not None:
            kept = _kept(start.mask, model.latent_shape)
            denoise = editing.inpainter(denoise, model.schedule, init, kept, init_keys)
        z, skipped = grids.begin(grid, noise, init, start.strength)
        z, row = samplers.SAMPLERS[settings.sampler](
            denoise,
            z,
            model.schedule,
            keys,
            steps=settings.steps,
            eta=settings.eta,
            spacing=settings.spacing,
            start=0 if start.init is None else skipped,
            trajectory=settings.trajectory,
        )
        if start.mask is not None:
            z = editing.paste(z, init, kept)
        images = _decode(model, first_stage, z, settings.window)
        if start.mask is not None:  # what is kept is kept to the pixel
            images = editing.paste(images, start.init, 1 - start.mask)
        if settings.trajectory:  # one step after another, in the memory of one
            decode = functools.partial(
                _decode, model, first_stage, window=settings.window
            )
            row = jnp.swapaxes(jax.lax.map(decode, row), 0, 1)
        return images, row

    return draw


def _decode(model, first_stage, z, window):
    def decode(z):
        return first_stage_lib.decode(model.autoencoder, first_stage, z)

    if window is not None:
        decode = tiling.tiled(decode, window)
    return decode(z)


@functools.lru_cache(maxsize=4)
def _invert_fn(model: model_lib.LatentDiffusion, settings: Settings):
    grid = settings.grid(model.schedule)

    @jax.jit
    def invert(params, first_stage, rows, images, level):
        conds = encode(model, params, rows, first_stage, level, ())
        denoise = model_lib.make_denoiser(model, params, conds)
        keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, INIT)
        tools = model_lib.make_tools(model, first_stage, keys)
        z, _ = editing.invert(denoise, tools.encode_image(images, keys), grid)
        return z / np.hypot(grid.alpha[0], grid.sigma[0])

    return invert


def guided_halves(
    model: model_lib.LatentDiffusion, guidance_scale: Guidance
) -> tuple[tuple[tuple[str, ...], ...], list[np.ndarray]]:
    """(what each half goes without, one scale a half) of a `guidance_scale`.

    Nothing where it is 1 all along, or where no condition guides. UserError for a name
    that guides nothing.
    """
    guided = tuple(name for name, c in model.conditioners.items() if c.guided)
    apart = guidance_scale
    if not isinstance(apart, Mapping):
        if not guided or np.all(np.asarray(apart) == 1):
            return (), []
        return (guided,), [np.asarray(apart, np.float32)]
    for name in apart:
        if name not in guided:
            hint = config_lib.nearest(name, guided) if guided else "this model has none"
            raise UserError(f"--guidance: {name!r} guides nothing; {hint}")
    names = tuple(apart)
    dropped = tuple(names[k:] for k in range(len(names)))
    return dropped, [np.asarray(scale, np.float32) for scale in apart.values()]


def check_settings(model: model_lib.LatentDiffusion, settings: Settings) -> None:
    """Raises UserError for what this model or sampler doesn't have."""
    if settings.sampler not in samplers.SAMPLERS:
        hint = config_lib.nearest(settings.sampler, samplers.SAMPLERS)
        raise UserError(f"--sampler: {settings.sampler!r}; {hint}")
    try:
        samplers.SAMPLERS[settings.sampler].check_eta(settings.eta)
        settings.grid(model.schedule)
    except UserError as error:
        raise UserError(f"--{error}") from error


def check_noise_level(model: model_lib.LatentDiffusion, level: int) -> None:
    """Raises UserError unless a condition of the model takes this level of noise."""
    levels = [c.noise_levels for c in model.conditioners.values() if c.noise_levels]
    if not levels:
        raise UserError(
            "--noise_level: no input of this model takes noise; leave it out"
        )
    if not 0 <= level < min(levels):
        raise UserError(f"--noise_level: {level}; choose from 0 to {min(levels) - 1}")


def row_keys(seed: int, n: int) -> jax.Array:
    """A typed key [n] for each picture of a seed."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(n)
    )


def draw(
    model: model_lib.LatentDiffusion,
    params: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    fields: Mapping[str, np.ndarray],
    *,
    count: int | None = None,
    settings: Settings = Settings(),  # noqa: B008  frozen
    guidance_scale: Guidance = 3.0,
    guidance_rescale: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    noise_level: int | None = None,
    noise: np.ndarray | None = None,
    start: Start = Start(),  # noqa: B008  a tuple of constants
    classifier: Classifier | None = None,
    frames: int | None = None,
) -> Drawn:
    """Draws one picture per row of the prepared `fields`; `count` where there are none.

    The same seed gives the same pictures whatever the batch size. Where guidance has
    nothing to do (a scale of 1) the net is called once a step, not twice. `noise_level`
    is that of noise-augmented conditions. `noise` and the arrays of `start` have a row
    for each picture. With `frames` the pictures are so many, evenly on the way from the
    first row over all others to the last, in noise (along the sphere) and in
    conditions; there is no `start` then. `classifier` guides besides, by the class of
    each row.
    """
    check_settings(model, settings)
    if noise_level is not None:
        check_noise_level(model, noise_level)
    dropped, scales = guided_halves(model, guidance_scale)
    run = _draw_fn(model, dataclasses.replace(settings, dropped=dropped))
    n = len(next(iter(fields.values()))) if fields else count
    keys, place = row_keys(seed, n), np.arange(n, dtype=np.float32)
    if frames is not None:
        place = np.linspace(0, n - 1, frames, dtype=np.float32)
    first = np.minimum(place.astype(int), max(n - 2, 0)) if frames else np.arange(n)

    def taken(start, at):
        return jax.tree.map(lambda x: x[at] if np.ndim(x) else jnp.float32(x), start)

    def labelled(at):
        if classifier is None:
            return None
        label, scale = jnp.asarray(classifier.label)[at], jnp.float32(classifier.scale)
        return Classifier(classifier.params, label, scale)

    def rows_at(index):
        given = None if noise is None else jnp.asarray(noise, jnp.float32)[index]
        rows = {name: x[index] for name, x in fields.items()}
        return Rows(rows, keys[index], given)

    images, trajectories = [], []
    size = min(batch_size, len(place))
    for begin in range(0, len(place), size):
        # The last row is repeated until there are `size`, so that one shape compiles.
        at = np.minimum(np.arange(begin, begin + size), len(place) - 1)
        x, row = run(
            params,
            first_stage,
            rows_at(first[at]),
            rows_at(np.minimum(first[at] + 1, n - 1)) if frames else None,
            place[at] - first[at] if frames else None,
            taken(start, at),
            scales,
            None if guidance_rescale is None else jnp.float32(guidance_rescale),
            None if noise_level is None else jnp.full([size], noise_level, jnp.int32),
            labelled(first[at]),
        )
        images.append(np.asarray(x))
        trajectories.append(np.asarray(row) if settings.trajectory else None)
    n = len(place)
    return Drawn(
        np.concatenate(images)[:n],
        np.concatenate(trajectories)[:n] if settings.trajectory else None,
    )


def invert(
    model: model_lib.LatentDiffusion,
    params: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    fields: Mapping[str, np.ndarray],
    images: np.ndarray,
    *,
    settings: Settings = Settings(),  # noqa: B008  frozen
    seed: int = 0,
    noise_level: int | None = None,
) -> np.ndarray:
    """The noise [n, h, w, c] that `settings` turn into about `images`, unguided.

    See `editing.invert`; `images` [n, H, W, 3] in [-1, 1], `fields` their conditions.
    """
    check_settings(model, settings)
    n = len(images)
    level = None if noise_level is None else jnp.full([n], noise_level, jnp.int32)
    rows = Rows(dict(fields), row_keys(seed, n))
    run = _invert_fn(model, settings)
    return np.asarray(run(params, first_stage, rows, jnp.asarray(images), level))
