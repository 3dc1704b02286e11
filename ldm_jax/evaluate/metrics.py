"""Scores of pictures against pictures, as plain functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np


def psnr(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [b] in dB of uint8 pictures [b, h, w, c]."""
    error = np.mean(np.square(x.astype(np.float64) - x_hat), axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-10))


@jax.jit
def _ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    taps = jnp.exp(-jnp.square(jnp.arange(11, dtype=jnp.float32) - 5) / (2 * 1.5**2))
    taps = taps / jnp.sum(taps)

    def blur(image):
        for shape in ((11, 1, 1, 1), (1, 11, 1, 1)):
            kernel = jnp.broadcast_to(taps.reshape(shape), (*shape[:3], channels))
            image = jax.lax.conv_general_dilated(
                image,
                kernel,
                (1, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=channels,
                precision=jax.lax.Precision.HIGHEST,
            )
        return image

    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x * mean_x
    var_y = blur(y * y) - mean_y * mean_y
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * contrast, axis=(1, 2, 3))


def ssim(x: np.ndarray, x_hat: np.ndarray) -> np.ndarray:
    """Structural similarity [b] of uint8 pictures [b, h, w, c] of at least 11 pixels.

    Gaussian window of 11 taps and sigma 1.5, no padding (Wang et al. 2004).
    """
    if min(x.shape[1:3]) < 11:
        raise ValueError(f"ssim needs pictures of at least 11 pixels, got {x.shape}")
    return np.asarray(_ssim(x.astype(np.float32), x_hat.astype(np.float32)))


def retrieval_ranks(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank [n] of each sample's own true picture among all, by distance; 0 is nearest.

    The distance is the mean squared difference of the uint8 pictures [n, h, w, c], of
    all pixels and channels. Ties count against the sample.
    """
    a = samples.reshape(len(samples), -1).astype(np.float64)
    b = truth.reshape(len(truth), -1).astype(np.float64)
    squared = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1)[None] - 2 * a @ b.T
    own = np.diagonal(squared)[:, None]
    return np.sum(squared <= own, axis=1) - 1
