"""Pipelines of Stable Diffusion's other tasks, read and written."""

import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditioning import pictures
from tests import runs

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
from tests import pipelines  # noqa: E402  needs both

ATOL = 5e-5
PROMPT = "a red circle"
pytestmark = pytest.mark.usefixtures("fast_compile", "full_compile")


@pytest.fixture(autouse=True)
def no_noise_of_conditions(monkeypatch):
    """Theirs and ours are of different generators, so both give zeros."""
    monkeypatch.setattr(pictures, "_noise", lambda tools, like: 0.0 * like)


def _upscale():
    ddpm = dict(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=2e-2)
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        vae=pipelines.first_stage("kl", 3, 0.5),
        text_encoder=pipelines.clip_text(),
        tokenizer=runs.tokenizer(),
        unet=pipelines.text_unet(6, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(**ddpm),
        scheduler=pipelines.scheduler(),
        max_noise_level=250,
    )
    pipeline.tokenizer.model_max_length = 20
    return pipeline


def _upscaled(pipeline, small, noise):
    """What it draws of a small picture, whose own noise is left out."""
    add = pipeline.low_res_scheduler.add_noise
    pipeline.low_res_scheduler.add_noise = lambda x, n, t: add(x, 0 * n, t)
    return pipeline(
        PROMPT,
        image=torch.from_numpy(small.transpose(0, 3, 1, 2) / 127.5 - 1).float(),
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=3.0,
        noise_level=20,
        output_type="np",
    ).images


def test_upscaling_with_noise(tmp_path):
    pipeline = pipelines.saved(_upscale(), tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.conditioners.low_res.max_noise_level == 250
    small = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    noise = pipelines.noise(model, 0)
    theirs = _upscaled(pipeline, small, noise)
    given = {"caption": [PROMPT], "low_res": small}
    ours = pipelines.drawn(model, given, noise, guidance_scale=3.0)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
