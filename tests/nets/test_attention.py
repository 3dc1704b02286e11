import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nets import attention


def _normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def test_attend_is_a_softmax_mean_of_values():
    q, k, v = _normal(0, 2, 3, 2, 4), _normal(1, 2, 5, 2, 4), _normal(2, 2, 5, 2, 4)
    out = np.asarray(attention.attend(q, k, v, 0.5))
    for b in range(2):
        for head in range(2):
            logits = 0.5 * np.asarray(q)[b, :, head] @ np.asarray(k)[b, :, head].T
            weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            expected = weights @ np.asarray(v)[b, :, head]
            np.testing.assert_allclose(out[b, :, head], expected, atol=1e-5)


def test_attend_sees_nothing_behind_the_mask():
    q, k, v = _normal(0, 1, 3, 1, 4), _normal(1, 1, 5, 1, 4), _normal(2, 1, 5, 1, 4)
    mask = jnp.array([True, True, False, True, False])
    masked = attention.attend(q, k, v, 1.0, mask[None, None, None])
    kept = attention.attend(q, k[:, mask], v[:, mask], 1.0)
    np.testing.assert_allclose(masked, kept, atol=1e-6)


def test_attend_keeps_logits_in_float32():
    # 16-bit logits could not tell 256 from 257, whose softmax is (0.27, 0.73).
    q = jnp.ones((1, 1, 1, 257), jnp.bfloat16)
    k = jnp.stack([q[0, 0, 0].at[0].set(0), q[0, 0, 0]])[None, :, None]
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    out = attention.attend(q, k, v, 1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out).item(), 1 / (1 + np.exp(-1)), atol=5e-3)


@pytest.mark.parametrize("depth", [1, 2])
def test_spatial_transformer_takes_one_context_or_one_for_each_block(depth):
    x, context = _normal(0, 1, 2, 3, 32), _normal(1, 1, 5, 8)
    net = attention.SpatialTransformer(heads=2, dim_head=16, depth=depth)
    params = net.init(jax.random.key(2), x, context)["params"]
    params["proj_out"]["kernel"] = _normal(3, 32, 32)
    out = net.apply({"params": params}, x, context)
    listed = net.apply({"params": params}, x, [context] * depth)
    np.testing.assert_array_equal(out, listed)
    other = net.apply({"params": params}, x, [context] * (depth - 1) + [-context])
    assert jnp.abs(other - out).max() > 1e-3


@pytest.mark.parametrize(
    "net",
    [
        attention.AttentionBlock(heads=2),
        attention.SpatialTransformer(heads=2, dim_head=16),
    ],
)
def test_residual_blocks_of_the_unet_start_as_identity(net):
    x = _normal(0, 1, 2, 3, 32)
    args = (x, x[:, 0]) if isinstance(net, attention.SpatialTransformer) else (x,)
    out, _ = net.init_with_output(jax.random.key(1), *args)
    np.testing.assert_array_equal(out, x)


def test_attention_block_orders_differ_by_a_permutation_of_features():
    x, heads, width = _normal(0, 1, 3, 3, 32), 2, 16
    legacy = attention.AttentionBlock(heads)
    params = legacy.init(jax.random.key(1), x)["params"]
    params["proj_out"]["kernel"] = _normal(2, 32, 32)
    order = np.arange(96).reshape(heads, 3, width).swapaxes(0, 1).reshape(-1)
    moved = jax.tree.map(lambda a: a, params)
    moved["qkv"] = jax.tree.map(lambda a: a[..., order], params["qkv"])
    new = attention.AttentionBlock(heads, new_order=True)
    np.testing.assert_allclose(
        new.apply({"params": moved}, x), legacy.apply({"params": params}, x), atol=1e-5
    )
    assert jnp.abs(new.apply({"params": params}, x) - x).max() > 1e-2


def test_linear_attention_weighs_values_by_keys_over_positions():
    x = _normal(0, 1, 2, 3, 4)
    net = attention.LinearAttention()
    params = net.init(jax.random.key(1), x)["params"]
    out = net.apply({"params": params}, x)
    tokens = np.asarray(x).reshape(6, 4)
    q, k, v = np.split(tokens @ np.asarray(params["to_qkv"]["kernel"]), 3, axis=-1)
    k = np.exp(k) / np.exp(k).sum(0)
    expected = (q @ (k.T @ v)) @ np.asarray(params["to_out"]["kernel"])
    expected += np.asarray(params["to_out"]["bias"])
    np.testing.assert_allclose(out.reshape(6, 4), expected, atol=1e-5)
