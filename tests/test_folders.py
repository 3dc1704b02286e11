"""Pipelines of LDM as diffusers saves them: what it draws, we draw."""

import json

import numpy as np
import pytest

import ldm_jax
from ldm_jax import draw, preset_of
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.convert import whole
from tests import runs

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
ATOL = 5e-5
pytestmark = pytest.mark.usefixtures("fast_compile", "full_compile")


def _randomised(net, seed):
    """Without the zeros and ones of a fresh net."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(around + 0.08 * torch.randn_like(value))
    return net.eval()


def _scheduler():
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _first_stage(kind, levels, scaling_factor):
    options = dict(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[32] * levels,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=32,
        scaling_factor=scaling_factor,
        sample_size=8 * 2 ** (levels - 1),
    )
    if kind == "vq":
        options |= dict(num_vq_embeddings=64)
    cls = {"kl": diffusers.AutoencoderKL, "vq": diffusers.VQModel}[kind]
    return _randomised(cls(**options), 1)


def _unet(in_channels):
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_head_dim=32,
    )
    return _randomised(net, 2)


def _saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def _noise(model, seed):
    """What such a pipeline draws first of a generator."""
    h, w, c = model.model.latent_shape
    drawn = torch.randn((1, c, h, w), generator=torch.manual_seed(seed))
    return drawn.numpy().transpose(0, 2, 3, 1)


def _drawn(model, inputs, noise, guidance_scale=1.0):
    """Pictures in [0, 1], not yet of 8 bits."""
    drawn = draw.draw(
        model.model,
        model.params,
        model.first_stage,
        conditioning.prepare(model.model.conditioners, inputs),
        count=1,
        settings=draw.Settings(steps=4),
        guidance_scale=guidance_scale,
        noise=noise,
    )
    return np.clip(np.asarray(drawn.images) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize(("kind", "scale"), [("vq", 0.5), ("kl", 0.25)])
def test_ldm_without_conditions(tmp_path, kind, scale):
    first = _first_stage(kind, 2, scale)
    pipeline = diffusers.LDMPipeline(first, _unet(3), _scheduler())
    _saved(pipeline, tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.preset == preset_of.READ_OFF
    assert not model.config.conditioners and model.size == (16, 16)
    noise = _noise(model, 0)
    theirs = pipeline(
        generator=torch.manual_seed(0), num_inference_steps=4, output_type="np"
    ).images
    assert theirs.std() > 0.01
    np.testing.assert_allclose(_drawn(model, {}, noise), theirs, atol=ATOL)


def test_ldm_of_small_pictures(tmp_path):
    # Its pipeline decodes without the factor.
    first = _first_stage("vq", 3, 0.5)
    pipeline = diffusers.LDMSuperResolutionPipeline(first, _unet(6), _scheduler())
    _saved(pipeline, tmp_path / "x")
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
    ours = _drawn(model, {"low_res": small}, _noise(model, 0))
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
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return diffusers.LDMTextToImagePipeline(
        _first_stage("kl", 4, 0.25),
        _randomised(ldm.LDMBertModel(config), 3),
        tokenizer,
        _randomised(unet, 2),
        _scheduler(),
    )


def test_ldm_of_text(tmp_path):
    pipeline = _saved(_text_pipeline(), tmp_path / "x")
    model = ldm_jax.load(tmp_path / "x")
    assert model.config.conditioners.text.net.kind == "transformer"
    noise = _noise(model, 0)
    theirs = pipeline(
        "a red circle",
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    ours = _drawn(model, {"caption": ["a red circle"]}, noise, guidance_scale=3.0)
    np.testing.assert_allclose(ours, theirs, atol=ATOL)
