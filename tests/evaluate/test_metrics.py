import numpy as np
import pytest

from ldm_jax.evaluate import metrics


def _pictures(n=3, size=24):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def test_psnr_literals():
    x = np.zeros((2, 4, 4, 3), np.uint8)
    x_hat = x.copy()
    x_hat[0] += 1  # squared error 1
    x_hat[1, :2] = 255  # half of it wrong by all there is
    expected = [10 * np.log10(255**2), 10 * np.log10(2)]
    np.testing.assert_allclose(metrics.psnr(x, x_hat), expected, rtol=1e-12)


def test_psnr_does_not_wrap_around():
    x, x_hat = np.full((1, 4, 4, 3), 0, np.uint8), np.full((1, 4, 4, 3), 200, np.uint8)
    np.testing.assert_allclose(metrics.psnr(x, x_hat), metrics.psnr(x_hat, x))


@pytest.mark.parametrize("blend", [0.0, 0.1, 0.5, 1.0])
def test_ssim_is_tensorflow_s(blend):
    tf = pytest.importorskip("tensorflow")
    x = _pictures()
    smooth = np.broadcast_to(np.linspace(0, 255, 24)[None, :, None, None], x.shape)
    y = np.round((1 - blend) * x + blend * smooth).astype(np.uint8)
    expected = tf.image.ssim(tf.constant(x), tf.constant(y), max_val=255).numpy()
    np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=2e-5)


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        metrics.ssim(_pictures(size=10), _pictures(size=10))


def test_retrieval_ranks_literals():
    truth = np.array([0, 100, 110, 255], np.uint8).reshape(4, 1, 1, 1)
    samples = np.array([1, 111, 60, 0], np.uint8).reshape(4, 1, 1, 1)
    # Distances of the third: 60, 40, 50, 195; of the fourth its own is the farthest.
    np.testing.assert_array_equal(metrics.retrieval_ranks(samples, truth), [0, 1, 1, 3])


def test_retrieval_ties_count_against_the_sample():
    truth = np.zeros((3, 2, 2, 1), np.uint8)
    np.testing.assert_array_equal(metrics.retrieval_ranks(truth, truth), [2, 2, 2])
