"""A run's factors as a file: written, added to a model, trained on."""

import dataclasses

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import convert, lora, publish_folder
from ldm_jax.config import UserError
from ldm_jax.train import finetune, loop
from tests import runs, test_publish

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
    started = lora.start(settings, trained.model, fresh)
    jax.tree.map(close, started, trained.factors)
    finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.rank = 3
    with pytest.raises(UserError, match="is of rank 2, diffusion_stage.lora.rank of 3"):
        finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.update(dict(rank=2, targets="to_q"))
    with pytest.raises(UserError, match="conv1/kernel, which .*lora.targets leaves"):
        finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.init_from = str(tmp_path / "gone.bin")
    gone = f"^{LORA}.init_from: {settings.init_from}: No such file"
    with pytest.raises(UserError, match=gone):
        finetune.prepare(config, trained.model, tmp_path / "new", {}, {})
    settings.init_from = str(path)
    with pytest.raises(UserError, match="^lora_file: x: no key of a LoRA"):
        plain.with_lora({"x": np.ones(2)})
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


@pytest.mark.usefixtures("full_compile")
def test_factors_of_a_text_tower_are_trained_and_written_too(tmp_path):
    other, path = tmp_path / "other", tmp_path / "l.safetensors"
    runs.untrained(other, test_publish._config())
    config = test_publish._config(
        f"init_from={other}",
        f"{LORA}.rank=2",
        f"{LORA}.targets=to_q",
        "diffusion_stage.optim.learning_rate=0.1",
    )
    assert loop.train(config, tmp_path / "heir")
    trained, plain = ldm_jax.load(tmp_path / "heir"), ldm_jax.load(other)
    assert trained.factors.keys() == {"unet", "conditioners"}
    trained.save_lora(path)
    added = plain.with_lora(path)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-6)

    jax.tree.map(close, added.params, trained.params)
    kernels = [
        m.params["conditioners"]["text"]["layer_0"]["attn"]["to_q"]["kernel"]
        for m in (plain, trained)
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4
    settings = config.diffusion_stage.lora
    settings.init_from = str(path)
    fresh = jax.tree.map(lambda a: 0 * a + 7, trained.factors)
    jax.tree.map(close, lora.start(settings, trained.model, fresh), trained.factors)

    # The same file in a model whose tower is frozen, so that it is among its encoders.
    frozen = dataclasses.replace(
        plain,
        params=plain.params | {"conditioners": {}},
        first_stage=plain.first_stage.replace(encoders=plain.params["conditioners"]),
    )
    both = frozen.with_lora(path)
    assert both.params["conditioners"] == {}
    jax.tree.map(close, both.first_stage.encoders, trained.params["conditioners"])
    config.conditioners.text.trainable = False
    nets = runs.build(config)
    with pytest.warns(UserWarning, match="of conditioners.text too, .* it is frozen"):
        started = lora.start(settings, nets, {"unet": fresh["unet"]})
    jax.tree.map(close, started, {"unet": trained.factors["unet"]})

    # diffusers makes the same of it.
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    publish_folder.write(plain, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    pipeline.tokenizer.model_max_length = config.conditioners.text.length
    pipeline.load_lora_weights(path)
    prompt = ["a red circle"]
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    text = trained.model.conditioners["text"]
    params = trained.params["conditioners"]["text"]
    ours = text.net.apply({"params": params}, text.prepare(prompt))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=5e-5)


def test_factors_of_towers_that_a_model_has_not_are_left_out(tmp_path):
    runs.untrained(tmp_path / "run", runs.debug())  # its text net is not CLIP's
    plain = ldm_jax.load(tmp_path / "run")
    factors = {"mid_res_0": {"conv1": {"kernel": {"a": np.ones((3, 3, 32, 2))}}}}
    factors["mid_res_0"]["conv1"]["kernel"]["b"] = np.ones((2, 32))
    state = convert.export_lora(plain.model.unet, factors, 2, 2)
    key = "text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    state |= {f"text_encoder{i}.{key}": np.ones((2, 8)) for i in ("", "_2")}
    said = "^the factors of text_encoder and text_encoder_2 are left out"
    with pytest.warns(UserWarning, match=said):
        added = plain.with_lora(state)
    unets = [m.params["unet"]["mid_res_0"]["conv1"]["kernel"] for m in (added, plain)]
    np.testing.assert_allclose(unets[0] - unets[1], 2.0, atol=1e-5)
    only_text = {key: value for key, value in state.items() if key.startswith("text")}
    with (
        pytest.warns(UserWarning, match=said),
        pytest.raises(UserError, match="no factors of a UNet"),
    ):
        plain.with_lora(only_text)
