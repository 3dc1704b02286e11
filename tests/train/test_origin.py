"""Training that starts from a released model: of it a run is made, once."""

import copy
import os
import shutil

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import preset_of, publish, released
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, finetune, loop, origin, sharding
from tests import runs, test_frozen

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of CompVis' layout of the debug preset."""
    monkeypatch.setenv("LDM_JAX_DATA", str(tmp_path / "cache"))
    runs.untrained(tmp_path / "run", runs.debug())
    path = tmp_path / "released.safetensors"
    publish.write_file(ldm_jax.load(tmp_path / "run"), path)
    return path


def _config(source, tmp_path, *overrides):
    tokenizer = workdir_lib.tokenizer_path(tmp_path / "run", "text")
    text = "conditioners.text.tokenizer"
    return runs.debug(
        f"init_from={source}",
        f"{text}.train_vocab_size=None",
        f"{text}.name={tokenizer}",
        *overrides,
    )


def test_a_file_is_trained_from_by_its_name(source, tmp_path, capsys, monkeypatch):
    """What it does not tell, such as the number of heads, is the config's."""
    config = _config(source, tmp_path, "diffusion_stage.lora.rank=2")
    workdir = tmp_path / "heir"
    assert loop.train(config, workdir)
    said = capsys.readouterr().out
    made = origin.run_of(config, "init_from")
    assert made.parent == tmp_path / "cache" / "released"
    assert f"init_from: making a run of {source} in {made}" in said
    assert f"autoencoder: taken from {source}" in said
    theirs, ours = (ldm_jax.load(run) for run in (made, workdir))
    assert ours.factors is not None and theirs.factors is None
    first = (model.first_stage.params for model in (theirs, ours))
    jax.tree.map(np.testing.assert_array_equal, *first)

    # The next run finds what was made; this one needs neither any more.
    monkeypatch.setattr(released, "settle", None)
    origin.make(config, tmp_path / "other")
    shutil.rmtree(made)
    origin.make(config, workdir)
    again = _config(source, tmp_path, "diffusion_stage.lora.rank=2")
    assert loop.train(again, workdir)


def test_the_run_that_is_made_has_no_token_of_its_own(source, tmp_path):
    """That of textual inversion is its heirs'."""
    options = dict(placeholder_token="<toy>", initializer_token="red", num_vectors=2)
    overrides = [f"diffusion_stage.inversion.{k}={v}" for k, v in options.items()]
    config = _config(source, tmp_path, *overrides)
    origin.make(config, tmp_path / "heir")
    made = ldm_jax.load(origin.run_of(config, "init_from"))
    assert set(made.config.diffusion_stage.inversion.values()) == {None}
    assert "placeholder_tokens" not in made.config.conditioners.text
    assert config.diffusion_stage.inversion.to_dict() == options


@pytest.mark.slow
def test_a_frozen_tower_comes_with_the_model(tmp_path):
    """Not from where the config says that such towers are, if it is one of them."""
    weights = test_frozen.write(tmp_path / "clip")
    before = test_frozen.config(weights)
    assert loop.train(before, tmp_path / "before")
    heir = test_frozen.config("nobody/nothing")
    heir.init_from = str(tmp_path / "before")
    assert loop.train(heir, tmp_path / "heir")
    towers = [
        ldm_jax.load(tmp_path / run).first_stage.encoders for run in ("before", "heir")
    ]
    jax.tree.map(np.testing.assert_array_equal, *towers)

    # Nothing but the UNet is trained, so these are all params; factors too.
    assert ldm_jax.load(tmp_path / "heir").params["conditioners"] == {}
    heir.diffusion_stage.lora.rank = 2
    assert loop.train(heir, tmp_path / "factors")
    assert loop.train(heir, tmp_path / "factors")  # it is found finished
    small = ldm_jax.load(tmp_path / "factors")
    assert small.factors.keys() == {"unet"}
    assert small.sample("a red circle", steps=2).shape == (1, 16, 16, 3)

    # Another tower is not that one.
    heir.conditioners.text.net.depth = 2
    assert finetune.encoders(heir, runs.build(heir), tmp_path / "new") == {}
    heir.conditioners.text.net.depth = 1
    taken = finetune.encoders(heir, runs.build(heir), tmp_path / "new")
    assert taken.keys() == {"text"}

    # What has a copy goes on without that run, wherever weights may have been.
    heir.conditioners.text.weights = None
    heir.diffusion_stage.lora.rank = None
    assert loop.train(heir, tmp_path / "own")
    shutil.rmtree(tmp_path / "before")
    assert loop.train(heir, tmp_path / "own")
    with pytest.raises(UserError, match="holds no run"):
        loop.train(heir, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_changed_file_is_another_run(source, tmp_path):
    config = _config(source, tmp_path)
    first = origin.run_of(config, "init_from")
    assert first == origin.run_of(config, "init_from")
    os.utime(source, ns=(1, 1))
    other = origin.run_of(config, "init_from")
    config.diffusion.parameterization = "eps"
    assert len({first, other, origin.run_of(config, "init_from")}) == 3


def test_a_model_of_other_nets_is_recognised(source, tmp_path, monkeypatch):
    """As the preset that predicts what this config does, with its tokenizer."""
    named = runs.debug()
    others = copy.deepcopy(named)
    assert named.diffusion.parameterization == "v"
    others.diffusion.parameterization = "eps"
    presets = {"configs/mine.py:eps": others, "configs/mine.py:named": named}
    monkeypatch.setattr(preset_of, "shipped", lambda: iter(presets.items()))
    monkeypatch.setattr(preset_of, "_signs", lambda *nets: "")  # heads are not told
    monkeypatch.setattr(preset_of, "_net", lambda *_, **__: None)
    monkeypatch.setattr(preset_of, "_condition", lambda source: None)
    config = _config(source, tmp_path, "unet.in_channels=5")
    origin.make(config, tmp_path / "heir")
    made = ldm_jax.load(origin.run_of(config, "init_from"))
    assert made.config.preset == "configs/mine.py:named"
    text = "conditioners.text.tokenizer.name"
    assert config_lib.flatten(made.config)[text] == config_lib.flatten(config)[text]
    alone = ldm_jax.load(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, made.params, alone)


def test_each_device_reads_its_own_part(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 2**10)
    config = _config(source, tmp_path, "mesh.fsdp=4", "mesh.data=2")
    origin.make(config, tmp_path / "heir")
    model = runs.build(config)
    mesh = sharding.make_mesh(config.mesh)
    init = jax.eval_shape(
        lambda: model_lib.init_diffusion(config, model, jax.random.key(0))
    )
    shardings = sharding.tree_shardings(init, mesh)
    started = finetune.start(config, checkpoint.placed(init, shardings))
    places = [leaf.sharding for leaf in jax.tree.leaves(started)]
    assert places == jax.tree.leaves(shardings)
    assert sum(not place.is_fully_replicated for place in places) > 30
    alone = ldm_jax.load(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, started, alone)


def test_what_can_not_be_made_a_run_of(source, tmp_path, monkeypatch):
    config = _config(source, tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"^init_from: .* run python -m ldm_jax.convert"
    ):
        origin.make(config, tmp_path / "heir")
    monkeypatch.undo()
    monkeypatch.setenv("LDM_JAX_DATA", str(tmp_path / "cache"))
    source.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"^init_from: .*released.safetensors: "):
        loop.train(config, tmp_path / "heir")
    assert not (tmp_path / "heir").exists() and not (tmp_path / "cache").exists()
