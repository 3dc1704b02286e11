import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nets import lpips
from tests import parity

ATOL = 5e-5


@pytest.fixture(scope="module")
def reference():
    """(params, io): VGG16 from the random numbers that meta.json names, real heads."""
    meta, weights, io = parity.load("lpips")
    draws = np.random.RandomState(meta["seed"])
    digest, vgg = hashlib.sha256(), {}
    names = [
        f"conv_{block}_{i}"
        for block, depth in enumerate(lpips.DEPTHS, 1)
        for i in range(1, depth + 1)
    ]
    for name, shape in zip(names, meta["conv_weight_shapes"], strict=True):
        scale = np.sqrt(2 / (shape[1] * 9))
        weight = (draws.standard_normal(shape) * scale).astype(np.float32)
        bias = (draws.standard_normal((shape[0],)) * 0.05).astype(np.float32)
        digest.update(weight.tobytes())
        vgg[name] = {"kernel": np.transpose(weight, (2, 3, 1, 0)), "bias": bias}
    assert digest.hexdigest() == meta["sha256_of_concatenated_conv_weights"]
    heads = {f"head_{i}": weights[f"lin{i}.model.1.weight"].ravel() for i in range(5)}
    return jax.tree.map(jnp.asarray, heads | {"vgg": vgg}), io


@pytest.fixture(scope="module")
def images(reference):
    _, io = reference
    return jnp.asarray(parity.nhwc(io["x"])), jnp.asarray(parity.nhwc(io["y"]))


@jax.jit
def _value_maps_and_gradient(params, x, y):
    def value(x, y):
        maps = lpips.LPIPS().apply({"params": params}, x, y, method="maps")
        values = lpips.LPIPS().apply({"params": params}, x, y)
        return values.sum(), (values, maps)

    return jax.grad(value, has_aux=True)(x, y)


@pytest.fixture(scope="module")
def computed(reference, images):
    """(gradient with respect to x, (values, maps)) of the fixture's images."""
    return _value_maps_and_gradient(reference[0], *images)


def test_value_is_the_references(reference, computed):
    _, io = reference
    _, (values, _) = computed
    assert values.shape == (2,) and values.dtype == jnp.float32
    np.testing.assert_allclose(values, io["value"].ravel(), atol=ATOL / 100)
    np.testing.assert_allclose(values, io["value_taming"].ravel(), atol=ATOL / 100)


def test_each_layer_is_the_references(reference, computed):
    _, io = reference
    for i, distances in enumerate(computed[1][1]):
        expected = io[f"per_layer_{i}"].ravel()
        np.testing.assert_allclose(distances.mean((1, 2)), expected, atol=ATOL / 100)


def test_each_position_is_the_references(reference, computed):
    _, io = reference
    total = sum(jax.image.resize(m, (2, 64, 64), "linear") for m in computed[1][1])
    expected = io["spatial"][:, 0]
    np.testing.assert_allclose(total[:, ::4, ::4], expected, atol=ATOL / 10)


def test_gradient_is_the_references(reference, computed):
    """But for rare pixels: a rounding makes a ReLU or a maximum choose otherwise."""
    _, io = reference
    expected = parity.nhwc(io["grad_x_taming"])
    error = np.abs(computed[0] - expected)
    assert np.median(np.abs(expected)) > 1e-5  # the gradient is small itself
    assert np.median(error) < 1e-8
    assert np.linalg.norm(error) < 0.01 * np.linalg.norm(expected)
    np.testing.assert_allclose(computed[0], expected, atol=ATOL / 10)


def test_features_are_the_references(reference, images):
    params, io = reference
    shift, scale = jnp.array([-0.030, -0.088, -0.188]), jnp.array([0.458, 0.448, 0.450])
    x = (images[0] - shift[None, None, None]) / scale[None, None, None]
    taps = jax.jit(lpips.VGG16Features().apply)({"params": params["vgg"]}, x)
    for i, tap in enumerate(taps):
        means = io[f"feat_x_{i}_mean_hw"]
        np.testing.assert_allclose(tap.mean((1, 2)), means, atol=ATOL)
        crop = parity.nhwc(io[f"feat_x_{i}_crop"])
        np.testing.assert_allclose(tap[:, :4, :4, :8], crop, atol=ATOL)


def test_bfloat16_is_near(reference, images, computed):
    params, _ = reference
    apply = jax.jit(lpips.LPIPS(dtype=jnp.bfloat16).apply)
    values = apply({"params": params}, *images)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, computed[1][0], rtol=0.05)
    assert np.abs(values - computed[1][0]).max() > 0


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 7, 9, 2)])
def test_max_pool_is_flaxs_and_so_is_its_gradient_at_ties(shape):
    x = np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32)
    weights = np.random.default_rng(1).normal(
        size=(shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    )
    weights = jnp.asarray(weights, jnp.float32)

    def pooled(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    np.testing.assert_array_equal(lpips._max_pool(x), pooled(x))
    ours, theirs = (
        jax.grad(lambda x, f=f: (f(x) * weights).sum())(x)
        for f in (lpips._max_pool, pooled)
    )
    np.testing.assert_array_equal(ours, theirs)


def _abstract(size):
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), x, x), x


def test_only_the_differentiated_image_goes_backwards():
    variables, x = _abstract(16)

    def value(y, x, variables):
        return lpips.LPIPS().apply(variables, x, y).sum()

    program = jax.make_jaxpr(jax.grad(value))(x, x, variables)
    batches = [
        equation.outvars[0].aval.shape[0]
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "conv_general_dilated"
    ]
    assert batches == [2] * (3 * 13)  # x and y forwards, y backwards


def test_features_without_any_active_one_have_a_gradient():
    """√ has an infinite slope at 0, which would make it NaN."""
    unit = lpips._unit(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0.0, 0.0]])
    grad = jax.grad(lambda f: lpips._unit(f).sum())(jnp.zeros((1, 2)))
    assert np.isfinite(grad).all()


def test_images_too_small_say_so():
    with pytest.raises(ValueError, match="8x8 .*give LPIPS 16 pixels"):
        _abstract(8)
