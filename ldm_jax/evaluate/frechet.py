"""Distances between sets of pictures, by way of their features.

Fréchet distance, kernel distance (KID), precision and recall, Inception Score are plain
functions of feature arrays. Two nets give features: InceptionV3, whose weights must be
fetched once, and one with fixed random weights that needs nothing. Scores with the
second are comparable among themselves only; they carry its name, and none is an FID.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ldm_jax.nets import inception

RANDOM_NET = "random-net Fréchet distance"  # what a report calls it


# --- statistics


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean `mu` [d] and unbiased covariance `sigma` [d, d] of `count` features.

    All in float64. `of(a) + of(b)` is `of` both together (Chan et al. 1979), so sets
    of any size go through in batches. `count` is None where a file didn't tell it;
    such statistics can be compared but not added to.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None

    @classmethod
    def of(cls, features: np.ndarray) -> "Statistics":
        """Statistics of features [n, d]; with n < 2 the covariance is zero."""
        n, d = features.shape
        features = np.asarray(features, np.float64)
        mu = features.mean(0) if n else np.zeros(d)
        centred = features - mu
        return cls(mu, centred.T @ centred / max(n - 1, 1), n)

    def __add__(self, other: "Statistics") -> "Statistics":
        if self.count is None or other.count is None:
            raise ValueError("statistics without a count can't be added to others")
        count = self.count + other.count
        share, step = other.count / max(count, 1), other.mu - self.mu
        scatter = self.sigma * max(self.count - 1, 0)
        scatter = scatter + other.sigma * max(other.count - 1, 0)
        scatter += np.outer(step, step) * (self.count * share)
        return Statistics(self.mu + step * share, scatter / max(count - 1, 1), count)

    def over_processes(self) -> "Statistics":
        """The sum of all processes' statistics, the same on each; all must call it."""
        if jax.process_count() == 1:
            return self
        numbers = np.concatenate([[self.count], self.mu, self.sigma.ravel()])
        d = len(self.mu)
        total = Statistics.of(np.zeros((0, d)))
        for process in range(jax.process_count()):  # one at a time: d² is 34 MB
            # As pairs of integers, because JAX would round float64 to float32.
            bits = multihost_utils.broadcast_one_to_all(
                numbers.view(np.uint32), process == jax.process_index()
            )
            count, mu, sigma = np.split(np.asarray(bits).view(np.float64), [1, 1 + d])
            total += Statistics(mu, sigma.reshape(d, d), int(count[0]))
        return total

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz that pytorch-fid reads too, whole or not at all."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
        known = {} if self.count is None else {"count": self.count}
        np.savez(partial, mu=self.mu, sigma=self.sigma, **known)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Reads what `save` wrote, or pytorch-fid's statistics, which lack the count.

        Raises ValueError where the file holds something else.
        """
        with np.load(path) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                raise ValueError(f"{path}: want mu and sigma, found {archive.files}")
            count = int(archive["count"]) if "count" in archive.files else None
            mu, sigma = np.float64(archive["mu"]), np.float64(archive["sigma"])
        return cls(mu, sigma, count)


# --- scores


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½), Dowson & Landau 1982.

    Right for covariances of any rank, so for fewer pictures than dimensions too. FID
    where the features are InceptionV3's (Heusel et al. 2017). Biased upwards by about
    1/n: compare at equal n only.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"features of {a.mu.shape} against those of {b.mu.shape}")
    for statistics in (a, b):
        if statistics.count is not None and statistics.count < 2:
            raise ValueError(f"{statistics.count} pictures have no covariance")
    # With Σ = L Lᵀ the eigenvalues of Σa^½ Σb Σa^½ are the squared singular values of
    # Laᵀ Lb. These need no root of a number that is zero but for rounding.
    roots = np.linalg.svd(_factor(a.sigma).T @ _factor(b.sigma), compute_uv=False)
    means = np.sum(np.square(a.mu - b.mu))
    traces = np.trace(a.sigma) + np.trace(b.sigma)
    return float(max(means + traces - 2 * np.sum(roots), 0.0))


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L [d, rank] with L Lᵀ = sigma."""
    values, vectors = np.linalg.eigh(sigma)
    above = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, above] * np.sqrt(values[above])


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of features [m, d] and [n, d], kernel (x·y/d + 1)³.

    The kernel distance of Bińkowski et al. 2018, KID where the features are
    InceptionV3's. Takes memory for m² + n² numbers; may be below zero.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean())


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """Mean and standard deviation of `squared_mmd` over fixed random subsets.

    100 subsets of 1000 are the custom for KID; smaller sets are taken whole. The
    subsets are torch-fidelity's, so the numbers are too.
    """
    rng, size = np.random.RandomState(2020), min(size, len(a), len(b))
    values = [
        squared_mmd(
            a[rng.choice(len(a), size, replace=False)],
            b[rng.choice(len(b), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall of features [n, d] (Kynkäänniemi et al. 2019).

    A point lies on a set's manifold if it is no farther from some point of the set
    than that one's k-th nearest neighbour in the set.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"k={k} wants more points than {len(real)} and {len(fake)}")
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    return _share_within(fake, real, k), _share_within(real, fake, k)


def _share_within(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    # The nearest in its own set is the point itself, hence k and not k - 1.
    radii = [np.partition(d, k, axis=1)[:, k] for d in _distances(manifold, manifold)]
    radii = np.concatenate(radii)
    within = [np.any(d <= radii, axis=1) for d in _distances(points, manifold)]
    return float(np.mean(np.concatenate(within)))


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances [rows, n] of some rows of `a` at a time to all of `b`."""
    for start in range(0, len(a), 1024):
        rows = a[start : start + 1024]
        norms = np.sum(rows * rows, 1)[:, None] + np.sum(b * b, 1)
        squared = norms - 2 * rows @ b.T
        # What rounding leaves of zero is zero: copies lie at no distance.
        yield np.where(squared > 1e-12 * norms, squared, 0)


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)) of probabilities [n, classes]: mean, std over splits.

    Salimans et al. 2016. Rows are shuffled first, because samples often come class by
    class; always alike, and as torch-fidelity does it.
    """
    p = np.asarray(probabilities, np.float64)
    p = p[np.random.RandomState(2020).permutation(len(p))]

    def entropy(q):
        return -np.sum(q * np.log(q, where=q > 0, out=np.zeros_like(q)), axis=-1)

    scores = [
        np.exp(entropy(part.mean(0)) - entropy(part).mean())
        for part in np.array_split(p, splits)
    ]
    return float(np.mean(scores)), float(np.std(scores))


# --- features


def _in_batches(apply: Callable, images: np.ndarray, batch_size: int):
    """Applies to uint8 pictures as float32 in [-1, 1], one compiled shape for all."""
    if images.dtype != np.uint8:
        raise ValueError(f"features are taken of uint8 pictures, got {images.dtype}")
    parts = []
    for start in range(0, max(len(images), 1), batch_size):
        rows = images[start : start + batch_size]
        padded = np.zeros((batch_size, *rows.shape[1:]), np.float32)
        padded[: len(rows)] = rows / np.float32(127.5) - 1
        parts.append(jax.device_get(apply(padded)))
    n = len(images)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *parts)


@jax.jit
def _inception(params, x):
    features, logits = inception.InceptionV3().apply({"params": params}, x)
    return features, jax.nn.softmax(logits)


def inception_features(
    params: Mapping, images: np.ndarray, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """InceptionV3's features [n, 2048] and probabilities [n, 1008] of uint8 pictures.

    `params` come from `ldm_jax.convert.inception`.
    """
    return _in_batches(functools.partial(_inception, params), images, batch_size)


# VGG16's thirteen convolutions, much narrower. The means of all five stages, together
# 64 numbers, are the features: those of the last stage alone hardly notice noise.
_WIDTHS = ((8, 8), (16, 16), (16, 16, 16), (16, 16, 16), (8, 8, 8))


@functools.cache
def _random_kernels() -> tuple[np.ndarray, ...]:
    # RandomState, because its numbers are promised never to change.
    rng, c, kernels = np.random.RandomState(0), 3, []
    for width in sum(_WIDTHS, ()):
        he = np.sqrt(2 / (9 * c))
        kernels.append((he * rng.standard_normal((3, 3, c, width))).astype(np.float32))
        c = width
    return tuple(kernels)


@jax.jit
def _random_net(kernels, x):
    kernels, means = iter(kernels), []
    for widths in _WIDTHS:
        if means:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for _ in widths:
            x = jax.lax.conv_general_dilated(
                x,
                next(kernels),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
            x = nn.relu(x)
        means.append(x.mean((1, 2)))
    return jnp.concatenate(means, -1)


def random_features(images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Features [n, 64] of uint8 pictures [n, h, w, 3], 16 pixels or more, from no data.

    A VGG-like net with fixed random weights and as many features as Naeem et al. 2020
    (arXiv 2002.09797) take: they find random embeddings the better judge of pictures
    unlike ImageNet's. The same on every machine, up to rounding.
    """
    if min(images.shape[1:3]) < 16:
        raise ValueError(f"random_features wants 16 pixels or more, got {images.shape}")
    apply = functools.partial(_random_net, _random_kernels())
    return _in_batches(apply, images, batch_size)
