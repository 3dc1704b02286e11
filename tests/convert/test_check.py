"""Our nets beside torch's, block by block: equal ones, and one that was changed."""

import sys

import jax
import numpy as np
import pytest

from ldm_jax import check as of_runs
from ldm_jax import convert, loaded
from ldm_jax.config import UserError
from ldm_jax.convert import check
from ldm_jax.nets import (
    autoencoder,
    clip_autoencoder,
    clip_vision,
    discriminator,
    dpt,
    embedders,
    prior,
    t5,
    text_encoder,
    unet,
)
from tests import runs
from tests.nets import test_dpt

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

ATOL = 5e-5
UNET = unet.UNet(
    in_channels=4,
    model_channels=32,
    out_channels=4,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
    num_heads=4,
    use_spatial_transformer=True,
    context_dim=12,
)
PLAIN = UNET.clone(
    use_spatial_transformer=False, context_dim=None, resblock_updown=True
)
KL = autoencoder.AutoencoderKL(ch=32, ch_mult=(1, 2), num_res_blocks=1)
VQ = autoencoder.VQModel(ch=32, ch_mult=(1, 2), num_res_blocks=1, n_embed=16)
BERT = text_encoder.TextTransformer(50, 9, 16, 2, heads=3, dim_head=8)
PICTURE = clip_vision.CLIPVisionTransformer(32, 8, 64, 2, 4, 24, "gelu")
T5 = t5.T5Encoder(50, 16, 2, 4, 8, 24)
PRIOR = prior.PriorTransformer(
    in_channels=12,
    out_channels=12,
    context_dim=12,
    context_length=7,
    vector_dim=10,
    depth=2,
    heads=2,
    dim_head=16,
)
TEXT = text_encoder.CLIPTextTransformer(50, 9, 64, depth=3, heads=4)


def _variables(net, *args, **kwargs):
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(0)

    def draw(path, a):
        scale = 0.1 if a.ndim == 1 else np.prod(a.shape[:-1]) ** -0.5
        value = scale * rng.normal(size=a.shape) + (path[-1].key == "scale")
        return value.astype(np.float32)

    return {"params": jax.tree_util.tree_map_with_path(draw, shapes["params"])}


def _of_unet(net):
    inputs = net.abstract_inputs()
    return _variables(net, **jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), inputs))


def _agree(rows):
    for row in rows:
        assert row.max_difference < ATOL, row
        assert row.mean_difference <= row.max_difference
        assert 0.05 < row.std < 20, row


def _wrong(rows):
    """The names of the blocks that are not equal, in the order of computing."""
    return [row.block for row in rows if row.max_difference > ATOL]


@pytest.mark.parametrize(
    "net",
    [
        UNET,
        PLAIN,
        UNET.clone(num_classes=7),
        UNET.clone(num_classes="timestep"),
        UNET.clone(num_classes="sequential", adm_in_channels=9),
        UNET.clone(num_classes="sequential", adm_in_channels=2816),
    ],
)
def test_all_blocks_of_a_unet_are_compared(net):
    rows = check.compare(net, _of_unet(net))
    _agree(rows)
    resample = ["down_0_downsample", "up_1_upsample"]
    label = ["label_embed_0", "label_embed_1"]
    wanted = [
        *("time_embed_0", "time_embed_1"),
        *(label if isinstance(net.num_classes, str) else []),
        *("conv_in", "down_0_res_0", resample[0], "down_1_res_0", "down_1_attn_0"),
        *("mid_res_0", "mid_attn", "mid_res_1"),
        *("up_1_res_0", "up_1_attn_0", "up_1_res_1", "up_1_attn_1", resample[1]),
        *("up_0_res_0", "up_0_res_1", "norm_out", "conv_out"),
    ]
    assert [row.block for row in rows] == wanted


@pytest.mark.parametrize("net", [KL, VQ], ids=["kl", "vq"])
def test_encoder_and_decoder_are_compared(net):
    rows = check.compare(net, _variables(net, np.zeros((1, 8, 8, 3))))
    _agree(rows)
    mid = ["mid_res_0", "mid_attn", "mid_res_1"]
    encoder = ["conv_in", "down_0_res_0", "down_0_downsample", "down_1_res_0", *mid]
    decoder = ["conv_in", *mid, "up_1_res_0", "up_1_res_1", "up_1_upsample"]
    decoder += ["up_0_res_0", "up_0_res_1"]
    out = ["norm_out", "conv_out"]
    assert [row.block for row in rows] == [
        *(f"encoder/{name}" for name in encoder + out),
        *("quant_conv", "post_quant_conv"),
        *(f"decoder/{name}" for name in decoder + out),
    ]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["layer_0", "layer_1", "layer_2", "norm_out"]),
        (dict(layer="penultimate"), ["layer_0", "layer_1", "norm_out"]),
        (dict(layer="penultimate", final_norm=False), ["layer_0", "layer_1"]),
        (
            dict(projection_dim=24, normalize=True),
            ["layer_0", "layer_1", "layer_2", "norm_out", "text_projection"],
        ),
    ],
)
def test_the_blocks_that_a_text_tower_runs_are_compared(options, wanted):
    net = TEXT.clone(**options)
    rows = check.compare(net, _variables(net, np.zeros((1, 9), np.int32)))
    _agree(rows)
    assert [row.block for row in rows] == wanted


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (BERT, ["layer_0", "layer_1", "norm_out"]),
        (T5, ["layer_0", "layer_1", "norm_out"]),
        (T5.clone(gated=False), ["layer_0", "layer_1", "norm_out"]),
        (
            PICTURE,
            ["patch", "norm_in", "layer_0", "layer_1", "norm_out", "projection"],
        ),
    ],
)
def test_other_towers_are_compared(net, wanted):
    picture = net is PICTURE
    x = np.zeros((1, 32, 32, 3), np.float32) if picture else np.zeros((1, 9), np.int32)
    variables = _variables(net, x)
    rows = check.compare(net, variables)
    _agree(rows)
    assert [row.block for row in rows] == wanted
    layout = "diffusers" if net is BERT else "huggingface"
    state = convert.export_network(net, variables, layout)
    variables["params"]["layer_1"]["ff_out"]["kernel"][0, 0] += 1.0
    assert _wrong(check.compare(net, variables, state_dict=state))[0] == "layer_1"


@pytest.mark.parametrize("query", [True, False])
def test_a_prior_is_compared(query):
    net = PRIOR if query else PRIOR.clone(query=False, positions=4)
    variables = _of_unet(net)
    rows = check.compare(net, variables)
    _agree(rows)
    assert [row.block for row in rows] == [
        *("time_embed_0", "time_embed_1", "text_vector", "text_tokens", "proj_in"),
        *("block_0", "block_1", "conv_out"),
    ]
    state = convert.export_network(net, variables, "diffusers")
    variables["params"]["block_1"]["ff_out"]["bias"][0] += 1.0
    wrong = _wrong(check.compare(net, variables, state_dict=state))
    assert wrong == ["block_1", "conv_out"]


@pytest.mark.parametrize("option", [dict(vector_dim=None), dict(context_dim=8)])
def test_a_prior_that_diffusers_has_not(option):
    net = PRIOR.clone(**option)
    with pytest.raises(UserError, match="vector_dim, context_dim: .* of diffusers has"):
        check.compare(net, _of_unet(net))


@pytest.mark.parametrize(
    ("method", "multiplier"),
    [("nearest", 0.5), ("bilinear", 0.75), ("bicubic", 0.5), ("adaptive", 0.5)],
)
def test_a_rescaler_is_compared(method, multiplier):
    net = embedders.SpatialRescaler(2, method, multiplier, 4, method == "nearest")
    variables = _variables(net, np.zeros((1, 8, 8, 3), np.float32))
    (row,) = check.compare(net, variables)
    assert row.block == "channel_mapper"
    _agree([row])
    state = convert.export_network(net, variables, "compvis")
    variables["params"]["channel_mapper"]["kernel"][0, 0] += 1.0
    assert _wrong(check.compare(net, variables, state_dict=state)) == ["channel_mapper"]


def test_a_class_embedder_is_compared():
    net = embedders.ClassEmbedder(3, 5)
    variables = _variables(net, np.zeros((1,), np.int32))
    (row,) = check.compare(net, variables)
    assert (row.block, row.max_difference) == ("embed", 0.0)
    state = convert.export_network(net, variables, "compvis")
    variables["params"]["embed"]["embedding"] += 1.0
    assert _wrong(check.compare(net, variables, state_dict=state)) == ["embed"]


def test_what_has_no_reference_says_so():
    net = discriminator.PatchDiscriminator()
    with pytest.raises(UserError, match="no reference for a PatchDiscriminator"):
        check.compare(net, {"params": {}})
    net = clip_autoencoder.ClipAutoencoder(ch=32, ch_mult=(1, 2), tower=PICTURE)
    with pytest.raises(UserError, match="a ClipAutoencoder is not in diffusers"):
        check.compare(net, {"params": {}})
    net = embedders.SpatialRescaler(2, "lanczos", 0.5, 4)
    with pytest.raises(UserError, match="method: 'lanczos', which torch has not"):
        check.compare(net, _variables(net, np.zeros((1, 8, 8, 3), np.float32)))


def test_depth_is_compared():
    variables = _variables(test_dpt.TINY, np.zeros((1, 64, 64, 3), np.float32))
    rows = check.compare(test_dpt.TINY, variables)
    _agree([row for row in rows if row.block != "head_2"])  # which may be small
    assert rows[-1].block == "head_2" and rows[-1].max_difference < ATOL
    assert {"stem_conv", "stage_1_block_0", "layer_3", "fusion_0"} <= {
        row.block for row in rows
    }
    state = convert.export_network(test_dpt.TINY, variables, "huggingface")
    variables["params"]["layer_1"]["ff_out"]["kernel"][0, 0] += 1.0
    wrong = _wrong(check.compare(test_dpt.TINY, variables, state_dict=state))
    assert wrong[0] == "layer_1" and wrong[-1] == "head_2"
    net = dpt.DepthMap(test_dpt.TINY, (4, 4))
    variables = {"params": {"tower": variables["params"]}}
    assert of_runs._compare(net, variables)[0].block == "stem_conv"


@pytest.mark.parametrize(
    ("path", "first"),
    [
        (("conv_in", "kernel"), "conv_in"),
        (("mid_attn", "block_0", "attn2", "to_k", "kernel"), "mid_attn"),
        (("up_1_res_1", "conv2", "kernel"), "up_1_res_1"),
        (("conv_out", "bias"), "conv_out"),
    ],
)
def test_a_unet_that_was_changed_is_found_in_the_block(path, first):
    variables = _of_unet(UNET)
    state = convert.export_network(UNET, variables, "diffusers")
    leaf = variables["params"]
    for name in path:
        leaf = leaf[name]
    leaf.flat[0] += 1.0
    rows = check.compare(UNET, variables, state_dict=state)
    assert _wrong(rows)[0] == first


def test_a_first_stage_that_was_changed_is_found_in_the_block():
    variables = _variables(KL, np.zeros((1, 8, 8, 3)))
    state = convert.export_network(KL, variables, "diffusers")
    variables["params"]["decoder"]["mid_attn"]["q"]["kernel"] += 1.0
    wrong = _wrong(check.compare(KL, variables, state_dict=state))
    assert wrong[0] == "decoder/mid_attn"


def test_a_text_tower_that_was_changed_is_found_in_the_block():
    net = TEXT.clone(layer="penultimate")
    whole = _variables(TEXT, np.zeros((1, 9), np.int32))
    state = convert.export_network(TEXT, whole, "huggingface")
    del whole["params"]["layer_2"]
    assert _wrong(check.compare(net, whole, state_dict=state)) == []
    whole["params"]["layer_1"]["ff_out"]["bias"][0] += 1.0
    wrong = _wrong(check.compare(net, whole, state_dict=state))
    assert wrong[0] == "layer_1"


def test_a_file_that_lacks_arrays_is_refused():
    with pytest.raises(UserError, match="state_dict: .*conv_in.bias"):
        check.compare(UNET, _of_unet(UNET), state_dict={"x": np.zeros(1)})


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch.*ldm_jax\[parity\]"):
        check.compare(UNET, _of_unet(UNET))
    with pytest.raises(UserError, match=r"torch.*ldm_jax\[parity\]"):
        of_runs.check(None)


def test_a_run_becomes_a_table(tmp_path, capsys):
    runs.untrained(tmp_path, runs.debug())
    table = of_runs.check(loaded.load(tmp_path))
    assert capsys.readouterr().out == table + "\n"
    assert "| autoencoder | decoder/conv_out |" in table
    assert "| unet | mid_attn |" in table
    assert "| conditioners.text | layer_0 |" in table
    assert "not compared" not in table
    assert "differs" not in table


def test_a_block_that_is_off_is_marked():
    rows = [
        check.Row("conv_in", 1e-6, 1e-7, 1.0),
        check.Row("down_0_res_0", 0.02, 1e-3, 10.0),
        check.Row("down_0_res_1", 0.005, 1e-3, 10.0),
        check.Row("mid_attn", float("nan"), 1e-3, 1.0),
    ]
    marked = [row.block for row in rows if "differs" in of_runs.line(row)]
    assert marked == ["down_0_res_0", "mid_attn"]
