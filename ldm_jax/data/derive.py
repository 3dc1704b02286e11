"""Columns made of the pictures: small copies for super-resolution, holes to fill.

A config lists them under data.derive: `low_res=dict(factor=4, kind="pil_bicubic")`,
`mask=dict(full=0.25)`. Example i of a split gets the same ones in every run.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
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
    images, seed, columns = (
        pipeline.pictures(source, ops),
        zlib.crc32(split.encode()),
        {},
    )
    for name, section in sections.items():
        if name not in DERIVED:
            raise UserError(f"data.derive.{name}: {nearest(name, DERIVED)}")
        make = functools.partial(DERIVED[name], images, seed)
        columns[name] = construct(f"data.derive.{name}", make, dict(section))
    return source.with_fields(**columns)


def low_res(
    images: np.ndarray, seed: int, *, factor: int = 4, kind: str = "pil_bicubic"
) -> np.ndarray:
    """Small copies uint8 [n, h / factor, w / factor, 3]; see degrade.py."""
    return np.stack(
        [
            degrade.degrade(x, factor, kind, np.random.default_rng((seed, index)))
            for index, x in enumerate(images)
        ]
    )


def mask(images: np.ndarray, seed: int, *, full: float = masks.FULL) -> np.ndarray:
    """Holes uint8 [n, h, w], 1 is hole; see masks.py."""
    n, h, w, _ = images.shape
    return masks.masks(n, h, w, seed, full)


# What data.derive may list.
DERIVED = {"low_res": low_res, "mask": mask}
