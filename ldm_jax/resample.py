"""Resizing as matrices: a resize is linear in each axis, one matrix for rows and one
for columns. Half-pixel centres and, but for the areas, no antialiasing, as torch's
`interpolate` and OpenCV have it. Numbers only, for nets and data alike.
"""

import numpy as np

# `area` is OpenCV's mean over a cell, `adaptive` torch's over whole pixels.
METHODS = ("nearest", "bilinear", "bicubic", "lanczos", "area", "adaptive")
_RADIUS = {"bilinear": 1, "area": 1, "bicubic": 2, "lanczos": 4}


def matrix(
    n_in: int,
    n_out: int,
    method: str,
    *,
    corners: bool = False,
    scale: float | None = None,
) -> np.ndarray:
    """float64 [n_out, n_in]: what each output row takes of the input rows.

    `scale` is how many input rows an output row is from the next, n_in / n_out unless
    given (torch's `scale_factor` is its inverse, also where n_out was rounded).
    `corners` puts the first and last rows' centres on each other (torch's
    `align_corners`), for bilinear and bicubic. Bicubic is Keys' with a = -0.75. Raises
    ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r}; choose one of {', '.join(METHODS)}")
    scale, i, j = scale or n_in / n_out, np.arange(n_out), np.arange(n_in)
    if method == "nearest":
        return np.eye(n_in)[np.minimum(np.floor(i * scale).astype(int), n_in - 1)]
    if method == "adaptive":
        start, end = np.floor(i * scale)[:, None], np.ceil((i + 1) * scale)[:, None]
        inside = (j >= start) & (j < end)
        return inside / inside.sum(axis=1, keepdims=True)
    if method == "area" and scale >= 1:  # how much of each pixel lies in the cell
        start, end = (i * scale)[:, None], ((i + 1) * scale)[:, None]
        share = np.minimum(end, j + 1) - np.maximum(start, j)
        return np.maximum(share, 0) / scale
    centre = (i + 0.5) * scale - 0.5
    if method == "area":  # enlarging: blends only where a cell crosses a pixel's edge
        whole = np.floor(i * scale)
        centre = whole + np.maximum(i + 1 - (whole + 1) / scale, 0)
    if corners:
        centre = i * (n_in - 1) / max(n_out - 1, 1)
    radius = _RADIUS[method]
    taps = np.floor(centre)[:, None] + np.arange(1 - radius, radius + 1)
    weights = _kernel(centre[:, None] - taps, method)
    weights /= weights.sum(axis=1, keepdims=True)
    # Beyond the border its own row is repeated.
    index = np.clip(taps, 0, n_in - 1).astype(int)
    out = np.zeros((n_out, n_in))
    np.add.at(out, (i[:, None], index), weights)
    return out


def _kernel(d: np.ndarray, method: str) -> np.ndarray:
    d = np.abs(d)
    if method == "lanczos":
        return np.sinc(d) * np.sinc(d / 4) * (d < 4)
    if method == "bicubic":
        a = -0.75
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0))
    return np.maximum(1 - d, 0)
