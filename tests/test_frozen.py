"""Frozen conditioning nets: weights from a path, kept in the run, errors in a line."""

import argparse
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import frozen
from ldm_jax.config import UserError
from ldm_jax.convert import towers
from ldm_jax.train import __main__ as train_main
from ldm_jax.train import loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
CLIP = dict(kind="clip", dim=32, depth=1, heads=2)


def hugging_face(vocab, length=20, dim=32):
    """A CLIP text tower's state dict with one layer, at random."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.3 * rng.normal(size=shape)).astype(np.float32)

    prefix = "text_model.encoder.layers.0"
    weights = {
        "text_model.embeddings.token_embedding.weight": draw(vocab, dim),
        "text_model.embeddings.position_embedding.weight": draw(length, dim),
        "text_model.final_layer_norm.weight": 1 + draw(dim),
        "text_model.final_layer_norm.bias": draw(dim),
        "visual_projection.weight": draw(4, 4),
        "logit_scale": np.zeros([], np.float32),
    }
    for name in ("layer_norm1", "layer_norm2"):
        weights |= {f"{prefix}.{name}.weight": 1 + draw(dim)}
        weights |= {f"{prefix}.{name}.bias": draw(dim)}
    for name in ("q", "k", "v", "out"):
        weights |= {f"{prefix}.self_attn.{name}_proj.weight": draw(dim, dim)}
        weights |= {f"{prefix}.self_attn.{name}_proj.bias": draw(dim)}
    for name, shape in (("fc1", (4 * dim, dim)), ("fc2", (dim, 4 * dim))):
        weights |= {f"{prefix}.mlp.{name}.weight": draw(*shape)}
        weights |= {f"{prefix}.mlp.{name}.bias": draw(shape[0])}
    return weights


def config(weights):
    """The debug preset with a frozen tower of these weights."""
    made = runs.debug()
    made.conditioners.text.update(dict(trainable=False, weights=weights))
    made.conditioners.text.net = CLIP | dict(vocab_size=2048)
    return made


def write(folder, **changes):
    """A folder with the tower that `hugging_face` draws; returns its path."""
    folder.mkdir(exist_ok=True)
    weights = {**hugging_face(2048), **changes}
    weights = {k: v for k, v in weights.items() if v is not None}
    safetensors_numpy.save_file(weights, folder / "model.safetensors")
    return str(folder)


def test_a_frozen_tower_trains_nothing_and_stays_with_the_run(tmp_path):
    weights = write(tmp_path / "clip")
    own, workdir = config(weights), tmp_path / "run"
    assert loop.train(own, workdir)
    (tmp_path / "clip" / "model.safetensors").unlink()  # the run has its own
    loaded = ldm_jax.load(workdir)
    assert "text" not in loaded.params["conditioners"]
    table = loaded.first_stage.encoders["text"]["token_emb"]
    expected = hugging_face(2048)["text_model.embeddings.token_embedding.weight"]
    np.testing.assert_array_equal(table, expected)
    assert loaded.sample("a red circle", steps=2).shape == (1, 16, 16, 3)


def test_a_tower_is_read_from_every_place(tmp_path):
    folder = write(tmp_path / "clip")
    model = runs.build(config(folder))
    ours = frozen.load(model, tmp_path / "none")["text"]
    file = tmp_path / "clip" / "model.safetensors"
    again = frozen.load(runs.build(config(str(file))), tmp_path / "none")["text"]
    jax.tree.map(np.testing.assert_array_equal, ours, again)
    whole = {
        f"cond_stage_model.transformer.{k}": v
        for k, v in hugging_face(2048).items()
        if k.startswith("text_model.")
    } | {"first_stage_model.x": np.zeros(3, np.float32)}
    safetensors_numpy.save_file(whole, tmp_path / "sd.safetensors")
    model = runs.build(config(str(tmp_path / "sd.safetensors")))
    again = frozen.load(model, tmp_path / "none")["text"]
    jax.tree.map(np.testing.assert_array_equal, ours, again)


def test_a_tower_is_read_from_torch_s_files(tmp_path):
    """Also from a trainer's checkpoint, of whose other things nothing is built."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
    ours = frozen.load(runs.build(config(write(tmp_path / "a"))), tmp_path)["text"]
    tensors = {k: torch.from_numpy(v.copy()) for k, v in hugging_face(2048).items()}
    torch.save(tensors, tmp_path / "clip.bin")
    whole = {"state_dict": tensors, "trainer": argparse.Namespace(lr=1.0)}
    torch.save(whole, tmp_path / "sd.ckpt")
    torch.save({"state_dict": tensors}, tmp_path / "wrapped.pt")
    torch.save(tensors, tmp_path / "plain, with a comma.ckpt")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    for name in ("clip.bin", "sd.ckpt", "wrapped.pt", "plain, with a comma.ckpt"):
        model = runs.build(config(str(tmp_path / name)))
        again = frozen.load(model, tmp_path / "none")["text"]
        jax.tree.map(np.testing.assert_array_equal, ours, again)
    with pytest.raises(UserError, match="x: .*list.pt holds no dict of arrays"):
        frozen.read(str(tmp_path / "list.pt"), "x")

    # Karlo's statistics are a pair, beside the tower's own file.
    torch.save((torch.arange(3.0), torch.ones(3)), tmp_path / "stats.th")
    both = frozen.read(f"{tmp_path / 'clip.bin'}, {tmp_path / 'stats.th'}", "x")
    assert set(both) == set(tensors) | set(towers.STATISTICS)
    assert both[towers.STATISTICS[0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("dtype", "one"),
    [("BF16", b"\x80\x3f"), ("F8_E4M3", b"\x38"), ("F8_E8M0", b"\x7f")],
)
def test_dtypes_that_numpy_has_not(tmp_path, dtype, one):
    """What ml_dtypes has a name for is read; others are refused in a line."""
    told = {"dtype": dtype, "shape": [1], "data_offsets": [0, len(one)]}
    head = json.dumps({"a": told}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + one)
    if dtype != "F8_E8M0":
        array = frozen.read(str(file), "x")["a"]
        assert array.astype(np.float32).tolist() == [1.0]
        return
    with pytest.raises(UserError, match="x: .*can't be read.*float32 or float16"):
        frozen.read(str(file), "x")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (None, "conditioners.text.trainable: False, but a frozen net needs weights"),
        ("/nowhere/clip", "text.weights: no file or folder '/nowhere/clip'"),
        ("clip.safetensors", "text.weights: no file or folder 'clip.safetensors'"),
        ("no-one/has-this", "'no-one/has-this' is not here and can't be fetched"),
    ],
)
def test_weights_that_are_not_there(tmp_path, weights, words):
    model = runs.build(config(weights))
    with pytest.raises(UserError, match=words):
        frozen.check(model, tmp_path)
        frozen.load(model, tmp_path)


def test_weights_that_do_not_fit(tmp_path):
    key = "text_model.final_layer_norm.bias"
    missing = write(tmp_path / "a", **{key: None})
    other = write(tmp_path / "b", **{key: np.zeros(7, np.float32)})
    for folder, words in ((missing, f"missing {key}"), (other, f"{key} of shape .7,")):
        with pytest.raises(UserError, match=words):
            frozen.load(runs.build(config(folder)), tmp_path / "none")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="has no model.safetensors or"):
        frozen.read(str(tmp_path / "c"), "x")
    (tmp_path / "c" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="x: .*can't be read"):
        frozen.read(str(tmp_path / "c"), "x")


def test_the_command_says_so_before_anything_is_written(tmp_path, capsys):
    argv = [f"--config={runs.TXT2IMG}:debug", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        train_main.main([*argv, "--config.conditioners.text.trainable=False"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "set conditioners.text.weights to a file" in line
    assert not (tmp_path / "run").exists()
    assert config_lib.load(f"{runs.TXT2IMG}:sd1").conditioners.text.weights
