import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis, plans
from ldm_jax.nets import autoencoder, text_encoder, unet
from tests import parity

TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _unet(name):
    meta, weights, _ = parity.load(name)
    config = {k: v for k, v in meta["config"].items() if k != "image_size"}
    net = unet.UNet(**config)
    weights = {k.removeprefix("model.diffusion_model."): v for k, v in weights.items()}
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    params = compvis.unet_params(weights, net)
    return weights, compvis.unet_rules(net, shapes), params


def _autoencoder(name):
    meta, weights, _ = parity.load(name)
    config = dict(meta["config"])
    cls = autoencoder.VQModel if "n_embed" in config else autoencoder.AutoencoderKL
    net = cls(**config.pop("ddconfig"), **config)
    shapes = plans.abstract_params(net, jax.ShapeDtypeStruct((1, 8, 8, 3), "f4"))
    params = compvis.autoencoder_params(weights, net)
    return weights, compvis.autoencoder_rules(shapes), params


def _bert(name):
    _, weights, _ = parity.load(name)
    net = text_encoder.TextTransformer(1000, 77, dim=64, depth=2)
    shapes = plans.abstract_params(net, TOKENS)
    params = compvis.text_transformer_params(weights, net)
    return weights, compvis.text_transformer_rules(shapes), params


def _clip_net(**options):
    return text_encoder.CLIPTextTransformer(
        1000, 77, dim=32, depth=3, heads=4, activation="gelu", **options
    )


def _clip(name):
    _, weights, _ = parity.load(name)
    shapes = plans.abstract_params(_clip_net(), TOKENS)
    params = compvis.clip_params(weights, _clip_net())
    return weights, compvis.clip_rules(shapes), params


def _openclip(name):
    _, weights, _ = parity.load(name)
    shapes = plans.abstract_params(_clip_net(), TOKENS)
    params = compvis.openclip_params(weights, _clip_net())
    return weights, compvis.openclip_rules(shapes), params


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (_unet, "unet_uncond"),
        (_unet, "unet_sd2"),
        (_unet, "unet_updown_ssn_legacyorder"),
        (_unet, "unet_adm_int"),
        (_unet, "unet_class_crossattn"),
        (_unet, "pair_unet_unclip"),
        (_autoencoder, "autoencoder_kl"),
        (_autoencoder, "vq_model"),
        (_bert, "bert_embedder"),
        (_clip, "clip_text_gelu"),
        (_openclip, "open_clip_text"),
    ],
)
def test_rules_run_backwards_give_the_state_dict_again(load, name):
    weights, rules, params = load(name)
    back = {}
    for rule in rules:
        value = params
        for part in rule.path.split("/"):
            value = value[part]
        parts = back.setdefault(rule.key, {})
        parts[rule.part[0] if rule.part else 0] = rule.layout.to_torch(value)
    back = {key: np.concatenate([p[i] for i in sorted(p)]) for key, p in back.items()}
    unused = {key for key in weights if "to_logits" in key or "text_projection" in key}
    assert back.keys() == weights.keys() - unused
    for key, value in back.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("quant_conv.bias"), r"missing quant_conv\.bias \(for quant"),
        (lambda w: w.update(extra=np.zeros(1)), "unknown extra"),
        (
            lambda w: w.update({"quant_conv.bias": np.zeros(3)}),
            r"quant_conv\.bias of shape \(3,\) does not fit .* of shape \(8,\)",
        ),
        (
            lambda w: w.update({"encoder.conv_in.weight": np.zeros(3)}),
            r"encoder\.conv_in\.weight of shape \(3,\) does not fit",
        ),
    ],
)
def test_every_key_that_does_not_fit_is_named(change, words):
    meta, weights, _ = parity.load("autoencoder_kl")
    net = autoencoder.AutoencoderKL(**meta["config"]["ddconfig"], embed_dim=4)
    compvis.autoencoder_params(weights | {"loss.logvar": np.zeros(())}, net)
    change(weights)
    with pytest.raises(ValueError, match=words):
        compvis.autoencoder_params(weights, net)


def test_what_taming_saves_besides_a_vq_model_is_left_out():
    meta, weights, _ = parity.load("vq_model")
    config = dict(meta["config"])
    net = autoencoder.VQModel(**config.pop("ddconfig"), **config)
    more = {
        "loss.discriminator.main.0.weight": np.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": np.zeros(1),
        "quantize.used": np.arange(3),
    }
    params = compvis.autoencoder_params(weights | more, net)
    np.testing.assert_array_equal(
        params["quantize"]["embedding"], weights["quantize.embedding.weight"]
    )
    with pytest.raises(ValueError, match=r"unknown quantize\.other"):
        compvis.autoencoder_params(weights | {"quantize.other": np.zeros(1)}, net)
    del weights["quantize.embedding.weight"]
    with pytest.raises(ValueError, match=r"missing quantize\.embedding\.weight"):
        compvis.autoencoder_params(weights, net)


def test_stabilitys_autoencoder_has_no_quant_convs():
    net = autoencoder.AutoencoderKL(
        ch=8, norm_groups=8, ch_mult=(1,), num_res_blocks=1, use_quant_convs=False
    )
    shapes = plans.abstract_params(net, jax.ShapeDtypeStruct((1, 8, 8, 3), "f4"))
    rules = list(compvis.autoencoder_rules(shapes))
    assert {rule.key.split(".")[0] for rule in rules} == {"encoder", "decoder"}
    weights = {r.key: r.layout.to_torch(np.zeros(shapes[r.path])) for r in rules}
    assert compvis.autoencoder_params(weights, net).keys() == {"encoder", "decoder"}


@pytest.mark.parametrize("convert", [compvis.clip_params, compvis.openclip_params])
def test_only_a_penultimate_tower_may_leave_out_the_last_block(convert):
    name = "clip_text_gelu" if convert is compvis.clip_params else "open_clip_text"
    _, weights, _ = parity.load(name)
    params = convert(weights, _clip_net(layer="penultimate"))
    assert "layer_1" in params and "layer_2" not in params
    shorter = text_encoder.CLIPTextTransformer(1000, 77, dim=32, depth=2, heads=4)
    with pytest.raises(ValueError, match=r"unknown .*\.2\."):
        convert(weights, shorter)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (dict(num_classes="continuous"), {"label_emb.weight", "label_emb.bias"}),
        (dict(num_classes="timestep"), {"label_emb.1.0.weight", "label_emb.1.2.bias"}),
        (dict(n_embed=8), {"id_predictor.0.weight", "id_predictor.1.bias"}),
        (dict(num_res_blocks=(1, 2)), {"input_blocks.4.0.in_layers.0.weight"}),
        (dict(attention_resolutions=(1,)), {"output_blocks.1.1.conv.weight"}),
        (dict(attention_resolutions=(2,)), {"output_blocks.1.2.conv.weight"}),
    ],
)
def test_unet_keys_follow_the_options(options, keys):
    base = dict(
        in_channels=4,
        model_channels=32,
        out_channels=4,
        num_res_blocks=1,
        attention_resolutions=(1,),
        channel_mult=(1, 2),
        num_heads=1,
    )
    net = unet.UNet(**base | options)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    assert keys <= {rule.key for rule in compvis.unet_rules(net, shapes)}


def test_codebook_predictor_ignores_the_unused_noise_output():
    net = unet.UNet(4, 32, 4, 1, (), channel_mult=(1,), num_heads=1, n_embed=8)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    rules = compvis.unet_rules(net, shapes)
    weights = {r.key: r.layout.to_torch(np.zeros(shapes[r.path])) for r in rules}
    params = compvis.unet_params(weights | {"out.0.weight": np.zeros(32)}, net)
    assert params["id_out"]["kernel"].shape == (1, 1, 32, 8)
    with pytest.raises(ValueError, match="unknown input_blocks.9"):
        compvis.unet_params(weights | {"input_blocks.9.0.x": np.zeros(1)}, net)
