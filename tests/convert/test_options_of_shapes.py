"""Options of networks that their shapes tell, without the original's config."""

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import convert
from ldm_jax.config import UserError
from ldm_jax.convert import compvis, plans, read_unet
from ldm_jax.nets import encoder_unet, unet, unet_variants
from tests.convert.test_networks import _apply, assert_same

TINY = dict(
    in_channels=4,
    model_channels=32,
    out_channels=4,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_heads=2,
)
CROSS = TINY | dict(use_spatial_transformer=True, context_dim=8)


def _random(net, **inputs):
    shapes = jax.eval_shape(lambda i: net.init(jax.random.key(0), **i), inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: (0.1 * rng.normal(size=a.shape)).astype(np.float32), shapes
    )


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize(
    "options",
    [
        TINY,
        TINY | dict(num_res_blocks=(1, 2), attention_resolutions=(1,)),
        TINY | dict(channel_mult=(1, 1, 2), resblock_updown=True),
        TINY | dict(channel_mult=(1, 2, 2), use_scale_shift_norm=True),
        TINY | dict(channel_mult=(1,), attention_resolutions=(1,)),
        TINY | dict(attention_resolutions=()),
        TINY | dict(num_classes=7),
        TINY | dict(num_classes="sequential", adm_in_channels=12),
        TINY | dict(num_classes="timestep"),
        TINY | dict(use_new_attention_order=True),
        CROSS | dict(attention_resolutions=(1, 2), transformer_depth=(1, 2)),
        CROSS | dict(use_linear_in_transformer=True, transformer_depth=3),
        CROSS | dict(disable_self_attentions=(False, True)),
        CROSS | dict(num_res_blocks=2, channel_mult=(1, 2, 4)),
    ],
)
def test_options_of_a_unet_are_read_off_its_weights(options, layout):
    net = unet.UNet(**options)
    variables = _random(net, **net.abstract_inputs())
    state = convert.export_network(net, variables, layout)
    hint = {"num_heads": 2, "use_new_attention_order": net.use_new_attention_order}
    again, same = convert.import_network(state, hint)
    assert_same(same, variables)
    inputs = jax.tree.map(
        lambda a: jnp.full(a.shape, 0.5).astype(a.dtype), net.abstract_inputs(8)
    )
    np.testing.assert_array_equal(
        _apply(again, same, **inputs), _apply(net, variables, **inputs)
    )


@pytest.mark.parametrize(
    "options",
    [
        TINY | dict(conv_resample=False),
        TINY | dict(num_classes="continuous"),
        TINY | dict(n_embed=9),
        TINY | dict(dims=1),
        CROSS | dict(disable_middle_transformer=True),
        CROSS
        | dict(sequential_crossattn=True, transformer_depth=2, context_dim=(8, 6)),
        TINY
        | dict(
            num_res_blocks=2, attention_resolutions=(1, 2), num_attention_blocks=(1, 2)
        ),
        # All on the way down, but not the one more on the way up.
        TINY | dict(num_attention_blocks=(0, 1)),
        TINY | dict(attention_resolutions=(1, 2), num_attention_blocks=(1, 1)),
        CROSS
        | dict(
            attention_resolutions=(1, 2),
            transformer_depth=(1, 2),
            transformer_depth_middle=3,
        ),
        CROSS
        | dict(
            attention_resolutions=(1, 2),
            transformer_depth=2,
            transformer_depth_middle=1,
        ),
    ],
)
def test_options_that_compvis_layout_alone_has_are_read_off_its_weights(options):
    net = unet.UNet(**options)
    variables = _random(net, **net.abstract_inputs())
    state = convert.export_network(net, variables, "compvis")
    again, same = convert.import_network(state, {"num_heads": 2})
    assert_same(same, variables)
    for key, value in options.items():
        if key != "attention_resolutions":
            assert getattr(again, key) == value, key


@pytest.mark.parametrize("dims", [[8], [8, 8], (8, 8)])
def test_a_context_for_each_block_may_be_one_for_all(dims):
    """As the original takes it; two arrays where `sequential_crossattn` says so."""
    net = unet.UNet(**CROSS | dict(transformer_depth=len(dims)))
    variables = _random(net, **net.abstract_inputs())
    state = convert.export_network(net, variables, "compvis")
    again, same = convert.import_network(state, {"num_heads": 2, "context_dim": dims})
    assert again.context_dim == 8
    assert_same(same, variables)
    inputs = dict(x=jnp.ones((1, 2, 2, 4)), t=jnp.ones(1))
    one = jnp.linspace(-1, 1, 16).reshape(1, 2, 8)
    np.testing.assert_array_equal(
        _apply(again, same, **inputs, context=[one] * len(dims)),
        _apply(again, same, **inputs, context=one),
    )
    if len(dims) > 1:
        many = {"num_heads": 2, "context_dim": dims, "sequential_crossattn": True}
        again, same = convert.import_network(state, many)
        assert again.context_dim == (8, 8)
        assert_same(same, variables)


def test_levels_of_a_classifier_that_widths_do_not_tell_are_those_of_its_config():
    options = dict(
        in_channels=3,
        model_channels=32,
        out_channels=5,
        num_res_blocks=1,
        attention_resolutions=(1,),
        channel_mult=(1, 1),
        resblock_updown=True,
    )
    net = encoder_unet.EncoderUNet(**options)
    variables = _random(net, **net.abstract_inputs())
    state = convert.export_network(net, variables, "compvis")
    with pytest.raises(UserError, match="give config with channel_mult and num_res"):
        convert.import_network(state)
    again, same = convert.import_network(state, options)
    assert again == net and again.num_heads == 1  # the original's default
    assert_same(same, variables)


def test_a_config_of_omegaconf_s_lists_gives_a_module_that_can_be_hashed():
    class Entries(collections.UserList):  # no list, as ListConfig is none
        pass

    net = unet.UNet(**TINY)
    variables = _random(net, **net.abstract_inputs())
    state = convert.export_network(net, variables, "compvis")
    given = {"num_heads": 2, "channel_mult": Entries([1, 2])}
    again, _ = convert.import_network(state, given)
    assert hash(again) == hash(again.clone()) and again.channel_mult == (1, 2)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "churches256"])
def test_released_unets_need_no_config(name):
    net = unet.UNet(**unet_variants.VARIANTS[name])
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    theirs = {
        rule.key: rule.layout.to_torch(np.broadcast_to(0, shapes[rule.path])).shape
        for rule in compvis.unet_rules(net, shapes)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read_unet.unet_of(theirs, {})
    heads = (again.num_heads, again.num_head_channels)
    assert heads == (net.num_heads, net.num_head_channels)
    assert plans.abstract_params(again, **again.abstract_inputs()) == shapes
