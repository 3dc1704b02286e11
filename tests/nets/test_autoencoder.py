import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis, plans
from ldm_jax.nets import autoencoder
from tests import parity

TINY = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=8)
SMALLEST = dict(ch=8, norm_groups=8, ch_mult=(1,), num_res_blocks=1, attn_type="none")


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
    encode = jax.jit(partial(net.apply, method="encode"))
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
    decode = jax.jit(partial(net.apply, method="decode"))
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
    shapes = plans.abstract_params(net, jax.ShapeDtypeStruct((1, 12, 8, 3), "f4"))
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
    encode = partial(net.apply, variables, x, method="encode")
    noisy = encode(deterministic=False, rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(encode(), encode())
    assert jnp.abs(noisy - encode()).max() > 1e-3


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (autoencoder.AutoencoderKL, dict(attn_type="flash"), "attn_type 'flash'"),
        (autoencoder.AutoencoderKL, dict(double_z=False), "double_z False"),
        (
            autoencoder.AutoencoderKL,
            dict(use_quant_convs=False, z_channels=8),
            "embed_dim 4 differs from z_channels 8",
        ),
        (autoencoder.VQModel, dict(double_z=True), "double_z True"),
    ],
)
def test_wrong_options_are_named(cls, options, words):
    net = cls(**TINY | options)
    with pytest.raises(ValueError, match=words):
        net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("use_quant_convs", [False, True])
def test_posterior_starts_near_init_logvar(use_quant_convs):
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4, 3), minval=-1)
    means, logvars = [], []
    for logvar in (0.0, -6.0):
        net = autoencoder.AutoencoderKL(
            **SMALLEST, init_logvar=logvar, use_quant_convs=use_quant_convs
        )
        variables = net.init(jax.random.key(1), x)
        assert ("quant_conv" in variables["params"]) == use_quant_convs
        assert ("post_quant_conv" in variables["params"]) == use_quant_convs
        moments = jax.jit(partial(net.apply, method="encode"))(variables, x)
        posterior = autoencoder.Posterior.from_moments(moments)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    np.testing.assert_allclose(logvars[1], logvars[0] - 6, atol=1e-5)
    np.testing.assert_array_equal(*means)


def test_without_quant_convs_the_latent_is_the_encoders_own():
    x = jax.random.uniform(jax.random.key(0), (1, 4, 4, 3), minval=-1)
    net = autoencoder.AutoencoderKL(**SMALLEST, use_quant_convs=False)
    variables = net.init(jax.random.key(1), x)
    encoder, decoder = autoencoder.Encoder(**SMALLEST), autoencoder.Decoder(**SMALLEST)
    parts = {name: {"params": p} for name, p in variables["params"].items()}
    moments = jax.jit(encoder.apply)(parts["encoder"], x)
    out = jax.jit(partial(net.apply, method="encode"))(variables, x)
    np.testing.assert_allclose(out, moments, atol=1e-6)
    z = moments[..., :4]
    image = jax.jit(decoder.apply)(parts["decoder"], z)
    out = jax.jit(partial(net.apply, method="decode"))(variables, z)
    np.testing.assert_allclose(out, image, atol=1e-6)
    np.testing.assert_allclose(jax.jit(net.apply)(variables, x), image, atol=1e-6)


def test_kl_bottleneck_draws_with_a_key_and_prices_by_the_kl():
    net = autoencoder.AutoencoderKL(**TINY)
    moments = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    posterior, key = autoencoder.Posterior.from_moments(moments), jax.random.key(1)
    for args, z in [((key,), posterior.sample(key)), ((), posterior.mode())]:
        out = net.apply({}, moments, *args, method="bottleneck")
        np.testing.assert_array_equal(out.z, z)
        np.testing.assert_array_equal(out.penalty, posterior.kl())
        assert out.indices is None
        np.testing.assert_array_equal(net.apply({}, moments, *args, method="latent"), z)


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "total"),
    [
        ("kl_f4", 22.35, 32.96, 55.31),
        ("kl_f8", 34.16, 49.49, 83.65),
        ("kl_f16", 28.27, 41.34, 69.61),
        ("kl_f32", 42.61, 61.24, 103.88),
        ("vq_f4", 22.34, 32.96, 55.30),
        ("vq_f4_noattn", 21.29, 31.91, 53.19),
        ("vq_f8", 27.40, 40.25, 67.65),
        ("vq_f8_n256", 27.40, 40.25, 67.65),
        ("vq_f16", 28.16, 41.31, 69.46),
        ("inpainting_big", 21.29, 31.91, 53.19),
        ("sd", 34.16, 49.49, 83.65),
        ("sd_x4", 22.36, 32.97, 55.33),
        ("rdm", 28.27, 41.34, 69.61),
    ],
)
def test_variants_have_the_published_number_of_parameters(
    name, encoder, decoder, total
):
    sizes = _sizes(name)
    assert round(sizes["encoder"] / 1e6, 2) == encoder
    assert round(sizes["decoder"] / 1e6, 2) == decoder
    without_codes = sum(sizes.values()) - sizes.get("quantize", 0)
    assert round(without_codes / 1e6, 2) == total


@functools.cache
def _sizes(name):
    """{part: number of parameters} of a variant."""
    kwargs = dict(autoencoder.VARIANTS[name])
    net = autoencoder.KINDS[kwargs.pop("kind")](**kwargs)
    shapes = plans.abstract_params(net, jax.ShapeDtypeStruct((1, 32, 32, 3), "f4"))
    sizes = {}
    for path, shape in shapes.items():
        part = path.split("/")[0]
        sizes[part] = sizes.get(part, 0) + int(np.prod(shape))
    return sizes


def test_variants_differ_by_the_arithmetic_of_their_layers():
    codes = {"vq_f4": 8192 * 3, "vq_f8": 16384 * 4, "vq_f8_n256": 256 * 4}
    codes |= {"vq_f16": 16384 * 8, "vqgan_f16_1024": 1024 * 256}
    for name, count in codes.items():
        assert _sizes(name)["quantize"] == count
    # taming's differs from vq_f16 where the latent's channels go in and out.
    ours, other = _sizes("vqgan_f16_1024"), _sizes("vq_f16")
    assert ours["encoder"] - other["encoder"] == (9 * 512 + 1) * (256 - 8)
    assert ours["decoder"] - other["decoder"] == 9 * 512 * (256 - 8)
    assert ours["quant_conv"] == ours["post_quant_conv"] == 256 * 257
    # Stability's kl-f8 with eight channels is the paper's without 1x1 convolutions.
    ours, other = _sizes("sgm_kl_f8"), _sizes("kl_f8")
    assert ours.keys() == {"encoder", "decoder"}
    assert ours["encoder"] - other["encoder"] == (9 * 512 + 1) * 8
    assert ours["decoder"] - other["decoder"] == 9 * 512 * 4
    # Two blocks more a level, no attention; widths 128, 256, 512.
    ours, other = _sizes("sgm_kl_f4"), _sizes("vq_f4_noattn")
    assert ours.keys() == {"encoder", "decoder"}
    block = [2 * (9 * c * c + c) + 4 * c for c in (128, 256, 512)]
    assert ours["decoder"] - other["decoder"] == 2 * sum(block) + 9 * 512
    more = (9 * 512 + 1) * (8 - 3)
    assert ours["encoder"] - other["encoder"] == 2 * sum(block) + more


# --- identity


def test_identity_passes_everything_through():
    net = autoencoder.Identity()
    x, key = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3)), jax.random.key(1)
    assert not net.init(key, x)
    for z in [
        net.apply({}, x),
        net.apply({}, x, method="encode", deterministic=False),
        net.apply({}, x, key, method="latent"),
        net.apply({}, x, method="decode"),
        net.apply({}, x, key, method="bottleneck").z,
    ]:
        np.testing.assert_array_equal(z, x)
    bottleneck = net.apply({}, x, method="bottleneck")
    np.testing.assert_array_equal(bottleneck.penalty, [0.0, 0.0])
    assert bottleneck.indices is None
    grey = autoencoder.Identity(channels=1)
    assert (grey.in_channels, grey.embed_dim, grey.ch_mult) == (1, 1, (1,))
