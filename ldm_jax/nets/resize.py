"""Resizing as torch's `interpolate` does it: half-pixel centres, no antialiasing.

`jax.image.resize` antialiases and has another cubic, so published weights would see
other pictures. A resize is linear in each axis: a matrix for rows and one for columns.
"""

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("nearest", "bilinear", "bicubic", "area")


def matrix(n_in: int, n_out: int, method: str) -> np.ndarray:
    """float64 [n_out, n_in]: what each output row takes of the input rows.

    Bicubic is Keys' with a = -0.75. Raises ValueError for an unknown method.
    """
    scale = n_in / n_out
    i = np.arange(n_out)
    if method == "nearest":
        return np.eye(n_in)[np.floor(i * scale).astype(int)]
    if method == "area":  # torch's adaptive average
        start, end = np.floor(i * scale), np.ceil((i + 1) * scale)
        j = np.arange(n_in)
        inside = (j >= start[:, None]) & (j < end[:, None])
        return inside / inside.sum(axis=1, keepdims=True)
    if method not in METHODS:
        raise ValueError(f"method: {method!r}; choose one of {', '.join(METHODS)}")
    centre = (i + 0.5) * scale - 0.5
    if method == "bilinear":
        centre = np.maximum(centre, 0)
    first = np.floor(centre)
    taps = np.arange(2) if method == "bilinear" else np.arange(-1, 3)
    distance = np.abs(centre[:, None] - first[:, None] - taps)
    if method == "bilinear":
        weights = 1 - distance
    else:
        weights = np.where(distance <= 1, _near(distance), _far(distance))
    # Beyond the border its own row is repeated.
    index = np.clip(first[:, None] + taps, 0, n_in - 1).astype(int)
    out = np.zeros((n_out, n_in))
    np.add.at(out, (i[:, None], index), weights)
    return out


def _near(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    return ((a + 2) * d - (a + 3)) * d * d + 1


def _far(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def resize(x: jax.Array, size: tuple[int, int], method: str) -> jax.Array:
    """[b, h, w, c] to [b, *size, c], in float32."""
    rows = jnp.asarray(matrix(x.shape[1], size[0], method), jnp.float32)
    columns = jnp.asarray(matrix(x.shape[2], size[1], method), jnp.float32)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x.astype(jnp.float32), columns)
