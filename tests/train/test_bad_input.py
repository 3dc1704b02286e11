"""Mistakes: one line with field and mend, exit code 2, and nothing touched."""

import collections
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.config import UserError
from ldm_jax.train import __main__ as train_main
from ldm_jax.train import check_data, checkpoint, loop
from tests import runs

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "txt2img.py"
FIRST_STAGES = ROOT / "configs" / "autoencoder.py"


@pytest.fixture(autouse=True)
def this_process_as_it_is(monkeypatch):
    """The command sets up logging and a compilation cache, which the tests have."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as conftest.py has it")
    monkeypatch.setattr(config_lib, "setup_logging", lambda: None)


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs the command; returns the one line that it ends with."""

    def run(*flags, config=f"{CONFIG}:debug", workdir=tmp_path / "run"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_info:
            train_main.main([f"--config={config}", f"--workdir={workdir}", *flags])
        assert exit_info.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


def test_unknown_preset_names_the_nearest(fails):
    assert "did you mean 'openmoji'?" in fails(config=f"{CONFIG}:opnmoji")


def test_missing_config_file(fails):
    assert "no file 'nowhere.py'" in fails(config="nowhere.py")


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--config.batchsize=8", "did you mean 'batch_size'?"),
        ("--config.unet.model_chanels=8", "did you mean 'unet.model_channels'?"),
        ("--config.seed.deeper=8", "seed is a value, not a section"),
        ("--config.unet=8", "a section; set one of its fields"),
        ("--config.batch_size=many", "'many' is not of type int"),
        ("--confg.batch_size=8", "no such flag"),
    ],
)
def test_mistyped_fields(fails, flag, hint):
    assert hint in fails(flag)


def test_batch_not_divisible_by_the_devices(fails):
    error = fails("--config.batch_size=12")
    assert "batch_size: 12 is not divisible by 8 devices; use 8 or 16" in error


def test_batch_not_divisible_by_micro_batches(fails):
    error = fails("--config.diffusion_stage.micro_batches=3")
    assert "8 devices x 3 micro-batches" in error


def test_image_size_not_divisible_by_f(fails):
    error = fails("--config.resolution=15")
    assert "resolution: 15 is not divisible by the autoencoder's f = 2" in error
    assert "use 14 or 16" in error


def test_mesh_that_does_not_fit(fails):
    assert "does not fit 8 devices" in fails("--config.mesh.fsdp=3")


def test_unknown_stage(fails):
    error = fails("--config.stages=('autoencode',)")
    assert "did you mean 'autoencoder'?" in error


def test_latent_channels_that_do_not_match(fails):
    assert "unet.out_channels: 5" in fails("--config.unet.out_channels=5")


def test_misspelt_constructor_argument(fails, tmp_path):
    """A section is a constructor's arguments: what it does not take is named."""
    config = tmp_path / "wrong.py"
    config.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('base', {str(CONFIG)!r})\n"
        "base = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(base)\n"
        "def get_config(arg):\n"
        "    config = base.debug()\n"
        "    config.unet.model_chanels = 8\n"
        "    return config\n"
    )
    assert "model_chanels" in fails(config=config)


def test_workdir_of_another_run(fails, tmp_path):
    workdir = tmp_path / "other"
    workdir.mkdir()
    config = config_lib.load(f"{CONFIG}:debug")
    (workdir / "config.json").write_text(config_lib.to_json(config))
    error = fails("--config.seed=7", "--config.batch_size=16", workdir=workdir)
    assert "seed: 0 -> 7" in error and "batch_size: 8 -> 16" in error
    error = fails("--config.report.log_steps=7", "--config.seed=7", workdir=workdir)
    assert "report" not in error


def test_missing_optional_dependency_names_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['clu'] = None\n"
        "from ldm_jax.train import __main__ as m\n"
        f"m.main(['--config={CONFIG}:debug', '--workdir={tmp_path}/run'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "pip install 'ldm_jax[train]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("dtype=float16", "dtype: 'float16'; choose one of auto, float32"),
        ("data.source=openmojo", "did you mean 'openmoji'?"),
        ("conditioners.text.slot=contxt", "text.slot: 'contxt'; did you mean"),
        ("conditioners.text.field=capt", "text.field: 'capt' is not in the data"),
        ("conditioners.text.trainable=False", "text.trainable: False, but a frozen"),
        ("unet.in_channels=5", "unet.in_channels: 5, but the latent has 8 channels"),
        ("diffusion.parameterization=z", "parameterization: 'z'"),
        ("diffusion.schedule=quadratic", "'quadratic'"),
        ("diffusion_stage.optim.schedule=step", "optim.schedule: 'step'; choose"),
        ("diffusion_stage.loss.loss_type=l3", "loss_type: 'l3'; choose one of l2, l1"),
        ("autoencoder_stage.batch_size=12", "autoencoder_stage.batch_size: 12 is not"),
    ],
)
def test_values_that_do_not_work(fails, flag, hint):
    """Found before the first write, also where only the second stage reads them."""
    assert hint in fails(f"--config.{flag}")


@pytest.mark.parametrize(
    ("preset", "flag", "hint"),
    [
        ("debug", "autoencoder.in_channels=1", "in_channels: 1, but the pictures have"),
        ("debug", "autoencoder.out_ch=4", "out_ch: 4, but the pictures have 3"),
        ("debug", "autoencoder.ch_mult=(1,2,2,2,2,2)", "16 is not divisible by the"),
        ("debug", "autoencoder.kind=kv", "autoencoder.kind: 'kv'; "),
        ("debug", "autoencoder_stage.loss.pixel_loss=l3", "pixel_loss: 'l3'"),
        ("debug", "autoencoder_stage.adversarial.disc_loss=hing", "mean 'hinge'?"),
        ("debug", "autoencoder_stage.adversarial.net.norm=b", "net: norm 'b'"),
        ("debug", "autoencoder_stage.optim.schedule=warmup_cosin", "warmup_cosine"),
        ("debug_vq", "autoencoder.remap=nowhere.npy", "no file 'nowhere.npy'"),
        ("kl_f8", "autoencoder_stage.loss.vgg=nowhere.pth", "vgg: no file 'nowhere"),
    ],
)
def test_first_stages_that_cannot_be(fails, preset, flag, hint):
    assert hint in fails(f"--config.{flag}", config=f"{FIRST_STAGES}:{preset}")


@pytest.mark.parametrize(
    ("codes", "hint"),
    [
        ([0, 7, 32], "n_embed: 32, but"),
        ([0, -1], "names code -1"),
        ([[0, 1]], "must be a list of code indices"),
        ([0.5], "must be a list of code indices"),
    ],
)
def test_codes_of_a_remap_that_are_not_there(fails, tmp_path, codes, hint):
    path = tmp_path / "used.npy"
    np.save(path, np.array(codes))
    error = fails(
        f"--config.autoencoder.remap={path}", config=f"{FIRST_STAGES}:debug_vq"
    )
    assert hint in error


PERCEPTUAL = ("--config.autoencoder_stage.loss.perceptual_weight=1.0",)


def test_perceptual_weights_that_cannot_be_fetched(
    fails, monkeypatch, tmp_path_factory
):
    def offline(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("LDM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    error = fails(*PERCEPTUAL, config=f"{FIRST_STAGES}:debug")
    assert "autoencoder_stage.loss.vgg" in error and "https://" in error


def test_perceptual_weights_that_would_run_code(fails, tmp_path):
    """A picklable object whose loading makes a folder: no loading, no folder."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "vgg.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vgg/data.pkl", pickle.dumps({"features": Hostile()}))
        archive.writestr("vgg/version", "3")
    flag = f"--config.autoencoder_stage.loss.vgg={path}"
    heads = f"--config.autoencoder_stage.loss.lpips_heads={path}"
    error = fails(*PERCEPTUAL, flag, heads, config=f"{FIRST_STAGES}:debug")
    assert str(path) in error and not (tmp_path / "owned").exists()


def test_what_cannot_matter_may_change(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(runs.debug()))
    loop.check(runs.debug("report.log_steps=7", "mesh.data=4", "mesh.fsdp=2"), workdir)
    # What a run that diverged is told to change.
    calmer = (
        "autoencoder_stage.optim.learning_rate=1e-5",
        "diffusion_stage.optim.clip_norm=0.5",
    )
    loop.check(runs.debug(*calmer), workdir)


def test_all_checkpoints_damaged(tmp_path, capsys):
    workdir = tmp_path / "run"
    runs.untrained(workdir, runs.debug())
    for path in (workdir / "autoencoder").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        train_main.main([f"--config={CONFIG}:debug", f"--workdir={workdir}"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --workdir: all checkpoints in")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_full_disk(tmp_path, capsys, monkeypatch, fast_compile):
    usage = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    flags = [f"--config={CONFIG}:debug", "--config.stages=('autoencoder',)"]
    with pytest.raises(SystemExit) as exit_info:
        train_main.main([*flags, f"--workdir={tmp_path / 'run'}"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "free some space or lower report.max_to_keep" in error
    assert error.count("\n") == 1
    assert checkpoint.Checkpoints(tmp_path / "run" / "autoencoder").steps() == []


def test_evaluation_without_tensorflow(tmp_path):
    runs_config = tmp_path / "config.json"
    runs_config.write_text(config_lib.to_json(runs.debug()))
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from ldm_jax.evaluate import __main__ as m\n"
        f"m.main(['--workdir={tmp_path}'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: tensorflow: not installed" in done.stderr
    assert "pip install 'ldm_jax[train]'" in done.stderr


def test_random_ops_move_pictures_away_from_their_conditions():
    config = config_lib.load(f"{runs.CONFIGS / 'inpainting'}.py:debug")
    model = runs.build(config)
    check_data.ops(config, model)
    config.data.ops = (("flip_lr", {}), ("to_float", {}))
    with pytest.raises(UserError, match="flip_lr moves the picture, but not the image"):
        check_data.ops(config, model)
    config = runs.debug()
    config.data.ops = (("flip_lr", {}), ("to_float", {}))
    check_data.ops(config, runs.build(config))  # a caption says nothing of where
