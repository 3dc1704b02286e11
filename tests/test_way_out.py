"""What can't go out to others, or nowhere on this disk, ends in one line."""

import dataclasses
import warnings

import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import publish, publish_folder, sample
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
UNCONDITIONAL = f"{runs.CONFIGS / 'unconditional.py'}:debug"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without conditions."""
    folder = tmp_path_factory.mktemp("run") / "run"
    runs.untrained(folder, config_lib.load(UNCONDITIONAL))
    return folder


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """A run of stage one alone; of its checkpoint nothing is read here."""
    folder = tmp_path_factory.mktemp("first") / "run"
    config = config_lib.load(f"{runs.AUTOENCODER}:debug")
    path = workdir_lib.config_path(folder)
    workdir_lib.write_text(path, config_lib.to_json(config))
    return folder


def _fails(capsys, main, *argv):
    """The one error line of a command that must fail."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


def test_a_first_stage_alone_does_not_draw(first_stage, tmp_path, capsys):
    words = f"--workdir: {first_stage} trains a first stage alone, but drawing needs"
    mend = f"--config.autoencoder_from={first_stage}"
    with pytest.raises(UserError, match=words):
        ldm_jax.load(first_stage)
    said = _fails(capsys, sample.main, f"--workdir={first_stage}", "--count=1")
    assert words in said and mend in said


def test_a_first_stage_that_is_not_there_stays(first_stage, tmp_path, capsys):
    for name in ("x.safetensors", "x"):
        said = _fails(capsys, convert_main.main, first_stage, tmp_path / name)
        assert "no sound checkpoint" in said
    assert list(tmp_path.iterdir()) == []


def test_a_prior_goes_out_by_itself(tmp_path, capsys):
    runs.untrained(
        tmp_path / "run", config_lib.load(f"{runs.CONFIGS / 'prior.py'}:debug")
    )
    for name in ("x", "x.safetensors"):
        said = _fails(capsys, convert_main.main, tmp_path / "run", tmp_path / name)
        assert "unet.kind: 'prior'" in said and "convert.export_network" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("write", [publish.write_file, publish_folder.write])
def test_a_classifier_that_stays_is_told(run, tmp_path, write):
    model = ldm_jax.load(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, tmp_path / "without.safetensors")
    model = dataclasses.replace(model, classifier={})
    with pytest.warns(UserWarning, match="^classifier: .* is left out, .*export_netw"):
        write(model, tmp_path / "with.safetensors")
    assert (tmp_path / "with.safetensors").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "run", "diffusers"])
def test_a_destination_that_can_not_be_written_is_a_line(run, tmp_path, capsys, name):
    source, path = tmp_path / "source.safetensors", tmp_path / "file" / name
    publish.write_file(ldm_jax.load(run), source)
    (tmp_path / "file").touch()
    argv = [source, path, f"--config={UNCONDITIONAL}"]
    argv += ["--diffusers"] * (name == "diffusers")
    said = _fails(capsys, convert_main.main, *argv)
    assert f"{path} can't be written (" in said and "name another" in said


@pytest.mark.parametrize("write", [publish.write_file, publish_folder.write])
def test_whoever_may_read_other_files_may_read_these(run, tmp_path, write):
    write(ldm_jax.load(run), tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    plain = (tmp_path / "plain").stat().st_mode
    files = [p for p in tmp_path.rglob("*.safetensors") if p.is_file()]
    assert files and {file.stat().st_mode for file in files} == {plain}
