"""Every kind of condition: its slots, its null row, its parity, what it refuses."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import draw, resample
from ldm_jax.conditioning import conditioners, kinds, neighbours, pictures
from ldm_jax.conditioning.conditioners import Setting, Tools
from ldm_jax.config import UserError
from ldm_jax.nets import clip_vision, embedders, layers
from tests import parity, runs

SETTING = Setting((16, 16), (4, 4, 3), runs.tokenizer(), "it")
ATOL = 5e-5


def encode_image(x, keys):
    """In place of a first stage: averages of 4 x 4 pixels."""
    del keys
    return x.reshape(len(x), 4, 4, 4, 4, 3).mean(axis=(2, 4))


def tools(n, table=None, params=None, **kwargs):
    """With eight pictures to look up, where a condition does."""
    made = Tools(encode_image, jax.random.split(jax.random.key(0), n), **kwargs)
    images = pictures.to_float(jnp.asarray(_columns(8)["image"]))
    memory = {}
    for name, conditioner in (table or {}).items():
        memory[name] = jnp.zeros([8, conditioner.remembered_dim])
        if conditioner.remembered is not None and params is not None:
            memory[name] = conditioner.remembered(images, made, params.get(name))
            assert memory[name].shape == (8, conditioner.remembered_dim)
    return made._replace(memory=memory)


def _columns(n):
    rng = np.random.default_rng(0)
    return {
        "caption": [runs.CAPTIONS[i % 3] for i in range(n)],
        "label": rng.integers(0, 5, n),
        "boxes": np.tile(np.float32([0.1, 0.2, 0.6, 0.9]), (n, 2, 1)),
        "categories": rng.integers(0, 5, (n, 2)),
        "segmentation": rng.integers(0, 5, (n, 16, 16)).astype(np.uint8),
        "low_res": rng.integers(0, 256, (n, 4, 4, 3), np.uint8),
        "image": rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
        "mask": rng.integers(0, 2, (n, 16, 16)).astype(np.uint8),
        "depth": rng.random((n, 16, 16)).astype(np.float32),
    }


TINY_DPT = dict(
    stem=16,
    widths=(16, 32, 32),
    depths=(1, 1, 1),
    dim=16,
    heads=2,
    grid=2,
    taps=(0, 1),
    reassembled=(8, 8),
    fusion=8,
    groups=4,
)
TINY_CLIP = dict(
    image_size=16, patch_size=8, dim=16, depth=1, heads=2, projection_dim=8
)
# kind: (options, {slot: shape of one row})
CASES = {
    "text": (
        dict(length=8, net=dict(kind="transformer", dim=16, depth=1)),
        {"context": (8, 16)},
    ),
    "class": (dict(num_classes=5, dim=16), {"context": (1, 16)}),
    "layout": (
        dict(num_classes=5, max_objects=3, net=dict(dim=16, depth=1)),
        {"context": (9, 16)},
    ),
    "semantic": (dict(num_classes=5, channels=2), {"concat": (4, 4, 2)}),
    "low_res": ({}, {"concat": (4, 4, 3)}),
    "noisy_low_res": ({}, {"concat": (4, 4, 3), "vector": ()}),
    "inpainting": ({}, {"concat": (4, 4, 4)}),
    "depth": ({}, {"concat": (4, 4, 1)}),
    "image_embedding": ({}, {"vector": (24,)}),
    "photo_depth": (dict(net=TINY_DPT, side=32), {"concat": (4, 4, 1)}),
    "clip_image": (dict(net=TINY_CLIP), {"vector": (16,)}),
    "clip_neighbours": (dict(k=3, net=TINY_CLIP), {"context": (3, 8)}),
    "neighbours": (dict(k=2, cells=2, dim=16), {"context": (2, 16)}),
}


def _made(kind, n=4):
    conditioner = kinds.KINDS[kind](SETTING, **CASES[kind][0])
    table = {"it": conditioner}
    columns = _columns(n)
    values = conditioner.prepare(*(columns[field] for field in conditioner.fields))
    params = conditioners.init(table, jax.random.key(1), lambda: tools(1, table))
    return table, params, {"it": values}


def test_every_kind_is_tried():
    assert set(CASES) == set(kinds.KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_a_kind_fills_its_slots_and_drops_to_its_null_row(kind):
    table, params, batch = _made(kind)
    own_tools = tools(4, table, params)
    given = conditioners.encode(table, params, batch, tools=own_tools)
    for slot, shape in CASES[kind][1].items():
        value = getattr(given, slot)
        assert value.shape == (4, *shape)
        assert np.isfinite(value).all()

    always = {"it": dataclasses.replace(table["it"], dropout=1.0)}
    dropped = conditioners.encode(
        always,
        params,
        batch,
        jax.random.key(2),
        own_tools._replace(noise_level=jnp.zeros(4, int)),
    )
    null = {"it": np.broadcast_to(table["it"].null, batch["it"].shape)}
    expected = conditioners.encode(
        table,
        params,
        null,
        tools=own_tools._replace(noise_level=jnp.zeros(4, int)),
    )
    if table["it"].drop_output:
        expected = jax.tree.map(jnp.zeros_like, expected)
    for slot in CASES[kind][1]:
        np.testing.assert_allclose(
            getattr(dropped, slot), getattr(expected, slot), atol=1e-6
        )


@pytest.mark.parametrize("kind", CASES)
def test_the_other_half_of_guidance(kind):
    table, params, batch = _made(kind)
    own_tools = tools(4, table, params)
    given = conditioners.encode(table, params, batch, tools=own_tools)
    model = types.SimpleNamespace(conditioners=table)
    halves, scales = draw.guided_halves(model, 2.0)
    if not table["it"].guided:
        assert halves == () and scales == []
        return
    assert halves == (("it",),) and scales == [2.0]
    dropped = {"it": jnp.ones(4, bool)}
    other = conditioners.encode(table, params, batch, tools=own_tools, dropped=dropped)
    for slot in CASES[kind][1]:
        assert not np.array_equal(getattr(given, slot), getattr(other, slot))


def test_text_may_go_through_t5_or_be_one_pooled_vector():
    t5 = dict(kind="t5", dim=16, depth=1, heads=2, dim_head=8, dim_ff=24)
    clip = dict(kind="clip", dim=16, depth=1, heads=2, projection_dim=12)
    captions = _columns(4)["caption"]
    for net, slot, shape in (
        (t5, "context", (4, 8, 16)),
        (clip, "context", (4, 1, 12)),
        (clip, "vector", (4, 12)),
    ):
        made = kinds.KINDS["text"](SETTING, length=8, net=net, slot=slot)
        params = conditioners.init({"it": made}, jax.random.key(0))
        batch = {"it": made.prepare(captions)}
        given = conditioners.encode({"it": made}, params, batch)
        assert getattr(given, slot).shape == shape
    with pytest.raises(UserError, match="net.variant: 't5_large'; did you mean"):
        net = dict(kind="t5", variant="t5_large")
        kinds.KINDS["text"](SETTING, length=8, net=net)


@pytest.mark.parametrize("kind", ["neighbours", "clip_neighbours"])
def test_neighbours_are_the_nearest_but_in_training_not_oneself(kind):
    options = CASES[kind][0] | dict(k=3, dropout=0.0)
    options.pop("dim", None)
    table = {"it": kinds.KINDS[kind](SETTING, **options)}
    params = conditioners.init(table, jax.random.key(1), lambda: tools(1, table))
    given = tools(8, table, params)
    memory = np.asarray(given.memory["it"])
    near = np.argsort(-memory @ memory.T, axis=1)
    assert near[:, 0].tolist() == list(range(8))
    scale = 12**0.5 if kind == "neighbours" else 1.0  # unit variance, or unit length
    batch = {"it": _columns(8)["image"]}
    for key, first in ((None, 0), (jax.random.key(0), 1)):
        tokens = conditioners.encode(table, params, batch, key, given).context
        expected = memory[near[:, first : first + 3]] * scale
        np.testing.assert_allclose(tokens, expected, atol=1e-5)
    many = kinds.KINDS[kind](SETTING, **options | dict(k=8))
    with pytest.raises(UserError, match="it.k: 8, but there are 8 training pictures"):
        many.before(batch["it"], given)


def test_neighbours_by_the_first_stage_want_whole_cells():
    with pytest.raises(UserError, match="cells: 3 does not divide the latent's 4x4"):
        neighbours.neighbours(SETTING, cells=3)


def test_conditions_of_one_slot_are_joined_or_kept_apart():
    options, _ = CASES["class"]
    table = {name: kinds.KINDS["class"](SETTING, **options) for name in "ab"}
    params = conditioners.init(table, jax.random.key(0))
    batch = {"a": np.int32([1, 2]), "b": np.int32([3, 4])}
    joined = conditioners.encode(table, params, batch).context
    apart = conditioners.encode(table, params, batch, sequential=True).context
    assert joined.shape == (2, 2, 16) and len(apart) == 2
    np.testing.assert_array_equal(joined, np.concatenate(apart, axis=1))


def test_layouts_are_shuffled_in_training_only():
    table, _, batch = _made("layout", 8)
    before = table["it"].before
    tokens = jnp.asarray(batch["it"])
    np.testing.assert_array_equal(before(tokens, tools(8)), tokens)
    shuffled = np.asarray(before(tokens, tools(8, training=True)))
    assert (shuffled != batch["it"]).any()
    triples = np.sort(shuffled.reshape(8, 3, 3)[..., 0], axis=1)
    np.testing.assert_array_equal(
        triples, np.sort(batch["it"].reshape(8, 3, 3)[..., 0], axis=1)
    )


def test_constant_depth_is_finite():
    conditioner = pictures.depth(SETTING)
    out = conditioner.before(jnp.full((2, 16, 16), 7.0), tools(2))
    np.testing.assert_allclose(out, -1.0, atol=1e-4)


def test_noise_levels_are_drawn_or_given():
    before = pictures.noisy_low_res(SETTING, max_noise_level=10).before
    x = jnp.asarray(_columns(64)["low_res"])
    _, drawn = before(x, tools(64, training=True))
    assert set(np.unique(drawn)) == set(range(10))
    _, default = before(x, tools(64))
    assert (np.asarray(default) == 20).all()
    _, given = before(x, tools(64, noise_level=jnp.full(64, 3)))
    assert (np.asarray(given) == 3).all()


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_levels_are_drawn_in_training_only(key):
    table, params, batch = _made("noisy_low_res", 64)
    levels = conditioners.encode(table, params, batch, key, tools(64)).vector
    assert len(np.unique(levels)) == 1 if key is None else len(np.unique(levels)) > 32


# ---- Parity --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "convention"),
    [("inpaint_batch_sd", "sd"), ("inpaint_batch_compvis", "ldm")],
)
def test_inpainting_inputs_are_the_references(fixture, convention):
    _, _, io = parity.load(fixture)
    setting = Setting((32, 32), (8, 8, 3))
    conditioner = pictures.inpainting(setting, convention=convention)
    mask = (io["mask_u8"] / 255 >= 0.5).astype(np.uint8)
    values = conditioner.prepare(io["image_u8"][None], mask[None])
    seen = []

    def encode(x, keys):
        del keys
        seen.append(x)
        return (
            jnp.asarray(parity.nhwc(io["masked_latent"]))
            if convention == "ldm"
            else (x[:, ::4, ::4])
        )

    out = conditioner.before(jnp.asarray(values), Tools(encode))
    masked = parity.nhwc(io["masked_image"])
    np.testing.assert_allclose(seen[0], masked, atol=ATOL)
    small = parity.nhwc(io["mask_latent"])
    if convention == "sd":
        np.testing.assert_allclose(out[..., :1], small, atol=ATOL)
    else:
        np.testing.assert_allclose(out, parity.nhwc(io["c_concat"]), atol=ATOL)


def test_class_embedder_is_the_references():
    _, weights, io = parity.load("class_embedder")
    params = {"embed": {"embedding": weights["embedding.weight"]}}
    net = embedders.ClassEmbedder(10, 16)
    out = net.apply({"params": params}, jnp.asarray(io["classes"], jnp.int32))
    np.testing.assert_allclose(out, io["out"], atol=ATOL)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bilinear_n2_map", dict(n_stages=2, out_channels=5, bias=True)),
        ("bilinear_n1", {}),
        ("nearest_n2", dict(n_stages=2, method="nearest")),
        ("bicubic_n1", dict(method="bicubic")),
        ("area_n1", dict(method="adaptive")),
        ("bilinear_mult0.25", dict(multiplier=0.25)),
        ("bicubic_mult2", dict(method="bicubic", multiplier=2)),
        ("bilinear_mult2", dict(multiplier=2)),
    ],
)
def test_spatial_rescaler_is_the_references(name, options):
    _, weights, io = parity.load("spatial_rescaler")
    params = {}
    if "out_channels" in options:
        kernel = weights["channel_mapper.weight"][:, :, 0, 0].T
        bias = weights["channel_mapper.bias"]
        params = {"channel_mapper": {"kernel": kernel, "bias": bias}}
    net = embedders.SpatialRescaler(**options)
    out = net.apply({"params": params}, jnp.asarray(parity.nhwc(io["x"])))
    np.testing.assert_allclose(out, parity.nhwc(io[name]), atol=ATOL)


def test_noise_level_embedding_is_the_references():
    _, _, io = parity.load("clip_noise_augmentation")
    out = layers.timestep_embedding(jnp.asarray(io["noise_level"], jnp.int32), 16)
    np.testing.assert_allclose(out, io["noise_level_embedding"], atol=ATOL)


def test_resizing_knows_its_methods():
    with pytest.raises(ValueError, match="method: 'cubic'"):
        resample.matrix(4, 2, "cubic")


# ---- Bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "change", "error"),
    [
        (
            "class",
            dict(label=np.array([7])),
            "label: 7 is no class; choose from 0 to 4",
        ),
        (
            "layout",
            dict(boxes=np.ones((1, 1, 4)) * 2, categories=np.zeros((1, 1), int)),
            "boxes: .* is out of range",
        ),
        (
            "semantic",
            dict(segmentation=np.full((1, 16, 16), 9, np.uint8)),
            "segmentation: class 9 is unknown",
        ),
        (
            "low_res",
            dict(low_res=np.zeros((1, 8, 8, 3), np.uint8)),
            "low_res: pictures of 8x8; .* so give 4x4",
        ),
        (
            "low_res",
            dict(low_res=np.zeros((1, 4, 4, 4), np.uint8)),
            "low_res: .* give 8-bit RGB pictures",
        ),
        (
            "inpainting",
            dict(
                image=np.zeros((1, 16, 16, 3), np.uint8),
                mask=np.zeros((1, 8, 8), np.uint8),
            ),
            "mask: 8x8, but the picture is 16x16",
        ),
        (
            "depth",
            dict(depth=np.zeros((1, 8, 8))),
            "depth: maps of 8x8; they must",
        ),
    ],
)
def test_wrong_inputs_take_one_line(kind, change, error):
    conditioner = kinds.KINDS[kind](SETTING, **CASES[kind][0])
    with pytest.raises(UserError, match=error) as raised:
        conditioner.prepare(*(change[field] for field in conditioner.fields))
    assert "\n" not in str(raised.value)


def test_a_smaller_picture_is_enlarged():
    made = pictures.low_res(SETTING, enlarge=2)
    x = np.repeat(np.arange(0, 8, 2, dtype=np.uint8)[:, None], 3, 1)[None] * 30
    small = np.ascontiguousarray(x.reshape(1, 2, 2, 3))
    wide = made.before(jnp.asarray(made.prepare(small)), conditioners.Tools())
    assert wide.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(
        wide.mean(), pictures.to_float(jnp.asarray(small)).mean(), atol=1e-5
    )
    assert wide[0, 0, 0, 0] < wide[0, 0, -1, 0] < wide[0, -1, -1, 0]
    with pytest.raises(UserError, match="low_res: .* and enlarge 2, so give 2x2"):
        made.prepare(np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="enlarge: 3 does not divide the latent's 4x4"):
        pictures.low_res(SETTING, enlarge=3)


def test_a_picture_s_vector_without_noise_is_the_tower_s():
    made = pictures.clip_image(SETTING, net=TINY_CLIP, max_noise_level=0)
    table = {"it": made}
    own_tools = tools(2, table)
    params = conditioners.init(table, jax.random.key(1), lambda: own_tools)
    batch = {"it": made.prepare(_columns(2)["image"])}
    given = conditioners.encode(table, params, batch, tools=own_tools).vector
    x = pictures.to_float(jnp.asarray(batch["it"]))
    x = clip_vision.preprocess(x, made.net.tower.image_size)
    expected = made.net.tower.apply({"params": params["it"]["tower"]}, x).embedding
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert given.shape == (2, 8)
