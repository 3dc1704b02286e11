import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis
from ldm_jax.nets import autoencoder, quantize
from tests import parity

TINY = dict(ch=8, norm_groups=8, ch_mult=(1,), num_res_blocks=1, attn_type="none")
TINY |= dict(n_embed=16)


@functools.cache
def fixture():
    meta, weights, io = parity.load("vq_model")
    config = dict(meta["config"])
    net = autoencoder.VQModel(**config.pop("ddconfig"), **config)
    io = {key: parity.nhwc(a) if a.ndim == 4 else a for key, a in io.items()}
    return net, compvis.autoencoder_params(weights, net), io


def _jit(net, **kwargs):
    return jax.jit(functools.partial(net.apply, **kwargs))


def _apply(*args, **kwargs):
    net, params, _ = fixture()
    return _jit(net, **kwargs)({"params": params}, *args)


def test_encode_matches_the_reference():
    _, _, io = fixture()
    np.testing.assert_allclose(_apply(io["x"], method="encode"), io["h"], atol=5e-5)


@pytest.mark.parametrize(
    ("kwargs", "image"),
    [({}, "dec_interface"), (dict(quantize=False), "dec_not_quantized")],
)
def test_decode_matches_the_reference(kwargs, image):
    _, _, io = fixture()
    out = _apply(io["h"], method="decode", **kwargs)
    np.testing.assert_allclose(out, io[image], atol=5e-5)


def test_every_way_from_codes_to_image_matches_the_reference():
    _, _, io = fixture()
    features = _apply(io["quant"], method="decode_features")
    for out in [
        _apply(features, method="conv_out"),
        _apply(io["quant"], method="decode"),
        _apply(io["indices_sane"], method="decode_code"),
        _apply(io["x"]),
    ]:
        np.testing.assert_allclose(out, io["dec"], atol=5e-5)


def test_bottleneck_matches_the_reference():
    _, _, io = fixture()
    out = _apply(io["h"], method="bottleneck")
    np.testing.assert_allclose(out.z, io["quant"], atol=5e-5)
    np.testing.assert_array_equal(out.indices, io["indices"])
    assert out.penalty.shape == (2,)
    np.testing.assert_allclose(out.penalty.mean(), io["loss_legacy_true"], atol=5e-5)
    np.testing.assert_array_equal(_apply(io["h"], method="latent"), io["h"])


def test_bottleneck_gradients_match_the_reference():
    net, params, io = fixture()
    w = jnp.asarray(io["grad_w"])

    def parts(embedding, h):
        tree = params | {"quantize": {"embedding": embedding}}
        out = net.apply({"params": tree}, h, method="bottleneck")
        return jnp.mean(out.penalty), jnp.sum(out.z * w)

    args = (jnp.asarray(params["quantize"]["embedding"]), jnp.asarray(io["h"]))
    codebook, h = jax.grad(lambda *a: parts(*a)[0], (0, 1))(*args)
    expected = io["grad_codebook_loss_legacy_true"]
    np.testing.assert_allclose(codebook, expected, rtol=1e-5, atol=1e-7)
    expected = io["grad_h_loss_legacy_true"]
    np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-8)
    codebook, h = jax.grad(lambda *a: parts(*a)[1], (0, 1))(*args)
    np.testing.assert_allclose(h, io["grad_straight_through"], atol=5e-5)
    assert not codebook.any()


def _tiny(**options):
    net = autoencoder.VQModel(**TINY | options)
    x = jax.random.uniform(jax.random.key(0), (8, 4, 4, 3), minval=-1)
    return net, net.init(jax.random.key(1), x), x


def test_every_option_reaches_the_quantizer():
    options = dict(
        n_embed=7,
        embed_dim=5,
        beta=0.5,
        legacy=False,
        remap=(1, 2),
        unknown_index="extra",
        sane_index_shape=True,
        l2_normalize=True,
        ema_decay=0.9,
        revive_below=0.25,
    )
    net, variables, x = _tiny(**options)
    assert net.make_quantizer() == quantize.VectorQuantizer(**options)
    assert variables["params"]["quantize"]["embedding"].shape == (7, 5)
    h = _jit(net, method="encode")(variables, x)
    out = _jit(net, method="bottleneck")(variables, h)
    assert out.indices.shape == (8, 4, 4) and out.indices.max() <= 2
    np.testing.assert_allclose(jnp.linalg.norm(out.z, axis=-1), 1.0, rtol=1e-5)


def test_unquantized_latents_of_a_unit_length_codebook_are_unit_length():
    net, variables, _ = _tiny(l2_normalize=True)
    z = 3 * jax.random.normal(jax.random.key(2), (1, 4, 4, 3))
    decode = _jit(net, method="decode", quantize=False)
    np.testing.assert_allclose(
        decode(variables, z), decode(variables, 7 * z), atol=1e-5
    )


def test_a_training_step_moves_the_codebook_of_the_net():
    net, variables, x = _tiny(ema_decay=0.9, revive_below=0.01)
    params = variables["params"]

    h = _jit(net, method="encode")(variables, x)

    @jax.jit
    def step(params, codebook, key):
        variables = {"params": params, "codebook": codebook}
        out, moved = net.apply(
            variables, h, key, method="bottleneck", mutable=["codebook"]
        )
        embedding, moved = quantize.move_codebook(
            net.make_quantizer(),
            params["quantize"]["embedding"],
            moved["codebook"]["quantize"],
        )
        params = params | {"quantize": {"embedding": embedding}}
        return params, {"quantize": moved}, jnp.mean(out.penalty)

    codebook, losses = variables["codebook"], []
    for i in range(60):
        params, codebook, loss = step(params, codebook, jax.random.key(i))
        losses.append(loss.item())
    # The nets stand still: the codes alone have come nearer to the latents.
    assert losses[-1] < 0.5 * losses[0]
    assert jax.tree.map(jnp.shape, codebook) == jax.tree.map(
        jnp.shape, dict(variables["codebook"])
    )


def test_no_collection_where_gradients_train_the_codebook():
    net, variables, x = _tiny()
    assert variables.keys() == {"params"}
    h = jnp.zeros((1, 4, 4, 3))
    _, moved = net.apply(variables, h, method="bottleneck", mutable=[])
    assert not moved


def test_remapped_codes_decode_without_a_key():
    net, variables, x = _tiny(remap=(3, 4))  # unknown_index "random"
    assert jax.eval_shape(net.apply, variables, x).shape == x.shape
    indices = jnp.ones((1, 4, 4), jnp.int32)
    image = _jit(net, method="decode_code")(variables, indices)
    code = variables["params"]["quantize"]["embedding"][4]
    z = jnp.broadcast_to(code[None, None, None], (1, 4, 4, 3))
    expected = _jit(net, method="decode")(variables, z)
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_compute_dtype_is_that_of_the_convolutions_alone():
    net = autoencoder.VQModel(**TINY, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("f4")}

    def parts(variables, x):
        h = net.apply(variables, x, method="encode")
        latent = net.apply(variables, h, method="latent")
        return h, latent, net.apply(variables, h, method="bottleneck")

    h, latent, bottleneck = jax.eval_shape(parts, variables, x)
    assert h.dtype == jnp.bfloat16
    for a in (latent, bottleneck.z, bottleneck.penalty):
        assert a.dtype == jnp.float32


@pytest.mark.parametrize(
    ("remap", "unknown_index", "count"),
    [
        (None, "random", 16),
        ((3, 5, 9), "random", 3),
        ((3, 5, 9), "extra", 4),
        ((3, 5, 9), 7, 8),
        ((3, 5, 9), 1, 3),
    ],
)
def test_number_of_indices(remap, unknown_index, count):
    net = autoencoder.VQModel(n_embed=16, remap=remap, unknown_index=unknown_index)
    assert net.num_indices == count
