"""Pipelines on the hub, with a hub that is a folder here."""

import fnmatch
import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub import errors

from ldm_jax import hub, released
from ldm_jax.config import UserError

FILES = (
    "model_index.json",
    "README.md",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/flax_model.msgpack",
    "tokenizer/merges.txt",
    "safety_checker/model.safetensors",
)


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """Puts `there` files on the hub as org/name; gives where they are fetched to."""

    fetched = []

    def make(there):
        def download(name, filename, subfolder=None):
            if name != "org/name":
                raise errors.LocalEntryNotFoundError("no network\nat all")
            filename = f"{subfolder}/{filename}" if subfolder else filename
            if filename not in there:
                raise errors.EntryNotFoundError("no such file")
            fetched.append(filename)
            return str(tmp_path / filename)

        def snapshot(name, allow_patterns, ignore_patterns):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            for file in there:
                wanted = any(fnmatch.fnmatch(file, p) for p in allow_patterns)
                if wanted and not any(
                    fnmatch.fnmatch(file, p) for p in ignore_patterns
                ):
                    path = tmp_path / "cache" / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(file)
            return str(tmp_path / "cache")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        return fetched

    return make


def _fetched(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_a_pipeline_needs_is_fetched(repo):
    repo(FILES)
    assert _fetched(hub.pipeline("org/name", "SRC")) == {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/merges.txt",
    }


def test_torch_s_files_are_taken_where_there_are_no_others(repo):
    repo([f for f in FILES if not f.endswith(".safetensors")])
    folder = hub.pipeline("org/name", "SRC")
    assert "unet/diffusion_pytorch_model.bin" in _fetched(folder)


@pytest.mark.parametrize("part", ["", "vae"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_first_stage_alone_is_fetched(repo, tmp_path, part, suffix, monkeypatch):
    """As stabilityai/sd-vae-ft-mse is, or from the folder of a pipeline."""
    made = tmp_path / part
    made.mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (made / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    prefix, source = (f"{part}/", f"org/name:{part}") if part else ("", "org/name")
    weights = f"{prefix}diffusion_pytorch_model.{suffix}"
    fetched = repo([f"{prefix}config.json", weights, f"{prefix}flax_model.msgpack"])
    assert released.is_source(source) and hub.pipeline(source, "SRC") is None
    assert hub.first_stage(source, "SRC") == made
    assert fetched == [f"{prefix}config.json", weights]
    with pytest.raises(UserError, match=f"^SRC: .*{made}.* has no weights in it"):
        released.open_source(source)  # the file is only a name here
    repo([f"{prefix}config.json"])
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors"):
        hub.first_stage(source, "SRC")
    (made / "config.json").write_text('{"model_type": "clip"}')
    assert hub.first_stage(source, "SRC") is None


def test_what_is_no_pipeline_is_left_to_others(repo):
    repo(["model.safetensors"])
    assert hub.pipeline("org/name", "SRC") is None
    assert hub.pipeline("org/name:text_encoder", "SRC") is None
    assert hub.pipeline("a.ckpt", "SRC") is None


def test_a_repo_that_can_not_be_had_is_a_line(repo):
    repo(FILES)
    with pytest.raises(UserError, match=r"^SRC: 'org/none' is not here .*\(no netw"):
        released.open_source("org/none")


def test_a_folder_here_comes_first(repo, tmp_path, monkeypatch):
    repo(FILES)
    monkeypatch.chdir(tmp_path)
    weights = pathlib.Path("org/name")
    weights.mkdir(parents=True)
    with pytest.raises(
        UserError, match="has no model.safetensors or pytorch_model.bin"
    ):
        released.open_source("org/name")


def test_a_path_that_is_wrong_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert released.is_source("runs/mine")
    pathlib.Path("runs").mkdir()
    assert not released.is_source("runs/mine")
    assert not released.is_source("mine")
    assert not released.is_source("no/such/runs")
