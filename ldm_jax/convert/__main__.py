"""python -m ldm_jax.convert SRC DST --config=configs/txt2img.py:sd2

Makes a run of a released model: a checkpoint of CompVis or Stability (.ckpt,
.safetensors) or a folder that diffusers has saved. DST is then a workdir for `python -m
ldm_jax.sample`, `ldm_jax.load` and `--config.init_from`. The preset says what is in
SRC, or the YAML that came with it (--config=v1-inference.yaml, or of SRC's name beside
it); without either SRC is recognised by its keys and shapes. Every array must fit.

python -m ldm_jax.convert RUN DST

goes back: to a checkpoint in CompVis' layout where DST ends in .safetensors, else to a
folder for diffusers.
"""

import argparse
import pathlib
from collections.abc import Sequence

from ldm_jax import config as config_lib
from ldm_jax.config import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("src", metavar="SRC", help="a file, folder, hub id or run")
    parser.add_argument("dst", metavar="DST", help="a path where nothing is yet")
    parser.add_argument(
        "--config", help="FILE.py[:PRESET][,key=value] or the original YAML"
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="the UNet's own, not their average"
    )
    parser.add_argument(
        "--scale_factor", type=float, help="of latents, where the file has none"
    )
    parser.add_argument(
        "--allow_missing",
        action="store_true",
        help="draw anew what SRC's UNet and autoencoder lack, instead of an error",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every block with torch's and diffusers', which must be installed",
    )
    args, rest = parser.parse_known_args(argv)
    with config_lib.exit_on_user_error():
        convert(args, rest)


def convert(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """What the command does; raises UserError before anything is written."""
    from ldm_jax import check, loaded, workdir
    from ldm_jax.convert import check as blocks

    config_lib.setup_logging()
    destination = pathlib.Path(args.dst)
    if destination.exists():
        raise UserError(f"DST: {destination} is there already; name another")
    if args.check:
        blocks.libraries()
    if workdir.is_run(pathlib.Path(args.src)):
        run = args.src
        _export(args, rest, destination)
    else:
        run = destination
        _import(args, rest, destination)
    if args.check:
        check.check(loaded.load(run))


def _export(
    args: argparse.Namespace, rest: Sequence[str], destination: pathlib.Path
) -> None:
    """A run to a file or a folder of others."""
    from ldm_jax import loaded, publish, publish_folder

    chosen = args.config or args.raw_weights or args.allow_missing
    if chosen or rest or args.scale_factor is not None:
        raise UserError(
            f"SRC: {args.src} is a run, which has a config and weights of its own;"
            " leave --config and the like out"
        )
    to_file = destination.suffix == ".safetensors"
    write = publish.write_file if to_file else publish_folder.write
    write(loaded.load(args.src), destination)
    print(f"{args.src} in {destination}")


def _import(
    args: argparse.Namespace, rest: Sequence[str], destination: pathlib.Path
) -> None:
    """A released model to a run."""
    from ldm_jax import preset_of, released

    if args.scale_factor is not None and not args.scale_factor > 0:
        raise UserError(f"--scale_factor: {args.scale_factor}; give one above 0")
    for word in rest:
        if not word.startswith("--config."):
            raise UserError(
                f"{word}: no such flag; config fields are written --config.FIELD=VALUE"
            )
    overrides = [word.removeprefix("--config.") for word in rest]
    source, config = released.settle(args.src, args.config, overrides)
    if not args.config:
        print("\n".join(preset_of.told(config)))
    nets, tokenizer_of, parts = released.open_parts(
        source,
        config,
        averaged=not args.raw_weights,
        scale_factor=args.scale_factor,
        allow_missing=args.allow_missing,
    )
    released.write(destination, config, nets, tokenizer_of, parts)
    print(f"{args.src} as {config.preset} in {destination}")


if __name__ == "__main__":
    main()
