"""Arrays to pictures: 8-bit, PIL, captioned grids. Needs pillow, nothing else."""

import os
import pathlib
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Float pictures in [-1, 1] to uint8; what lies outside is clipped."""
    return np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(
    images: np.ndarray, captions: Sequence[str] | None = None, columns: int = 8
) -> Image.Image:
    """Pictures uint8 [n, h, w, 3] in rows of `columns`, each over its caption."""
    n, h, w, _ = images.shape
    columns, scale = min(columns, n), max(1, round(128 / w))
    side_w, side_h, margin = w * scale, h * scale, 6
    font = ImageFont.load_default(size=11)
    # The font that pillow brings has no accents.
    texts = [
        unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        for c in captions or [""] * n
    ]
    lines = [textwrap.wrap(text, side_w // 7) or [""] for text in texts]
    text_h = 14 * max(map(len, lines)) if captions is not None else 0
    cell_w, cell_h = side_w + margin, side_h + text_h + margin
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(images):
        left, top = i % columns * cell_w, i // columns * cell_h
        tile = Image.fromarray(picture).resize((side_w, side_h), Image.NEAREST)
        sheet.paste(tile, (left, top))
        draw.text(
            (left + 2, top + side_h),
            "\n".join(lines[i]),
            fill="black",
            font=font,
            spacing=2,
        )
    return sheet


def save(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a picture whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    image.save(partial, format=path.suffix.lstrip(".") or "png")
    os.replace(partial, path)
