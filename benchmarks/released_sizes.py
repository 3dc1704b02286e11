"""python -m benchmarks.released_sizes --model=sd1

Compares nets of Stable Diffusion at their real size, with random weights, with those of
diffusers and transformers, from which `import_network` alone takes them; and a guided
DDIM trajectory of both. float32; about 8 GB of memory, one net at a time.
"""

import argparse
import gc
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import common
from ldm_jax import convert
from ldm_jax.diffusion import denoiser, samplers, schedules

STEPS, GUIDANCE = 20, 7.5
WANTED, WANTED_OF_TRAJECTORY = 1e-3, 1e-2

# As in the folders of the released models.
_TEXT = dict(vocab_size=49408, max_position_embeddings=77, eos_token_id=2)
_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
)
MODELS: dict[str, dict[str, Any]] = {
    "sd1": {
        "title": "Stable Diffusion 1.5",
        "parameterization": "eps",
        "vae": _VAE,
        "unet": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "text": _TEXT
        | dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        ),
    },
    "sd2": {
        "title": "Stable Diffusion 2.1",
        "parameterization": "v",
        "vae": _VAE,
        "unet": dict(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        "text": _TEXT
        | dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
        ),
    },
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
START, END = 49406, 49407  # of a text


class Result(NamedTuple):
    """Ours less theirs; `std` is the spread of theirs."""

    name: str
    parameters: int | None
    std: float
    greatest: float
    mean: float
    wanted: float


def result(name, model, ours, theirs, wanted=WANTED) -> Result:
    """What differs between two arrays, channels last."""
    away = np.abs(np.asarray(ours) - theirs)
    count = None if model is None else sum(p.numel() for p in model.parameters())
    return Result(name, count, theirs.std(), away.max(), away.mean(), wanted)


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """No weight is idle: matrices keep the variance, norms are off one."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(std=0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
        if p.ndim == 1 and name.endswith("weight"):
            p.add_(1)
    model.eval()


@torch.no_grad()
def scaled(last: torch.nn.Module, run: Callable[[], torch.Tensor]) -> np.ndarray:
    """What `run` gives, its last layer scaled so that it has unit variance."""
    std = run().std()
    last.weight /= std
    last.bias /= std
    return nhwc(run())


def imported(model: torch.nn.Module) -> tuple[Any, Any]:
    """(net, variables on the device), by the converter alone."""
    config = model.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    net, variables = convert.import_network(model.state_dict(), config)
    return net, jax.tree.map(jnp.asarray, variables)


def nchw(x: np.ndarray) -> torch.Tensor:
    """For torch."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def nhwc(x: torch.Tensor) -> np.ndarray:
    """Of torch."""
    return np.moveaxis(x.numpy(), 1, -1)


@torch.no_grad()
def text(options: dict[str, Any]) -> tuple[Result, np.ndarray, np.ndarray]:
    """The text encoder; and the contexts [no text, a text], ours and theirs."""
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**options))
    randomize(model)
    tokens = np.full((2, 77), END, np.int32)
    tokens[:, 0] = START
    tokens[1, 1:12] = np.random.default_rng(0).integers(0, START, 11)
    theirs = model(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    net, variables = imported(model)
    ours = np.asarray(jax.jit(net.apply)(variables, tokens))
    return result("text encoder", model, ours, theirs), ours, theirs


@torch.no_grad()
def first_stage(options: dict[str, Any], size: int) -> list[Result]:
    """The encoder's moments and the decoder's pictures."""
    model = diffusers.AutoencoderKL(**options)
    randomize(model)
    rng = np.random.default_rng(1)
    side = size * 2 ** (len(options["block_out_channels"]) - 1)
    x = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    z = rng.normal(size=(1, size, size, 4)).astype(np.float32)
    moments = scaled(
        model.quant_conv, lambda: model.encode(nchw(x)).latent_dist.parameters
    )
    pictures = scaled(model.decoder.conv_out, lambda: model.decode(nchw(z)).sample)
    net, variables = imported(model)

    def run(method, value):
        return jax.jit(lambda v, a: net.apply(v, a, method=method))(variables, value)

    return [
        result("VAE, moments", model, run("encode", x), moments),
        result("VAE, picture", None, run("decode", z), pictures),
    ]


def denoising(
    options: dict[str, Any],
    parameterization: str,
    size: int,
    contexts: tuple[np.ndarray, np.ndarray],
) -> list[Result]:
    """The UNet once, and along a guided trajectory; contexts are ours and theirs."""
    z = np.random.default_rng(2).normal(size=(2, size, size, 4)).astype(np.float32)
    t = np.array([801, 7], np.int32)
    here, there = contexts
    net, variables, count, once, drawn = their_unet(
        options, parameterization, z, t, torch.from_numpy(there)
    )
    gc.collect()
    # With their context, so that this row is of the UNet alone.
    ours = jax.jit(net.apply)(variables, z, t, there)
    rows = [result("UNet", None, ours, once)._replace(parameters=count)]
    schedule = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)

    @jax.jit
    def draw(variables, z, context):
        denoise = denoiser.make_denoiser(
            lambda z_t, t, context: net.apply(variables, z_t, t, context),
            schedule,
            parameterization,
            [context[:1], context[1:]],
            [GUIDANCE],
        )
        ddim = samplers.SAMPLERS["ddim"]
        return ddim(denoise, z, schedule, jax.random.key(0), steps=STEPS)[0]

    ours = draw(variables, z[:1], here)
    name = f"{STEPS} steps of DDIM, text included"
    return [*rows, result(name, None, ours, drawn, WANTED_OF_TRAJECTORY)]


@torch.no_grad()
def their_unet(
    options: dict[str, Any],
    parameterization: str,
    z: np.ndarray,
    t: np.ndarray,
    context: torch.Tensor,
) -> tuple[Any, Any, int, np.ndarray, np.ndarray]:
    """(our net, its variables, parameters; what theirs gives once, and at the end)."""
    model = diffusers.UNet2DConditionModel(**options)
    randomize(model)
    once = scaled(
        model.conv_out, lambda: model(nchw(z), torch.from_numpy(t), context).sample
    )
    drawn = their_trajectory(model, parameterization, nchw(z[:1]), context)
    count = sum(p.numel() for p in model.parameters())
    return *imported(model), count, once, nhwc(drawn)


def their_trajectory(
    model: torch.nn.Module,
    parameterization: str,
    z: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    """The loop of their pipeline with the scheduler of the released folders."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=PREDICTIONS[parameterization],
    )
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([z, z]), t)
        without, told = model(both, t, context).sample.chunk(2)
        out = without + GUIDANCE * (told - without)
        z = scheduler.step(out, t, z).prev_sample
    return z


def measure(model: dict[str, Any], size: int) -> list[Result]:
    """All rows of one of `MODELS`, one net in memory at a time."""
    of_text, *contexts = text(model["text"])
    gc.collect()
    of_pictures = first_stage(model["vae"], size)
    gc.collect()
    unet, parameterization = model["unet"], model["parameterization"]
    return [of_text, *of_pictures, *denoising(unet, parameterization, size, contexts)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="sd1")
    parser.add_argument("--size", type=int, default=16, help="of the latents")
    args = parser.parse_args()
    model = MODELS[args.model]
    rows = measure(model, args.size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    packages = ("flax", "torch", "diffusers", "transformers")
    print(common.environment(*packages), end="\n\n")
    side = f"{args.size}x{args.size}"
    print(f"{model['title']}, latents {side}, at most {peak:.1f} GiB:\n")
    print("| Output | Parameters | std | max | mean | wanted |")
    print("| --- " * 6 + "|")
    for name, count, std, greatest, mean, wanted in rows:
        count = "" if count is None else f"{count / 1e6:.1f}M"
        numbers = f"{std:.3f} | {greatest:.1e} | {mean:.1e} | {wanted:.0e}"
        print(f"| {name} | {count} | {numbers} |")


if __name__ == "__main__":
    main()
