import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nets import layers
from tests import parity


@pytest.mark.parametrize("dim", [32, 33, 320])
def test_timestep_embedding_matches_the_reference(dim):
    _, _, io = parity.load("timestep_embedding")
    embedding = layers.timestep_embedding(jnp.asarray(io["t"]), dim)
    # The last bit of an angle of 999 is 6.1e-5; exp differs by it in a few places.
    np.testing.assert_allclose(embedding, io[f"emb{dim}"], atol=6.2e-5)
    differing = np.abs(embedding - io[f"emb{dim}"]) > 1e-5
    assert differing.mean() < 0.005


def test_timestep_embedding_is_cosines_then_sines_of_fractional_t():
    embedding = layers.timestep_embedding(jnp.array([0.5]), 4)
    expected = [np.cos(0.5), np.cos(0.005), np.sin(0.5), np.sin(0.005)]
    np.testing.assert_allclose(embedding[0], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_normalises_each_group_in_float32(dtype):
    x = 100 + 3 * jax.random.normal(jax.random.key(0), (2, 5, 7, 8))
    norm = layers.GroupNorm(groups=4, eps=1e-6, dtype=dtype)
    variables = {"params": {"scale": jnp.full(8, 2.0), "bias": jnp.full(8, 1.0)}}
    y = norm.apply(variables, x)
    groups = np.asarray(x, np.float64).reshape(2, 35, 4, 2)
    mean = groups.mean((1, 3), keepdims=True)
    expected = (groups - mean) / groups.std((1, 3), keepdims=True) * 2 + 1
    assert y.dtype == dtype
    atol = 1e-5 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected.reshape(x.shape), atol=atol
    )


def test_group_norm_names_the_width_it_cannot_split():
    with pytest.raises(ValueError, match="48 channels .* 32 groups"):
        layers.GroupNorm().init(jax.random.key(0), jnp.zeros((1, 2, 2, 48)))


def test_conv_matches_a_sum_over_the_window():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    conv = layers.Conv(3, strides=2, padding=((0, 1), (0, 1)))
    params = conv.init(jax.random.key(0), x)["params"]
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = np.zeros((1, 2, 2, 3), np.float32)
    for i in range(2):
        for j in range(2):
            window = padded[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[0, i, j] = np.einsum("hwi,hwio->o", window, params["kernel"])
    expected += np.asarray(params["bias"])
    np.testing.assert_allclose(conv.apply({"params": params}, x), expected, atol=1e-5)


def test_weights_start_as_those_of_torch():
    x = jnp.zeros((1, 8, 8, 50))
    params = layers.Conv(64).init(jax.random.key(0), x)["params"]
    limit = (50 * 9) ** -0.5
    for leaf in jax.tree.leaves(params):
        assert jnp.abs(leaf).max() <= limit
        assert jnp.abs(leaf).max() > 0.9 * limit
    np.testing.assert_allclose(params["kernel"].std(), limit / 3**0.5, rtol=0.02)
    params = layers.Dense(8, zero_init=True).init(jax.random.key(0), x)["params"]
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(params))


def test_resampling_is_by_two_and_leaves_the_frames_of_a_video():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    up = layers.upsample_nearest(x)
    np.testing.assert_array_equal(up[0, :2, :, 0], [[0, 0, 1, 1, 2, 2]] * 2)
    np.testing.assert_allclose(layers.avg_pool(up), x)
    np.testing.assert_allclose(layers.avg_pool(x)[0, 0, 0, 0], (0 + 1 + 3 + 4) / 4)
    assert layers.upsample_nearest(jnp.zeros((1, 3, 4, 4, 1)), 3).shape[1:4] == (
        3,
        8,
        8,
    )
