"""Small copies of pictures, as a super-resolution model is to undo them.

Plain resizers by their library's name and rules (`pil_bicubic`, `cv_area`, …), and the
blind degradations of BSRGAN (Zhang et al. 2021) in the variant that the LDM data code
used: `bsrgan` and the milder `bsrgan_light`. 8 bits in, 8 bits out.
"""

import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

from ldm_jax import resample
from ldm_jax.config import UserError, nearest

_PIL = {
    "pil_nearest": Image.Resampling.NEAREST,
    "pil_bilinear": Image.Resampling.BILINEAR,
    "pil_bicubic": Image.Resampling.BICUBIC,
    "pil_box": Image.Resampling.BOX,
    "pil_hamming": Image.Resampling.HAMMING,
    "pil_lanczos": Image.Resampling.LANCZOS,
}
_CV = ("cv_nearest", "cv_bilinear", "cv_bicubic", "cv_area", "cv_lanczos")
_BSRGAN = ("bsrgan", "bsrgan_light")
KINDS = (*_PIL, *_CV, *_BSRGAN)


def degrade(
    image: np.ndarray, factor: int, kind: str, rng: np.random.Generator
) -> np.ndarray:
    """uint8 [h, w, 3] to uint8 [h / factor, w / factor, 3].

    The plain resizers draw nothing. Raises UserError for an unknown kind and for a
    size that `factor` does not divide.
    """
    if kind not in KINDS:
        raise UserError(f"low_res.kind: {kind!r}; {nearest(kind, KINDS)}")
    h, w = image.shape[:2]
    if factor < 1 or h % factor or w % factor:
        raise UserError(
            f"low_res.factor: {factor} does not divide a picture of {h}x{w}; choose a"
            " divisor"
        )
    size = h // factor, w // factor
    if kind in _PIL:
        small = Image.fromarray(image).resize((size[1], size[0]), _PIL[kind])
        return np.asarray(small)
    x = image.astype(np.float64) / 255
    if kind in _CV:
        return _to_uint8(cv_resize(x, size, kind.removeprefix("cv_")))
    return _to_uint8(_bsrgan(x, factor, rng, light=kind == "bsrgan_light"))


def _to_uint8(x: np.ndarray) -> np.ndarray:
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


def cv_resize(x: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """float [h, w, c] to [*size, c]."""
    rows, columns = (
        resample.matrix(n, m, method) for n, m in zip(x.shape[:2], size, strict=True)
    )
    return np.einsum("ih,hwc,jw->ijc", rows, x, columns, optimize=True)


# ---- BSRGAN --------------------------------------------------------------------


def _bsrgan(
    x: np.ndarray, factor: int, rng: np.random.Generator, light: bool
) -> np.ndarray:
    """Blur, shrink, noise and JPEG in random order (`degradation_bsrgan_variant`)."""
    target = x.shape[0] // factor, x.shape[1] // factor
    left = factor
    if factor == 4 and rng.random() < 0.25:
        half = x.shape[0] // 2, x.shape[1] // 2
        if rng.random() < 0.5:
            x = cv_resize(x, half, _any_method(rng))
        else:
            x = _antialiased(x, half)
        x, left = np.clip(x, 0, 1), 2
    order = list(rng.permutation(7))
    two, three = order.index(2), order.index(3)
    if two > three:  # the last resize comes after the first
        order[two], order[three] = order[three], order[two]
    for step in order:
        if step == 0 or (step == 1 and not light):
            x = _blur(x, left, rng, light)
        elif step == 2:
            x = _shrink(x, left, rng, 0.8 if light else 0.75)
        elif step == 3:
            x = np.clip(cv_resize(x, target, _any_method(rng)), 0, 1)
        elif step == 4:
            x = _noise(x, rng, (1, 2) if light else (2, 25))
        elif step == 5 and rng.random() < 0.9:
            x = _jpeg(x, rng, light)
    return _jpeg(x, rng, light)


def _any_method(rng: np.random.Generator) -> str:
    return ("bilinear", "bicubic", "area")[rng.integers(3)]


def _antialiased(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic whose kernel widens with the shrinking, as Matlab's imresize."""
    planes = [
        Image.fromarray(x[..., c].astype(np.float32)).resize(
            (size[1], size[0]), Image.Resampling.BICUBIC
        )
        for c in range(x.shape[2])
    ]
    return np.stack([np.asarray(plane, np.float64) for plane in planes], axis=-1)


def _blur(
    x: np.ndarray, factor: int, rng: np.random.Generator, light: bool
) -> np.ndarray:
    """An anisotropic or isotropic Gaussian, half and half; mirrored borders."""
    width, spread = 4.0 + factor, 2.0 + 0.2 * factor
    if light:
        width, spread = width / 4, spread / 4
    if rng.random() < 0.5:
        size = (
            int(rng.integers(2, 12)) + 3 if light else 2 * int(rng.integers(2, 12)) + 3
        )
        angle = rng.random() * np.pi
        kernel = _gaussian(size, *(width * rng.random(2)), angle)
    else:
        size = (
            int(rng.integers(2, 5)) + 3 if light else 2 * int(rng.integers(2, 12)) + 3
        )
        sigma = (spread * rng.random()) ** 2
        kernel = _gaussian(size, sigma, sigma, 0.0)
    return ndimage.convolve(x, kernel[..., None], mode="mirror")


def _gaussian(size: int, l1: float, l2: float, angle: float) -> np.ndarray:
    """A normalised kernel [size, size]; l1, l2 are the variances along its axes."""
    l1, l2 = max(l1, 1e-3), max(l2, 1e-3)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    inverse = turn @ np.diag([1 / l1, 1 / l2]) @ turn.T
    grid = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(grid, grid, indexing="ij")
    points = np.stack([x, y], axis=-1)
    power = np.einsum("...i,ij,...j->...", points, inverse, points)
    kernel = np.exp(-0.5 * power)
    return kernel / kernel.sum()


def _shrink(
    x: np.ndarray, factor: int, rng: np.random.Generator, resize: float
) -> np.ndarray:
    """Resizes by up to 1 / (2 factor), or takes every factor-th pixel of a blur."""
    h, w = x.shape[:2]
    if rng.random() < resize:
        scale = rng.uniform(1, 2 * factor)
        size = max(int(h / scale), 1), max(int(w / scale), 1)
        return np.clip(cv_resize(x, size, _any_method(rng)), 0, 1)
    sigma = rng.uniform(0.1, 0.6 * factor)
    kernel = _gaussian(25, sigma**2, sigma**2, 0.0)
    # Half a cell to the side, so that the pixel kept is the middle of its cell: a
    # convolution turns the kernel round, so it moves up and left.
    kernel = ndimage.shift(kernel, -(factor - 1) / 2, order=1, mode="nearest")
    kernel /= kernel.sum()
    x = ndimage.convolve(x, kernel[..., None], mode="mirror")
    return np.clip(x[::factor, ::factor], 0, 1)


def _noise(
    x: np.ndarray, rng: np.random.Generator, levels: tuple[int, int]
) -> np.ndarray:
    """Gaussian: in colour 40%, in grey 40%, with correlated channels 20%."""
    level, kind = rng.integers(levels[0], levels[1] + 1) / 255, rng.random()
    if kind > 0.6:
        noise = rng.normal(0, level, x.shape)
    elif kind < 0.4:
        noise = rng.normal(0, level, (*x.shape[:2], 1))
    else:
        basis, _ = np.linalg.qr(rng.random((3, 3)))
        # |.| leaves a 3x3 covariance positive; the reference takes the highest level.
        covariance = np.abs(basis.T @ np.diag(rng.random(3)) @ basis)
        root = np.linalg.cholesky(covariance + 1e-9 * np.eye(3))
        noise = levels[1] / 255 * rng.normal(size=x.shape) @ root.T
    return np.clip(x + noise, 0, 1)


def _jpeg(x: np.ndarray, rng: np.random.Generator, light: bool) -> np.ndarray:
    """There and back at a random quality."""
    quality = int(rng.integers(80 if light else 30, 96))
    packed = io.BytesIO()
    Image.fromarray(_to_uint8(x)).save(packed, "jpeg", quality=quality)
    return np.asarray(Image.open(packed), np.float64) / 255
