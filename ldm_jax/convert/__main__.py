"""python -m ldm_jax.convert SRC DST --config=configs/txt2img.py:sd2

Makes a run of a released checkpoint of CompVis or Stability (.ckpt, .safetensors): DST
is then a workdir for `python -m ldm_jax.sample`, `ldm_jax.load` and
`--config.init_from`. The preset says what is in the file; every array must fit it.
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
    parser.add_argument("src", metavar="SRC", help="a file, or a hub id")
    parser.add_argument("dst", metavar="DST", help="a workdir that is not there yet")
    parser.add_argument("--config", required=True, help="FILE.py[:PRESET][,key=value]")
    parser.add_argument(
        "--raw_weights", action="store_true", help="the UNet's own, not their average"
    )
    parser.add_argument(
        "--scale_factor", type=float, help="of latents, where the file has none"
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
    from ldm_jax import check, frozen, loaded, model, released
    from ldm_jax.convert import check as blocks

    config_lib.setup_logging()
    workdir = pathlib.Path(args.dst)
    if workdir.exists():
        raise UserError(f"DST: {workdir} is there already; name another")
    if args.scale_factor is not None and not args.scale_factor > 0:
        raise UserError(f"--scale_factor: {args.scale_factor}; give one above 0")
    if args.check:
        blocks.libraries()
    for word in rest:
        if not word.startswith("--config."):
            raise UserError(
                f"{word}: no such flag; config fields are written --config.FIELD=VALUE"
            )
    overrides = [word.removeprefix("--config.") for word in rest]
    config = config_lib.load(args.config, overrides)
    if "diffusion" not in config.stages:
        raise UserError(
            f"--config: {args.config} has no diffusion stage; choose another"
        )
    tokenizer_of = released.load_tokenizers(config)
    nets = model.build(config, tokenizer_of)
    parts = released.read(
        frozen.read(args.src, "SRC"),
        config,
        nets,
        averaged=not args.raw_weights,
        scale_factor=args.scale_factor,
    )
    released.write(workdir, config, nets, tokenizer_of, parts)
    print(f"{args.src} as {config.preset} in {workdir}")
    if args.check:
        check.check(loaded.load(workdir))


if __name__ == "__main__":
    main()
