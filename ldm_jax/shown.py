"""What a person sees of a condition: a picture of it, and words under it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Of class numbers; more than these begin again, a little darker.
_PALETTE = np.array(
    [
        (245, 245, 245), (230, 25, 75), (60, 180, 75), (255, 205, 25), (0, 110, 200),
        (245, 130, 48), (145, 30, 180), (70, 220, 240), (240, 50, 230), (170, 220, 60),
        (250, 170, 190), (0, 128, 128), (200, 170, 255), (154, 99, 36), (255, 240, 180),
        (128, 0, 0), (150, 255, 190), (128, 128, 0), (255, 200, 150), (0, 0, 117),
        (128, 128, 128),
    ],
    np.uint8,
)  # fmt: skip


def colour(numbers: np.ndarray) -> np.ndarray:
    """Colours uint8 […, 3] of class numbers […]; the same in every picture."""
    turn = np.asarray(numbers, int) // len(_PALETTE)
    colours = _PALETTE[np.asarray(numbers, int) % len(_PALETTE)]
    return (colours * 0.8 ** turn[..., None]).astype(np.uint8)


def words(fields: Mapping[str, Any], n: int) -> list[str]:
    """What can be said of `n` rows of raw conditions: captions, classes."""
    if "caption" in fields:
        return list(fields["caption"])
    if "label" in fields:
        return [f"class {label}" for label in fields["label"]]
    return [""] * n


def picture(fields: Mapping[str, Any], size: int) -> np.ndarray | None:
    """What can be drawn of raw conditions, uint8 [n, size, size, 3]; None if nothing.

    A layout's boxes, a class map's colours, a small picture enlarged, depth in grey, a
    picture with its hole in grey.
    """
    if "boxes" in fields:
        boxes = np.asarray(fields["boxes"])
        if "crop" in fields:  # boxes are of the larger picture that it shows a part of
            corner, end = np.split(np.asarray(fields["crop"])[:, None], 2, axis=-1)
            shown = np.tile(corner, 2), np.tile(end - corner, 2)
            boxes = (boxes - shown[0]) / shown[1]
        pairs = zip(boxes, fields["categories"], strict=True)
        return np.stack([_boxes(row, numbers, size) for row, numbers in pairs])
    if "segmentation" in fields:
        rows = colour(fields["segmentation"])
    elif "low_res" in fields:
        rows = fields["low_res"]
    elif "depth" in fields:
        depth = np.asarray(fields["depth"], np.float32)
        low, high = (f(depth, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
        grey = 255 * (depth - low) / np.maximum(high - low, 1e-6)
        rows = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
    elif "image" in fields:
        rows = np.asarray(fields["image"])
        if "mask" in fields:
            hole = np.asarray(fields["mask"])[..., None] > 0
            rows = np.where(hole, np.uint8(128), rows)
    else:
        return None
    return np.stack([_resized(row, size) for row in rows])


def _resized(row: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(row).resize((size, size), Image.NEAREST))


def _boxes(boxes: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
    sheet = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(sheet)
    for box, number in zip(np.asarray(boxes) * (size - 1), numbers, strict=True):
        if number >= 0:
            line = tuple(int(c) for c in colour(np.asarray(number + 1)))
            draw.rectangle(box.tolist(), outline=line, width=max(1, size // 32))
    return np.asarray(sheet)
