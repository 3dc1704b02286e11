"""A run's factors as a file: written, added to a model, trained on."""

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import convert, lora
from ldm_jax.config import UserError
from ldm_jax.train import finetune, loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
LORA = "diffusion_stage.lora"


def test_trained_factors_go_into_a_file_and_on_from_it(tmp_path):
    other, heir, path = (
        tmp_path / "other",
        tmp_path / "heir",
        tmp_path / "l.safetensors",
    )
    runs.untrained(other, runs.debug())
    config = runs.debug(
        f"init_from={other}",
        f"{LORA}.rank=2",
        f"{LORA}.alpha=4",
        f"{LORA}.targets=unet/.*(to_q|conv1)",
    )
    assert loop.train(config, heir)
    trained, plain = ldm_jax.load(heir), ldm_jax.load(other)
    with pytest.raises(UserError, match="^path: .* this run trained no factors"):
        plain.save_lora(path)
    with pytest.raises(UserError, match="ends in .safetensors"):
        trained.save_lora(tmp_path / "l.bin")
    trained.save_lora(path)
    with pytest.raises(UserError, match="^path: .* is there already"):
        trained.save_lora(path)
    assert [p.name for p in tmp_path.glob("*l.safetensors*")] == ["l.safetensors"]

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-6)

    added = plain.with_lora(path)
    jax.tree.map(close, added.params, trained.params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(added.params))
    half = plain.with_lora(path, scale=0.5).params["unet"]["mid_res_0"]["conv1"]
    ends = [m.params["unet"]["mid_res_0"]["conv1"] for m in (plain, trained)]
    close(half["kernel"], (ends[0]["kernel"] + ends[1]["kernel"]) / 2)
    assert np.abs(ends[0]["kernel"] - ends[1]["kernel"]).max() > 1e-5
    off = plain.with_lora(path, scale=0.0)
    jax.tree.map(np.testing.assert_array_equal, off.params, plain.params)

    # Started from the file, the factors make the same change under their own alpha.
    settings = config.diffusion_stage.lora
    settings.init_from = str(path)
    fresh = jax.tree.map(lambda a: 0 * a + 7, trained.factors)
    started = lora.start(settings, trained.model.unet, fresh)
    jax.tree.map(close, started, trained.factors)
    finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.rank = 3
    with pytest.raises(UserError, match="is of rank 2, diffusion_stage.lora.rank of 3"):
        finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.update(dict(rank=2, targets="to_q"))
    with pytest.raises(UserError, match="conv1/kernel, which .*lora.targets leaves"):
        finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    factors, *_ = convert.import_lora(trained.model.unet, path)
    assert factors.keys() == trained.factors["unet"].keys()

    # A run that starts from them and learns nothing still has them.
    settings.targets = "unet/.*(to_q|conv1)"
    config.diffusion_stage.optim.learning_rate = 0.0
    assert loop.train(config, tmp_path / "same")
    jax.tree.map(close, ldm_jax.load(tmp_path / "same").factors, trained.factors)


def test_a_file_needs_factors_to_train():
    with pytest.raises(UserError, match="lora.init_from: 'x', but no factors"):
        lora.check(runs.debug(f"{LORA}.init_from=x"))
