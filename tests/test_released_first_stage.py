"""A first stage alone, in CompVis' keys or diffusers', as a run that others take."""

import json
import warnings

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import convert, preset_of, released
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import compvis, whole, write_config
from ldm_jax.train import checkpoint, loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def made(tmp_path):
    """(net, its params, {layout: a file of them})"""
    config = config_lib.load(f"{runs.AUTOENCODER}:debug", ["autoencoder.ch=32"])
    net = model_lib.build_autoencoder(config)
    shapes = jax.eval_shape(
        lambda: model_lib.init_autoencoder(config, net, jax.random.key(0))[0]
    )
    params = runs.random_like(shapes["autoencoder"])
    paths = {}
    for layout in ("compvis", "diffusers"):
        paths[layout] = tmp_path / f"{layout}.safetensors"
        arrays = convert.export_network(net, {"params": params}, layout)
        if layout == "compvis":  # as its trainer left it
            arrays["loss.discriminator.main.0.weight"] = np.zeros((8, 3, 4, 4))
            arrays["loss.logvar"] = np.zeros(())
        safetensors_numpy.save_file(arrays, paths[layout])
    paths["folder"] = tmp_path / "vae"
    paths["folder"].mkdir()
    safetensors_numpy.save_file(
        arrays, paths["folder"] / "diffusion_pytorch_model.safetensors"
    )
    said = write_config.autoencoder_of(net, 0.5, config.resolution)
    (paths["folder"] / "config.json").write_text(json.dumps(said))
    return net, params, paths


def _first_stage(run):
    return loaded_lib.load_first_stage(run, workdir_lib.read_config(run))


@pytest.mark.parametrize("layout", ["compvis", "diffusers", "folder"])
def test_it_becomes_a_run(tmp_path, made, layout, capsys):
    net, params, paths = made
    run = tmp_path / "run"
    groups = f"--config.autoencoder.norm_groups={net.norm_groups}"  # no array tells
    flags = [] if layout == "folder" else ["--scale_factor=0.5", groups]
    convert_main.main([str(paths[layout]), str(run), *flags])
    said = capsys.readouterr().out
    assert f"autoencoder.ch = {net.ch}\n" in said and "scale_factor = 0.5" in said
    found = _first_stage(run)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert np.all(np.asarray(found.std) == 2) and not np.asarray(found.mean).any()
    config = workdir_lib.read_config(run)
    assert config.stages == ("autoencoder",)
    assert model_lib.build_autoencoder(config).ch_mult == net.ch_mult
    # A preset may be named instead; it is then that of all options.
    named = f"--config={runs.AUTOENCODER}:debug,autoencoder.ch=32"
    convert_main.main([str(paths[layout]), str(tmp_path / "named"), named])
    assert workdir_lib.read_config(tmp_path / "named").autoencoder.init_logvar == -6


@pytest.mark.parametrize("variant", ["kl_f8", "kl_f32", "vq_f4", "vq_f4_noattn"])
def test_a_published_one_is_recognised(variant):
    config = config_lib.load(f"{runs.AUTOENCODER}:{variant}")
    plan = compvis.autoencoder_plan(model_lib.build_autoencoder(config))
    arrays = {
        rule.key: rule.layout.to_torch(
            np.broadcast_to(np.float32(0), plan.shapes[rule.path])
        )
        for rule in plan.rules
    }
    source = whole.Whole(whole.with_prefix(arrays))
    found = preset_of.config_of(source)
    assert found.preset == f"configs/autoencoder.py:{variant}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert released._scale_factor(source, found) == (
            0.18215 if variant == "kl_f8" else 1.0
        )
    assert len(said) == (variant != "kl_f8")


def test_training_takes_it_by_its_name(tmp_path, made, monkeypatch):
    monkeypatch.setenv("LDM_JAX_DATA", str(tmp_path / "cache"))
    net, params, paths = made
    config = runs.debug(f"autoencoder_from={paths['compvis']}", "autoencoder.ch=16")
    workdir = tmp_path / "heir"
    loop.check(config, workdir)
    loop.open_workdir(workdir, config, {"text": runs.tokenizer()})
    assert config.autoencoder.ch == net.ch
    jax.tree.map(np.testing.assert_array_equal, _first_stage(workdir).params, params)
    assert checkpoint.Checkpoints(workdir / "autoencoder").finished()
    monkeypatch.setenv("LDM_JAX_DATA", str(tmp_path / "another"))
    wrong = runs.debug(f"init_from={paths['compvis']}")
    with pytest.raises(UserError, match="a first stage alone; give it as autoencoder"):
        loop.check(wrong, tmp_path / "wrong")


@pytest.mark.parametrize("flag", ["x.safetensors", "--diffusers", "--check"])
def test_it_draws_nothing(tmp_path, made, capsys, flag):
    if flag == "--check":
        pytest.importorskip("diffusers")
    source = str(made[2]["compvis"])
    words = [str(tmp_path / "x"), flag] if flag[0] == "-" else [str(tmp_path / flag)]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        convert_main.main([source, *words])
    assert "a first stage alone, which draws nothing" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="draws nothing"):
        ldm_jax.load(source)
