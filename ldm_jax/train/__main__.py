"""python -m ldm_jax.train --config=configs/txt2img.py --workdir=runs/openmoji

Trains every stage of a config; the same command in the same workdir goes on where it
stopped. `--config=FILE:PRESET,key=value` and `--config.key=value` override fields.
"""

import time

STARTED = time.monotonic()

import argparse  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
from collections.abc import Sequence  # noqa: E402

from ldm_jax import config as config_lib  # noqa: E402


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into flags and "key=value" overrides of the config."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE.py[:PRESET][,key=value]")
    parser.add_argument("--workdir", help="default: runs/CONFIG-PRESET")
    args, rest = parser.parse_known_args(argv)
    overrides = []
    for word in rest:
        if not word.startswith("--config."):
            raise config_lib.UserError(
                f"{word}: no such flag; config fields are written --config.FIELD=VALUE"
            )
        overrides.append(word.removeprefix("--config."))
    return args, overrides


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    with config_lib.exit_on_user_error():
        args, overrides = parse(argv)
        config = config_lib.load(args.config, overrides)
        config_lib.setup_logging()
        name = f"{pathlib.Path(args.config.partition(':')[0]).stem}-{config.preset}"
        workdir = pathlib.Path(args.workdir or pathlib.Path("runs") / name)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        try:
            from ldm_jax.train import distributed, loop
        except ModuleNotFoundError as error:
            raise config_lib.UserError(
                f"{error.name}: not installed, and training needs it;"
                " pip install 'ldm_jax[train]'"
            ) from error
        distributed.initialize()
        loop.train(config, workdir, STARTED)


if __name__ == "__main__":
    main()
