"""config.json for our nets: diffusers and transformers load what is exported."""

import json

import flax
import jax
import numpy as np
import pytest

from ldm_jax import convert
from ldm_jax.config import UserError
from ldm_jax.convert import plans, write_config
from ldm_jax.nets import (
    autoencoder,
    clip_vision,
    layers,
    text_encoder,
    unet,
    unet_variants,
)
from tests import parity

ATOL = 5e-5
diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

UNET = dict(
    in_channels=4,
    model_channels=32,
    out_channels=4,
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    channel_mult=(1, 2),
    use_new_attention_order=True,  # as whatever is read from diffusers
)
CONTEXT = UNET | dict(
    num_heads=4, use_spatial_transformer=True, context_dim=12, legacy=False
)
PLAIN = UNET | dict(num_head_channels=16, legacy=False, in_channels=3)
KL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=256)
CLIP = dict(dim=64, depth=3, heads=4, activation="gelu")
TEXT = CLIP | dict(vocab_size=50, max_seq_len=9)


def _random(params):
    """No weight is idle: norms are off one, what starts at zero is not."""
    rng = np.random.default_rng(0)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path, a in flat.items():
        scale = 0.1 if a.ndim == 1 else np.prod(a.shape[:-1]) ** -0.5
        value = rng.normal(size=a.shape) * scale + path.endswith("/scale")
        flat[path] = value.astype(np.float32)
    return {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


def _variables(net, *args, **kwargs):
    shapes = plans.abstract_params(net, *args, **kwargs)
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    return _random(flax.traverse_util.unflatten_dict(arrays, sep="/"))


def _loaded(model, state):
    tensors = {key: torch.from_numpy(value) for key, value in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _tensor(array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def _comes_back(net, variables, config, layout="diffusers"):
    state = convert.export_network(net, variables, layout)
    again, values = convert.import_network(state, json.loads(json.dumps(config)))
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, values, variables)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(attention_resolutions=(2,)),
        dict(attention_resolutions=()),
        dict(num_res_blocks=(1, 2)),
        dict(channel_mult=(1, 3, 2), attention_resolutions=(1, 4)),
        dict(num_heads=None, num_head_channels=16),
        dict(use_linear_in_transformer=True),
        dict(transformer_depth=(1, 2)),
        dict(disable_self_attentions=(True, False)),
        dict(use_scale_shift_norm=True, dropout=0.1),
        dict(attention_resolutions=(), resblock_updown=True),
        dict(num_classes=7),
        dict(num_classes="timestep"),
        dict(num_classes="continuous"),
        dict(num_classes="sequential", adm_in_channels=9),
        dict(num_classes="sequential", adm_in_channels=2816),  # as SDXL
        dict(in_channels=9, out_channels=8),
    ],
)
@torch.no_grad()
def test_a_unet_with_context_is_loaded_by_diffusers(options):
    net = unet.UNet(**CONTEXT | options)
    variables = _variables(net, **net.abstract_inputs())
    config = write_config.unet_of(net, 8)
    assert config["_class_name"] == "UNet2DConditionModel"
    model = diffusers.UNet2DConditionModel.from_config(config)
    _loaded(model, convert.export_network(net, variables, "diffusers"))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 8, net.in_channels)).astype(np.float32)
    context = rng.normal(size=(2, 5, 12)).astype(np.float32)
    t, ours, theirs = np.array([7.0, 801.0], np.float32), {}, {}
    if net.num_classes is not None:
        y, theirs = _condition(net, rng, t)
        ours["y"] = y
    wanted = model(_tensor(x), torch.from_numpy(t), torch.from_numpy(context), **theirs)
    out = jax.jit(net.apply)(variables, x, t, context, **ours)
    np.testing.assert_allclose(out, parity.nhwc(wanted.sample.numpy()), atol=ATOL)
    _comes_back(net, variables, config)


def _condition(net, rng, t):
    """(y, what diffusers is given for it)."""
    if net.adm_in_channels == 2816:
        text = rng.normal(size=(2, 1280)).astype(np.float32)
        sizes = rng.integers(0, 512, (2, 6)).astype(np.float32)
        waves = np.asarray(layers.timestep_embedding(sizes.ravel(), 256))
        given = {
            "text_embeds": torch.from_numpy(text),
            "time_ids": torch.from_numpy(sizes),
        }
        y = np.concatenate([text, waves.reshape(2, -1)], -1)
        return y, {"added_cond_kwargs": given}
    y = {
        "timestep": t / 3,
        "continuous": t[:, None] / 1000,
        "sequential": rng.normal(size=(2, 9)).astype(np.float32),
    }.get(net.num_classes, np.array([1, 6], np.int32))
    return y, {"class_labels": torch.from_numpy(y)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(attention_resolutions=(2,)),
        dict(attention_resolutions=(2,), num_res_blocks=2, resblock_updown=True),
        dict(use_scale_shift_norm=True),
        dict(num_head_channels=None, num_heads=1),
        dict(attention_resolutions=(), disable_middle_transformer=True),
        dict(num_classes=7),
        dict(num_classes="timestep"),
        dict(use_new_attention_order=False, legacy=True),
    ],
)
@torch.no_grad()
def test_a_unet_without_context_is_loaded_by_diffusers(options):
    net = unet.UNet(**PLAIN | options)
    variables = _variables(net, **net.abstract_inputs())
    config = write_config.unet_of(net, 8)
    assert config["_class_name"] == "UNet2DModel"
    model = diffusers.UNet2DModel.from_config(config)
    state = convert.export_network(net, variables, "diffusers")
    _loaded(model, state)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    t, ours, theirs = np.array([7.0, 801.0], np.float32), {}, {}
    if net.num_classes is not None:
        y, theirs = _condition(net, rng, t)
        ours["y"] = y
    wanted = model(_tensor(x), torch.from_numpy(t), **theirs).sample.numpy()
    out = jax.jit(net.apply)(variables, x, t, **ours)
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    if net.use_new_attention_order and not net.disable_middle_transformer:
        _comes_back(net, variables, config)
    again, values = convert.import_network(state, config)
    np.testing.assert_allclose(again.apply(values, x, t, **ours), out, atol=ATOL)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (CONTEXT | dict(dims=1), "dims"),
        (CONTEXT | dict(n_embed=8), "n_embed"),
        (CONTEXT | dict(channel_mult=(2, 4)), "channel_mult"),
        (CONTEXT | dict(conv_resample=False), "conv_resample"),
        (CONTEXT | dict(num_attention_blocks=(1, 1)), "num_attention_blocks"),
        (CONTEXT | dict(context_dim=(12, 14)), "context_dim"),
        (CONTEXT | dict(resblock_updown=True), "resblock_updown"),
        (CONTEXT | dict(disable_middle_self_attn=True), "disable_middle_self_attn"),
        (CONTEXT | dict(disable_middle_transformer=True), "disable_middle_transformer"),
        (CONTEXT | dict(num_head_channels=20), "num_head_channels"),
        (PLAIN | dict(num_res_blocks=(1, 2)), "num_res_blocks"),
        (PLAIN | dict(num_classes="continuous"), "num_classes"),
        (PLAIN | dict(num_head_channels=None, num_heads=4), "num_heads"),
    ],
)
def test_what_no_unet_of_diffusers_is_says_so_in_one_line(options, field):
    with pytest.raises(UserError, match=f"^{field}: .*compvis'$"):
        write_config.unet_of(unet.UNet(**options), 8)


def test_released_unets_have_the_released_configs():
    """Facts of the configs in the folders of Stable Diffusion 1.5, 2.1 and x4."""
    sd1 = write_config.unet_of(unet.UNet(**unet_variants.VARIANTS["sd1"]), 64)
    assert sd1["attention_head_dim"] == 8
    assert sd1["block_out_channels"] == [320, 640, 1280, 1280]
    assert sd1["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    sd2 = write_config.unet_of(unet.UNet(**unet_variants.VARIANTS["sd2"]), 96)
    assert sd2["attention_head_dim"] == [5, 10, 20, 20]
    assert sd2["use_linear_projection"]
    x4 = write_config.unet_of(unet.UNet(**unet_variants.VARIANTS["x4_upscaler"]), 128)
    assert x4["only_cross_attention"] == [True, True, True, False]
    assert x4["num_class_embeds"] == 1000


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(ch_mult=(1, 2, 2), attn_resolutions=(128,), num_res_blocks=2),
        dict(norm_groups=8, attn_type="none"),
        dict(use_quant_convs=False),
        dict(in_channels=2, out_ch=5, z_channels=3, embed_dim=3),
    ],
)
@torch.no_grad()
def test_a_kl_autoencoder_is_loaded_by_diffusers(options):
    net = autoencoder.AutoencoderKL(**KL | options)
    x = np.random.default_rng(1).normal(size=(2, 16, 16, net.in_channels))
    x = x.astype(np.float32)
    variables = _variables(net, x)
    config = write_config.autoencoder_of(net, 0.25, 16)
    model = diffusers.AutoencoderKL.from_config(config)
    assert model.config.scaling_factor == 0.25
    _loaded(model, convert.export_network(net, variables, "diffusers"))
    moments = model.encode(_tensor(x)).latent_dist.parameters.numpy()
    encoded = net.apply(variables, x, method="encode")
    np.testing.assert_allclose(encoded, parity.nhwc(moments), atol=ATOL)
    z = moments[:, : net.embed_dim]
    wanted = model.decode(torch.from_numpy(z)).sample.numpy()
    out = net.apply(variables, parity.nhwc(z), method="decode")
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    _comes_back(net, variables, config)


@torch.no_grad()
def test_a_vq_autoencoder_is_loaded_by_diffusers():
    net = autoencoder.VQModel(**KL, n_embed=32, z_channels=3, embed_dim=4)
    x = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    variables = _variables(net, x)
    config = write_config.autoencoder_of(net, 1.0, 16)
    model = diffusers.VQModel.from_config(config)
    _loaded(model, convert.export_network(net, variables, "diffusers"))
    h = model.encode(_tensor(x)).latents
    encoded = net.apply(variables, x, method="encode")
    np.testing.assert_allclose(encoded, parity.nhwc(h.numpy()), atol=ATOL)
    wanted = model.decode(h).sample.numpy()
    out = net.apply(variables, parity.nhwc(h.numpy()), method="decode")
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    _comes_back(net, variables, config)


@pytest.mark.parametrize(
    ("net", "field"),
    [
        (autoencoder.AutoencoderKL(**KL, attn_type="linear"), "attn_type"),
        (autoencoder.AutoencoderKL(**KL, tanh_out=True), "tanh_out"),
        (autoencoder.AutoencoderKL(**KL, embed_dim=3), "embed_dim"),
        (autoencoder.AutoencoderKL(**KL, resamp_with_conv=False), "resamp_with_conv"),
        (autoencoder.AutoencoderKL(**KL | dict(ch_mult=(2, 4))), "ch_mult"),
        (autoencoder.VQModel(**KL, l2_normalize=True), "l2_normalize"),
        (autoencoder.Identity(), "autoencoder"),
    ],
)
def test_what_no_autoencoder_of_diffusers_is_says_so_in_one_line(net, field):
    with pytest.raises(UserError, match=f"^{field}: .*diffusers.*; [^\n]*$"):
        write_config.autoencoder_of(net, 1.0, 16)


def _tower(cls, config, state):
    """A tower of transformers; a class in itself has bare names there, others not."""
    model = cls(cls.config_class(**config))
    bare = not any(key.startswith("text_model.") for key in model.state_dict())
    if bare and "text_model" in next(iter(state)):
        state = {key.removeprefix("text_model."): a for key, a in state.items()}
    return _loaded(model, state)


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({}, 3),
        (dict(activation="quick_gelu"), 3),
        (dict(layer="penultimate"), 2),
        (dict(projection_dim=24), 3),
    ],
)
@torch.no_grad()
def test_a_text_tower_is_loaded_by_transformers(options, depth):
    net = text_encoder.CLIPTextTransformer(**TEXT | options)
    tokens = np.array([[3, 4, 49, 4], [1, 49, 49, 49]], np.int32)
    variables = _variables(net, tokens)
    config = write_config.clip_text_of(net)
    assert config["num_hidden_layers"] == depth
    assert config["architectures"] == [
        "CLIPTextModel" + "WithProjection" * (net.projection_dim is not None)
    ]
    whole = net.clone(depth=net.blocks, layer="last")
    state = convert.export_network(whole, variables, "huggingface")
    cls = getattr(transformers, config["architectures"][0])
    model = _tower(cls, config, state)
    wanted = model(torch.from_numpy(tokens).long())
    wanted = wanted.text_embeds if net.projection_dim else wanted.last_hidden_state
    out = net.apply(variables, tokens)
    np.testing.assert_allclose(out, wanted, atol=ATOL)
    if net.projection_dim is None:
        _comes_back(whole, variables, config, "huggingface")


def test_a_tower_without_its_last_norm_is_a_layer_of_the_whole_one():
    net = text_encoder.CLIPTextTransformer(
        **TEXT, layer="penultimate", final_norm=False
    )
    assert write_config.clip_text_of(net)["num_hidden_layers"] == 3
    with pytest.raises(UserError, match="^normalize: "):
        write_config.clip_text_of(net.clone(normalize=True))


@torch.no_grad()
def test_a_picture_tower_is_loaded_by_transformers():
    net = clip_vision.CLIPVisionTransformer(32, 8, projection_dim=24, **CLIP)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    variables = _variables(net, x)
    config = write_config.clip_vision_of(net)
    cls = getattr(transformers, config["architectures"][0])
    state = convert.export_network(net, variables, "huggingface")
    wanted = _tower(cls, config, state)(_tensor(x)).image_embeds
    np.testing.assert_allclose(net.apply(variables, x).embedding, wanted, atol=ATOL)
    _comes_back(net, variables, config, "huggingface")
