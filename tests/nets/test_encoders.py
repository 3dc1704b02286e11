"""Frozen encoders: T5, CLIP's picture tower, pooled text; live and by fixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import resample
from ldm_jax.convert import towers
from ldm_jax.diffusion import denoiser, schedules
from ldm_jax.nets import clip_vision, embedders, layers, t5, text_encoder
from tests import parity

torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
transformers = pytest.importorskip("transformers")
ATOL = 5e-5


def _random(net):
    """Every parameter at random, norms and biases too."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    return net.eval()


def _state_dict(net):
    return {k: v.detach().numpy() for k, v in net.state_dict().items()}


def _agree(ours, theirs):
    theirs = theirs.detach().numpy()
    scale = max(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=ATOL)


def small_t5(gated):
    """An encoder of transformers with random weights."""
    config = transformers.T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )
    return _random(transformers.T5EncoderModel(config))


@pytest.mark.parametrize("gated", [True, False])
def test_t5_is_that_of_transformers(gated):
    reference = small_t5(gated)
    net = t5.T5Encoder(50, 24, 3, 4, 8, 40, gated=gated, num_buckets=8, max_distance=20)
    weights = _state_dict(reference)
    params = towers.params_of(net, weights)
    del weights["shared.weight"]  # a file of the encoder alone has its own name for it
    jax.tree.map(np.testing.assert_array_equal, params, towers.params_of(net, weights))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 40)).astype(np.int32)
    mask = np.ones((2, 40), bool)
    mask[0, 25:] = False
    for kept in (None, mask):
        theirs = reference(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(
                np.ones_like(mask) if kept is None else kept
            ),
        ).last_hidden_state
        ours = net.apply({"params": params}, tokens, kept)
        _agree(ours, theirs)


ACTIVATIONS = ["quick_gelu", "gelu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clip_picture_tower_is_that_of_transformers(activation):
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=12,
        hidden_act=activation,
    )
    reference = _random(transformers.CLIPVisionModelWithProjection(config))
    net = clip_vision.CLIPVisionTransformer(32, 8, 32, 2, 4, 12, activation)
    params = towers.params_of(net, _state_dict(reference))
    x = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    theirs = reference(torch.from_numpy(np.moveaxis(x, -1, 1)))
    ours = net.apply({"params": params}, x)
    _agree(ours.embedding, theirs.image_embeds)
    _agree(ours.tokens, theirs.last_hidden_state)


def test_openclip_s_picture_tower_is_the_same_net():
    """Its layout: packed q, k, v, a projection that is not transposed."""
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    weights = _state_dict(_random(transformers.CLIPVisionModelWithProjection(config)))
    net = clip_vision.CLIPVisionTransformer(16, 8, 32, 2, 4, 12)
    expected = towers.params_of(net, weights)
    renamed = {
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": weights[
            "vision_model.embeddings.position_embedding.weight"
        ],
        "visual.conv1.weight": weights[
            "vision_model.embeddings.patch_embedding.weight"
        ],
        "visual.proj": weights["visual_projection.weight"].T,
        "token_embedding.weight": np.zeros((3, 3), np.float32),
        "logit_scale": np.zeros([], np.float32),
    }
    for kind in ("weight", "bias"):
        for a, b in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
            renamed[f"visual.{a}.{kind}"] = weights[f"vision_model.{b}.{kind}"]
        for i in range(2):
            there = f"vision_model.encoder.layers.{i}"
            here = f"visual.transformer.resblocks.{i}"
            packed = [weights[f"{there}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            renamed[f"{here}.attn.in_proj_{kind}"] = np.concatenate(packed)
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                renamed[f"{here}.{a}.{kind}"] = weights[f"{there}.{b}.{kind}"]
    actual = towers.params_of(net, renamed)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)

    # SD-unCLIP's checkpoint has it among other things, with statistics of embeddings.
    whole = {f"embedder.model.{k}": v for k, v in renamed.items()}
    whole |= {"model.diffusion_model.out.weight": np.zeros(3, np.float32)}
    mean, std = (np.arange(12.0)[None] + i for i in (-5, 1))
    statistics = dict(zip(towers.STATISTICS, (mean, std), strict=True))
    vector = clip_vision.ImageVector(net)
    params = towers.params_of(vector, whole | statistics)
    jax.tree.map(np.testing.assert_array_equal, params["tower"], expected)
    np.testing.assert_array_equal(params["mean"], mean[0])
    np.testing.assert_array_equal(params["std"], std[0])
    without = towers.params_of(vector, whole)
    assert not without["mean"].any() and np.all(without["std"] == 1)
    inputs = [jax.ShapeDtypeStruct(s, np.float32) for s in ((2, 16, 16, 3), (2, 1))]
    inputs += [jax.ShapeDtypeStruct((2, 12), np.float32)] * 2
    shapes = jax.eval_shape(vector.init, jax.random.key(0), tuple(inputs))["params"]
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
    # Without noise the embedding stays as it is; without signal it is the mean.
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    rest = np.zeros((2, 12), np.float32), np.zeros((2, 12), np.float32)
    for signal in (0.0, 1.0):
        inputs = (x, np.full((2, 1), signal, np.float32), *rest)
        out = vector.apply({"params": params}, inputs)[:, :12]
        tower = net.apply({"params": expected}, clip_vision.preprocess(x, 16))
        wanted = tower.embedding if signal else np.broadcast_to(mean, (2, 12))
        np.testing.assert_allclose(out, wanted, atol=ATOL)
    for wrong in (mean[:, :3], std - 1):
        with pytest.raises(ValueError, match="are not 12 numbers each"):
            towers.params_of(vector, whole | {towers.STATISTICS[1]: wrong})


def _text(**options):
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        projection_dim=20,
        eos_token_id=59,
    )
    reference = _random(transformers.CLIPTextModelWithProjection(config))
    net = text_encoder.CLIPTextTransformer(60, 12, 32, 3, 4, **options)
    params = towers.params_of(net, _state_dict(reference))
    tokens = np.random.default_rng(0).integers(0, 58, (3, 12)).astype(np.int32)
    tokens[[0, 1, 2], [4, 11, 7]] = 59
    ours = net.apply({"params": params}, tokens)
    theirs = reference(torch.from_numpy(tokens).long(), output_hidden_states=True)
    return ours, theirs


@pytest.mark.parametrize(
    "options", [{}, dict(layer="penultimate"), dict(final_norm=False)]
)
def test_pooled_text_is_that_of_transformers(options):
    ours, theirs = _text(projection_dim=20, **options)
    _agree(ours, theirs.text_embeds)
    if not options:  # the pooler's output, before it is projected
        ours, theirs = _text(layer="pooled")
        _agree(ours, theirs.last_hidden_state[[0, 1, 2], [4, 11, 7]])
    ours, _ = _text(projection_dim=20, normalize=True, **options)
    expected = theirs.text_embeds / theirs.text_embeds.norm(dim=-1, keepdim=True)
    _agree(ours, expected)


def test_the_last_norm_may_be_left_out():
    ours, theirs = _text(layer="penultimate", final_norm=False)
    _agree(ours, theirs.hidden_states[-2])


@pytest.mark.parametrize("size", [(32, 32), (48, 20), (300, 224)])
def test_pictures_are_resized_from_corner_to_corner(size):
    x = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(  # in float64: it rounds the places too
        torch.from_numpy(np.float64(np.moveaxis(x, -1, 1))),
        (24, 24),
        mode="bicubic",
        align_corners=True,
    ).numpy()
    rows, columns = (resample.matrix(n, 24, "bicubic", corners=True) for n in size)
    ours = np.einsum("ih,bhwc,jw->bcij", rows, x, columns)
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
    out = clip_vision.preprocess(jnp.asarray(x), 24)
    mean, std = np.array(clip_vision.MEAN), np.array(clip_vision.STD)
    expected = ((np.moveaxis(theirs, 1, -1) + 1) / 2 - mean) / std
    np.testing.assert_allclose(out, expected, atol=5e-5)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("multiplier", [0.5, 0.75, 1.5])
def test_maps_whose_sides_do_not_divide_are_resized_by_the_factor(method, multiplier):
    x = np.random.default_rng(0).normal(size=(2, 15, 9, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(x, -1, 1)), scale_factor=multiplier, mode=method
    ).numpy()
    ours_has = {"area": "adaptive"}.get(method, method)
    ours = embedders.SpatialRescaler(1, ours_has, multiplier).apply({}, x)
    np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1), atol=ATOL)


def test_noised_embeddings_are_the_reference_s():
    _, _, io = parity.load("clip_noise_augmentation")
    schedule = schedules.make_schedule(schedule="squaredcos_cap_v2")
    level = jnp.asarray(io["noise_level"], jnp.int32)
    e = jnp.asarray(io["embedding"])
    signal, sigma = denoiser.levels(schedule, level, e)
    mean, std = (jnp.asarray(io[name]) for name in ("data_mean", "data_std"))
    out = clip_vision.noised_embedding(e, signal, sigma * io["noise"], mean, std)
    np.testing.assert_allclose(out, io["out"], atol=ATOL)
    sinusoids = layers.timestep_embedding(level, 16)
    adm = jnp.concatenate([out, sinusoids], axis=-1)
    np.testing.assert_allclose(adm, io["adm"], atol=ATOL)


@pytest.mark.parametrize(
    ("net", "args", "millions"),
    [
        (t5.T5Encoder(**t5.VARIANTS["t5_v1_1_large"]), ((1, 4), jnp.int32), 341.2),
        (t5.T5Encoder(**t5.VARIANTS["t5_v1_1_xxl"]), ((1, 4), jnp.int32), 4762.31),
        (t5.T5Encoder(**t5.VARIANTS["byt5_base"]), ((1, 4), jnp.int32), 414.70),
        (
            clip_vision.CLIPVisionTransformer(**clip_vision.VARIANTS["clip_l"]),
            ((1, 224, 224, 3), jnp.float32),
            303.97,
        ),
        (
            clip_vision.CLIPVisionTransformer(**clip_vision.VARIANTS["openclip_h"]),
            ((1, 224, 224, 3), jnp.float32),
            632.08,
        ),
    ],
)
def test_published_sizes(net, args, millions):
    x = jnp.zeros(*args)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert count == pytest.approx(millions, abs=0.2)
