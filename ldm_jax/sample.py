"""Pictures from a finished run; --help lists the inputs that its model takes.

    python -m ldm_jax.sample --workdir=runs/openmoji --prompt="strawberry" --out=a.png

Needs no TensorFlow, no torch, and nothing that only training needs.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import draw as draw_lib
from ldm_jax import inputs as inputs_lib
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import picture, shown
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import kinds
from ldm_jax.config import UserError
from ldm_jax.diffusion import grids, samplers

# Flags of inputs that any model takes, whatever it reads.
OPTIONAL = ("init_image", "mask")


def make_parser(
    fields: Sequence[str], optional: Sequence[str] = OPTIONAL
) -> argparse.ArgumentParser:
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
        shown_ = entry in taken or entry.flag in optional
        text = entry.help if shown_ else argparse.SUPPRESS
        group.add_argument(f"--{entry.flag}", action="append", default=[], help=text)
    text = "a file with one prompt a line" if "caption" in fields else None
    group.add_argument("--prompts_file", help=text or argparse.SUPPRESS)
    group.add_argument("--count", type=int, help="how many pictures of one input")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--strength",
        type=float,
        help="how much of --init_image is drawn anew, 0 to 1; default"
        f" {loaded_lib.STRENGTH}, with --mask 1",
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
    group.add_argument(
        "--classifier_scale",
        type=float,
        help="how much a classifier that the run trained draws towards --label",
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
    group = parser.add_argument_group("added to the model, each may be repeated")
    group.add_argument(
        "--lora",
        type=parse_lora,
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="factors of diffusers, PEFT or kohya",
    )
    group.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="FILE",
        help="a token of textual inversion, for prompts",
    )
    return parser


def parse_lora(text: str) -> tuple[str, float]:
    """(file, scale) of FILE or FILE:SCALE."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0


def parse_guidance(text: str) -> draw_lib.Guidance:
    """ "7.5", "7.5,1", "text=7.5;low_res=2": see `LoadedModel.sample`."""

    def scale(word):
        numbers = [float(x) for x in word.split(",")]
        return numbers[0] if len(numbers) == 1 else numbers

    try:
        if "=" not in text:
            return scale(text)
        pairs = (word.partition("=") for word in text.split(";"))
        return {name.strip(): scale(value) for name, _, value in pairs}
    except ValueError as error:
        raise UserError(
            f"--guidance: {text!r}; give a number, several as 7.5,1 or NAME=7.5;NAME=2"
        ) from error


def parse_size(text: str) -> tuple[int, int]:
    """ "64" or "64x96" to (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise UserError(f"--size: {text!r}; give HEIGHTxWIDTH, such as 64x96, or 64")
    return int(sides[0]), int(sides[-1])


def read_inputs(
    args: argparse.Namespace,
    fields: Sequence[str],
    optional: Sequence[str] = OPTIONAL,
) -> dict[str, Any]:
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
    optional = set(optional)
    if not given["init_image"]:
        optional.discard("mask")
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


def inputs_of(workdir: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(columns that the model of a run reads, flags that it may be given besides)."""
    if workdir is None or not workdir_lib.is_run(pathlib.Path(workdir)):
        return (), OPTIONAL
    folder = pathlib.Path(workdir)
    config = workdir_lib.read_config(folder)
    workdir_lib.check_draws(folder, config)
    tokenizer_of = workdir_lib.load_tokenizers(folder, config)
    fields = kinds.required_fields(model_lib.build(config, tokenizer_of).conditioners)
    return fields, OPTIONAL + ("label",) * ("classifier" in config.stages)


def with_files(
    model: loaded_lib.LoadedModel, args: argparse.Namespace
) -> loaded_lib.LoadedModel:
    """The model with what --lora and --tokens add; UserErrors name the flag."""
    for path, scale in args.lora:
        model = model.with_lora(path, scale, option="--lora")
    try:
        for path in args.tokens:
            model = model.with_tokens(path)
    except UserError as error:
        raise UserError(f"--tokens: {error}") from error
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see --help."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--workdir")
    with config_lib.exit_on_user_error():
        config_lib.setup_logging()
        fields, optional = inputs_of(first.parse_known_args(argv)[0].workdir)
        args = make_parser(fields, optional).parse_args(argv)
        workdir_lib.read_config(pathlib.Path(args.workdir))  # says where there is none
        inputs = read_inputs(args, fields, optional)
        images = with_files(loaded_lib.load(args.workdir), args).sample(
            inputs=inputs,
            count=args.count,
            steps=args.steps,
            guidance_scale=args.guidance,
            guidance_rescale=args.guidance_rescale,
            classifier_scale=args.classifier_scale,
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
