"""Tiny pipelines of diffusers with random weights, and what they are compared with."""

import numpy as np
import pytest

from ldm_jax import draw
from ldm_jax.conditioning import conditioners as conditioning
from tests import runs
from tests.nets import test_dpt

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def randomised(net, seed):
    """Without the zeros and ones of a fresh net."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(around + 0.08 * torch.randn_like(value))
    return net.eval()


def scheduler(**options):
    """The one that LDM was trained with."""
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        **dict(set_alpha_to_one=False, steps_offset=1) | options,
    )


def first_stage(kind, levels, scaling_factor):
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
    net = randomised(cls(**options), 1)
    if kind == "vq":
        # z + (z_q - z) of diffusers would round codes far smaller than z.
        net.quantize.embedding.weight.data *= 12
    return net


def unet(in_channels):
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
    return randomised(net, 2)


def saved(pipeline, folder):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def noise(model, seed):
    """What such a pipeline draws first of a generator."""
    h, w, c = model.model.latent_shape
    drawn = torch.randn((1, c, h, w), generator=torch.manual_seed(seed))
    return drawn.numpy().transpose(0, 2, 3, 1)


def drawn(model, inputs, noise, guidance_scale=1.0):
    """Pictures in [0, 1], not yet of 8 bits."""
    drawn = draw.draw(
        model.model,
        model.params,
        model.first_stage,
        conditioning.prepare(model.model.conditioners, inputs),
        count=1,
        settings=draw.Settings(steps=4, spacing=model.config.sample.spacing),
        guidance_scale=guidance_scale,
        noise=noise,
    )
    return np.clip(np.asarray(drawn.images) / 2 + 0.5, 0, 1)


def clip_text(dim=64):
    """A CLIP text tower of one head a layer, of `runs.tokenizer`."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(runs.tokenizer()),
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=20,
        hidden_act="gelu",
        eos_token_id=2,
    )
    return randomised(transformers.CLIPTextModel(config), 3)


def clip_vision(dim=64, projection_dim=16):
    """A CLIP picture tower of one head a layer."""
    config = transformers.CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        projection_dim=projection_dim,
        hidden_act="gelu",
    )
    return randomised(transformers.CLIPVisionModelWithProjection(config), 4)


def text_unet(in_channels, context_dim=64, **options):
    """A UNet that attends to `clip_text`, or to tokens of another width."""
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=context_dim,
        attention_head_dim=4,
        **options,
    )
    return randomised(net, 2)


def depth_estimator():
    """A DPT-hybrid."""
    return randomised(test_dpt._reference(transformers, test_dpt.TINY), 5)
