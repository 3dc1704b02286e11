import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis, plans
from ldm_jax.nets import unet, unet_variants
from tests import parity

FIXTURES = [
    "unet_uncond",
    "unet_sd2",
    "unet_updown_ssn_legacyorder",
    "unet_adm_int",
    "unet_concat",
    "unet_class_crossattn",
    "pair_unet_sd1",
    "pair_unet_unclip",
]
TINY = dict(
    in_channels=4,
    model_channels=32,
    out_channels=3,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_heads=2,
)
CROSS = TINY | dict(use_spatial_transformer=True, context_dim=8)


@functools.cache
def fixture(name):
    meta, weights, io = parity.load(name)
    config = {k: v for k, v in meta["config"].items() if k != "image_size"}
    net = unet.UNet(**config)
    weights = {k.removeprefix("model.diffusion_model."): v for k, v in weights.items()}
    variables = {"params": compvis.unet_params(weights, net)}
    apply = jax.jit(functools.partial(net.apply, mutable=False))
    return apply, variables, io


def _inputs(io, x="x", t="t", rows=slice(None)):
    inputs = {"x": parity.nhwc(io[x]), "t": io[t][rows].astype(np.float32)}
    inputs |= {key: io[key][rows] for key in ("context", "y") if key in io}
    if "y" in inputs and inputs["y"].dtype == np.int64:
        inputs["y"] = inputs["y"].astype(np.int32)
    return inputs


@pytest.mark.parametrize("name", FIXTURES)
def test_unet_matches_the_reference(name):
    apply, variables, io = fixture(name)
    out = apply(variables, **_inputs(io))
    np.testing.assert_allclose(out, parity.nhwc(io["out"]), atol=5e-5)


@pytest.mark.parametrize("name", FIXTURES[:6])
def test_unet_matches_the_reference_at_fractional_timesteps(name):
    apply, variables, io = fixture(name)
    out = apply(variables, **_inputs(io, t="t_frac"))
    np.testing.assert_allclose(out, parity.nhwc(io["out_frac"]), atol=5e-5)


@pytest.mark.parametrize("name", FIXTURES[:6])
def test_unet_matches_the_reference_on_a_non_square_latent(name):
    apply, variables, io = fixture(name)
    out = apply(variables, **_inputs(io, x="x_rect", rows=slice(1)))
    np.testing.assert_allclose(out, parity.nhwc(io["out_rect"]), atol=5e-5)


def _random_params(net, **inputs):
    """Params without the zeros that make a fresh UNet's output zero."""
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), **inputs))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [0.1 * rng.normal(size=a.shape).astype(np.float32) for a in leaves]
    return {"params": jax.tree.unflatten(tree, leaves)}


def _zeros(net, size=None):
    return jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), net.abstract_inputs(size)
    )


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        (dict(num_res_blocks=(1, 2)), "down_1_res_1", "down_0_res_1"),
        (dict(attention_resolutions=(1,)), "up_0_attn_1", "up_1_attn_0"),
        (dict(conv_resample=False), "mid_attn", "sample"),
        (dict(resblock_updown=True), "up_1_upsample/emb_proj", "skip_connection"),
        (dict(dims=1), "mid_attn/qkv", "context"),
        (dict(dims=3), "down_0_downsample", "context"),
        (dict(num_classes=5), "label_embed", "label_embed_0"),
        (dict(num_classes="continuous"), "label_embed/kernel", "label_embed_0"),
        (dict(num_classes="timestep"), "label_embed_1", "label_embed/"),
        (
            dict(num_classes="sequential", adm_in_channels=7),
            "label_embed_0",
            "label_embed/",
        ),
        (dict(n_embed=16), "id_out", "conv_out"),
        (dict(disable_middle_transformer=True), "mid_res_1", "mid_attn"),
        (
            dict(num_attention_blocks=(0, 1), attention_resolutions=(1, 2)),
            "up_1_attn_0",
            "up_1_attn_1",
        ),
        (dict(num_heads_upsample=4), "up_1_attn_0", "context"),
        (dict(num_heads=None, num_head_channels=8), "up_1_attn_0", "context"),
    ],
)
def test_every_option_shows_in_the_parameters(options, present, absent):
    net = unet.UNet(**TINY | options)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    assert any(path.startswith(present) for path in shapes)
    assert not any(absent in path for path in shapes)


def test_disabled_self_attention_looks_at_the_context():
    options = CROSS | dict(attention_resolutions=(1, 2), transformer_depth=(1, 2))
    net = unet.UNet(
        **options,
        disable_self_attentions=(False, True),
        disable_middle_self_attn=True,
    )
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    for block, width in [
        ("down_0_attn_0/block_0", 32),
        ("down_1_attn_0/block_1", 8),
        ("up_1_attn_1/block_0", 8),
        ("mid_attn/block_1", 8),
    ]:
        assert shapes[f"{block}/attn1/to_k/kernel"][0] == width
    assert "down_0_attn_0/block_1/attn1/to_k/kernel" not in shapes


def test_context_list_gives_each_block_its_own():
    options = CROSS | dict(transformer_depth=(1, 2), context_dim=(8, 6))
    options |= dict(attention_resolutions=(1, 2), sequential_crossattn=True)
    net = unet.UNet(**options)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    assert shapes["mid_attn/block_0/attn2/to_k/kernel"][0] == 8
    assert shapes["mid_attn/block_1/attn2/to_k/kernel"][0] == 6
    assert not any(path.startswith("down_0_attn_0/block_1") for path in shapes)


@pytest.mark.parametrize("legacy", [True, False])
def test_heads_follow_the_arithmetic_of_the_original(legacy):
    options = CROSS | dict(num_heads=None, num_head_channels=20, legacy=legacy)
    net = unet.UNet(**options)
    assert net.heads_of(64, upward=False) == ((3, 21) if legacy else (3, 20))
    up = unet.UNet(**TINY | dict(num_heads_upsample=4, legacy=legacy))
    assert up.heads_of(64, upward=True)[0] == (4 if legacy else 2)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_output_keeps_the_shape_of_the_latent(dims):
    net = unet.UNet(**TINY, dims=dims)
    out = jax.eval_shape(
        lambda i: net.init_with_output(jax.random.key(0), **i)[0],
        net.abstract_inputs(8),
    )
    assert out.shape == (1, *(8,) * dims, 3)


def test_a_fresh_unet_predicts_zero():
    net = unet.UNet(**TINY)
    inputs = _zeros(net, 4) | {"x": jnp.ones((1, 4, 4, 4))}
    out, _ = jax.jit(net.init_with_output)(jax.random.key(0), **inputs)
    assert not out.any()


def test_remat_changes_neither_parameters_nor_gradients():
    grads = []
    for remat in (False, True):
        net = unet.UNet(**CROSS, dropout=0.5, remat=remat)
        inputs = _zeros(net, 4) | {"x": jnp.ones((1, 4, 4, 4))}
        variables = _random_params(net, **inputs)

        def loss(variables, net=net, inputs=inputs):
            rngs = {"dropout": jax.random.key(1)}
            out = net.apply(variables, **inputs, deterministic=False, rngs=rngs)
            return jnp.square(out).sum()

        grads.append(jax.jit(jax.grad(loss))(variables))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *grads
    )
    jaxpr = str(jax.make_jaxpr(loss)(variables))
    assert jaxpr.count("remat") >= 5


def test_compute_dtype_holds_and_params_stay_float32():
    net = unet.UNet(**CROSS, dtype=jnp.bfloat16, use_scale_shift_norm=True)
    out, variables = jax.eval_shape(
        lambda i: net.init_with_output(jax.random.key(0), **i), net.abstract_inputs()
    )
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("f4")}


def test_context_may_join_plain_attention_in_any_dtype():
    options = dict(added_kv=True, context_dim=8, num_classes="clip", adm_in_channels=12)
    net = unet.UNet(**TINY, **options, dtype=jnp.bfloat16, remat=True)
    inputs = net.abstract_inputs(8)
    assert inputs["context"].shape == (1, 1, 6) and inputs["y"].shape == (1, 12)
    out, variables = jax.eval_shape(
        lambda i: net.init_with_output(jax.random.key(0), **i), inputs
    )
    assert out.dtype == jnp.bfloat16 and out.shape == (1, 8, 8, 3)
    kernel = variables["params"]["mid_attn"]["encoder_kv"]["kernel"]
    assert kernel.shape[0] == 8 and kernel.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        (TINY, dict(x=jnp.zeros((1, 4, 4, 5))), "x has 5 channels.*in_channels is 4"),
        (TINY, dict(x=jnp.zeros((1, 5, 4, 4))), "divisible by 2"),
        (TINY, dict(y=jnp.zeros(1, jnp.int32)), "y was given, but num_classes=None"),
        (TINY | dict(num_classes=3), dict(y=None), "no y was given"),
        (TINY, dict(context=jnp.zeros((1, 2, 8))), "context was given"),
        (CROSS, dict(context=None), "no context was given"),
        (TINY | dict(added_kv=True, context_dim=8), dict(context=None), "no context"),
        (
            TINY | dict(added_kv=True, context_dim=8),
            dict(context=[jnp.zeros((1, 2, 8))]),
            "context is a list, but added_kv takes one array",
        ),
        (
            TINY | dict(num_classes="clip", adm_in_channels=8, context_dim=8),
            {},
            "num_classes 'clip' makes tokens, so it needs added_kv",
        ),
        (CROSS, dict(context=jnp.zeros((1, 2, 9))), "width 9, but context_dim is 8"),
        (
            CROSS,
            dict(context=[jnp.zeros((1, 2, 8))] * 2),
            r"context has width \(8, 8\)",
        ),
        (TINY | dict(num_heads=None), {}, "give one of them"),
        (TINY | dict(num_heads=5), {}, "64 channels can't be split into 5 heads"),
        (TINY | dict(num_res_blocks=(1,)), {}, "num_res_blocks: 1 entries for 2"),
        (
            TINY | dict(num_classes="sequential", adm_in_channels=7),
            dict(y=jnp.zeros((1, 6))),
            r"y is \[6\] a row, but num_classes=.sequential. takes \[7\]",
        ),
        (
            TINY | dict(num_classes="other"),
            dict(y=jnp.zeros((1, 6))),
            "num_classes 'other'",
        ),
    ],
)
def test_mistakes_are_named(options, change, words):
    net = unet.UNet(**options)
    inputs = _zeros(net) | change
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: net.init(jax.random.key(0), **inputs))


MILLIONS = {
    "celeba256": 274.06,
    "churches256": 294.97,
    "cin256": 394.98,
    "cin256_v2": 400.92,
    "ldm_1p4b": 872.30,
    "cc256": 403.62,
    "layout2img": 246.28,
    "bsr_sr": 113.62,
    "inpainting_big": 387.25,
    "semantic": 215.23,
    "rdm768": 1335.48,
    "sd1": 859.52,
    "sd1_inpaint": 859.54,
    "sd2": 865.91,
    "sd2_inpaint": 865.93,
    "sd2_depth": 865.91,
    "unclip_h": 870.17,
    "unclip_l": 869.52,
    "x4_upscaler": 473.40,
    "sdxl": 2567.46,
    "karlo_decoder": 893.32,
    "karlo_sr": 729.70,
}


@pytest.mark.parametrize("name", unet_variants.VARIANTS)
def test_variants_have_the_published_number_of_parameters(name):
    net = unet.UNet(**unet_variants.VARIANTS[name])
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert round(count / 1e6, 2) == MILLIONS[name]
