"""Columns made of the pictures: small copies for super-resolution, holes to fill.

A config lists them under data.derive: `low_res=dict(factor=4, kind="pil_bicubic")`,
`mask=dict(full=0.25)`. Example i of a split gets the same ones in every run.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.config import UserError, construct, nearest
from ldm_jax.data import degrade, masks, pipeline
from ldm_jax.data.sources import Source


def add(
    source: Source,
    sections: Mapping[str, Mapping[str, Any]],
    split: str,
    ops: Sequence[tuple[str, dict]],
) -> Source:
    """The source with one column more for each section; pictures are as after `ops`."""
    if not sections:
        return source
    seed, makers = zlib.crc32(split.encode()), {}
    for name, section in sections.items():
        if name not in DERIVED:
            raise UserError(f"data.derive.{name}: {nearest(name, DERIVED)}")
        makers[name] = construct(f"data.derive.{name}", DERIVED[name], dict(section))

    def made(image, index):
        return {
            name: make(image, np.random.default_rng((seed, index)))
            for name, make in makers.items()
        }

    rows = [made(x, i) for i, x in enumerate(pipeline.pictures(source, ops))]
    columns = {name: np.stack([row[name] for row in rows]) for name in makers}
    added = source.with_fields(**columns)
    if source.example is None:
        return added

    def example(index):
        row = source.example(index)
        return row | made(row["image"], index)

    return dataclasses.replace(added, example=example)


# The picture after data.ops, uint8 [h, w, 3], and what is random -> the new value.
Maker = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def low_res(*, factor: int = 4, kind: str = "pil_bicubic") -> Maker:
    """A small copy uint8 [h / factor, w / factor, 3]; see degrade.py."""
    return lambda image, rng: degrade.degrade(image, factor, kind, rng)


def mask(*, full: float = masks.FULL) -> Maker:
    """Holes uint8 [h, w], 1 is hole; see masks.py."""
    return lambda image, rng: masks.random_mask(rng, *image.shape[:2], full)


# What data.derive may list.
DERIVED = {"low_res": low_res, "mask": mask}
