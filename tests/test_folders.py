"""Pipelines of LDM as diffusers saves them: what it draws, we draw."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import preset_of, publish_folder
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import whole
from tests import runs

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tests import pipelines  # noqa: E402  needs both

ATOL = 5e-5
pytestmark = pytest.mark.usefixtures("fast_compile", "full_compile")


@pytest.mark.parametrize(("kind", "scale"), [("vq", 0.5), ("kl", 0.25)])
def test_ldm_without_conditions(tmp_path, kind, scale):
    first = pipelines.first_stage(kind, 2, scale)
    pipeline = diffusers.LDMPipeline(first, pipelines.unet(3), pipelines.scheduler())
    pipelines.saved(pipeline, tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.preset == preset_of.READ_OFF
    assert not model.config.conditioners and model.size == (16, 16)
    noise = pipelines.noise(model, 0)
    theirs = pipeline(
        generator=torch.manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    assert theirs.std() > 0.01
    np.testing.assert_allclose(pipelines.drawn(model, {}, noise), theirs, atol=ATOL)


def test_ldm_of_small_pictures(tmp_path):
    # Its pipeline decodes without the factor.
    first = pipelines.first_stage("vq", 3, 0.5)
    pipeline = diffusers.LDMSuperResolutionPipeline(
        first, pipelines.unet(6), pipelines.scheduler()
    )
    pipelines.saved(pipeline, tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.conditioners.low_res.kind == "low_res"
    small = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    image = torch.from_numpy(small.transpose(0, 3, 1, 2) / 127.5 - 1).float()
    theirs = pipeline(
        image,
        generator=torch.manual_seed(0),
        num_inference_steps=4,
        output_type="np",
    ).images
    ours = pipelines.drawn(model, {"low_res": small}, pipelines.noise(model, 0))
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
    # Another pipeline's three channels more might be anything.
    index = json.loads((tmp_path / "x" / whole.INDEX).read_text())
    index["_class_name"] = "LDMPipeline"
    (tmp_path / "x" / whole.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="takes 3 channels besides the latent's 3"):
        ldm_jax.load(tmp_path / "x")


def _text_pipeline():
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm

    tokenizer = runs.tokenizer()
    config = ldm.LDMBertConfig(
        vocab_size=len(tokenizer),
        encoder_layers=2,
        encoder_ffn_dim=128,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=32,
    )
    return diffusers.LDMTextToImagePipeline(
        pipelines.first_stage("kl", 4, 0.25),
        pipelines.randomised(ldm.LDMBertModel(config), 3),
        tokenizer,
        pipelines.text_unet(3, context_dim=32),
        pipelines.scheduler(),
    )


def test_ldm_of_text(tmp_path):
    pipeline = pipelines.saved(_text_pipeline(), tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.conditioners.text.net.kind == "transformer"
    noise = pipelines.noise(model, 0)
    theirs = pipeline(
        "a red circle",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    ours = pipelines.drawn(
        model, {"caption": ["a red circle"]}, noise, guidance_scale=3.0
    )
    np.testing.assert_allclose(ours, theirs, atol=ATOL)


def test_the_command_makes_a_run_of_ldm_of_text_and_compares(tmp_path, capsys):
    pipelines.saved(_text_pipeline(), tmp_path / "x")
    convert_main.main([str(tmp_path / "x"), str(tmp_path / "run"), "--check"])
    said = capsys.readouterr().out
    for row in (
        "autoencoder | encoder",
        "unet | down_0",
        "conditioners.text | layer_1",
    ):
        assert f"| {row}" in said
    assert "differs" not in said and "not compared" not in said
    models = [ldm_jax.load(tmp_path / name) for name in ("x", "run")]
    jax.tree.map(np.testing.assert_array_equal, *(m.params for m in models))
    jax.tree.map(np.testing.assert_array_equal, *(m.first_stage for m in models))


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_ldm_goes_there_and_back(tmp_path, kind):
    first = pipelines.first_stage(kind, 2, 0.5)
    pipeline = diffusers.LDMPipeline(first, pipelines.unet(3), pipelines.scheduler())
    pipelines.saved(pipeline, tmp_path / "x")
    _there_and_back(tmp_path, ["unet", "vqvae"], diffusers.LDMPipeline)


def test_ldm_of_text_goes_there_and_back(tmp_path):
    pipelines.saved(_text_pipeline(), tmp_path / "x")
    cls = diffusers.LDMTextToImagePipeline
    _there_and_back(tmp_path, ["unet", "vqvae", "bert"], cls)


def test_ldm_of_small_pictures_goes_there_and_back(tmp_path):
    first, unet = pipelines.first_stage("vq", 3, 0.5), pipelines.unet(6)
    cls = diffusers.LDMSuperResolutionPipeline
    pipelines.saved(cls(first, unet, pipelines.scheduler()), tmp_path / "x")
    model = _there_and_back(tmp_path, ["unet", "vqvae"], cls)
    std = 2 * model.first_stage.std
    scaled = dataclasses.replace(model, first_stage=model.first_stage.replace(std=std))
    with pytest.raises(UserError, match="multiplied by 0.5, but LDMSuper.* as they ar"):
        publish_folder.write(scaled, tmp_path / "z")
    assert not (tmp_path / "z").exists()


def _there_and_back(tmp_path, parts, cls):
    """Writes what was read; every array and what was read of configs is the same."""
    model = ldm_jax.load(tmp_path / "x")
    publish_folder.write(model, tmp_path / "y")
    for part in parts:
        ours, theirs = (
            safetensors_numpy.load_file(
                next((tmp_path / folder / part).glob("*.safetensors"))
            )
            for folder in ("y", "x")
        )
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
        # LDM's text encoder has a head that nothing is computed with.
        assert all("to_logits" in key for key in theirs.keys() - ours.keys())
    read = cls.from_pretrained(tmp_path / "y")
    assert read.scheduler.config.beta_end == 0.0195
    again = ldm_jax.load(tmp_path / "y")
    same = np.testing.assert_array_equal
    jax.tree.map(same, again.params, model.params)
    jax.tree.map(same, again.first_stage, model.first_stage)
    assert again.config.to_dict() == model.config.to_dict()
    return model


@pytest.mark.parametrize(
    ("options", "spacing"),
    [
        (dict(timestep_spacing="trailing"), "trailing"),
        (dict(steps_offset=0, set_alpha_to_one=True), "leading"),
    ],
)
def test_the_steps_are_those_of_the_folder(tmp_path, options, spacing):
    """Not where all pipelines of Stable Diffusion have them."""
    first, scheduler = pipelines.first_stage("kl", 2, 0.5), pipelines.scheduler
    pipeline = diffusers.LDMPipeline(first, pipelines.unet(3), scheduler(**options))
    pipelines.saved(pipeline, tmp_path / "x")
    model = _there_and_back(tmp_path, ["unet"], diffusers.LDMPipeline)
    assert model.config.sample.spacing == spacing
    theirs = pipeline(
        generator=torch.manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    ours = pipelines.drawn(model, {}, pipelines.noise(model, 0))
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
    written = diffusers.LDMPipeline.from_pretrained(tmp_path / "y")
    again = written(
        generator=torch.manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    np.testing.assert_allclose(again, theirs, atol=ATOL)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(), "clip_sample True, which"),
        (dict(steps_offset=1), "clip_sample True, set_alpha_to_one True, which"),
        (dict(timestep_spacing="linspace"), "True, timestep_spacing linspace, which"),
    ],
)
def test_what_a_scheduler_does_besides_is_warned_of(tmp_path, options, said):
    diffusers.DDIMScheduler(**options).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    with pytest.warns(UserWarning, match=f"its DDIM has .*{said} ours has not"):
        whole._spacing(whole._read_json(path, "SRC"), "LDMPipeline")
