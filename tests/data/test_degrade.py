"""Degradations against OpenCV where it is installed, and BSRGAN's finer points."""

import numpy as np
import pytest

from ldm_jax.data import degrade


@pytest.mark.parametrize("size", [(16, 16), (37, 29), (70, 75), (128, 96)])
@pytest.mark.parametrize(
    "method", ["nearest", "bilinear", "bicubic", "area", "lanczos"]
)
def test_resizing_is_opencvs(method, size):
    cv2 = pytest.importorskip("cv2")
    flags = dict(nearest=0, bilinear=1, bicubic=2, area=3, lanczos=4)
    x = np.random.default_rng(0).random((64, 48, 3))
    expected = cv2.resize(x, size[::-1], interpolation=flags[method])
    np.testing.assert_allclose(degrade.cv_resize(x, size, method), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_pixel_kept_is_the_middle_of_its_cell(factor):
    ramp = np.linspace(0, 1, 48)[None, :, None] * np.ones((48, 1, 3))
    small = degrade._shrink(ramp, factor, np.random.default_rng(0), resize=0.0)
    middles = (np.arange(small.shape[1]) * factor + (factor - 1) / 2) / 47
    inside = slice(16 // factor, -16 // factor)
    np.testing.assert_allclose(small[10, inside, 0], middles[inside], atol=1e-6)


def test_enlarging_by_area_repeats_pixels_where_the_factor_is_whole():
    x = np.random.default_rng(0).random((3, 5, 1))
    large = degrade.cv_resize(x, (6, 15), "area")
    np.testing.assert_allclose(large, x.repeat(2, 0).repeat(3, 1), atol=1e-12)


def test_the_blur_after_halving_is_that_of_half_the_factor(monkeypatch):
    seen = {}

    def blur(x, factor, rng, light):
        seen.setdefault(x.shape[0] == 64, set()).add(factor)
        return x

    monkeypatch.setattr(degrade, "_blur", blur)
    # Steps that resize are left out, so that the size tells whether it was halved.
    monkeypatch.setattr(degrade, "_shrink", lambda x, factor, rng, resize: x)
    image = np.zeros((64, 64, 3), np.uint8)
    real = degrade.cv_resize
    monkeypatch.setattr(
        degrade,
        "cv_resize",
        lambda x, size, method: real(x, size, method) if size[0] == 32 else x,
    )
    for seed in range(40):
        degrade.degrade(image, 4, "bsrgan", np.random.default_rng(seed))
    assert seen == {True: {4}, False: {2}}


def test_correlated_noise_has_the_highest_levels_spread():
    x, spreads = np.full((64, 64, 3), 0.5), []
    for seed in range(200):
        noise = degrade._noise(x, np.random.default_rng(seed), (2, 25)) - 0.5
        grey = np.ptp(noise, axis=2).max() < 1e-9
        correlation = np.abs(np.corrcoef(noise.reshape(-1, 3).T)[0, 1])
        if not grey and correlation > 0.06:
            spreads.append(np.square(noise).mean() * 3)
    # The trace of the covariance is the sum of three uniform eigenvalues, or so.
    assert 0.08 < len(spreads) / 200 < 0.32
    spreads = np.array(spreads) / (25 / 255) ** 2
    assert 1.2 < spreads.mean() < 1.8 and spreads.min() > 0.15
