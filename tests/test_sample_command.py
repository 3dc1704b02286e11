"""The sampling command: pictures from flags and files, and mistakes in one line."""

import shutil

import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import convert, frozen, sample
from ldm_jax.train import checkpoint
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
PROMPTS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    runs.untrained(workdir, runs.debug())
    return workdir


@pytest.fixture(scope="module")
def loaded(workdir):
    return ldm_jax.load(workdir)


@pytest.fixture(scope="module")
def pictures(loaded):
    return loaded.sample(PROMPTS)


def _distance(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


def _fails(capsys, *argv):
    """The one error line of a command that must fail."""
    with pytest.raises(SystemExit) as exit_:
        sample.main(list(argv))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_command_writes_one_picture(workdir, pictures, tmp_path, capsys):
    out = tmp_path / "deep" / "a.png"
    sample.main([f"--workdir={workdir}", f"--prompt={PROMPTS[0]}", f"--out={out}"])
    assert _distance(np.asarray(Image.open(out)), pictures[0]) <= 1
    assert str(out) in capsys.readouterr().out


def test_command_takes_prompts_from_flags_and_a_file(workdir, pictures, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[1]}\n\n  {PROMPTS[2]}\n")
    argv = [f"--workdir={workdir}", f"--prompt={PROMPTS[0]}", f"--prompts_file={file}"]
    sample.main([*argv, f"--out={tmp_path / 'all'}"])
    files = sorted((tmp_path / "all").iterdir())
    assert [f.name for f in files] == ["00000.png", "00001.png", "00002.png"]
    drawn = np.stack([np.asarray(Image.open(f)) for f in files])
    assert _distance(drawn, pictures) <= 1
    sample.main([*argv, f"--out={tmp_path / 'grid.png'}"])
    assert Image.open(tmp_path / "grid.png").width > 3 * 128


def test_command_adds_files_to_the_model(workdir, loaded, tmp_path, capsys):
    factors = {"a": np.ones((3, 3, 32, 2)), "b": np.ones((2, 32))}
    tree = {"mid_res_0": {"conv1": {"kernel": factors}}}
    state = convert.export_lora(loaded.model.unet, tree, 2, 2)
    lora, toy = tmp_path / "lora.safetensors", tmp_path / "toy.safetensors"
    frozen.write_params(lora, state)
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    frozen.write_params(toy, {"<toy>": rows})
    out, prompt = tmp_path / "a.png", "a red <toy>"
    argv = [f"--workdir={workdir}", f"--prompt={prompt}", f"--out={out}"]
    sample.main([*argv, f"--lora={lora}:0.25", f"--tokens={toy}"])
    wanted = loaded.with_lora(lora, 0.25).with_tokens(toy).sample(prompt)
    assert _distance(np.asarray(Image.open(out)), wanted[0]) <= 1
    for flag in ("lora", "tokens"):
        err = _fails(capsys, *argv, f"--{flag}=gone.safetensors")
        assert err.startswith(f"error: --{flag}: ") and "gone.safetensors" in err
    other = tmp_path / "other.safetensors"
    frozen.write_params(other, {"x.lora_A.weight": rows})
    err = _fails(capsys, *argv, f"--lora={other}:0.25")
    assert err.startswith(f"error: --lora: {other}: x.lora_A.weight: of shape (2, 32)")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a:0.8", ("a", 0.8)),
        ("C:/a", ("C:/a", 1.0)),
        ("C:/a:-1", ("C:/a", -1.0)),
    ],
)
def test_a_lora_may_have_a_scale(text, wanted):
    assert sample.parse_lora(text) == wanted


def test_a_folder_without_a_run(tmp_path, capsys):
    err = _fails(capsys, f"--workdir={tmp_path / 'no'}", "--prompt=a")
    assert "holds no run" in err and "--workdir" in err
    assert not (tmp_path / "no").exists()


def test_flags_that_cannot_be_read(workdir, capsys):
    argv = [f"--workdir={workdir}", "--prompt=a"]
    assert "--guidance: 'x'; give a number" in _fails(capsys, *argv, "--guidance=x")
    assert "--guidance: 'a=1;b'; give" in _fails(capsys, *argv, "--guidance=a=1;b")
    assert "--size: '2x3x4'; give HEIGHTxWIDTH" in _fails(capsys, *argv, "--size=2x3x4")


def test_prompts_are_needed(workdir, tmp_path, capsys):
    assert "--prompt: none given" in _fails(capsys, f"--workdir={workdir}")
    flag = f"--prompts_file={tmp_path / 'none.txt'}"
    assert "--prompts_file: no file" in _fails(capsys, f"--workdir={workdir}", flag)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_missing_checkpoint(workdir, tmp_path, capsys, stage):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / stage)
    err = _fails(capsys, f"--workdir={copy}", "--prompt=a")
    assert f"no sound checkpoint in {copy / stage}" in err
    assert not (copy / stage).exists()


def test_an_unfinished_first_stage(workdir, tmp_path, capsys, monkeypatch):
    read = checkpoint.Checkpoints.read_meta

    def without_statistics(self, step):
        meta = read(self, step)
        del meta["latent"]
        return meta

    monkeypatch.setattr(checkpoint.Checkpoints, "read_meta", without_statistics)
    err = _fails(capsys, f"--workdir={workdir}", "--prompt=a")
    assert "is not finished; run the training command again" in err
