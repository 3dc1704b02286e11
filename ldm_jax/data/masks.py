"""Holes for training an inpainting model: strokes, boxes, now and then everything.

In the spirit of LaMa's large masks (Suvorov et al. 2021), whose own generator differs
in its numbers; Stable Diffusion 2's was never released.
"""

import numpy as np
from PIL import Image, ImageDraw

FULL, BOXES = 0.25, 0.5  # shares of full masks, and of boxes among the others


def random_mask(
    rng: np.random.Generator, height: int, width: int, full: float = FULL
) -> np.ndarray:
    """uint8 [height, width], 1 is hole.

    With probability `full` all of it; else 1 to 3 boxes with sides of 20% to 60% of the
    picture's, or 1 to 4 strokes of 2 to 6 segments, each 15% to 50% of the shorter side
    long and 10% to 25% wide, with round joints.
    """
    if rng.random() < full:
        return np.ones((height, width), np.uint8)
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    if rng.random() < BOXES:
        for _ in range(rng.integers(1, 4)):
            w, h = rng.uniform(0.2, 0.6, 2) * (width, height)
            x, y = rng.uniform(0, 1, 2) * (width - w, height - h)
            draw.rectangle((x, y, x + w, y + h), fill=1)
    else:
        for _ in range(rng.integers(1, 5)):
            _stroke(draw, rng, height, width)
    return np.array(image)


def _stroke(draw: ImageDraw.ImageDraw, rng, height: int, width: int) -> None:
    side = min(height, width)
    breadth = max(rng.uniform(0.1, 0.25) * side, 1.0)
    here, angle = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(2, 7)):
        angle += rng.uniform(-np.pi / 2, np.pi / 2)
        step = rng.uniform(0.15, 0.5) * side
        there = here + step * np.array([np.cos(angle), np.sin(angle)])
        there = np.clip(there, 0, (width, height))
        draw.line((*here, *there), fill=1, width=round(breadth))
        for x, y in (here, there):
            r = breadth / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
        here = there
