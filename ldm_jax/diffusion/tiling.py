"""A net on overlapping windows of an input that is larger than it can take.

`LatentDiffusion.split_input_params` of the CompVis code: crops, weights that fall
towards the border of a crop, and their weighted mean.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser


def starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows of `window` begin along an axis of `size`: 0, stride, …

    The last one ends with the axis, also where the strides don't (the original leaves
    such a rest out).
    """
    if not 1 <= stride <= window:
        raise UserError(f"stride: {stride}; choose from 1 to the window's {window}")
    window = min(window, size)
    return [*range(0, size - window, stride), size - window]


def frames(
    size: tuple[int, int],
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
) -> np.ndarray:
    """The windows of an input of `size` [h, w], in the order in which `tiled` runs.

    float32 [windows, 4]: x, y, width and height in parts of the input.
    """
    tops, lefts, (h, w) = _places(size, window, stride)
    return np.array(
        [
            (left / size[1], top / size[0], w / size[1], h / size[0])
            for top in tops
            for left in lefts
        ],
        np.float32,
    )


def border_weights(h: int, w: int, low: float = 0.01, high: float = 0.5) -> np.ndarray:
    """[h, w] float64: distance to the nearest border, where a side is 1 long.

    0 at the border, 1/2 in the centre, clipped to [low, high]; `low` above 0 keeps the
    weights of what only one window covers from vanishing.
    """

    def to_border(n):
        place = np.linspace(0, 1, n)
        return np.minimum(place, 1 - place)

    distance = np.minimum(to_border(h)[:, None], to_border(w)[None])
    return np.clip(distance, low, high)


def tie_weights(
    rows: int, columns: int, low: float = 0.01, high: float = 0.5
) -> np.ndarray:
    """[rows * columns]: `border_weights` of the windows' own places, row by row."""
    return border_weights(rows, columns, low, high).reshape(-1)


def tiled(
    f: Callable[[Any], jax.Array],
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    *,
    low: float = 0.01,
    high: float = 0.5,
    break_ties: bool = False,
) -> Callable[[Any], jax.Array]:
    """`f` on overlapping windows of its input, put together with smooth weights.

    They overlap by half unless `stride` says otherwise.

    The input is [b, h, w, c] or a pytree of such, all of one h and w, that are cut
    alike; `f` gives [b, h', w', c'] for each window, larger or smaller by one factor (a
    decoder or an encoder). The windows run one after another, so memory is that of one.
    An input that fits into the window goes to `f` as it is. `break_ties` also weighs
    windows by how central they are.
    """
    return _numbered(lambda x, number: f(x), window, stride, low, high, break_ties)


def _numbered(f, window, stride=None, low=0.01, high=0.5, break_ties=False):
    """`tiled` of an `f(x, number)` that is told which window it is given."""

    def run(x):
        _, h, w, _ = jax.tree.leaves(x)[0].shape
        tops, lefts, size = _places((h, w), window, stride)
        if len(tops) == len(lefts) == 1:
            return f(x, 0)
        corners = [(top, left) for top in tops for left in lefts]
        out = jax.eval_shape(lambda x: f(_cut(x, (0, 0), size), 0), x)
        b, out_h, out_w, c = out.shape
        weights = border_weights(out_h, out_w, low, high)[None, :, :, None]
        ties = np.ones(len(corners))
        if break_ties:
            ties = tie_weights(len(tops), len(lefts), low, high)
        canvas = (h * out_h // size[0], w * out_w // size[1])
        places = np.array(corners) * [out_h, out_w] // size
        total = np.zeros([1, *canvas, 1])
        for (top, left), tie in zip(places, ties, strict=True):
            total[:, top : top + out_h, left : left + out_w] += tie * weights

        def add(mean, inputs):
            corner, place, tie, number = inputs
            at = (0, *place, 0)
            part = f(_cut(x, corner, size), number).astype(jnp.float32)
            part *= tie * jnp.asarray(weights, jnp.float32)
            old = jax.lax.dynamic_slice(mean, at, part.shape)
            return jax.lax.dynamic_update_slice(mean, old + part, at), None

        rows = (
            jnp.asarray(corners),
            jnp.asarray(places),
            jnp.asarray(ties, jnp.float32),
            jnp.arange(len(corners)),
        )
        mean, _ = jax.lax.scan(add, jnp.zeros([b, *canvas, c]), rows)
        return mean / jnp.asarray(total, jnp.float32)

    return run


@flax.struct.dataclass
class PerWindow:
    """A condition of its own for every window: leaves of `conds` [b, windows, …]."""

    conds: Any


def tiled_apply(
    apply: denoiser.Apply,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    **weights: Any,
) -> denoiser.Apply:
    """`apply(z_t, t, cond)` window by window; `weights` are `tiled`'s options.

    Leaves of `cond` with the height and width of z_t [b, h, w, c] are cut as it is; the
    others (tokens, vectors, classes) go to every window whole, but those of `PerWindow`
    to their own. UserError where a condition is a picture of another size.
    """

    def run(z_t, t, cond):
        each = isinstance(cond, PerWindow)
        leaves, structure = jax.tree.flatten(cond.conds if each else cond)
        spatial = [leaf.ndim == 4 + each for leaf in leaves]
        for leaf, is_spatial in zip(leaves, spatial, strict=True):
            if is_spatial and leaf.shape[-3:-1] != z_t.shape[1:3]:
                raise UserError(
                    f"cond: {leaf.shape[-3:-1]} does not lie over the latent's"
                    f" {z_t.shape[1:3]}; resize it before tiling"
                )
        # Pictures are the same for all windows: each sees its own part of them.
        cut = [
            leaf[:, 0] if each else leaf
            for leaf, is_cut in zip(leaves, spatial, strict=True)
            if is_cut
        ]

        def window_apply(parts, number):
            z_window, *parts = parts
            parts = iter(parts)
            here = [
                next(parts) if is_cut else leaf[:, number] if each else leaf
                for leaf, is_cut in zip(leaves, spatial, strict=True)
            ]
            return apply(z_window, t, jax.tree.unflatten(structure, here))

        return _numbered(window_apply, window, stride, **weights)([z_t, *cut])

    return run


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _places(size, window, stride):
    """(tops, lefts, (height, width)) of the windows of an input of `size`."""
    window, half = _pair(window), [max(side // 2, 1) for side in _pair(window)]
    stride = half if stride is None else _pair(stride)
    tops, lefts = map(starts, size, window, stride)
    return tops, lefts, (min(window[0], size[0]), min(window[1], size[1]))


def _cut(x, corner, size):
    """The window of `size` at `corner` of every leaf [b, h, w, c]."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice(
            leaf, (0, *corner, 0), (leaf.shape[0], *size, leaf.shape[3])
        ),
        x,
    )
