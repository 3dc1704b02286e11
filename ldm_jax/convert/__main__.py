"""python -m ldm_jax.convert SRC DST --config=configs/txt2img.py:sd2

Makes a run of a released model: a checkpoint of CompVis or Stability (.ckpt,
.safetensors) or a folder that diffusers has saved. DST is then a workdir for `python -m
ldm_jax.sample`, `ldm_jax.load` and `--config.init_from`. The preset says what is in
SRC, or the YAML that came with it (--config=v1-inference.yaml, or of SRC's name beside
it); without either SRC is recognised by its keys and shapes. Every array must fit.

Where DST ends in .safetensors it becomes a checkpoint in CompVis' layout instead, and
with --diffusers a folder for diffusers. Runs go out in the same two ways, those of
stage one alone as an autoencoder alone:

python -m ldm_jax.convert RUN DST
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ldm_jax import config as config_lib
from ldm_jax.config import UserError

if TYPE_CHECKING:
    from ldm_jax import loaded, released

FILE = ".safetensors"


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
        "--raw_weights", action="store_true", help="the net's own, not their average"
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
        "--diffusers",
        action="store_true",
        help="DST is a folder for diffusers, as it always is where SRC is a run",
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
    from ldm_jax import check, loaded, publish, publish_folder, released, workdir
    from ldm_jax.convert import references

    config_lib.setup_logging()
    destination = _destination(args)
    if args.check:
        references.libraries()
    of_run = workdir.is_run(pathlib.Path(args.src))
    if of_run:
        _check_no_options(args, rest)
        model, name = _of_run(pathlib.Path(args.src)), args.src
    else:
        opened = _released(args, rest)
        name = f"{args.src} as {opened.config.preset}"
        if destination.suffix == FILE or args.diffusers or args.check:
            model = released.in_memory(opened)
    said = f"{name} in {destination}"
    if destination.suffix == FILE:
        publish.write_file(model, destination)
        if isinstance(model, loaded.LoadedAutoencoder):  # of which no key tells it
            factor = publish.one_scale_factor(model.first_stage)
            said += f", without its scale_factor {factor:.6g}"
    elif of_run or args.diffusers:
        publish_folder.write(model, destination)
    else:
        released.write(destination, opened)
    print(said)
    if args.check:
        check.check(model)


def _of_run(workdir: pathlib.Path) -> "loaded.Loaded":
    from ldm_jax import loaded
    from ldm_jax import workdir as workdir_lib

    of_both = "diffusion" in workdir_lib.read_config(workdir)
    return loaded.load(workdir) if of_both else loaded.load_autoencoder(workdir)


def _destination(args: argparse.Namespace) -> pathlib.Path:
    """DST, if it may be written."""
    path = pathlib.Path(args.dst)
    if path.exists():
        raise UserError(f"DST: {path} is there already; name another")
    if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise UserError(
            f"DST: {path} would be a pickle, which can run code where it is read; name"
            f" it {path.with_suffix(FILE).name}"
        )
    if args.diffusers and path.suffix == FILE:
        raise UserError(
            f"--diffusers: its layout is a folder, and {path} a file; leave out either"
            f" the flag or {FILE}"
        )
    return path


def _check_no_options(args: argparse.Namespace, rest: Sequence[str]) -> None:
    chosen = args.config or args.raw_weights or args.allow_missing
    if chosen or rest or args.scale_factor is not None:
        raise UserError(
            f"SRC: {args.src} is a run, which has a config and weights of its own;"
            " leave --config and the like out"
        )


def _released(args: argparse.Namespace, rest: Sequence[str]) -> "released.Opened":
    """The released model that SRC is."""
    from ldm_jax import preset_of, released

    if args.scale_factor is not None and not 0 < args.scale_factor < math.inf:
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
    opened = released.open_parts(
        source,
        config,
        averaged=not args.raw_weights,
        scale_factor=args.scale_factor,
        allow_missing=args.allow_missing,
    )
    if config.preset == preset_of.READ_OFF:
        print(f"  scale_factor = {opened.parts.scale_factor!r}")
    return opened


if __name__ == "__main__":
    main()
