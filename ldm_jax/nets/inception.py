"""InceptionV3 as the Fréchet Inception distance uses it (Heusel et al. 2017).

The net is TensorFlow's graph of 2015-12-05, not torchvision's: means leave the padding
out, the last block takes a maximum where its twin takes a mean, and there are 1008
classes. FID compares numbers with other people's, so all is float32 at full precision.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

FEATURES, CLASSES, RESOLUTION = 2048, 1008, 299
_EPS = 1e-3  # of the batch normalisation
_FULL = jax.lax.Precision.HIGHEST  # the default is bfloat16 on TPU, TF32 on GPU


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation with stored moments, ReLU."""

    features: int
    height: int = 1
    width: int = 1
    strides: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.height, self.width, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale = self.param("scale", nn.initializers.ones, shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        mean = self.param("mean", nn.initializers.zeros, shape[-1:])
        variance = self.param("variance", nn.initializers.ones, shape[-1:])
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.strides, self.strides),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_FULL,
        )
        gain = scale * jax.lax.rsqrt(variance + _EPS)
        shift = bias - mean * gain
        return nn.relu(x * gain[None, None, None] + shift[None, None, None])


def _branch(x: jax.Array, name: str, *convs: tuple) -> jax.Array:
    """Convolutions one after another, each the leading fields of a `ConvNorm`."""
    for i, conv in enumerate(convs, 1):
        x = ConvNorm(*conv, name=f"{name}_{i}" if len(convs) > 1 else name)(x)
    return x


def _halve(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _mean(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


class BlockA(nn.Module):
    """Branches of reach 1, 5 and 5, and a mean."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        branches = [
            _branch(x, "branch1x1", (64,)),
            _branch(x, "branch5x5", (48,), (64, 5, 5)),
            _branch(x, "branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
            _branch(_mean(x), "branch_pool", (self.pool_features,)),
        ]
        return jnp.concatenate(branches, -1)


class BlockB(nn.Module):
    """Halves 35 pixels to 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        halving = (3, 3, 2, "VALID")
        branches = [
            _branch(x, "branch3x3", (384, *halving)),
            _branch(x, "branch3x3dbl", (64,), (96, 3, 3), (96, *halving)),
            _halve(x),
        ]
        return jnp.concatenate(branches, -1)


class BlockC(nn.Module):
    """Branches of reach 1, 7 and 13 by rows and columns of seven, and a mean."""

    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.inner
        twice = ((c,), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
        branches = [
            _branch(x, "branch1x1", (192,)),
            _branch(x, "branch7x7", (c,), (c, 1, 7), (192, 7, 1)),
            _branch(x, "branch7x7dbl", *twice),
            _branch(_mean(x), "branch_pool", (192,)),
        ]
        return jnp.concatenate(branches, -1)


class BlockD(nn.Module):
    """Halves 17 pixels to 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        halving = (3, 3, 2, "VALID")
        seven = ((192,), (192, 1, 7), (192, 7, 1), (192, *halving))
        branches = [
            _branch(x, "branch3x3", (192,), (320, *halving)),
            _branch(x, "branch7x7x3", *seven),
            _halve(x),
        ]
        return jnp.concatenate(branches, -1)


class BlockE(nn.Module):
    """Branches that fork into rows and columns of three, and a mean or a maximum."""

    use_maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def fork(x, name):
            rows = ConvNorm(384, 1, 3, name=f"{name}a")(x)
            columns = ConvNorm(384, 3, 1, name=f"{name}b")(x)
            return rows, columns

        pooled = _maximum(x) if self.use_maximum else _mean(x)
        branches = [
            _branch(x, "branch1x1", (320,)),
            *fork(ConvNorm(384, name="branch3x3_1")(x), "branch3x3_2"),
            *fork(_branch(x, "branch3x3dbl", (448,), (384, 3, 3)), "branch3x3dbl_3"),
            _branch(pooled, "branch_pool", (192,)),
        ]
        return jnp.concatenate(branches, -1)


def resize(x: jax.Array) -> jax.Array:
    """[b, h, w, c] -> [b, 299, 299, c], bilinear between pixel centres, unfiltered.

    So does pytorch-fid. TensorFlow's own pipeline and torch-fidelity align the corner
    of the first pixel instead, which moves an FID a little.
    """
    shape = (x.shape[0], RESOLUTION, RESOLUTION, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


class InceptionV3(nn.Module):
    """Images [b, h, w, 3] in [-1, 1] -> features [b, 2048], logits [b, 1008].

    The features are pool3, the mean over space. The logits lack the classifier's bias:
    the Inception Score was defined without it (Salimans et al. 2016, their code).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = resize(x.astype(jnp.float32))
        x = ConvNorm(32, 3, 3, 2, "VALID", name="conv_1a")(x)
        x = ConvNorm(32, 3, 3, 1, "VALID", name="conv_2a")(x)
        x = ConvNorm(64, 3, 3, name="conv_2b")(x)
        x = _halve(x)
        x = ConvNorm(80, name="conv_3b")(x)
        x = ConvNorm(192, 3, 3, 1, "VALID", name="conv_4a")(x)
        x = _halve(x)
        x = BlockA(32, name="mixed_5b")(x)
        x = BlockA(64, name="mixed_5c")(x)
        x = BlockA(64, name="mixed_5d")(x)
        x = BlockB(name="mixed_6a")(x)
        x = BlockC(128, name="mixed_6b")(x)
        x = BlockC(160, name="mixed_6c")(x)
        x = BlockC(160, name="mixed_6d")(x)
        x = BlockC(192, name="mixed_6e")(x)
        x = BlockD(name="mixed_7a")(x)
        x = BlockE(use_maximum=False, name="mixed_7b")(x)
        x = BlockE(use_maximum=True, name="mixed_7c")(x)
        features = x.mean((1, 2))
        init = nn.initializers.lecun_normal()
        classifier = self.param("classifier", init, (FEATURES, CLASSES))
        return features, jnp.dot(features, classifier, precision=_FULL)
