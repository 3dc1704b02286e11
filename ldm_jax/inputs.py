"""What a model may be given at sampling, and how the command reads it from files.

A model's conditioners name the columns that they read; INPUTS at the foot says which
flag of `python -m ldm_jax.sample` fills which columns. So there is no task flag.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.config import UserError


class Input(NamedTuple):
    """One flag: its name, the columns that it fills, its help, and its reader.

    `read(flag, values)` gives {column: one row per value}.
    """

    flag: str
    columns: tuple[str, ...]
    help: str
    read: Callable[[str, Sequence[str]], dict[str, Any]]


def flags_for(fields: Sequence[str]) -> list[Input]:
    """The inputs of a model that reads these columns, in the order of INPUTS."""
    return [entry for entry in INPUTS if set(entry.columns) & set(fields)]


def read(entry: Input, values: Sequence[str]) -> dict[str, Any]:
    """Reads what was given to a flag; UserError names the flag and the file."""
    return entry.read(f"--{entry.flag}", values)


def collect(
    fields: Sequence[str], inputs: Mapping[str, Any], count: int | None
) -> tuple[dict[str, Any], int]:
    """`inputs` {column: rows} as equally many rows of every one of `fields`.

    One row serves for all; `count` repeats it, or says how many pictures a model draws
    that takes nothing. Raises UserError for what is missing, too much or uneven.
    """
    takes = f"it takes {', '.join(fields)}" if fields else "it is unconditional"
    for name in inputs:
        if name not in fields:
            raise UserError(f"{name}: this model takes none, {takes}; leave it out")
    for name in fields:
        if name not in inputs:
            raise UserError(f"{name}: none given; give one ({takes})")
        if not len(inputs[name]):
            raise UserError(f"{name}: none given; give at least one")
    if count is not None and count < 1:
        raise UserError(f"count: {count}; choose 1 or more")
    sizes = {name: len(inputs[name]) for name in fields}
    n = max(sizes.values(), default=count or 1)
    if n == 1 and count is not None:
        n = count
    for name, size in sizes.items():
        if size not in (1, n):
            raise UserError(f"{name}: {size} given, but {n} of another; give 1 or {n}")
    if count not in (None, n):
        raise UserError(f"count: {count}, but {n} inputs are given; leave it out")
    rows = {}
    for name in fields:
        column = inputs[name]
        once = len(column) == 1
        if isinstance(column, np.ndarray):
            rows[name] = np.repeat(column, n, axis=0) if once else column
        else:
            rows[name] = list(column) * n if once else list(column)
    return rows, n


# ---- Readers -------------------------------------------------------------------


def open_image(flag: str, path: str) -> Image.Image:
    """A picture file, opened; UserError where it is none."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{flag}: no file {path!r}")
    try:
        image = Image.open(path)
        image.load()
    except OSError as error:
        raise UserError(f"{flag}: {path!r} is no picture ({error})") from error
    return image


def rgb(flag: str, path: str) -> np.ndarray:
    """uint8 [h, w, 3] of an 8-bit picture without transparency."""
    image, deep = open_image(flag, path), False
    with Image.open(path) as header:  # pillow cuts RGB to 8 bits without a word
        deep = any(";16" in str(tile) for tile in header.tile)
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        raise UserError(
            f"{flag}: {path!r} has an alpha channel; lay it on a background and save it"
            " as RGB"
        )
    if deep or image.mode not in ("RGB", "L", "P"):
        raise UserError(
            f"{flag}: {path!r} has not 8 bits a channel (mode {image.mode}); save it as"
            " 8-bit RGB"
        )
    return np.asarray(image.convert("RGB"))


def _stack(flag: str, rows: Sequence[np.ndarray]) -> np.ndarray:
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise UserError(f"{flag}: sizes {shapes[0]} and {shapes[1]}; give one size")
    return np.stack(rows)


def _pictures(column: str):
    def read(flag: str, paths: Sequence[str]) -> dict[str, Any]:
        return {column: _stack(flag, [rgb(flag, path) for path in paths])}

    return read


def _masks(flag: str, paths: Sequence[str]) -> dict[str, Any]:
    rows = [np.asarray(open_image(flag, path).convert("L")) for path in paths]
    return {"mask": _stack(flag, [(row >= 128).astype(np.uint8) for row in rows])}


def _class_maps(flag: str, paths: Sequence[str]) -> dict[str, Any]:
    rows = []
    for path in paths:
        image = open_image(flag, path)
        if image.mode not in ("L", "P"):
            raise UserError(
                f"{flag}: {path!r} is of mode {image.mode}; save class numbers as"
                " 8-bit grey or palette"
            )
        rows.append(np.asarray(image))
    return {"segmentation": _stack(flag, rows)}


def _depths(flag: str, paths: Sequence[str]) -> dict[str, Any]:
    rows = []
    for path in paths:
        image = open_image(flag, path)
        if image.mode not in ("L", "I", "F", "I;16", "I;16B"):
            raise UserError(
                f"{flag}: {path!r} is of mode {image.mode}; save depth as one grey"
                " channel, nearer is brighter"
            )
        rows.append(np.asarray(image, np.float32))
    return {"depth": _stack(flag, rows)}


def _labels(flag: str, values: Sequence[str]) -> dict[str, Any]:
    try:
        return {"label": np.array([int(value) for value in values])}
    except ValueError as error:
        raise UserError(f"{flag}: {error}; give class numbers") from error


def _captions(flag: str, values: Sequence[str]) -> dict[str, Any]:
    del flag
    return {"caption": list(values)}


def _layouts(flag: str, paths: Sequence[str]) -> dict[str, Any]:
    """Files [{"box": [x0, y0, x1, y1], "category": 3}, …], boxes as parts of 1."""
    layouts = []
    for path in paths:
        if not pathlib.Path(path).is_file():
            raise UserError(f"{flag}: no file {path!r}")
        try:
            objects = json.loads(pathlib.Path(path).read_text())
            boxes = [[float(x) for x in entry["box"]] for entry in objects]
            categories = [int(entry["category"]) for entry in objects]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{flag}: {path!r} is no list of {{"box": [x0, y0, x1, y1],'
                f' "category": 3}} ({error!r})'
            ) from error
        if any(len(box) != 4 for box in boxes) or not boxes:
            raise UserError(f"{flag}: {path!r}: a box is [x0, y0, x1, y1], one or more")
        layouts.append((boxes, categories))
    most = max(len(categories) for _, categories in layouts)
    boxes = np.zeros((len(layouts), most, 4), np.float32)
    categories = np.full((len(layouts), most), -1, np.int32)
    for row, (row_boxes, row_categories) in enumerate(layouts):
        boxes[row, : len(row_boxes)] = row_boxes
        categories[row, : len(row_categories)] = row_categories
    return {"boxes": boxes, "categories": categories}


INPUTS = (
    Input("prompt", ("caption",), "what to draw", _captions),
    Input("label", ("label",), "number of a class", _labels),
    Input(
        "layout",
        ("boxes", "categories"),
        'a JSON file: [{"box": [x0, y0, x1, y1], "category": 3}, …], boxes from 0 to 1',
        _layouts,
    ),
    Input(
        "segmentation",
        ("segmentation",),
        "a picture of class numbers, 8-bit grey or palette; 255 is none",
        _class_maps,
    ),
    Input("low_res", ("low_res",), "the small picture", _pictures("low_res")),
    Input("depth", ("depth",), "a grey picture, nearer is brighter", _depths),
    Input(
        "image",
        ("image",),
        "the picture to complete, or to draw alike",
        _pictures("image"),
    ),
    Input("mask", ("mask",), "a grey picture, white is drawn anew", _masks),
)

# What every model takes besides: a picture to start from.
START = Input(
    "init_image",
    ("init_image",),
    "a picture to start from; with --mask its black parts are kept",
    _pictures("init_image"),
)
