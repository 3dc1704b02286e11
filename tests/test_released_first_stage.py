"""A first stage alone, in CompVis' keys or diffusers', as a run that others take."""

import collections
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


def test_it_draws_nothing(made):
    with pytest.raises(UserError, match="SRC: a first stage alone, which draws noth"):
        ldm_jax.load(made[2]["compvis"])


@pytest.mark.parametrize("flags", [[], ["--raw_weights"]])
def test_its_average_is_taken_unless_told(tmp_path, made, flags, capsys):
    _, params, paths = made
    arrays = safetensors_numpy.load_file(paths["compvis"])
    nets = {k: v for k, v in arrays.items() if not k.startswith("loss.")}
    average = {f"model_ema.{k.replace('.', '')}": v + 1 for k, v in nets.items()}
    average["model_ema.decay"] = np.array(0.999, np.float32)
    path = tmp_path / "averaged.safetensors"
    safetensors_numpy.save_file(arrays | average, path)
    words = [str(path), str(tmp_path / "run"), "--scale_factor=1", *flags]
    convert_main.main(words)
    more = 0 if flags else 1
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b + more),
        _first_stage(tmp_path / "run").params,
        params,
    )
    del average["model_ema.decoderconv_inbias"]
    safetensors_numpy.save_file(arrays | average, path)
    words[1] = str(tmp_path / "another")
    if flags:
        convert_main.main(words)
        return
    with pytest.raises(SystemExit):
        convert_main.main(words)
    said = capsys.readouterr().err
    assert "the autoencoder's average lacks 1 arrays, such as 'first_stage_" in said


def test_a_full_disk_is_a_line(tmp_path, made, capsys, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    before = sorted(tmp_path.iterdir())
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        convert_main.main([str(made[2]["folder"]), str(run)])
    said = capsys.readouterr().err
    assert said.startswith(f"error: DST: the disk of {run} is full; free some space")
    assert said.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_it_goes_from_layout_to_layout(tmp_path, made, capsys):
    net, params, paths = made
    folder, file = tmp_path / "to" / "vae", tmp_path / "to" / "kl.safetensors"
    factor = "--scale_factor=0.18215"
    convert_main.main([str(paths["compvis"]), str(folder), "--diffusers", factor])
    said = json.loads((folder / "config.json").read_text())
    assert said["scaling_factor"] == 0.18215 and said["_class_name"] == "AutoencoderKL"
    convert_main.main([str(folder), str(file)])
    assert "without its scale_factor 0.18215" in capsys.readouterr().out
    for path in (folder / "diffusion_pytorch_model.safetensors", file):
        _, found = convert.import_network(path)
        jax.tree.map(np.testing.assert_array_equal, found["params"], params)
    keys = safetensors_numpy.load_file(paths["compvis"]).keys()
    bare = {key for key in keys if not key.startswith("loss.")}
    assert safetensors_numpy.load_file(file).keys() == bare


def _finished(workdir, net, params, mean, std):
    """What training leaves of stage one."""
    config = config_lib.load(f"{runs.AUTOENCODER}:debug", [f"autoencoder.ch={net.ch}"])
    path = workdir_lib.config_path(workdir)
    workdir_lib.write_text(path, config_lib.to_json(config))
    latent = {"mean": mean, "std": std}
    tree = {"autoencoder": params}
    checkpoint.save_params(workdir / "autoencoder", tree, 7, latent=latent)


def test_one_that_was_trained_here_goes_out(tmp_path, made, capsys):
    net, params, _ = made
    c = net.embed_dim
    mean, std = np.linspace(-0.5, 2, c), np.linspace(0.5, 3, c)
    run = tmp_path / "run"
    _finished(run, net, params, mean.tolist(), std.tolist())
    convert_main.main([str(run), str(tmp_path / "x.safetensors")])
    convert_main.main([str(run), str(tmp_path / "out")])
    _, found = convert.import_network(tmp_path / "x.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found["params"], params)
    # As LDM measures the spread of all latents, of channels as these are.
    z = np.random.default_rng(0).normal(size=(100_000, c)) * std + mean
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_allclose(said["scaling_factor"], 1 / z.std(), rtol=5e-3)
    assert f"scale_factor {said['scaling_factor']:.6g}" in capsys.readouterr().out
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    z = np.random.default_rng(1).normal(size=(1, 4, 4, c)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    ours = net.apply({"params": params}, z, method="decode")
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, expected, atol=5e-5)


@pytest.mark.parametrize("layout", ["compvis", "folder"])
def test_it_is_checked(tmp_path, made, capsys, layout):
    pytest.importorskip("diffusers")
    flags = ["--check", *(["--scale_factor=1"] if layout == "compvis" else [])]
    convert_main.main([str(made[2][layout]), str(tmp_path / "run"), *flags])
    said = capsys.readouterr().out
    assert "| autoencoder | encoder/conv_in |" in said
    assert "| autoencoder | decoder/conv_out |" in said
    assert "differs" not in said
    convert_main.main([str(tmp_path / "run"), str(tmp_path / "out"), "--check"])
    assert capsys.readouterr().out.count("| autoencoder |") == said.count("| autoenc")
