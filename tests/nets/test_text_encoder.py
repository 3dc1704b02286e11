import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis, plans
from ldm_jax.nets import text_encoder
from tests import parity


@functools.cache
def bert():
    meta, weights, io = parity.load("bert_embedder")
    config = meta["config"]
    net = text_encoder.TextTransformer(
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_seq_len"],
        dim=config["n_embed"],
        depth=config["n_layer"],
    )
    return net, {"params": compvis.text_transformer_params(weights, net)}, io


@pytest.mark.parametrize("suffix", ["", "_short"])
def test_text_transformer_matches_the_reference(suffix):
    net, variables, io = bert()
    out = jax.jit(net.apply)(variables, io[f"tokens{suffix}"].astype(np.int32))
    np.testing.assert_allclose(out, io[f"embeddings{suffix}"], atol=5e-5)


def test_mask_hides_padding():
    net, variables, io = bert()
    tokens = io["tokens"].astype(np.int32)
    mask = tokens != 0
    out = jax.jit(net.apply)(variables, tokens, mask)
    np.testing.assert_allclose(out[mask], io["embeddings_masked"][mask], atol=5e-5)


def test_dropout_acts_only_when_not_deterministic():
    for rates in (dict(dropout=0.5), dict(emb_dropout=0.5)):
        net = text_encoder.TextTransformer(11, 5, dim=8, depth=1, heads=2, **rates)
        tokens = jnp.arange(5)[None]
        variables = net.init(jax.random.key(0), tokens)
        out = net.apply(variables, tokens)
        rngs = {"dropout": jax.random.key(1)}
        noisy = net.apply(variables, tokens, deterministic=False, rngs=rngs)
        assert jnp.abs(out - noisy).max() > 1e-3


def _clip_hf(**options):
    meta, weights, io = parity.load("clip_text_gelu")
    config = meta["config"]
    net = text_encoder.CLIPTextTransformer(
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_position_embeddings"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        activation="gelu",
        **options,
    )
    return net, compvis.clip_params(weights, net), io


@pytest.mark.parametrize(
    ("layer", "array"),
    [("last", "last_hidden_state"), ("penultimate", "penultimate_final_ln")],
)
def test_clip_matches_hugging_face(layer, array):
    net, params, io = _clip_hf(layer=layer)
    out = jax.jit(net.apply)({"params": params}, io["tokens"].astype(np.int32))
    np.testing.assert_allclose(out, io[array], atol=5e-5)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_clip_matches_openclip(layer):
    meta, weights, io = parity.load("open_clip_text")
    config = meta["config"]
    net = text_encoder.CLIPTextTransformer(
        vocab_size=config["vocab_size"],
        max_seq_len=config["context_length"],
        dim=config["width"],
        depth=config["layers"],
        heads=config["heads"],
        activation="gelu",
        layer=layer,
    )
    params = compvis.openclip_params(weights, net)
    out = jax.jit(net.apply)({"params": params}, io["tokens"].astype(np.int32))
    np.testing.assert_allclose(out, io[layer], atol=5e-5)


def test_quick_gelu_is_another_function():
    x = jnp.array([-1.0, 0.5, 2.0])
    expected = np.asarray(x) / (1 + np.exp(-1.702 * np.asarray(x)))
    np.testing.assert_allclose(text_encoder.quick_gelu(x), expected, rtol=1e-6)
    tiny = dict(vocab_size=11, max_seq_len=5, dim=8, depth=1, heads=2)
    tokens = jnp.arange(5)[None]
    outs = []
    for activation in ("gelu", "quick_gelu"):
        net = text_encoder.CLIPTextTransformer(**tiny, activation=activation)
        outs.append(net.init_with_output(jax.random.key(0), tokens)[0])
    assert jnp.abs(outs[0] - outs[1]).max() > 1e-5


def test_clip_does_not_look_ahead():
    net = text_encoder.CLIPTextTransformer(11, 5, dim=8, depth=2, heads=2)
    tokens = jnp.array([[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]])
    out, _ = net.init_with_output(jax.random.key(0), tokens)
    np.testing.assert_allclose(out[0, :3], out[1, :3], atol=1e-6)
    assert jnp.abs(out[0, 3:] - out[1, 3:]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "length", "words"),
    [
        ({}, 6, "6 tokens were given, but max_seq_len is 5"),
        (dict(layer="hidden"), 5, "layer 'hidden'"),
        (dict(activation="relu"), 5, "activation 'relu'"),
    ],
)
def test_mistakes_are_named(options, length, words):
    net = text_encoder.CLIPTextTransformer(11, 5, dim=8, depth=1, heads=2, **options)
    with pytest.raises(ValueError, match=words):
        net.init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))


def test_an_id_outside_the_vocabulary_shows_as_nan():
    net = text_encoder.TextTransformer(11, 5, dim=8, depth=1, heads=2)
    tokens = jnp.array([[1, 11]])
    variables = net.init(jax.random.key(0), tokens)
    assert jnp.isnan(net.apply(variables, tokens)).any()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("bert_1p4b", 581.99),
        ("bert_cc", 186.15),
        ("bert_layout", 58.86),
        ("clip_l", 123.06),
        ("openclip_h", 340.39),
    ],
)
def test_variants_have_the_published_number_of_parameters(name, millions):
    nets = {
        "bert": text_encoder.TextTransformer,
        "clip": text_encoder.CLIPTextTransformer,
        "openclip": text_encoder.CLIPTextTransformer,
    }
    net = nets[name.split("_")[0]](**text_encoder.VARIANTS[name])
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = plans.abstract_params(net, tokens)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    if name.startswith("bert"):  # the original has a layer to_logits that is never used
        count += net.vocab_size * (net.dim + 1)
    assert round(count / 1e6, 2) == millions


def test_context_behind_the_end_is_zeros():
    net = text_encoder.CLIPTextTransformer(
        vocab_size=20, max_seq_len=6, dim=32, depth=1, heads=2
    )
    tokens = np.array([[3, 4, 19, 19, 19, 19], [1, 2, 3, 4, 5, 19]])
    variables = net.init(jax.random.key(0), tokens)
    whole = net.apply(variables, tokens)
    cut = net.clone(zero_padding=True).apply(variables, tokens)
    there = np.array([[True] * 3 + [False] * 3, [True] * 6])
    np.testing.assert_array_equal(cut, np.where(there[..., None], whole, 0))
    assert np.abs(whole[0, 3:]).min() > 0
