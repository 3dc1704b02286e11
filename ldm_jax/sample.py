"""Pictures from a finished run: `ldm_jax.load(workdir).sample(prompts)`, or

    python -m ldm_jax.sample --workdir=runs/openmoji --prompt="strawberry" --out=a.png

Needs no TensorFlow, no torch, and nothing that only training needs.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import draw as draw_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import inputs as inputs_lib
from ldm_jax import model as model_lib
from ldm_jax import picture, shown
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import kinds
from ldm_jax.config import UserError
from ldm_jax.diffusion import grids, samplers
from ldm_jax.nets import autoencoder
from ldm_jax.train import checkpoint

STRENGTH = 0.75  # of an --init_image that has no mask


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A finished run: nets with their averaged params, ready to draw."""

    config: ml_collections.ConfigDict
    model: model_lib.LatentDiffusion
    params: Mapping[str, Any]
    first_stage: first_stage_lib.FirstStage
    step: int
    tokenizers: Mapping[str, Any]

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of `inputs` that this model takes."""
        return kinds.required_fields(self.model.conditioners)

    @functools.lru_cache(maxsize=4)  # noqa: B019  one entry a size
    def sized(self, size: tuple[int, int]) -> model_lib.LatentDiffusion:
        """The same nets for pictures of another `size` [H, W].

        Raises UserError where the first stage or the UNet can't halve it.
        """
        factor = first_stage_lib.downsampling(self.model.autoencoder)
        factor *= 2 ** (len(self.model.unet.channel_mult) - 1)
        if min(size) < 1 or any(side % factor for side in size):
            near = "x".join(str(max(round(s / factor), 1) * factor) for s in size)
            raise UserError(
                f"--size: {size[0]}x{size[1]}; the nets need multiples of {factor}, so"
                f" use {near}"
            )
        return model_lib.build(self.config, self.tokenizers, size)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        count: int | None = None,
        steps: int | None = None,
        guidance_scale: draw_lib.Guidance | None = None,
        guidance_rescale: float | None = None,
        seed: int = 0,
        eta: float | None = None,
        sampler: str = "ddim",
        spacing: str | None = None,
        strength: float | None = None,
        noise: np.ndarray | None = None,
        interpolate: int | None = None,
        size: int | tuple[int, int] | None = None,
        tile: bool = False,
        progress: bool = False,
        batch_size: int = 16,
        noise_level: int | None = None,
        output: Literal["array", "pil"] = "array",
    ) -> np.ndarray | list[Image.Image]:
        """Draws one picture per prompt or row of `inputs`: uint8 [b, H, W, 3], or PIL.

        `inputs` {column: rows} holds what this model takes (see `fields`): `prompts` is
        short for its `caption`, and one row serves for all. `count` draws one row more
        than once, or says how many where the model is unconditional. `steps` and
        `guidance_scale` default to those of the run's config, `eta` and `spacing` to
        the sampler's. Picture i of a seed is the same in every call and batch.

        Any model starts from the rows of `init_image` among the `inputs`: `strength` 1
        draws them anew, 0 leaves them; with a `mask` (1 is drawn anew) the rest is kept
        to the pixel. `noise` [b, h, w, c] replaces what `seed` would draw, see
        `invert`. `interpolate` draws so many pictures on the way from the first row to
        the last. `size` [H, W] is another than the training pictures'; with `tile` the
        net sees windows of the size that it was trained on. `progress` gives what the
        model thought at each step instead, [b, steps, H, W, 3].
        """
        if output not in ("array", "pil"):
            raise UserError(f"output: {output!r}; choose array or pil")
        model, fields, start, n = self._prepare(
            prompts, inputs, count, size, strength, noise
        )
        if interpolate is not None and (n < 2 or interpolate < 2):
            raise UserError(
                f"--interpolate: {interpolate} pictures between {n}; choose 2 or more"
                " of both (--count=2 makes two of one input)"
            )
        settings = draw_lib.Settings(
            sampler=sampler,
            steps=self.config.sample.steps if steps is None else steps,
            eta=eta,
            spacing=spacing,
            window=self.model.latent_shape[:2] if tile else None,
            trajectory=progress,
        )
        if guidance_scale is None:
            guidance_scale = self.config.sample.guidance_scale
        drawn = draw_lib.draw(
            model,
            self.params,
            self.first_stage,
            fields,
            count=n,
            settings=settings,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            batch_size=batch_size,
            noise_level=noise_level,
            start=start,
            frames=interpolate,
        )
        images = picture.to_uint8(drawn.trajectory if progress else drawn.images)
        if output == "array":
            return images
        flat = images.reshape(-1, *images.shape[-3:])
        return [Image.fromarray(x) for x in flat]

    def invert(
        self,
        init_image: np.ndarray,
        prompts: str | Sequence[str] | None = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The noise [b, h, w, c] from which DDIM draws about these pictures, unguided.

        `init_image` uint8 [b, H, W, 3] with the conditions that describe it. Given to
        `sample(noise=…)` with others, it draws the pictures changed; the same `steps`
        bring them back.
        """
        inputs = dict(inputs or {}) | {"init_image": init_image}
        model, fields, start, _ = self._prepare(
            prompts, inputs, None, init_image.shape[1:3], None, None
        )
        settings = draw_lib.Settings(
            steps=self.config.sample.steps if steps is None else steps
        )
        return draw_lib.invert(
            model,
            self.params,
            self.first_stage,
            fields,
            start.init,
            settings=settings,
            seed=seed,
        )

    def _prepare(self, prompts, inputs, count, size, strength, noise):
        """(model of this size, prepared fields, start, how many)."""
        inputs = dict(inputs or {})
        if prompts is not None:
            inputs["caption"] = [prompts] if isinstance(prompts, str) else list(prompts)
        model = self.model
        if size is not None:
            size = (size, size) if isinstance(size, int) else tuple(size)
            model = self.sized(size)
        taken = self.fields
        extras = [name for name in ("init_image", "mask") if name in inputs]
        extras = [name for name in extras if name not in taken]
        if "mask" in extras and "init_image" not in inputs:
            raise UserError("--mask: this model needs an --init_image with it")
        if strength is not None and "init_image" not in inputs:
            raise UserError(f"--strength: {strength}, but there is no --init_image")
        if strength is not None and not 0 <= strength <= 1:
            raise UserError(f"--strength: {strength}; choose from 0 (keep) to 1 (anew)")
        if noise is not None and noise.shape[1:] != model.latent_shape:
            raise UserError(
                f"noise: {list(noise.shape[1:])}; it must be latents of"
                f" {list(model.latent_shape)}"
            )
        if noise is not None and count is None:
            count = len(noise) if len(noise) > 1 else None
        rows, n = inputs_lib.collect((*taken, *extras), inputs, count)
        fields = {
            name: c.prepare(*(rows[field] for field in c.fields))
            for name, c in model.conditioners.items()
        }
        start = draw_lib.Start(noise=noise)
        if "init_image" in extras:
            masks = rows["mask"] if "mask" in extras else None
            factor = first_stage_lib.downsampling(model.autoencoder)
            size = tuple(factor * side for side in model.latent_shape[:2])
            init, mask = inputs_lib.start_of(size, rows["init_image"], masks)
            if strength is None:
                strength = STRENGTH if mask is None else 1.0
            start = start._replace(init=init, mask=mask, strength=strength)
        return model, fields, start, n


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
    tokenizers = workdir_lib.load_tokenizers(workdir, config)
    model = model_lib.build(config, tokenizers)
    looking = [k for k, c in model.conditioners.items() if c.remembered is not None]
    first_stage = load_first_stage(workdir, config).replace(
        memory=workdir_lib.load_memory(workdir, looking)
    )
    abstract = jax.eval_shape(
        lambda: model_lib.init_diffusion(config, model, jax.random.key(0))
    )
    saved = checkpoint.Checkpoints(workdir / "diffusion")
    params, meta = saved.load_averaged(checkpoint.single_device(abstract))
    step = meta["step"]
    return LoadedModel(config, model, params, first_stage, step, tokenizers)


def make_parser(fields: Sequence[str]) -> argparse.ArgumentParser:
    """The command's flags; --help lists the inputs of a model that reads `fields`."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.sample",
        description="Draws pictures from a run. With --workdir, --help lists the"
        " inputs that its model takes; each may be repeated, one serves for all.",
    )
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="a .png (several pictures make a captioned grid), or a folder",
    )
    group = parser.add_argument_group("inputs")
    taken = inputs_lib.flags_for(fields)
    for entry in (*inputs_lib.INPUTS, inputs_lib.START):
        shown_ = entry in taken or entry.flag in ("init_image", "mask")
        text = entry.help if shown_ else argparse.SUPPRESS
        group.add_argument(f"--{entry.flag}", action="append", default=[], help=text)
    text = "a file with one prompt a line" if "caption" in fields else None
    group.add_argument("--prompts_file", help=text or argparse.SUPPRESS)
    group.add_argument("--count", type=int, help="how many pictures of one input")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--strength",
        type=float,
        help=f"how much of --init_image is drawn anew, 0 to 1; default {STRENGTH}, with"
        " --mask 1",
    )
    group.add_argument(
        "--noise_level", type=int, help="of noise-augmented inputs; default: the config"
    )
    group.add_argument(
        "--interpolate",
        type=int,
        metavar="N",
        help="draw N pictures on the way from the first input to the last",
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", default="ddim", help=" | ".join(samplers.SAMPLERS))
    group.add_argument("--steps", type=int, help="default: the run's config")
    group.add_argument(
        "--guidance",
        type=parse_guidance,
        help="7.5, or 7.5,1 for one that changes over the steps, or NAME=7.5;NAME=2 for"
        " conditions apart; default: the run's config",
    )
    group.add_argument(
        "--guidance_rescale",
        type=float,
        help="0 to 1: how much of guidance's contrast is taken back",
    )
    group.add_argument("--eta", type=float, help="0 deterministic … 1 ancestral")
    group.add_argument("--spacing", help=f"of the steps: {' | '.join(grids.SPACINGS)}")
    group.add_argument(
        "--size", type=parse_size, help="HxW, if not that of the training pictures"
    )
    group.add_argument(
        "--tile",
        action="store_true",
        help="show the net windows of the size that it was trained on",
    )
    group.add_argument(
        "--progress",
        action="store_true",
        help="a row for each picture: what the model thought at each step",
    )
    group.add_argument("--batch_size", type=int, default=16)
    return parser


def parse_guidance(text: str) -> draw_lib.Guidance:
    """ "7.5", "7.5,1", "text=7.5;low_res=2": see `LoadedModel.sample`."""

    def scale(word):
        numbers = [float(x) for x in word.split(",")]
        return numbers[0] if len(numbers) == 1 else numbers

    if "=" not in text:
        return scale(text)
    pairs = (word.partition("=") for word in text.split(";"))
    return {name.strip(): scale(value) for name, _, value in pairs}


def parse_size(text: str) -> tuple[int, int]:
    """ "64" or "64x96" to (H, W)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0], sides[-1]


def read_inputs(args: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """{column: rows} of all input flags; UserError for one that the model lacks."""
    entries = (*inputs_lib.INPUTS, inputs_lib.START)
    given = {entry.flag: list(getattr(args, entry.flag)) for entry in entries}
    if args.prompts_file:
        path = pathlib.Path(args.prompts_file)
        if not path.is_file():
            raise UserError(f"--prompts_file: no file {str(path)!r}")
        given["prompt"] += [line.strip() for line in path.read_text().splitlines()]
    given["prompt"] = [prompt for prompt in given["prompt"] if prompt]
    taken = inputs_lib.flags_for(fields)
    names = ", ".join(f"--{entry.flag}" for entry in taken) or "no input, --count alone"
    optional = {"init_image"} | ({"mask"} if given["init_image"] else set())
    rows = {}
    for entry in entries:
        used = entry in taken or entry.flag in optional
        if given[entry.flag] and not used:
            raise UserError(f"--{entry.flag}: this model takes {names}; leave it out")
        if not given[entry.flag] and entry in taken:
            raise UserError(f"--{entry.flag}: none given; this model takes {names}")
        if given[entry.flag]:
            rows |= inputs_lib.read(entry, given[entry.flag])
    kept = {*fields, *optional}
    return {name: column for name, column in rows.items() if name in kept}


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
            guidance_rescale=args.guidance_rescale,
            seed=args.seed,
            eta=args.eta,
            sampler=args.sampler,
            spacing=args.spacing,
            strength=args.strength,
            interpolate=args.interpolate,
            size=args.size,
            tile=args.tile,
            progress=args.progress,
            batch_size=args.batch_size,
            noise_level=args.noise_level,
        )
        out, columns = pathlib.Path(args.out), 8
        texts = shown.words(inputs, len(images))
        texts = texts * len(images) if len(texts) == 1 else texts
        if args.interpolate:
            texts = []
        if args.progress:  # eight of the steps, the last among them
            at = np.linspace(0, images.shape[1] - 1, 8).round().astype(int)
            at = sorted(set(at.tolist()))
            columns, texts = len(at), []
            images = images[:, at].reshape(-1, *images.shape[2:])
        if out.suffix != ".png":
            for index, image in enumerate(images):
                picture.save(Image.fromarray(image), out / f"{index:05d}.png")
        elif len(images) == 1:
            picture.save(Image.fromarray(images[0]), out)
        else:
            captions = texts if any(texts) else None
            picture.save(picture.grid(images, captions, columns), out)
        print(f"{len(images)} pictures in {out}")


if __name__ == "__main__":
    main()
