"""Small random models of diffusers and transformers, through the converter alone."""

import jax
import numpy as np
import pytest

from ldm_jax import convert
from ldm_jax.config import UserError
from tests import parity

ATOL = 5e-5
diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    attention_head_dim=4,
)
BOTH = dict(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
PLAIN = dict(
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    attention_head_dim=16,
)
COARSE = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    sample_size=16,
)


def _random(model):
    """No weight is idle: norms are off one, what starts at zero is not."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def _state(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def _tensor(array):
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def _through_compvis(net, variables, config):
    """The state dict in the other layout gives the same variables."""
    other = convert.export_network(net, variables, "compvis")
    hint = {key: getattr(net, key) for key in config}
    _, again = convert.import_network(other, hint)
    jax.tree.map(np.testing.assert_array_equal, variables, again)


@pytest.mark.parametrize(
    ("options", "y"),
    [
        ({}, None),
        (BOTH | dict(attention_head_dim=(2, 4)), None),
        (BOTH | dict(use_linear_projection=True), None),
        (BOTH | dict(transformer_layers_per_block=(1, 2)), None),
        (dict(block_out_channels=(32, 64), layers_per_block=(1, 2)), None),
        (dict(class_embed_type="timestep"), "scalar"),
        (
            dict(
                class_embed_type="projection", projection_class_embeddings_input_dim=9
            ),
            "vector",
        ),
        (dict(num_class_embeds=7), "id"),
        (BOTH | dict(only_cross_attention=(True, False)), None),
        (dict(resnet_time_scale_shift="scale_shift"), None),
        (
            dict(
                down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
                up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"),
            ),
            None,
        ),
    ],
)
@torch.no_grad()
def test_a_conditional_unet_matches_diffusers(options, y):
    config = UNET | options
    model = _random(diffusers.UNet2DConditionModel(**config))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(2, 5, 12)).astype(np.float32)
    t, extra, labels = np.array([7.0, 801.0], np.float32), {}, None
    if y is not None:
        vector = rng.normal(size=(2, 9)).astype(np.float32)
        many = {"scalar": t / 3, "vector": vector, "id": np.array([1, 6], np.int32)}
        extra["y"] = many[y]
        labels = torch.from_numpy(extra["y"])
    wanted = model(
        _tensor(x), torch.from_numpy(t), torch.from_numpy(context), class_labels=labels
    ).sample.numpy()
    state = _state(model)
    net, variables = convert.import_network(state, dict(model.config))
    out = jax.jit(net.apply)(variables, x, t, context, **extra)
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    back = convert.export_network(net, variables, "diffusers")
    assert back.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    _through_compvis(net, variables, ("num_heads", "num_head_channels"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(attention_head_dim=None),
        dict(
            down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2,
            downsample_type="resnet",
            upsample_type="resnet",
        ),
    ],
)
@torch.no_grad()
def test_an_unconditional_unet_matches_diffusers(options):
    model = _random(diffusers.UNet2DModel(**PLAIN | options))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    t = np.array([7.0, 801.0], np.float32)
    wanted = model(_tensor(x), torch.from_numpy(t)).sample.numpy()
    state = _state(model)
    net, variables = convert.import_network(state, dict(model.config))
    out = jax.jit(net.apply)(variables, x, t)
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    back = convert.export_network(net, variables, "diffusers")
    assert back.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    kept = ("num_heads", "num_head_channels", "use_new_attention_order")
    _through_compvis(net, variables, kept)


@pytest.mark.parametrize(
    "options",
    [
        dict(layers_per_block=2),
        dict(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        ),
        dict(norm_num_groups=8),
        dict(use_quant_conv=False, use_post_quant_conv=False),
        dict(mid_block_add_attention=False),
    ],
)
@pytest.mark.parametrize("old", [False, True])
@torch.no_grad()
def test_a_kl_autoencoder_matches_diffusers(options, old):
    config = COARSE | dict(latent_channels=4) | options
    model = _random(diffusers.AutoencoderKL(**config))
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    moments = model.encode(_tensor(x)).latent_dist.parameters.numpy()
    z = moments[:, :4]
    wanted = model.decode(torch.from_numpy(z)).sample.numpy()
    state = given = _state(model)
    if old:
        was = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        given = {}
        for key, value in state.items():
            for new, name in was.items():
                key = key.replace(f".{new}.", f".{name}.")
            given[key] = value
    net, variables = convert.import_network(given, dict(model.config))
    encoded = net.apply(variables, x, method="encode")
    np.testing.assert_allclose(encoded, parity.nhwc(moments), atol=ATOL)
    out = net.apply(variables, parity.nhwc(z), method="decode")
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    back = convert.export_network(net, variables, "diffusers")
    assert back.keys() == state.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key], err_msg=key)
    _through_compvis(net, variables, ("norm_groups",))


@torch.no_grad()
def test_a_vq_autoencoder_matches_diffusers():
    config = COARSE | dict(num_vq_embeddings=32, latent_channels=3, vq_embed_dim=4)
    model = _random(diffusers.VQModel(**config))
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    h = model.encode(_tensor(x)).latents
    wanted = model.decode(h).sample.numpy()
    net, variables = convert.import_network(_state(model), dict(model.config))
    encoded = net.apply(variables, x, method="encode")
    np.testing.assert_allclose(encoded, parity.nhwc(h.numpy()), atol=ATOL)
    out = net.apply(variables, parity.nhwc(h.numpy()), method="decode")
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)
    _through_compvis(net, variables, ())


@pytest.mark.parametrize("option", [{"norm_eps": 1e-6}, {"freq_shift": 1}])
def test_what_is_computed_otherwise_here_is_refused(option):
    model = diffusers.UNet2DModel(**PLAIN | option)
    with pytest.raises(UserError, match=f"{next(iter(option))}: .*only"):
        convert.import_network(_state(model), dict(model.config))
