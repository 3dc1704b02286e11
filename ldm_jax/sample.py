"""Pictures from a finished run: `ldm_jax.load(workdir).sample(prompts)`, or

    python -m ldm_jax.sample --workdir=runs/openmoji --prompt="strawberry" --out=a.png

Needs no TensorFlow, no torch, and nothing that only training needs.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax import picture
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.diffusion import samplers
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint


class Drawn(NamedTuple):
    """Pictures float32 [b, H, W, 3] in [-1, 1], and how they came about."""

    images: np.ndarray
    trajectory: np.ndarray | None  # decoded x0_hat [b, steps, H, W, 3]


@functools.lru_cache(maxsize=8)
def _draw_fn(
    model: model_lib.LatentDiffusion,
    sampler: str,
    steps: int,
    eta: float,
    guided: bool,
    trajectory: bool,
):
    """One compiled program per model and settings; guidance and seed are traced."""

    @jax.jit
    def draw(params, first_stage, fields, keys, guidance_scale):
        b = keys.shape[0]
        cond = conditioning.encode(model.conditioners, params["conditioners"], fields)
        uncond = None
        if guided:
            uncond = conditioning.encode_null(
                model.conditioners, params["conditioners"], b
            )
        denoise = model_lib.make_denoiser(model, params, cond, uncond, guidance_scale)
        # A picture's noise depends on its own key alone, not on its batch.
        pairs = jax.vmap(jax.random.split)(keys)
        z = jax.vmap(lambda key: jax.random.normal(key, model.latent_shape))(
            pairs[:, 0]
        )
        z, row = samplers.SAMPLERS[sampler](
            denoise,
            z,
            model.schedule,
            pairs[:, 1],
            steps=steps,
            eta=eta,
            trajectory=trajectory,
        )
        images = first_stage_lib.decode(model.autoencoder, first_stage, z)
        if trajectory:
            s = row.shape[0]
            row = row.reshape(s * b, *row.shape[2:])
            row = first_stage_lib.decode(model.autoencoder, first_stage, row)
            row = jnp.swapaxes(row.reshape(s, b, *row.shape[1:]), 0, 1)
        return images, row

    return draw


def draw(
    model: model_lib.LatentDiffusion,
    params: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    fields: Mapping[str, np.ndarray],
    *,
    count: int | None = None,
    steps: int = 50,
    guidance_scale: float = 3.0,
    seed: int = 0,
    eta: float = 0.0,
    sampler: str = "ddim",
    batch_size: int = 16,
    trajectory: bool = False,
) -> Drawn:
    """Draws one picture per row of the prepared `fields`; `count` where there are none.

    The same seed gives the same pictures whatever the batch size. A `guidance_scale`
    of 1 calls the net without its unconditional half.
    """
    if sampler not in samplers.SAMPLERS:
        hint = config_lib.nearest(sampler, samplers.SAMPLERS)
        raise UserError(f"--sampler: {sampler!r}; {hint}")
    total = len(model.schedule.betas)
    if not 1 <= steps <= total:
        raise UserError(f"--steps: {steps}; choose from 1 to {total}")
    n = len(next(iter(fields.values()))) if fields else count
    size = min(batch_size, n)
    guided = bool(fields) and float(guidance_scale) != 1.0
    run = _draw_fn(model, sampler, steps, float(eta), guided, trajectory)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(-(-n // size) * size)
    )
    images, rows = [], []
    for start in range(0, n, size):
        batch = {
            name: _padded(x[start : start + size], size) for name, x in fields.items()
        }
        x, row = run(
            params,
            first_stage,
            batch,
            keys[start : start + size],
            jnp.float32(guidance_scale),
        )
        images.append(np.asarray(x))
        rows.append(np.asarray(row) if trajectory else None)
    return Drawn(
        np.concatenate(images)[:n], np.concatenate(rows)[:n] if trajectory else None
    )


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`, so that one shape is compiled."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A finished run: nets with their averaged params, ready to draw."""

    config: ml_collections.ConfigDict
    model: model_lib.LatentDiffusion
    params: Mapping[str, Any]
    first_stage: first_stage_lib.FirstStage
    step: int

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        eta: float = 0.0,
        sampler: str = "ddim",
        batch_size: int = 16,
        output: Literal["array", "pil"] = "array",
    ) -> np.ndarray | list[Image.Image]:
        """Draws one picture per prompt: uint8 [b, H, W, 3], or PIL images.

        `steps` and `guidance_scale` default to those of the run's config. Picture i of
        a seed is the same in every call and batch.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if output not in ("array", "pil"):
            raise UserError(f"output: {output!r}; choose array or pil")
        if not prompts:
            raise UserError("prompts: none given; give at least one")
        if steps is None:
            steps = self.config.sample.steps
        if guidance_scale is None:
            guidance_scale = self.config.sample.guidance_scale
        conditioners = self.model.conditioners
        drawn = draw(
            self.model,
            self.params,
            self.first_stage,
            {name: c.prepare(prompts) for name, c in conditioners.items()},
            count=len(prompts),
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            eta=eta,
            sampler=sampler,
            batch_size=batch_size,
        )
        images = picture.to_uint8(drawn.images)
        return images if output == "array" else [Image.fromarray(x) for x in images]


def load_first_stage(
    workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> first_stage_lib.FirstStage:
    """The finished autoencoder of a run with the statistics of its latents.

    Where a config's first stage is the identity, pixels are the latents.
    """
    net = model_lib.build_autoencoder(config)
    if isinstance(net, autoencoder.Identity):
        c = net.embed_dim
        return first_stage_lib.FirstStage({}, jnp.zeros(c), jnp.ones(c))
    abstract = jax.eval_shape(
        lambda: model_lib.init_autoencoder(config, net, jax.random.key(0))[0]
    )
    saved = checkpoint.Checkpoints(workdir / "autoencoder")
    params, meta = saved.load_averaged(checkpoint.single_device(abstract))
    if "latent" not in meta:
        raise UserError(
            f"--workdir: the autoencoder of {workdir} is not finished; run the training"
            " command again to go on with it"
        )
    return first_stage_lib.FirstStage(
        params=params["autoencoder"],
        mean=jnp.asarray(meta["latent"]["mean"], jnp.float32),
        std=jnp.asarray(meta["latent"]["std"], jnp.float32),
    )


def load(workdir: str | pathlib.Path) -> LoadedModel:
    """Loads a run's newest checkpoint, finished or not, with its averaged params."""
    workdir = pathlib.Path(workdir)
    config = workdir_lib.read_config(workdir)
    model = model_lib.build(config, workdir_lib.load_tokenizers(workdir, config))
    first_stage = load_first_stage(workdir, config)
    abstract = jax.eval_shape(
        lambda: model_lib.init_diffusion(config, model, jax.random.key(0))
    )
    saved = checkpoint.Checkpoints(workdir / "diffusion")
    params, meta = saved.load_averaged(checkpoint.single_device(abstract))
    return LoadedModel(config, model, params, first_stage, meta["step"])


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and of the lines of --prompts_file."""
    prompts = list(args.prompt)
    if args.prompts_file:
        path = pathlib.Path(args.prompts_file)
        if not path.is_file():
            raise UserError(f"--prompts_file: no file {str(path)!r}")
        prompts += [line.strip() for line in path.read_text().splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError("--prompt: none given; write --prompt='strawberry'")
    return prompts


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.sample", description="Draws pictures from a run."
    )
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts_file", help="a file with one prompt a line")
    parser.add_argument("--steps", type=int, help="default: the run's config")
    parser.add_argument("--guidance", type=float, help="default: the run's config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eta", type=float, default=0.0, help="0 DDIM … 1 ancestral")
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--out",
        default="samples.png",
        help="a .png (several prompts make a captioned grid), or a folder for one each",
    )
    args = parser.parse_args(argv)
    with config_lib.exit_on_user_error():
        config_lib.setup_logging()
        prompts = read_prompts(args)
        images = load(args.workdir).sample(
            prompts,
            steps=args.steps,
            guidance_scale=args.guidance,
            seed=args.seed,
            eta=args.eta,
            sampler=args.sampler,
            batch_size=args.batch_size,
        )
        out = pathlib.Path(args.out)
        if out.suffix != ".png":
            for index, image in enumerate(images):
                picture.save(Image.fromarray(image), out / f"{index:05d}.png")
        elif len(images) == 1:
            picture.save(Image.fromarray(images[0]), out)
        else:
            picture.save(picture.grid(images, prompts), out)
        print(f"{len(images)} pictures in {out}")


if __name__ == "__main__":
    main()
