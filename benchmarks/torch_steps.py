"""Training steps of torch nets as large as a preset's, to compare with."""

import functools
from collections.abc import Callable

import diffusers
import torch

from ldm_jax import model as model_lib

CORES = torch.get_num_threads()
Steps = dict[str, Callable[[], None]]


def _steps(net: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Steps:
    """Forward, backward, clipping, AdamW and an average of all parameters.

    With all cores and with one: where others use the machine, torch's threads wait for
    each other so long that one alone is faster.
    """
    params = list(net.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def step(threads):
        torch.set_num_threads(threads)
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1e-3)

    counts = sorted({CORES, 1})
    return {f"torch, {n} threads": functools.partial(step, n) for n in counts}


def count(net: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def autoencoder(model: model_lib.LatentDiffusion, resolution: int, b: int):
    """(steps, parameters) of diffusers' AutoencoderKL with L1 + KL."""
    ours = model.autoencoder
    widths = tuple(ours.ch * m for m in ours.ch_mult)
    net = diffusers.AutoencoderKL(
        in_channels=ours.in_channels,
        out_channels=ours.out_ch,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=ours.num_res_blocks,
        latent_channels=ours.embed_dim,
        norm_num_groups=ours.norm_groups,
        mid_block_add_attention=ours.attn_type != "none",
    )
    x = torch.rand(b, ours.in_channels, resolution, resolution) * 2 - 1

    def loss():
        posterior = net.encode(x).latent_dist
        x_hat = net.decode(posterior.sample()).sample
        return (x - x_hat).abs().sum() / b + 1e-6 * posterior.kl().mean()

    return _steps(net, loss), count(net)


def unet(model: model_lib.LatentDiffusion, tokens: int, b: int):
    """(steps, parameters) of diffusers' UNet2DConditionModel with a squared error.

    The text net is left out: its output is an input here.
    """
    ours = model.unet
    widths = tuple(ours.model_channels * m for m in ours.channel_mult)
    attends = [2**level in ours.attention_resolutions for level in range(len(widths))]
    heads = [
        width // ours.num_head_channels if ours.num_head_channels else ours.num_heads
        for width in widths
    ]
    net = diffusers.UNet2DConditionModel(
        in_channels=ours.in_channels,
        out_channels=ours.out_channels,
        down_block_types=tuple("CrossAttn" * a + "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttn" * a + "UpBlock2D" for a in attends[::-1]),
        block_out_channels=widths,
        layers_per_block=ours.num_res_blocks,
        cross_attention_dim=ours.context_dim,
        transformer_layers_per_block=ours.transformer_depth,
        attention_head_dim=tuple(heads),  # which is the number of heads here
        use_linear_projection=ours.use_linear_in_transformer,
    )
    h, w, c = model.latent_shape
    z, eps = torch.randn(b, c, h, w), torch.randn(b, ours.out_channels, h, w)
    context, t = torch.randn(b, tokens, ours.context_dim), torch.arange(b)

    def loss():
        return (net(z, t, encoder_hidden_states=context).sample - eps).square().mean()

    return _steps(net, loss), count(net)
