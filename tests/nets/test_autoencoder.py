import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis
from ldm_jax.nets import autoencoder
from tests import parity

TINY = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=8)


@functools.cache
def fixture():
    meta, weights, io = parity.load("autoencoder_kl")
    net = autoencoder.AutoencoderKL(
        **meta["config"]["ddconfig"], embed_dim=meta["config"]["embed_dim"]
    )
    return net, {"params": compvis.autoencoder_params(weights, net)}, io


@pytest.mark.parametrize("suffix", ["", "_nonsquare"])
def test_encode_matches_the_reference(suffix):
    net, variables, io = fixture()
    encode = jax.jit(functools.partial(net.apply, method="encode"))
    moments = encode(variables, parity.nhwc(io[f"x{suffix}"]))
    expected = parity.nhwc(io[f"moments{suffix}"])
    np.testing.assert_allclose(moments, expected, atol=5e-5)


def test_encoder_matches_the_reference_inside():
    net, variables, io = fixture()
    x = jnp.asarray(parity.nhwc(io["x"]))
    _, state = net.apply(variables, x, method="encode", capture_intermediates=True)
    acts = state["intermediates"]["encoder"]
    for ours, theirs in [
        (acts["down_0_downsample"], "act.encoder.down.0.downsample"),
        (acts["mid_attn"], "act.encoder.mid.attn_1"),
        (acts, "act.encoder"),
    ]:
        expected = parity.nhwc(io[theirs])
        np.testing.assert_allclose(ours["__call__"][0], expected, atol=5e-5)


@pytest.mark.parametrize(
    ("z", "x"),
    [("mode", "dec_mode"), ("sample", "dec_sample"), ("z_nonsquare", "dec_nonsquare")],
)
def test_decode_matches_the_reference(z, x):
    net, variables, io = fixture()
    io = io | {"z_nonsquare": np.split(io["moments_nonsquare"], 2, axis=1)[0]}
    decode = jax.jit(functools.partial(net.apply, method="decode"))
    image = decode(variables, parity.nhwc(io[z]))
    np.testing.assert_allclose(image, parity.nhwc(io[x]), atol=5e-5)


def test_posterior_matches_the_reference():
    _, _, io = fixture()
    posterior = autoencoder.Posterior.from_moments(parity.nhwc(io["moments"]))
    sample = jnp.asarray(parity.nhwc(io["sample"]))
    np.testing.assert_array_equal(posterior.mode(), parity.nhwc(io["mode"]))
    np.testing.assert_array_equal(posterior.logvar, parity.nhwc(io["logvar"]))
    np.testing.assert_allclose(posterior.kl(), io["kl"], rtol=1e-6, atol=5e-5)
    np.testing.assert_allclose(posterior.nll(sample), io["nll"], rtol=1e-6, atol=5e-5)


def test_posterior_sample_has_its_mean_and_spread_and_clamps_logvar():
    moments = jnp.concatenate([jnp.full((1, 64, 64, 1), 3.0)] * 2, -1)
    z = autoencoder.Posterior.from_moments(moments).sample(jax.random.key(0))
    np.testing.assert_allclose(z.mean(), 3.0, atol=0.25)
    np.testing.assert_allclose(z.std(), np.exp(1.5), rtol=0.05)
    for raw, clamped in [(-99.0, -30.0), (99.0, 20.0)]:
        posterior = autoencoder.Posterior.from_moments(jnp.full((1, 1, 1, 2), raw))
        assert posterior.logvar.item() == clamped


@pytest.mark.parametrize("tanh_out", [False, True])
def test_decode_is_conv_out_of_decode_features(tanh_out):
    net = autoencoder.AutoencoderKL(**TINY, tanh_out=tanh_out)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    variables = net.init(jax.random.key(1), x)
    z = jax.random.normal(jax.random.key(2), (1, 4, 4, 4))
    image = net.apply(variables, z, method="decode")
    features = net.apply(variables, z, method="decode_features")
    assert features.shape == (1, 8, 8, 32)
    out = net.apply(variables, features, method="conv_out")
    np.testing.assert_array_equal(out, image)
    plain = autoencoder.AutoencoderKL(**TINY).apply(variables, z, method="decode")
    expected = jnp.tanh(plain) if tanh_out else plain
    np.testing.assert_allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (dict(attn_resolutions=(4,)), "encoder/down_1_attn_0/q", "up_0_attn_0"),
        (dict(attn_type="none"), "encoder/mid_res_1", "mid_attn"),
        (dict(use_linear_attn=True), "decoder/mid_attn/to_qkv", "mid_attn/q/"),
        (dict(resamp_with_conv=False), "decoder/up_0_res_1", "sample"),
        (dict(give_pre_end=True), "decoder/up_0_res_1", "decoder/conv_out"),
        (dict(norm_groups=8, ch=8, dtype=jnp.bfloat16), "decoder/conv_out", "skip_"),
    ],
)
def test_every_option_shows_in_the_parameters(options, present, absent):
    net = autoencoder.AutoencoderKL(**TINY | options)
    shapes = compvis.abstract_params(net, jax.ShapeDtypeStruct((1, 12, 8, 3), "f4"))
    assert any(path.startswith(present) for path in shapes)
    assert not any(absent in path for path in shapes)


def test_compute_dtype_holds_from_end_to_end_and_params_stay_float32():
    net = autoencoder.AutoencoderKL(**TINY, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16 and out.shape == (1, 8, 8, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("f4")}


def test_dropout_acts_only_when_not_deterministic():
    net = autoencoder.AutoencoderKL(**TINY, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    variables = net.init(jax.random.key(1), x)
    encode = functools.partial(net.apply, variables, x, method="encode")
    noisy = encode(deterministic=False, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(encode(), encode())
    assert jnp.abs(noisy - encode()).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(attn_type="flash"), "attn_type 'flash'"),
        (dict(double_z=False), "double_z"),
    ],
)
def test_wrong_options_are_named(options, words):
    net = autoencoder.AutoencoderKL(**TINY | options)
    with pytest.raises(ValueError, match=words):
        net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "total"),
    [
        ("kl_f4", 22.35, 32.96, 55.31),
        ("kl_f8", 34.16, 49.49, 83.65),
        ("kl_f16", 28.27, 41.34, 69.61),
        ("kl_f32", 42.61, 61.24, 103.88),
        ("sd", 34.16, 49.49, 83.65),
        ("sd_x4", 22.36, 32.97, 55.33),
        ("rdm", 28.27, 41.34, 69.61),
    ],
)
def test_variants_have_the_published_number_of_parameters(
    name, encoder, decoder, total
):
    net = autoencoder.AutoencoderKL(**autoencoder.VARIANTS[name])
    shapes = compvis.abstract_params(net, jax.ShapeDtypeStruct((1, 32, 32, 3), "f4"))
    for prefix, millions in [("encoder", encoder), ("decoder", decoder), ("", total)]:
        count = sum(np.prod(s) for path, s in shapes.items() if path.startswith(prefix))
        assert round(count / 1e6, 2) == millions
