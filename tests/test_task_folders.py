"""Pipelines of Stable Diffusion's other tasks, read and written."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import model as model_lib
from ldm_jax import publish_folder
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.conditioning import pictures
from ldm_jax.config import UserError
from ldm_jax.convert import whole
from tests import runs

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines import stable_diffusion  # noqa: E402

from tests import pipelines  # noqa: E402  needs both

ATOL = 5e-5
PROMPT = "a red circle"
# Arrays of DPT that its depth is not computed with.
UNUSED = ("dpt.layernorm.", "neck.fusion_stage.layers.0.residual_layer1.")
pytestmark = pytest.mark.usefixtures("fast_compile", "full_compile")


@pytest.fixture(autouse=True)
def no_noise_of_conditions(monkeypatch):
    """Theirs and ours are of different generators, so both give zeros."""
    monkeypatch.setattr(pictures, "_noise", lambda tools, like: 0.0 * like)


def _saved(cls, folder, unet, levels, **parts):
    """A pipeline of text in a folder, with a first stage of so many levels."""
    pipeline = cls(
        vae=pipelines.first_stage("kl", levels, 0.5),
        text_encoder=pipelines.clip_text(),
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=pipelines.scheduler(),
        **parts,
    )
    return pipelines.saved(pipeline, folder)


def _tokenizer():
    tokenizer = runs.tokenizer()
    tokenizer.model_max_length = 20  # of its pipelines' prompts
    return tokenizer


def _there_and_back(pipeline, tmp_path):
    """(our model of it, the pipeline that is made of that); neither lost anything."""
    model = ldm_jax.load(tmp_path / "x")
    publish_folder.write(model, tmp_path / "y")
    again, read = type(pipeline).from_pretrained(tmp_path / "y"), model.params
    again.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        if hasattr(part, "state_dict"):
            states = [p.components[name].state_dict() for p in (pipeline, again)]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                if not key.startswith(UNUSED):
                    np.testing.assert_array_equal(states[1][key], value, err_msg=key)
    third = ldm_jax.load(tmp_path / "y")
    same = np.testing.assert_array_equal
    jax.tree.map(same, third.params, read)
    jax.tree.map(same, third.first_stage, model.first_stage)
    assert third.config.conditioners.to_dict() == model.config.conditioners.to_dict()
    return model, again


def _latents(noise):
    return torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())


def _without_noise(scheduler):
    add = scheduler.add_noise
    scheduler.add_noise = lambda x, noise, timesteps: add(x, 0 * noise, timesteps)


def test_upscaling_with_noise(tmp_path):
    ddpm = dict(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=2e-2)
    pipeline = _saved(
        diffusers.StableDiffusionUpscalePipeline,
        tmp_path / "x",
        pipelines.text_unet(6, num_class_embeds=1000),
        3,
        low_res_scheduler=diffusers.DDPMScheduler(**ddpm),
        max_noise_level=250,
    )
    model, again = _there_and_back(pipeline, tmp_path)
    assert model.config.conditioners.low_res.max_noise_level == 250
    small = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    noise = pipelines.noise(model, 0)
    given = {"caption": [PROMPT], "low_res": small}
    ours = pipelines.drawn(model, given, noise, guidance_scale=3.0)
    for theirs in (pipeline, again):
        assert theirs.config.max_noise_level == 250
        _without_noise(theirs.low_res_scheduler)
        drawn = theirs(
            PROMPT,
            image=torch.from_numpy(small.transpose(0, 3, 1, 2) / 255).float(),
            latents=_latents(noise),
            num_inference_steps=4,
            guidance_scale=3.0,
            noise_level=20,
            output_type="np",
        ).images
        assert drawn.std() > 0.01
        np.testing.assert_allclose(ours, drawn, atol=ATOL)


def test_pictures_alike(tmp_path):
    normalizer = stable_diffusion.StableUnCLIPImageNormalizer(16)
    pipelines.randomised(normalizer, 6)
    with torch.no_grad():
        normalizer.std.copy_(normalizer.std.abs() + 0.5)
    unet = pipelines.text_unet(
        3, class_embed_type="projection", projection_class_embeddings_input_dim=32
    )
    pipeline = _saved(
        diffusers.StableUnCLIPImg2ImgPipeline,
        tmp_path / "x",
        unet,
        2,
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        image_encoder=pipelines.clip_vision(),
        image_normalizer=normalizer,
        image_noising_scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2"
        ),
    )
    model, again = _there_and_back(pipeline, tmp_path)
    # Of the tower's size, so that no resizing is compared.
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    noise = pipelines.noise(model, 0)
    given = {"caption": [PROMPT], "image": picture[None]}
    ours = pipelines.drawn(model, given, noise, guidance_scale=3.0)
    for theirs in (pipeline, again):
        _without_noise(theirs.image_noising_scheduler)
        drawn = theirs(
            Image.fromarray(picture),
            PROMPT,
            height=16,
            width=16,
            latents=_latents(noise),
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="np",
        ).images
        assert drawn.std() > 0.01
        np.testing.assert_allclose(ours, drawn, atol=ATOL)


def test_depth_of_a_picture(tmp_path):
    pipeline = _saved(
        diffusers.StableDiffusionDepth2ImgPipeline,
        tmp_path / "x",
        pipelines.text_unet(4),
        2,
        depth_estimator=pipelines.depth_estimator(),
        feature_extractor=transformers.DPTImageProcessor(),
    )
    model, again = _there_and_back(pipeline, tmp_path)
    assert again.feature_extractor.size == dict(height=384, width=384)
    conditioners = model.model.conditioners
    net, params = conditioners["depth"].net, model.first_stage.encoders["depth"]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 64, 64, 3)).astype(np.float32)
    ours = net.tower.apply({"params": params["tower"]}, x)
    z = rng.normal(size=(1, *model.model.latent_shape)).astype(np.float32)
    fields = conditioning.prepare(
        conditioners,
        {"caption": [PROMPT], "image": rng.integers(0, 256, (1, 16, 16, 3), np.uint8)},
    )
    nets = {**model.params["conditioners"], **model.first_stage.encoders}
    cond = conditioning.encode(conditioners, nets, fields)
    t = np.array([321])
    eps = model_lib.apply_unet(model.model, model.params["unet"], z, t, cond)
    for theirs in (pipeline, again):
        with torch.no_grad():
            depth = theirs.depth_estimator(_latents(x)).predicted_depth.numpy()
            text, _ = theirs.encode_prompt(PROMPT, "cpu", 1, False)
            joined = np.concatenate([z, cond.concat], axis=-1)
            wanted = theirs.unet(_latents(joined), torch.tensor(t), text).sample
        scale = depth.max()
        np.testing.assert_allclose(ours / scale, depth / scale, atol=ATOL)
        np.testing.assert_allclose(eps.transpose(0, 3, 1, 2), wanted, atol=ATOL)


def test_a_folder_with_other_noise_of_its_condition_is_a_line(tmp_path):
    (tmp_path / "low_res_scheduler").mkdir()
    path = tmp_path / "low_res_scheduler" / "scheduler_config.json"
    ours = dict(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=2e-2)
    for changed, words in (
        ({}, None),
        (dict(beta_end=0.012), "has linear_end 0.012; only 0.02 is known"),
        (dict(num_train_timesteps=10), "has timesteps 10; only 1000"),
        (dict(beta_schedule="linear"), "has schedule 'sqrt_linear'; only 'linear'"),
    ):
        path.write_text(json.dumps(ours | changed))
        if words is None:
            whole._check_noise(path, "SRC")
            continue
        with pytest.raises(UserError, match=f"^SRC: .*low_res_scheduler.* {words}"):
            whole._check_noise(path, "SRC")
