"""Whole checkpoints of CompVis as runs: every part, its average, what does not fit."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import released
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import compvis, plans, towers, whole
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint, finetune, sharding
from ldm_jax.train import state as train_state
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
DEBUG = f"{runs.TXT2IMG}:debug"


def _under(prefix, plan, params):
    """Params under torch's names."""
    return {prefix + k: v for k, v in plans.revert(params, plan.rules).items()}


def _file_of(loaded):
    """What a trainer would have saved of a run: {key: array}."""
    model, params = loaded.model, loaded.params
    state_dict = {
        "alphas_cumprod": np.float32(model.schedule.alphas_cumprod),
        "betas": np.zeros(1000, np.float32),
        "model_ema.decay": np.float32(0.9999),
    }
    average = _under("", compvis.unet_plan(model.unet), params["unet"])
    for key, value in average.items():
        state_dict[f"model.diffusion_model.{key}"] = value + 1
        state_dict["model_ema.diffusion_model" + key.replace(".", "")] = value
    plan = compvis.autoencoder_plan(model.autoencoder)
    first_stage = loaded.first_stage.params
    return state_dict | _under("first_stage_model.", plan, first_stage)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with random params, the same as a released file, and its tokenizer."""
    folder = tmp_path_factory.mktemp("released")
    config = runs.debug()
    runs.untrained(folder / "run", config)
    loaded = ldm_jax.load(folder / "run")
    text = loaded.model.conditioners["text"].net
    state_dict = _file_of(loaded) | _under(
        "cond_stage_model.",
        compvis.text_transformer_plan(text),
        loaded.params["conditioners"]["text"],
    )
    return loaded, state_dict, str(folder / "run" / "tokenizers" / "text")


def _convert(tmp_path, made, *flags, **changes):
    _, state_dict, tokenizer = made
    state_dict = {
        k: np.asarray(v) for k, v in (state_dict | changes).items() if v is not None
    }
    source = tmp_path / "released.safetensors"
    safetensors_numpy.save_file(state_dict, source)
    convert_main.main(
        [
            str(source),
            str(tmp_path / "run"),
            f"--config={DEBUG}",
            "--config.conditioners.text.tokenizer.train_vocab_size=None",
            f"--config.conditioners.text.tokenizer.name={tokenizer}",
            *flags,
        ]
    )
    return ldm_jax.load(tmp_path / "run")


def test_a_released_file_is_the_run_that_it_was_made_of(tmp_path, made, capsys):
    loaded = made[0]
    again = _convert(tmp_path, made, "--scale_factor=0.5")
    assert "released.safetensors as debug in" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    same = again.first_stage.params, loaded.first_stage.params
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert np.all(np.asarray(again.first_stage.std) == 2.0)
    assert not np.asarray(again.first_stage.mean).any()
    first_stage = loaded.first_stage.replace(
        mean=again.first_stage.mean, std=again.first_stage.std
    )
    expected = dataclasses.replace(loaded, first_stage=first_stage)
    pictures = (m.sample("a red circle", steps=2) for m in (again, expected))
    np.testing.assert_array_equal(*pictures)

    # Not trained on as if it had an optimizer's state, but finetuned elsewhere.
    saved = checkpoint.Checkpoints(tmp_path / "run" / "diffusion")
    with pytest.raises(UserError, match="choose another --workdir, and finetune them"):
        saved.restore_newest(train_state.create(again.params, optax.adam(1.0), 0.0))
    config = config_lib.load(DEBUG, [f"init_from={tmp_path / 'run'}"])
    fresh = jax.eval_shape(lambda: again.params)
    finetune.check(config, fresh)
    started = finetune.start(config, fresh)
    jax.tree.map(np.testing.assert_array_equal, started, again.params)
    assert checkpoint.Checkpoints(tmp_path / "run" / "autoencoder").finished()


def test_raw_weights_and_a_scale_of_the_file_s_own(tmp_path, made):
    loaded = made[0]
    again = _convert(tmp_path, made, "--raw_weights", scale_factor=np.float32(0.25))
    assert np.all(np.asarray(again.first_stage.std) == 4.0)
    difference = jax.tree.map(
        lambda a, b: float(np.abs(a - b - 1).max()),
        again.params["unet"],
        loaded.params["unet"],
    )
    assert max(jax.tree.leaves(difference)) < 1e-6


def test_every_block_is_compared_where_torch_is(tmp_path, made, capsys):
    pytest.importorskip("diffusers")
    _convert(tmp_path, made, "--check")
    said = capsys.readouterr().out
    for net in ("unet | conv_in", "autoencoder | encoder"):
        assert f"| {net}" in said
    assert "differs" not in said


@pytest.mark.parametrize(
    ("flags", "changes", "words"),
    [
        ((), {"unet.weight": np.zeros(3)}, "1 arrays of no known part, such as 'unet"),
        ((), {"model.diffusion_model.out.2.bias": None}, "the UNet is not that of"),
        (("--config.unet.model_channels=64",), {}, "the UNet is not that of --config"),
        ((), {"model_ema.diffusion_modelout2bias": None}, "average lacks 1 arrays"),
        ((), {"first_stage_model.quant_conv.bias": np.zeros(3)}, "the autoencoder is"),
        (
            (),
            {"model_ema.diffusion_modelout2bias": np.full(8, np.nan, np.float16)},
            "out.2.bias (float16) has 8 of 8 numbers that are infinite or NaN",
        ),
        ((), {"cond_stage_model.more": np.zeros(3)}, "conditioners.text is not that"),
        (("--config.diffusion.linear_end=0.02",), {}, "diffusion: alphas_cumprod has"),
        (("--config.diffusion_stage.loss.learn_logvar=True",), {}, "SRC has no logvar"),
        (("--scale_factor=0",), {}, "--scale_factor: 0.0"),
        (("--scale_factor=inf",), {}, "--scale_factor: inf"),
        ((), {"scale_factor": np.array(np.nan)}, "scale_factor is nan, which multipl"),
        ((), {"scale_factor": np.zeros(())}, "scale_factor is 0.0, which multiplies"),
        ((), {"scale_factor": np.ones(2)}, "scale_factor is [1.0, 1.0], which"),
        ((), {"scale_factor": np.zeros(1)}, "scale_factor is [0.0], which multiplies"),
        (("--scale=0",), {}, "--scale=0: no such flag"),
        (
            ("--config.conditioners.text.tokenizer.train_vocab_size=99",),
            {},
            "tokenizer",
        ),
    ],
)
def test_what_does_not_fit_is_a_line_and_nothing_is_written(
    tmp_path, made, capsys, flags, changes, words
):
    with pytest.raises(SystemExit) as stopped:
        _convert(tmp_path, made, *flags, **changes)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["released.safetensors"]


def test_what_is_missing_may_be_drawn_anew(tmp_path, made, capsys):
    original = made[0]
    lacking = {
        "model.diffusion_model.middle_block.0.in_layers.2.weight": None,
        "first_stage_model.quant_conv.bias": None,
    }
    with pytest.raises(SystemExit):
        _convert(tmp_path, made, **lacking)
    assert "missing middle_block.0.in_layers.2.weight" in capsys.readouterr().err
    again = _convert(tmp_path, made, "--allow_missing", **lacking)
    said = capsys.readouterr().err
    for name in ("UNet", "AutoencoderKL"):
        assert (
            f"warning: 1 arrays of the {name} are not in SRC and are untrained" in said
        )
    fresh = model_lib.init_diffusion(
        again.config, again.model, jax.random.key(again.config.seed)
    )
    there, new, old = (
        traverse_util.flatten_dict(params["unet"], sep="/")
        for params in (again.params, fresh, original.params)
    )
    drawn = "mid_res_0/conv1/kernel"
    np.testing.assert_allclose(there.pop(drawn), new[drawn], atol=1e-6)
    assert np.abs(np.asarray(new[drawn])).max() > 0
    for path, value in there.items():
        np.testing.assert_array_equal(value, old[path])
    params = again.first_stage.params
    key = jax.random.key(again.config.seed)
    fresh, _ = model_lib.init_autoencoder(again.config, again.model.autoencoder, key)
    np.testing.assert_allclose(
        params["quant_conv"]["bias"],
        fresh["autoencoder"]["quant_conv"]["bias"],
        atol=1e-6,
    )
    np.testing.assert_array_equal(
        params["quant_conv"]["kernel"],
        original.first_stage.params["quant_conv"]["kernel"],
    )
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit):  # strict in what it knows nothing of
        _convert(tmp_path / "x", made, "--allow_missing", **{"x.weight": np.zeros(1)})
    assert "1 arrays of no known part" in capsys.readouterr().err


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_on_the_device_is_no_view_of_the_file(transposed):
    buffer = np.zeros(1024 + 64, np.uint8)
    start = -buffer.__array_interface__["data"][0] % 64  # where jax would not copy
    array = buffer[start : start + 1024].view(np.float32).reshape(16, 16)
    array[:] = np.arange(256).reshape(16, 16)
    view = array.T if transposed else array
    expected = view.copy()
    placed = jax.block_until_ready(released.on_device("x", view))
    array[:] = -1
    np.testing.assert_array_equal(placed, expected)


def _sharded(tree):
    """How many of a tree's arrays lie in parts on several devices."""
    leaves = jax.tree.leaves(tree)
    return sum(not leaf.sharding.is_fully_replicated for leaf in leaves)


def test_params_are_spread_over_a_mesh_as_in_training(tmp_path, made, monkeypatch):
    """Files and runs alike; what is drawn is the same."""
    loaded, state_dict, tokenizer = made
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**10)
    mesh = sharding.make_mesh(ConfigDict(dict(data=1, fsdp=4, tensor=2, dcn_data=1)))
    source = tmp_path / "released.safetensors"
    safetensors_numpy.save_file(jax.tree.map(np.asarray, state_dict), source)
    text = "conditioners.text.tokenizer"
    spec = f"{DEBUG},{text}.train_vocab_size=None,{text}.name={tokenizer}"
    _convert(tmp_path, made)
    file = ldm_jax.load(source, spec, mesh=mesh)
    run = ldm_jax.load(tmp_path / "run", mesh=mesh)
    wanted = sharding.tree_shardings(loaded.params["unet"], mesh)
    for model in (file, run):
        assert _sharded(model.params) > 30 and _sharded(model.first_stage.params) > 5
        unet = model.params["unet"]
        jax.tree.map(lambda x, s: _same_place(x, s), unet, wanted)
        jax.tree.map(np.testing.assert_array_equal, unet, loaded.params["unet"])
    options = dict(prompts=["a red circle on blue"], steps=2, output="array")
    difference = file.sample(**options) - run.sample(**options).astype(int)
    assert not difference.any()
    alone = ldm_jax.load(tmp_path / "run").sample(**options)
    assert np.abs(alone - file.sample(**options).astype(int)).max() <= 1


def _same_place(array, expected):
    assert array.sharding.is_equivalent_to(expected, array.ndim)


def test_a_destination_that_is_there_stays(tmp_path, made, capsys):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit):
        _convert(tmp_path, made)
    assert "is there already; name another" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        ("class_conditional", towers.class_embedder_plan),
        ("semantic", lambda net: towers.rescaler_plan(net, 22)),
    ],
)
def test_conditions_of_other_tasks_are_in_the_file_too(tmp_path, task, plan):
    spec = f"{runs.CONFIGS / task}.py:debug"
    runs.untrained(tmp_path / "run", config_lib.load(spec))
    loaded = ldm_jax.load(tmp_path / "run")
    ((name, conditioner),) = loaded.model.conditioners.items()
    params = loaded.params["conditioners"][name]
    state_dict = _file_of(loaded)
    state_dict |= _under("cond_stage_model.", plan(conditioner.net), params)
    parts = released.read(whole.Whole(state_dict), loaded.config, loaded.model)
    jax.tree.map(np.testing.assert_array_equal, parts.diffusion, loaded.params)
    assert parts.encoders == {} and parts.scale_factor == 1.0


def test_a_first_stage_that_is_there_twice_is_read_once(tmp_path):
    """LDM's inpainting encodes what is known by it, and torch saves both names."""
    config = config_lib.load(f"{runs.CONFIGS / 'inpainting'}.py:debug")
    config.conditioners.known.convention = "ldm"
    runs.untrained(tmp_path / "run", config)
    loaded = ldm_jax.load(tmp_path / "run")
    arrays = {key: np.asarray(value) for key, value in _file_of(loaded).items()}
    first = {k: v for k, v in arrays.items() if k.startswith(whole.FIRST_STAGE)}
    arrays |= {k.replace("first_stage", "cond_stage"): v for k, v in first.items()}
    path = tmp_path / "twice.safetensors"
    safetensors_numpy.save_file(arrays, path)
    # What no array tells.
    heads = f"--config.unet.num_head_channels={loaded.model.unet.num_head_channels}"
    groups = f"--config.autoencoder.norm_groups={loaded.model.autoencoder.norm_groups}"
    convert_main.main([str(path), str(tmp_path / "again"), heads, groups])
    again = ldm_jax.load(tmp_path / "again")
    assert again.config.conditioners.known.convention == "ldm"
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    params = (model.first_stage.params for model in (again, loaded))
    jax.tree.map(np.testing.assert_array_equal, *params)
    key = "cond_stage_model.decoder.conv_in.bias"
    arrays[key] = arrays[key] + 1
    safetensors_numpy.save_file(arrays, path)
    with pytest.raises(UserError, match=f"^SRC: {key} and .* two names of one array"):
        ldm_jax.load(path)


def test_scale_factors_are_of_autoencoders_that_there_are():
    assert set(released.SCALE_FACTORS) <= set(autoencoder.VARIANTS)
    config = config_lib.load(f"{runs.CONFIGS / 'upscale.py'}:x4")
    assert released.SCALE_FACTORS[config.autoencoder.variant] == 0.08333
