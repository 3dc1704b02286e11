"""python -m ldm_jax.evaluate --workdir=runs/openmoji

Scores a run: reconstructions of held-out pictures, and captions found again among
pictures. Writes report.json and the grids in pictures/.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from ldm_jax import config as config_lib
from ldm_jax import workdir as workdir_lib


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="folder of the training run")
    parser.add_argument("--vgg", help="weights of VGG16, for LPIPS")
    parser.add_argument("--lpips_heads", help="weights of LPIPS's heads")
    parser.add_argument("--inception", help="weights of FID's InceptionV3")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch those weights that are neither given nor in the cache",
    )
    args = parser.parse_args(argv)
    with config_lib.exit_on_user_error():
        config_lib.setup_logging()
        workdir = pathlib.Path(args.workdir)
        config = workdir_lib.read_config(workdir)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        try:
            from ldm_jax.data import sources
            from ldm_jax.evaluate import pretrained_scores, run_report
        except ModuleNotFoundError as error:
            raise config_lib.UserError(
                f"{error.name}: not installed, and evaluation reads data with it;"
                " pip install 'ldm_jax[train]'"
            ) from error
        weights = pretrained_scores.load(
            args.vgg, args.lpips_heads, args.inception, download=args.download
        )
        splits = sources.load_splits(config.data, config.resolution)
        run_report.write(workdir, *splits, weights)


if __name__ == "__main__":
    main()
