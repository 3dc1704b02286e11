import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import classifier, plans
from ldm_jax.nets import encoder_unet
from tests import parity

TINY = dict(
    in_channels=4,
    model_channels=32,
    out_channels=5,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_head_channels=16,
    image_size=8,
)


def _net(**options):
    return encoder_unet.EncoderUNet(**TINY | options)


def _state_dict(net):
    """A state dict of random numbers under torch's keys, in torch's shapes."""
    rng = np.random.default_rng(0)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    return {
        rule.key: np.ascontiguousarray(
            rule.layout.to_torch(
                0.2 * rng.normal(size=shapes[rule.path]).astype(np.float32)
            )
        )
        for rule in classifier.encoder_unet_rules(net, shapes)
    }


def _inputs():
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray([3.0, 700.5])


@functools.cache
def _outputs(pool):
    """State dict, logits, and the blocks' features that the net gives to its head."""
    net = _net(pool=pool)
    state_dict = _state_dict(net)
    variables = {"params": classifier.encoder_unet_params(state_dict, net)}

    def is_block(module, _):
        return bool(re.match(r"conv_in|down_|mid_", module.name or ""))

    logits, state = net.apply(
        variables, *_inputs(), capture_intermediates=is_block, mutable="intermediates"
    )
    features = {
        name: np.moveaxis(np.asarray(value["__call__"][0]), -1, 1)
        for name, value in state["intermediates"].items()
    }
    return state_dict, np.asarray(logits), features


def test_adaptive_pool_matches_the_reference():
    meta, weights, io = parity.load("encoder_unet_adaptive")
    net = encoder_unet.EncoderUNet(**meta["config"])
    variables = {"params": classifier.encoder_unet_params(weights, net)}
    logits = net.apply(variables, parity.nhwc(io["x"]), io["t"].astype(np.float32))
    np.testing.assert_allclose(logits, io["out"], atol=5e-5)


def _attention_pool(torch, state_dict, x):
    """Every token attends, in torch's own attention; then the first is kept."""
    tokens = x.flatten(2)
    tokens = torch.cat([tokens.mean(-1, keepdim=True), tokens], dim=-1)
    tokens = tokens + state_dict["out.2.positional_embedding"]
    conv1d = torch.nn.functional.conv1d
    weight, bias = (state_dict[f"out.2.qkv_proj.{w}"] for w in ("weight", "bias"))
    q, k, v = (
        a.unflatten(1, (-1, 16)).transpose(-1, -2)
        for a in conv1d(tokens, weight, bias).chunk(3, dim=1)
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = out.transpose(-1, -2).flatten(1, 2)
    weight, bias = (state_dict[f"out.2.c_proj.{w}"] for w in ("weight", "bias"))
    return conv1d(out, weight, bias)[:, :, 0]


def _head_in_torch(torch, pool, state_dict, features):
    functional = torch.nn.functional

    def params(i):
        return state_dict[f"out.{i}.weight"], state_dict[f"out.{i}.bias"]

    if pool.startswith("spatial"):
        blocks = ("conv_in", "down_0_res_0", "down_0_downsample", "down_1_attn_0")
        means = [features[name].mean((2, 3)) for name in (*blocks, "mid_res_1")]
        h = functional.linear(torch.cat(means, dim=-1), *params(0))
        if pool == "spatial":
            return functional.linear(functional.relu(h), *params(2))
        h = functional.silu(functional.group_norm(h, 32, *params(1)))
        return functional.linear(h, *params(3))
    h = functional.group_norm(features["mid_res_1"], 32, *params(0))
    h = functional.silu(h)
    if pool == "attention":
        return _attention_pool(torch, state_dict, h)
    h = functional.adaptive_avg_pool2d(h, (1, 1))
    return functional.conv2d(h, *params(3)).flatten(1)


@pytest.mark.parametrize("pool", encoder_unet.POOLS)
def test_heads_match_torch(pool):
    torch = pytest.importorskip("torch")
    state_dict, logits, features = _outputs(pool)
    arrays = [
        {key: torch.tensor(value) for key, value in group.items()}
        for group in (state_dict, features)
    ]
    expected = _head_in_torch(torch, pool, *arrays).numpy()
    scale = np.abs(expected).max()
    assert scale > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize(
    ("pool", "keys"),
    [
        ("adaptive", {"out.0.weight": (64,), "out.3.weight": (5, 64, 1, 1)}),
        (
            "attention",
            {
                "out.0.weight": (64,),
                "out.2.positional_embedding": (64, 17),
                "out.2.qkv_proj.weight": (192, 64, 1),
                "out.2.c_proj.weight": (5, 64, 1),
            },
        ),
        # 32 + 32 + 32 + 64 of the input blocks, 64 of the middle.
        ("spatial", {"out.0.weight": (2048, 224), "out.2.weight": (5, 2048)}),
        (
            "spatial_v2",
            {
                "out.0.weight": (2048, 224),
                "out.1.weight": (2048,),
                "out.3.weight": (5, 2048),
            },
        ),
    ],
)
def test_heads_have_the_keys_of_the_original(pool, keys):
    found = {
        key: value.shape
        for key, value in _state_dict(_net(pool=pool)).items()
        if key.startswith("out.") and not key.endswith(".bias")
    }
    assert found == keys


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (dict(num_res_blocks=2), "down_1_res_1", "down_2_res_0"),
        (dict(attention_resolutions=(1,)), "down_0_attn_0", "down_1_attn_0"),
        (dict(conv_resample=False), "mid_attn", "down_0_downsample"),
        (dict(resblock_updown=True), "down_0_downsample/emb_proj", "up_0"),
        (dict(num_heads=2, num_head_channels=None), "mid_attn/qkv", "attn_pool"),
    ],
)
def test_every_option_shows_in_the_parameters(options, present, absent):
    net = _net(**options)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    assert any(path.startswith(present) for path in shapes)
    assert not any(path.startswith(absent) for path in shapes)
    classifier.encoder_unet_params(_state_dict(net), net)


@pytest.mark.parametrize("pool", encoder_unet.POOLS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_of_one_row_a_latent(pool, dtype):
    net = _net(pool=pool, dtype=dtype, use_scale_shift_norm=True, dropout=0.1)
    inputs = dict(zip(("x", "t"), _inputs(), strict=True))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    init = functools.partial(net.init_with_output, rngs, deterministic=False)
    logits, _ = jax.eval_shape(init, **inputs)
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)


@pytest.mark.parametrize("option", ["new", "heads", "t"])
def test_options_without_parameters_change_the_logits(option):
    net = _net()
    changed = {
        "new": dict(use_new_attention_order=True),
        "heads": dict(num_head_channels=None, num_heads=1),
        "t": {},
    }[option]
    variables = {"params": classifier.encoder_unet_params(_state_dict(net), net)}
    x, t = _inputs()
    before = net.apply(variables, x, t)
    after = _net(**changed).apply(variables, x, t + 50.0 if option == "t" else t)
    assert np.abs(before - after).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pool="mean"), "'mean'.*adaptive, attention, spatial, spatial_v2"),
        (dict(pool="attention", image_size=None), "image_size"),
        (dict(pool="attention", num_head_channels=None), "num_head_channels"),
        (dict(pool="attention", image_size=16), "8x8, not 4x4"),
        (dict(num_head_channels=None, num_heads=3), "64 channels.* 3 heads"),
        (dict(in_channels=3), "4 channels, but in_channels is 3"),
    ],
)
def test_misfits_are_told(options, message):
    init = functools.partial(_net(**options).init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, *_inputs())


def test_a_foreign_state_dict_is_refused():
    state_dict = _state_dict(_net(pool="spatial"))
    with pytest.raises(ValueError, match=r"missing .*out\.3\.weight .*unknown out\.2"):
        classifier.encoder_unet_params(state_dict, _net(pool="adaptive"))
