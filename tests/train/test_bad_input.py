"""Mistakes: one line with field and mend, exit code 2, and nothing touched."""

import os
import pathlib
import subprocess
import sys

import pytest

from ldm_jax.train import __main__ as train_main

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "txt2img.py"


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
    from ldm_jax import config as config_lib

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
