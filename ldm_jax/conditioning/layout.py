"""Layouts as tokens: boxes with categories, as Layout2ImgDiffusion reads them.

An object is three tokens: its class, its top left corner, its bottom right corner. A
corner is one cell of a square grid over the picture (taming's
`ObjectsBoundingBoxConditionalBuilder`, objects_bbox).
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError

NUM_TOKENS = 8192
# Bits of `modifiers`; a class with modifiers is a class of its own.
GROUP, OCCLUDED, DEPICTION, INSIDE = 1, 2, 4, 8
WHOLE = (0.0, 0.0, 1.0, 1.0)  # x, y, width, height


def encode(
    boxes: Any,
    categories: Any,
    *,
    num_classes: int,
    max_objects: int = 30,
    num_tokens: int = NUM_TOKENS,
    modifiers: Any = None,
    crop: Any = None,
    encode_crop: bool = False,
    flip: bool = False,
) -> np.ndarray:
    """Tokens int32 [n, 3 · max_objects (+ 2 of the crop if `encode_crop`)].

    boxes [n, m, 4] and crop, [n, 4] or one for all, are (x, y, width, height) in parts
    of the picture, the annotations' own form; categories int [n, m] have -1 where there
    is no object; modifiers int [n, m] are bits. Objects beyond `max_objects`, of no
    area, or outside of the crop are left out, and their places hold the token "none",
    the last one. Without `encode_crop` boxes are relative to the crop. `flip` mirrors
    left and right.
    """
    boxes, categories = np.asarray(boxes, np.float64), np.asarray(categories)
    if modifiers is None:
        modifiers = np.zeros_like(categories)
    sections, none = math.isqrt(num_tokens), num_tokens - 1
    crop = np.asarray(WHOLE if crop is None else crop, np.float64)

    def token(x, y):
        return _token(np.float64(x), np.float64(y), sections)

    rows = []
    for row_boxes, row_classes, row_bits, frame in zip(
        boxes,
        categories,
        np.asarray(modifiers),
        np.broadcast_to(crop, (len(boxes), 4)),
        strict=True,
    ):
        window = WHOLE if encode_crop else frame
        tokens = []
        there = np.flatnonzero(row_classes >= 0)[:max_objects]
        for i in there:
            if _intersection(row_boxes[i], frame) <= 0:
                continue
            x, y, w, h = _within(row_boxes[i], window, flip)
            tokens.append(row_classes[i] + num_classes * row_bits[i])
            tokens += [token(x, y), token(x + w, y + h)]
        tokens += [none] * (3 * max_objects - len(tokens))
        if encode_crop:
            x, y, w, h = frame
            x = 1 - (x + w) if flip else x
            tokens += [token(x, y), token(x + w, y + h)]
        rows.append(tokens)
    return np.array(rows, np.int32)


def within_crops(tokens: Any, frame: Any, num_tokens: int = NUM_TOKENS) -> Any:
    """Tokens [b, 2] of the part `frame` (x, y, width, height) of crops [b, 2].

    Arrays of numpy or JAX. LDM encodes the crop anew for each tile
    (`LatentDiffusion.apply_model`).
    """
    sections = math.isqrt(num_tokens)
    x, y = (a / (sections - 1) for a in (tokens % sections, tokens // sections))

    def part(side, start, size):  # of every crop's [b, 2] from and to
        length = side[:, 1] - side[:, 0]
        first = side[:, 0] + start * length
        return first, first + size * length

    (x0, x1), (y0, y1) = part(x, frame[0], frame[2]), part(y, frame[1], frame[3])
    corners = [_token(x0, y0, sections), _token(x1, y1, sections)]
    return jnp.stack(corners, axis=1).astype(tokens.dtype)


def _token(x, y, sections):
    """The cell of a corner; halves go to the even number, as Python's `round`."""
    cells = [(a * (sections - 1)).round().astype(int) for a in (x, y)]
    return cells[1] * sections + cells[0]


def decode(
    tokens: np.ndarray, *, max_objects: int = 30, num_tokens: int = NUM_TOKENS
) -> list[list[tuple[int, tuple[float, float, float, float]]]]:
    """The objects of token rows [n, k]: per row a list of (class, (x0, y0, x1, y1))."""
    sections, none = math.isqrt(num_tokens), num_tokens - 1

    def corner(token):
        return (token % sections / (sections - 1), token // sections / (sections - 1))

    rows = []
    for row in np.asarray(tokens):
        triples = row[: 3 * max_objects].reshape(-1, 3).tolist()
        rows.append(
            [(c, corner(a) + corner(b)) for c, a, b in triples if none not in (c, a, b)]
        )
    return rows


def check(boxes: Any, categories: Any, num_classes: int) -> None:
    """Raises UserError for a box or a category out of range."""
    boxes, categories = np.asarray(boxes), np.asarray(categories)
    if boxes.ndim != 3 or boxes.shape != (*categories.shape, 4):
        raise UserError(
            f"boxes: {list(boxes.shape)} with categories {list(categories.shape)}; give"
            " [n, m, 4] and [n, m]"
        )
    there = categories >= 0
    x0, y0, x1, y1 = np.moveaxis(boxes[there], -1, 0)
    wrong = ~((x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1))
    if wrong.any():
        box = [round(float(x), 4) for x in boxes[there][wrong][0]]
        raise UserError(
            f"boxes: {box} is out of range; give [x0, y0, x1, y1] with"
            " 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
        )
    unknown = categories[categories >= num_classes]
    if unknown.size:
        raise UserError(
            f"categories: {unknown[0]} is unknown; choose from 0 to {num_classes - 1},"
            " or -1 for no object"
        )


def check_crops(crops: Any) -> None:
    """Raises UserError for a part that is shown which is none of the picture."""
    for x0, y0, x1, y1 in np.asarray(crops):
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise UserError(
                f"crop: {[float(x) for x in (x0, y0, x1, y1)]} is out of range; give"
                " [x0, y0, x1, y1] with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
            )


def from_corners(boxes: Any) -> np.ndarray:
    """(x0, y0, x1, y1) to (x, y, width, height), float64 […, 4]."""
    boxes = np.asarray(boxes, np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def _intersection(box, other) -> float:
    sides = [
        min(box[i] + box[i + 2], other[i] + other[i + 2]) - max(box[i], other[i])
        for i in range(2)
    ]
    return max(sides[0], 0.0) * max(sides[1], 0.0)


def _within(box, window, flip: bool) -> tuple[float, ...]:
    """`box` in parts of `window`, cut at its borders."""
    start, size = [], []
    for i in range(2):
        first = min(max((box[i] - window[i]) / window[i + 2], 0.0), 1.0)
        start.append(first)
        size.append(min(box[i + 2] / window[i + 2], 1 - first))
    if flip:
        start[0] = 1 - (start[0] + size[0])
    return start[0], start[1], size[0], size[1]
