"""Finetuning: what is taken over, what begins at zero, which params may move."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax import adapters, frozen, lora
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, finetune, loop, optim, report
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
DEPTH = str(runs.CONFIGS / "depth2img.py")


@pytest.fixture
def other(tmp_path):
    """A finished run of the debug preset with random params."""
    workdir = tmp_path / "other"
    runs.untrained(workdir, runs.debug())
    return workdir


def _fresh(config):
    model = runs.build(config)
    key = jax.random.key(7)
    return model, model_lib.init_diffusion(config, model, key)


def _averaged(workdir, stage, like):
    saved = checkpoint.Checkpoints(workdir / stage)
    shapes = checkpoint.single_device(jax.eval_shape(lambda: like))
    return saved.load_averaged(shapes)[0]


def test_the_same_nets_start_from_what_was_trained(other, capsys):
    config = runs.debug(f"init_from={other}")
    _, fresh = _fresh(config)
    finetune.check(config, fresh)
    started = finetune.start(config, fresh)
    expected = _averaged(other, "diffusion", fresh)
    jax.tree.map(np.testing.assert_array_equal, started, expected)
    assert capsys.readouterr().out == f"diffusion: starts from {other}\n"


def _with_tower(*overrides, trainable):
    config = runs.debug(*overrides)
    config.conditioners.text.trainable = trainable
    config.conditioners.text.net = dict(kind="clip", dim=32, depth=1, heads=2)
    return config


def test_what_is_frozen_there_may_be_trained_here(tmp_path, capsys):
    """As the text tower of Stable Diffusion; by factors of low rank too."""
    other = tmp_path / "other"
    runs.untrained(other, _with_tower(trainable=False))
    config = _with_tower(f"init_from={other}", trainable=True)
    model, fresh = _fresh(config)
    tower = runs.random_like(fresh["conditioners"]["text"])
    frozen.write(other, {"text": tower})
    finetune.check(config, fresh)
    started = finetune.start(config, fresh)
    assert capsys.readouterr().out == f"diffusion: starts from {other}\n"
    jax.tree.map(np.testing.assert_array_equal, started["conditioners"]["text"], tower)
    unet = _averaged(other, "diffusion", {**fresh, "conditioners": {}})["unet"]
    jax.tree.map(np.testing.assert_array_equal, started["unet"], unet)

    config.diffusion_stage.lora.rank = 2
    base, _ = finetune.prepare(config, model, tmp_path / "heir", {}, {})
    jax.tree.map(np.testing.assert_array_equal, base, started)
    wider = _with_tower(f"init_from={other}", trainable=True)
    wider.conditioners.text.net.depth = 2
    with pytest.raises(UserError, match="init_from: that run's nets are not these"):
        finetune.check(wider, _fresh(wider)[1])


def test_what_is_trained_there_may_be_frozen_here(tmp_path, capsys):
    other = tmp_path / "other"
    runs.untrained(other, _with_tower(trainable=True))
    config = _with_tower(f"init_from={other}", trainable=False)
    model, fresh = _fresh(config)
    finetune.check(config, fresh)
    found = finetune.encoders(config, model, tmp_path / "heir")
    like = _fresh(_with_tower(trainable=True))[1]
    theirs = _averaged(other, "diffusion", like)
    expected = {"text": theirs["conditioners"]["text"]}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    started = finetune.start(config, fresh)
    assert capsys.readouterr().out == f"diffusion: starts from {other}\n"
    assert started["conditioners"] == {}
    config.diffusion_stage.lora.rank = 2
    base, _ = finetune.prepare(config, model, tmp_path / "heir", found, {})
    jax.tree.map(np.testing.assert_array_equal, base, started)


def test_new_input_channels_change_nothing_at_first(other, capsys):
    """Text to image as the start of depth to image."""
    length = runs.debug().conditioners.text.length
    overrides = [f"init_from={other}", f"conditioners.text.length={length}"]
    config = config_lib.load(f"{DEPTH}:debug", overrides)
    model, fresh = _fresh(config)
    finetune.check(config, jax.eval_shape(lambda: fresh))
    started = finetune.start(config, fresh)
    assert "(the UNet's 1 new input channels at zero)" in capsys.readouterr().out
    channels = model.latent_shape[-1]
    kernel = started["unet"]["conv_in"]["kernel"]
    assert (
        np.abs(kernel[:, :, :channels]).min() > 0 and not kernel[:, :, channels:].any()
    )

    old_model, old_fresh = _fresh(runs.debug())
    before = _averaged(other, "diffusion", old_fresh)
    key = jax.random.key(0)
    z = jax.random.normal(key, (2, *model.latent_shape))
    context = jax.random.normal(key, (2, 5, config.unet.context_dim))
    depth = jax.random.normal(key, (*z.shape[:3], 1))
    t = jnp.array([3, 700])
    new = model_lib.apply_unet(
        model, started["unet"], z, t, conditioning.Conditioning(depth, context), None
    )
    old = model_lib.apply_unet(
        old_model, before["unet"], z, t, conditioning.Conditioning(None, context), None
    )
    np.testing.assert_allclose(new, old, atol=1e-4)
    assert np.abs(old).max() > 0.1


def test_a_finetuned_run_moves_only_what_it_is_told_to(other, tmp_path, capsys):
    workdir = tmp_path / "heir"
    config = runs.debug(
        f"init_from={other}", "diffusion_stage.optim.train_only=attn2/to_(k|v)"
    )
    assert loop.train(config, workdir)
    said = capsys.readouterr().out
    assert f"diffusion: starts from {other}" in said
    assert f"autoencoder: taken from {other}" in said
    heir = ldm_jax.load(workdir)
    before = _averaged(other, "diffusion", heir.params)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(heir.params),
        jax.tree.leaves(before),
        strict=True,
    )
    moved = set()
    for (path, a), b in pairs:
        if not np.array_equal(a, b):
            moved.add("/".join(entry.key for entry in path[-3:-1]))
    assert moved == {"attn2/to_k", "attn2/to_v"}
    assert config_lib.differences(heir.config, config) == ""

    # It stands by itself, also where the other run is gone.
    shutil.rmtree(other)
    again = runs.debug(
        f"init_from={other}", "diffusion_stage.optim.train_only=attn2/to_(k|v)"
    )
    assert not finetune.is_due(again, workdir)
    assert loop.train(again, workdir)


def test_factors_of_low_rank_are_all_that_is_trained(other, tmp_path):
    workdir = tmp_path / "heir"
    overrides = [f"init_from={other}", "diffusion_stage.lora.rank=2"]
    config = runs.debug(*overrides, "diffusion_stage.lora.alpha=4")
    assert loop.train(config, workdir)
    shutil.rmtree(other)  # it stands by itself
    heir = ldm_jax.load(workdir)
    # An array of numpy would go to the device with every call.
    leaves = jax.tree.leaves((heir.params, heir.first_stage))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    before = frozen.read_params(workdir_lib.base_path(workdir))
    factors = adapters.initializer(config, heir.model)(jax.random.key(0))
    factors = _averaged(workdir, "diffusion", factors)
    changed = 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(heir.params),
        jax.tree.leaves(before),
        strict=True,
    ):
        name = "/".join(entry.key for entry in path)
        found = factors
        for word in name.split("/"):
            found = found.get(word, {})
        assert bool(found) == bool(re.search(r"attn[12]/to_\w+/kernel", name))
        if found:
            change = 2.0 * found["a"] @ found["b"]
            np.testing.assert_allclose(a, b + change, atol=1e-6)
            assert found["b"].shape[0] == 2 and np.any(found["b"])
            changed += 1
        else:
            np.testing.assert_array_equal(a, b)
    assert changed > 8
    assert report.count(factors) < 0.2 * report.count(before)
    assert heir.sample("a red circle", steps=2).shape == (1, 16, 16, 3)
    assert loop.train(runs.debug(*overrides, "diffusion_stage.lora.alpha=4"), workdir)


def test_factors_begin_with_no_change_also_of_convolutions():
    settings = runs.debug().diffusion_stage.lora
    settings.update(dict(rank=3, targets="conv|to_q"))
    base = {"conv": {"kernel": jnp.ones((3, 3, 4, 5)), "bias": jnp.ones(5)}}
    base |= {"to_q": {"kernel": jnp.ones((4, 6))}, "to_k": {"kernel": jnp.ones((4, 6))}}
    factors = lora.init(settings, base, jax.random.key(0))
    assert set(factors) == {"conv", "to_q"} and set(factors["conv"]) == {"kernel"}
    same = lora.merge(settings, base, factors)
    jax.tree.map(np.testing.assert_array_equal, same, base)
    factors["conv"]["kernel"]["b"] += 1.0
    moved = lora.merge(settings, base, factors)["conv"]["kernel"]
    expected = jnp.einsum("hwir,ro->hwio", *factors["conv"]["kernel"].values())
    np.testing.assert_allclose(moved - 1, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [5, 7, 9])
def test_tiled_input_channels_are_the_old_ones_by_their_share(channels):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    wide = finetune.widen(kernel, channels, "tiled")
    assert wide.dtype == np.float32
    for i in range(channels):
        times = len(range(i % 4, channels, 4))
        np.testing.assert_allclose(
            wide[:, :, i], kernel[:, :, i % 4] / times, rtol=1e-6
        )
    # An input that is tiled alike gives what the old input gave.
    x = np.random.default_rng(1).normal(size=(1, 5, 5, 4)).astype(np.float32)
    conv = jax.lax.conv_general_dilated
    options = dict(
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    old = conv(x, kernel, **options)
    new = conv(x[..., np.arange(channels) % 4], wide, **options)
    np.testing.assert_allclose(new, old, atol=5e-5)


def test_a_run_starts_with_tiled_channels(other, capsys):
    length = runs.debug().conditioners.text.length
    overrides = [f"init_from={other}", f"conditioners.text.length={length}"]
    config = config_lib.load(f"{DEPTH}:debug", [*overrides, "init_channels=tiled"])
    _, fresh = _fresh(config)
    started = finetune.start(config, fresh)
    assert "(the UNet's 1 new input channels tiled)" in capsys.readouterr().out
    kernel = started["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, -1], kernel[:, :, 0])
    config = config_lib.load(f"{DEPTH}:debug", [*overrides, "init_channels=copied"])
    with pytest.raises(UserError, match="init_channels: 'copied'; choose None"):
        finetune.check(config, fresh)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rank=2"], "lora.rank: 2, but there is nothing to adapt; set init_from"),
        (["rank=0"], "lora.rank: 0; choose 1 or more"),
        (
            ["rank=2", "targets=nowhere"],
            "lora.targets: 'nowhere' is in no path of one",
        ),
        (["rank=2", "targets=("], "lora.targets: '\\(' is no pattern"),
    ],
)
def test_factors_of_nothing(other, tmp_path, overrides, words):
    overrides = [f"diffusion_stage.lora.{word}" for word in overrides]
    if len(overrides) > 1:
        overrides.append(f"init_from={other}")
    with pytest.raises(UserError, match=f"^diffusion_stage.{words}"):
        loop.train(runs.debug(*overrides), tmp_path / "heir")
    assert not (tmp_path / "heir").exists()


def test_factors_train_no_new_input_channels(other, tmp_path):
    length = runs.debug().conditioners.text.length
    overrides = [f"init_from={other}", f"conditioners.text.length={length}"]
    overrides.append("diffusion_stage.lora.rank=2")
    config = config_lib.load(f"{DEPTH}:debug", overrides)
    with pytest.raises(UserError, match="means .*1 new input channels at zero.*lora"):
        finetune.prepare(config, runs.build(config), tmp_path / "heir", {}, {})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["unet.model_channels=64"],
            r"of another shape: .*\(.*\) there, .* and \d+ more",
        ),
        (["unet.num_res_blocks=2"], "not there: unet/down_0_attn_1"),
        (["unet.transformer_depth=0"], "only there: unet/"),
    ],
)
def test_other_nets_are_refused_before_anything_is_written(
    other, tmp_path, overrides, words
):
    config = runs.debug(f"init_from={other}", *overrides)
    workdir = tmp_path / "heir"
    with pytest.raises(UserError, match=f"^init_from: .*{words}"):
        loop.train(config, workdir)
    assert not workdir.exists()


def test_a_run_without_a_diffusion_model(other, tmp_path):
    with pytest.raises(UserError, match="^init_from: .* holds no run"):
        finetune.check(runs.debug(f"init_from={tmp_path}"), {})
    shutil.rmtree(other / "diffusion")
    with pytest.raises(UserError, match="^init_from: .* has no checkpoint"):
        finetune.check(runs.debug(f"init_from={other}"), {})


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nowhere", "is found in no param's path; they are such as a/b"),
        ("(", "no pattern"),
    ],
)
def test_patterns_that_train_nothing(tmp_path, pattern, words):
    with pytest.raises(UserError, match=f"optim.train_only: .*{words}"):
        optim.labels(pattern, {"a": {"b": jnp.zeros(3)}})
    config = runs.debug(f"diffusion_stage.optim.train_only={pattern}")
    with pytest.raises(UserError, match="optim.train_only: "):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
