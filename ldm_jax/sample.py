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
from ldm_jax import inputs as inputs_lib
from ldm_jax import model as model_lib
from ldm_jax import picture, shown
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.conditioning import kinds
from ldm_jax.config import UserError
from ldm_jax.diffusion import samplers
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint

CONDITION = 2  # purpose of a picture's key


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
    def draw(params, first_stage, fields, keys, guidance_scale, noise_level):
        b = keys.shape[0]
        cond_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, CONDITION)
        tools = model_lib.make_tools(model, first_stage, cond_keys, noise_level)
        trained = params["conditioners"]
        sequential = model.unet.sequential_crossattn
        cond = conditioning.encode(
            model.conditioners, trained, fields, tools=tools, sequential=sequential
        )
        uncond = None
        if guided:
            uncond = conditioning.encode_null(
                model.conditioners, trained, fields, tools, sequential
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
    noise_level: int | None = None,
) -> Drawn:
    """Draws one picture per row of the prepared `fields`; `count` where there are none.

    The same seed gives the same pictures whatever the batch size. A `guidance_scale`
    of 1 calls the net without its unconditional half, as does a model whose conditions
    guide nothing. `noise_level` is that of noise-augmented conditions.
    """
    if sampler not in samplers.SAMPLERS:
        hint = config_lib.nearest(sampler, samplers.SAMPLERS)
        raise UserError(f"--sampler: {sampler!r}; {hint}")
    total = len(model.schedule.betas)
    if not 1 <= steps <= total:
        raise UserError(f"--steps: {steps}; choose from 1 to {total}")
    if noise_level is not None:
        check_noise_level(model, noise_level)
    n = len(next(iter(fields.values()))) if fields else count
    size = min(batch_size, n)
    guided = any(c.guided for c in model.conditioners.values())
    guided = guided and float(guidance_scale) != 1.0
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
            None if noise_level is None else jnp.full([size], noise_level, jnp.int32),
        )
        images.append(np.asarray(x))
        rows.append(np.asarray(row) if trajectory else None)
    return Drawn(
        np.concatenate(images)[:n], np.concatenate(rows)[:n] if trajectory else None
    )


def check_noise_level(model: model_lib.LatentDiffusion, level: int) -> None:
    """Raises UserError unless a condition of the model takes this level of noise."""
    levels = [c.noise_levels for c in model.conditioners.values() if c.noise_levels]
    if not levels:
        raise UserError(
            "--noise_level: no input of this model takes noise; leave it out"
        )
    if not 0 <= level < min(levels):
        raise UserError(f"--noise_level: {level}; choose from 0 to {min(levels) - 1}")


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

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of `inputs` that this model takes."""
        return kinds.required_fields(self.model.conditioners)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        count: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        eta: float = 0.0,
        sampler: str = "ddim",
        batch_size: int = 16,
        noise_level: int | None = None,
        output: Literal["array", "pil"] = "array",
    ) -> np.ndarray | list[Image.Image]:
        """Draws one picture per prompt or row of `inputs`: uint8 [b, H, W, 3], or PIL.

        `inputs` {column: rows} holds what this model takes (see `fields`): `prompts` is
        short for its `caption`, and one row serves for all. `count` draws one row more
        than once, or says how many where the model is unconditional. `steps` and
        `guidance_scale` default to those of the run's config. Picture i of a seed is
        the same in every call and batch.
        """
        inputs = dict(inputs or {})
        if prompts is not None:
            inputs["caption"] = [prompts] if isinstance(prompts, str) else list(prompts)
        if output not in ("array", "pil"):
            raise UserError(f"output: {output!r}; choose array or pil")
        rows, n = inputs_lib.collect(self.fields, inputs, count)
        if steps is None:
            steps = self.config.sample.steps
        if guidance_scale is None:
            guidance_scale = self.config.sample.guidance_scale
        conditioners = self.model.conditioners
        drawn = draw(
            self.model,
            self.params,
            self.first_stage,
            {
                name: c.prepare(*(rows[field] for field in c.fields))
                for name, c in conditioners.items()
            },
            count=n,
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            eta=eta,
            sampler=sampler,
            batch_size=batch_size,
            noise_level=noise_level,
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


def make_parser(fields: Sequence[str]) -> argparse.ArgumentParser:
    """The command's flags; --help lists the inputs of a model that reads `fields`."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.sample",
        description="Draws pictures from a run. With --workdir, --help lists the"
        " inputs that its model takes; each may be repeated, one serves for all.",
    )
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    taken = inputs_lib.flags_for(fields)
    for entry in inputs_lib.INPUTS:
        text = entry.help if entry in taken else argparse.SUPPRESS
        parser.add_argument(f"--{entry.flag}", action="append", default=[], help=text)
    text = "a file with one prompt a line" if "caption" in fields else None
    parser.add_argument("--prompts_file", help=text or argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help="how many pictures of one input")
    parser.add_argument("--steps", type=int, help="default: the run's config")
    parser.add_argument("--guidance", type=float, help="default: the run's config")
    parser.add_argument(
        "--noise_level", type=int, help="of noise-augmented inputs; default: the config"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eta", type=float, default=0.0, help="0 DDIM … 1 ancestral")
    parser.add_argument("--sampler", default="ddim", help=" | ".join(samplers.SAMPLERS))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--out",
        default="samples.png",
        help="a .png (several pictures make a captioned grid), or a folder",
    )
    return parser


def read_inputs(args: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """{column: rows} of all input flags; UserError for one that the model lacks."""
    given = {entry.flag: list(getattr(args, entry.flag)) for entry in inputs_lib.INPUTS}
    if args.prompts_file:
        path = pathlib.Path(args.prompts_file)
        if not path.is_file():
            raise UserError(f"--prompts_file: no file {str(path)!r}")
        given["prompt"] += [line.strip() for line in path.read_text().splitlines()]
    given["prompt"] = [prompt for prompt in given["prompt"] if prompt]
    taken = inputs_lib.flags_for(fields)
    names = ", ".join(f"--{entry.flag}" for entry in taken) or "no input, --count alone"
    rows = {}
    for entry in inputs_lib.INPUTS:
        if given[entry.flag] and entry not in taken:
            raise UserError(f"--{entry.flag}: this model takes {names}; leave it out")
        if not given[entry.flag] and entry in taken:
            raise UserError(f"--{entry.flag}: none given; this model takes {names}")
        if entry in taken:
            rows |= inputs_lib.read(entry, given[entry.flag])
    return {name: column for name, column in rows.items() if name in fields}


def fields_of(workdir: str | None) -> tuple[str, ...]:
    """What the model of a run reads; nothing where there is no run to ask."""
    if workdir is None or not workdir_lib.config_path(pathlib.Path(workdir)).is_file():
        return ()
    config = workdir_lib.read_config(pathlib.Path(workdir))
    tokenizer_of = workdir_lib.load_tokenizers(pathlib.Path(workdir), config)
    return kinds.required_fields(model_lib.build(config, tokenizer_of).conditioners)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--workdir")
    with config_lib.exit_on_user_error():
        config_lib.setup_logging()
        fields = fields_of(first.parse_known_args(argv)[0].workdir)
        args = make_parser(fields).parse_args(argv)
        workdir_lib.read_config(pathlib.Path(args.workdir))  # says where there is none
        inputs = read_inputs(args, fields)
        images = load(args.workdir).sample(
            inputs=inputs,
            count=args.count,
            steps=args.steps,
            guidance_scale=args.guidance,
            seed=args.seed,
            eta=args.eta,
            sampler=args.sampler,
            batch_size=args.batch_size,
            noise_level=args.noise_level,
        )
        out = pathlib.Path(args.out)
        if out.suffix != ".png":
            for index, image in enumerate(images):
                picture.save(Image.fromarray(image), out / f"{index:05d}.png")
        elif len(images) == 1:
            picture.save(Image.fromarray(images[0]), out)
        else:
            texts = shown.words(inputs, len(images))
            texts = texts * len(images) if len(texts) == 1 else texts
            picture.save(picture.grid(images, texts if any(texts) else None), out)
        print(f"{len(images)} pictures in {out}")


if __name__ == "__main__":
    main()
