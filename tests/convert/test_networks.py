import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ldm_jax import convert
from ldm_jax.config import UserError
from ldm_jax.nets import autoencoder, embedders, lpips
from tests import parity

ATOL = 5e-5
UNETS = (
    "unet_uncond",
    "unet_sd2",
    "unet_updown_ssn_legacyorder",
    "unet_adm_int",
    "unet_concat",
    "unet_class_crossattn",
    "pair_unet_sd1",
    "pair_unet_unclip",
    "diffusers_unet_sd1",
)
PAIRS = ("pair_unet_sd1", "pair_unet_unclip")


def _flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(tree, other):
    """Bit for bit."""
    tree, other = _flat(tree), _flat(other)
    assert tree.keys() == other.keys()
    for key, value in tree.items():
        assert value.shape == other[key].shape, key
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def _unet_inputs(io):
    inputs = {"x": parity.nhwc(io["x"]), "t": io["t"].astype(np.float32)}
    inputs |= {key: io[key] for key in ("context", "y") if key in io}
    if "y" in inputs and inputs["y"].dtype == np.int64:
        inputs["y"] = inputs["y"].astype(np.int32)
    return inputs


def _apply(net, variables, *args, **kwargs):
    kwargs = dict(kwargs)
    method = kwargs.pop("method", None)
    run = jax.jit(lambda v, a, k: net.apply(v, *a, **k, method=method))
    return run(variables, args, kwargs)


def _agrees(out, wanted):
    np.testing.assert_allclose(out, parity.nhwc(wanted), atol=ATOL)


# --- every fixture of a network


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_matches_the_reference(name):
    meta, weights, io = parity.load(name)
    net, variables = convert.import_network(weights, meta["config"])
    _agrees(_apply(net, variables, **_unet_inputs(io)), io["out"])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("config", ["config", "diffusers_config"])
def test_a_pair_gives_equal_variables(name, config):
    meta, weights, io = parity.load(name)
    _, theirs, _ = parity.load(name, "weights_diffusers.safetensors")
    net, variables = convert.import_network(weights, meta["config"])
    other, same = convert.import_network(theirs, meta[config])
    assert_same(variables, same)
    _agrees(_apply(other, same, **_unet_inputs(io)), io["out_diffusers"])
    bare = {k.removeprefix("model.diffusion_model."): v for k, v in weights.items()}
    assert_same(convert.export_network(other, same, "compvis"), bare)
    assert_same(convert.export_network(net, variables, "diffusers"), theirs)


# Heads of 8 with convolutions are Stable Diffusion 1's habit.
@pytest.mark.parametrize("name", ["pair_unet_sd1", "diffusers_unet_sd1"])
def test_a_unet_without_its_config_has_the_heads_of_stable_diffusion(name):
    _, weights, io = parity.load(name)
    with pytest.warns(UserWarning, match="num_heads=8"):
        net, variables = convert.import_network(weights)
    _agrees(_apply(net, variables, **_unet_inputs(io)), io["out"])


@pytest.mark.parametrize("name", UNETS)
def test_all_but_the_heads_of_a_unet_are_read_off_the_weights(name):
    meta, weights, io = parity.load(name)
    heads = {
        key: meta["config"][key]
        for key in ("num_heads", "num_head_channels")
        if key in meta["config"]
    } or {"num_heads": meta["config"]["attention_head_dim"]}
    net, variables = convert.import_network(weights, heads)
    _agrees(_apply(net, variables, **_unet_inputs(io)), io["out"])


@pytest.mark.parametrize("name", ["unet_uncond", "unet_adm_int"])
def test_heads_that_nothing_tells_are_asked_for(name):
    _, weights, _ = parity.load(name)
    with pytest.raises(UserError, match="number of heads .* config="):
        convert.import_network(weights)


@pytest.mark.parametrize("given", [True, False])
def test_the_kl_autoencoder_matches_the_reference(given):
    meta, weights, io = parity.load("autoencoder_kl")
    net, variables = convert.import_network(weights, meta["config"] if given else None)
    assert isinstance(net, autoencoder.AutoencoderKL)
    _agrees(
        _apply(net, variables, parity.nhwc(io["x"]), method="encode"), io["moments"]
    )
    decoded = _apply(net, variables, parity.nhwc(io["mode"]), method="decode")
    _agrees(decoded, io["dec_mode"])


def test_an_autoencoder_has_what_the_config_of_sgm_says():
    """Whose engine names its encoder's arguments apart, and has no 1x1 convolutions."""
    net = autoencoder.AutoencoderKL(
        ch=32, ch_mult=(1, 2), num_res_blocks=1, use_quant_convs=False, tanh_out=True
    )
    params = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    state = convert.export_network(net, {"params": params}, "compvis")
    options = dict(ch=32, ch_mult=[1, 2], attn_type="vanilla-xformers", tanh_out=True)
    engine = dict(
        embed_dim=4,
        encoder_config=dict(target="sgm.x.Encoder", params=options),
        decoder_config=dict(target="sgm.x.Decoder", params=options),
        regularizer_config=dict(target="sgm.x.DiagonalGaussianRegularizer"),
    )
    for config in (engine, {"target": "sgm.x.AutoencodingEngine", "params": engine}):
        again, variables = convert.import_network(state, config)
        assert again.tanh_out and not again.use_quant_convs
        assert_same(variables["params"], params)
    assert not convert.import_network(state)[0].tanh_out


@pytest.mark.parametrize("name", ["vq_model", "diffusers_vq"])
@pytest.mark.parametrize("given", [True, False])
def test_a_vq_autoencoder_matches_the_reference(name, given):
    meta, weights, io = parity.load(name)
    net, variables = convert.import_network(weights, meta["config"] if given else None)
    assert isinstance(net, autoencoder.VQModel)
    _agrees(_apply(net, variables, parity.nhwc(io["x"]), method="encode"), io["h"])
    decode = functools.partial(_apply, net, variables, method="decode")
    _agrees(decode(parity.nhwc(io["h"])), io["dec"])


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("prefix", ["", "cond_stage_model."])
def test_the_bert_encoder_matches_the_reference(given, prefix):
    meta, weights, io = parity.load("bert_embedder")
    weights = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(weights, meta["config"] if given else None)
    out = _apply(net, variables, io["tokens"].astype(np.int32))
    np.testing.assert_allclose(out, io["embeddings"], atol=ATOL)


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.transformer."])
def test_the_clip_text_tower_matches_the_reference(prefix):
    meta, weights, io = parity.load("clip_text_gelu")
    weights = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(weights, meta["config"])
    tokens = io["tokens"].astype(np.int32)
    out = _apply(net, variables, tokens)
    np.testing.assert_allclose(out, io["last_hidden_state"], atol=ATOL)
    penultimate = _apply(net.clone(layer="penultimate"), variables, tokens)
    np.testing.assert_allclose(penultimate, io["penultimate_final_ln"], atol=ATOL)
    projected = _apply(net.clone(projection_dim=24), variables, tokens)
    np.testing.assert_allclose(projected, io["text_embeds"], atol=ATOL)


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model."])
def test_the_openclip_text_tower_matches_the_reference(prefix):
    meta, weights, io = parity.load("open_clip_text")
    weights = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(weights, meta["config"])
    tokens = io["tokens"].astype(np.int32)
    for layer in ("last", "penultimate"):
        out = _apply(net.clone(layer=layer), variables, tokens)
        np.testing.assert_allclose(out, io[layer], atol=ATOL)


@pytest.mark.parametrize("name", ["class_embedder", "class_embedder_ucg"])
@pytest.mark.parametrize("prefix", ["", "cond_stage_model."])
def test_the_class_embedder_matches_the_reference(name, prefix):
    meta, weights, io = parity.load(name)
    weights = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(weights, meta["config"])
    out = _apply(net, variables, io["classes"].astype(np.int32))
    np.testing.assert_array_equal(out, io.get("out", io.get("out_nodropout")))


def test_the_spatial_rescaler_matches_the_reference():
    _, weights, io = parity.load("spatial_rescaler")
    net, variables = convert.import_network(weights, {"n_stages": 2})
    _agrees(_apply(net, variables, parity.nhwc(io["x"])), io["bilinear_n2_map"])
    net, variables = convert.import_network({}, {"n_stages": 1, "method": "area"})
    assert variables == {"params": {}}
    _agrees(_apply(net, variables, parity.nhwc(io["x"])), io["area_n1"])
    net, _ = convert.import_network({}, {"multiplier": 0.25})
    assert net == embedders.SpatialRescaler(1, "bilinear", 0.25)
    mapper = {"channel_mapper.weight": np.zeros((4, 3, 1, 1), np.float32)}
    net, _ = convert.import_network(mapper, {"multiplier": 0.75, "n_stages": 3})
    assert net.out_channels == 4


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_classifier_matches_the_reference(prefix):
    meta, weights, io = parity.load("encoder_unet_adaptive")
    weights = {prefix + key: value for key, value in weights.items()}
    x, t = parity.nhwc(io["x"]), io["t"].astype(np.float32)
    for config in (meta["config"], {"num_head_channels": 16}):
        net, variables = convert.import_network(weights, config)
        np.testing.assert_allclose(_apply(net, variables, x, t), io["out"], atol=ATOL)


@pytest.mark.parametrize("prefix", ["", "loss.discriminator."])
@pytest.mark.parametrize("name", ["nlayer_discriminator", "actnorm_discriminator"])
def test_a_discriminator_round_trips(name, prefix):
    meta, weights, io = parity.load(name)
    given = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(given, meta["config"])
    assert net.ndf == 16 and net.norm == meta["config"].get("norm", net.norm)
    back = convert.export_network(net, variables, "compvis")
    _, again = convert.import_network(back, meta["config"])
    assert_same(again, variables)
    left_out = {key for key in weights if key.endswith("num_batches_tracked")}
    assert_same(back, {k: v for k, v in weights.items() if k not in left_out})


@pytest.mark.parametrize(
    ("name", "out", "options"),
    [
        ("nlayer_discriminator", "out_train", {}),
        ("actnorm_discriminator", "out_first", {"initialize": True}),
    ],
)
def test_a_discriminator_matches_the_reference(name, out, options):
    _, weights, io = parity.load(name)
    net, variables = convert.import_network(weights)
    logits, _ = net.apply(
        variables,
        parity.nhwc(io["x"]),
        train=True,
        mutable=["params", "batch_stats"],
        **options,
    )
    _agrees(logits, io[out])


@pytest.fixture(scope="module")
def lpips_weights():
    """The published keys, with VGG16 from the random numbers that meta.json names."""
    meta, weights, io = parity.load("lpips")
    draws = np.random.RandomState(meta["seed"])
    keys = [key for key in meta["state_dict_keys"] if key.startswith("net.")]
    for key, shape in zip(keys[::2], meta["conv_weight_shapes"], strict=True):
        scale = np.sqrt(2 / (shape[1] * 9))
        weights[key] = (draws.standard_normal(shape) * scale).astype(np.float32)
        bias = draws.standard_normal((shape[0],)) * 0.05
        weights[key.replace("weight", "bias")] = bias.astype(np.float32)
    return weights, io


@pytest.mark.parametrize("prefix", ["", "loss.perceptual_loss."])
def test_lpips_matches_the_reference(lpips_weights, prefix):
    weights, io = lpips_weights
    given = {prefix + key: value for key, value in weights.items()}
    net, variables = convert.import_network(given)
    assert isinstance(net, lpips.LPIPS)
    back = convert.export_network(net, variables, "compvis")
    assert_same(back, {k: v for k, v in weights.items() if "scaling" not in k})
    if not prefix:
        x, y = (parity.nhwc(io[name]) for name in "xy")
        out = _apply(net, variables, x, y)
        np.testing.assert_allclose(out, io["value"].ravel(), atol=ATOL)


# --- there and back

ROUND_TRIPS = {
    **dict.fromkeys(UNETS, ("compvis", "diffusers")),
    "autoencoder_kl": ("compvis", "diffusers"),
    "vq_model": ("compvis", "diffusers"),
    "diffusers_vq": ("compvis", "diffusers"),
    "clip_text_gelu": ("huggingface", "openclip"),
    "open_clip_text": ("huggingface", "openclip"),
    "bert_embedder": ("compvis",),
    "class_embedder": ("compvis",),
    "spatial_rescaler": ("compvis",),
    "encoder_unet_adaptive": ("compvis",),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_round_trip_through_any_layout_is_bit_exact(name):
    meta, weights, _ = parity.load(name)
    config = meta.get("config")
    net, variables = convert.import_network(weights, config)
    given = {k.removeprefix("model.diffusion_model."): v for k, v in weights.items()}
    given = {k: v for k, v in given.items() if "to_logits" not in k}
    exports = []
    for layout in ROUND_TRIPS[name]:
        exported = convert.export_network(net, variables, layout)
        assert {v.dtype for v in exported.values()} == {np.dtype("float32")}
        order = {"use_new_attention_order": False}
        same = (config or {}) | (order if layout == "diffusers" else {})
        _, again = convert.import_network(exported, same)
        assert_same(again, variables)
        exports.append(exported)
    assert any(given.keys() == exported.keys() for exported in exports)
    for exported in exports:
        if exported.keys() == given.keys():
            assert_same(exported, given)


def test_qkv_in_the_old_order_are_in_the_new_in_diffusers():
    meta, weights, io = parity.load("unet_uncond")
    net, variables = convert.import_network(weights, meta["config"])
    theirs = convert.export_network(net, variables, "diffusers")
    assert "mid_block.attentions.0.to_q.weight" in theirs
    net, variables = convert.import_network(theirs, {"num_heads": 4})
    assert net.use_new_attention_order
    _agrees(_apply(net, variables, **_unet_inputs(io)), io["out"])


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_a_file_is_read(tmp_path, suffix):
    weights = {"embedding.weight": np.arange(6, dtype=np.float16).reshape(3, 2)}
    path = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        safetensors_numpy.save_file(weights, path)
    else:
        torch = pytest.importorskip("torch")
        tensors = {k: torch.from_numpy(v) for k, v in weights.items()}
        whole = {"state_dict": tensors, "epoch": 3} if suffix == ".ckpt" else tensors
        torch.save(whole, path)
    net, variables = convert.import_network(str(path))
    assert net == embedders.ClassEmbedder(3, 2)
    (leaf,) = jax.tree.leaves(variables)
    np.testing.assert_array_equal(leaf, weights["embedding.weight"])
    assert leaf.dtype == np.float32


def test_tensors_of_torch_are_read():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    _, variables = convert.import_network({"embedding.weight": weight})
    np.testing.assert_array_equal(jax.tree.leaves(variables)[0], np.ones((3, 2)))


# --- what does not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda w: w.pop("quant_conv.bias"),
            r"missing quant_conv\.bias .*likely cause",
        ),
        (lambda w: w.update(extra=np.zeros(1)), "unknown extra .*likely cause"),
        (
            lambda w: w.update({"quant_conv.bias": np.zeros(3)}),
            r"quant_conv\.bias of shape \(3,\) does not fit .*cause: other widths",
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed_in_groups(change, words):
    meta, weights, _ = parity.load("autoencoder_kl")
    change(weights)
    with pytest.raises(UserError, match=words) as caught:
        convert.import_network(weights, meta["config"])
    assert "\n" not in str(caught.value)


def test_a_config_of_another_architecture_is_refused_in_one_line():
    meta, weights, _ = parity.load("unet_sd2")
    with pytest.raises(UserError, match="missing .*unknown .*likely cause") as caught:
        convert.import_network(weights, meta["config"] | {"channel_mult": [1, 2, 4]})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    "change", [{"num_heads": 5}, {"num_heads": "4"}, {"num_res_blocks": [1]}]
)
def test_a_config_that_no_net_can_have_is_refused_in_one_line(change):
    meta, weights, _ = parity.load("unet_uncond")
    with pytest.raises(UserError, match="^UNet, layout compvis: ") as caught:
        convert.import_network(weights, meta["config"] | change)
    assert "\n" not in str(caught.value)


def test_a_first_stage_may_have_its_loss_and_colours_beside_it():
    meta, weights, _ = parity.load("autoencoder_kl")
    _, expected = convert.import_network(weights, meta["config"])
    more = {
        "loss.discriminator.main.0.weight": np.zeros((64, 3, 4, 4)),
        "loss.perceptual_loss.net.slice1.0.weight": np.zeros((64, 3, 3, 3)),
        "loss.logvar": np.zeros(()),
        "colorize": np.zeros((3, 6, 1, 1)),
    }
    _, variables = convert.import_network(weights | more, meta["config"])
    assert_same(variables, expected)


def test_a_decoder_that_ends_early_leaves_its_last_layers():
    meta, weights, _ = parity.load("autoencoder_kl")
    ddconfig = meta["config"]["ddconfig"] | {"give_pre_end": True}
    net, variables = convert.import_network(
        weights, meta["config"] | {"ddconfig": ddconfig}
    )
    assert net.give_pre_end and "conv_out" not in variables["params"]["decoder"]


def test_what_is_no_network_or_more_than_one_is_refused():
    with pytest.raises(UserError, match="no network known here"):
        convert.import_network({"lora_up.weight": np.zeros((2, 2))})
    two = {
        "first_stage_model.encoder.mid.block_1.norm1.weight": np.zeros(32),
        "model.diffusion_model.input_blocks.0.0.weight": np.zeros((32, 4, 3, 3)),
        "model.diffusion_model.output_blocks.0.0.x": np.zeros(1),
    }
    with pytest.raises(UserError, match="2 networks"):
        convert.import_network(two)


def test_a_layout_that_a_network_has_not_is_refused():
    net = embedders.ClassEmbedder(3, 2)
    variables = net.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    with pytest.raises(UserError, match="choose one of compvis"):
        convert.export_network(net, variables, "diffusers")
