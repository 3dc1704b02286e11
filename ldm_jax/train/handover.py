"""A first stage that another run has trained, taken over by this one.

`--config.autoencoder_from=runs/kl_f4` copies its last checkpoint, with the statistics
of its latents, so that the new workdir is whole by itself.
"""

import pathlib
import shutil

import ml_collections

from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, origin


def is_taken(config: ml_collections.ConfigDict) -> bool:
    """Whether stage one is not this run's to train."""
    return bool(config.get("autoencoder_from"))


def adopt_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Puts the net's section of that run in place of this config's own.

    Raises UserError where there is no such run, or its first stage isn't finished.
    """
    run = origin.run_of(config, "autoencoder_from")
    of_both = config.autoencoder_from == config.get("init_from")
    field = "init_from" if of_both else "autoencoder_from"
    if checkpoint.Checkpoints(workdir / "autoencoder").finished():
        run = workdir  # copied before; the other run may be gone
    elif not workdir_lib.is_run(run):
        raise UserError(
            f"{field}: {run} holds no run (no config.json); give the --workdir"
            " of one that has trained an autoencoder"
        )
    elif not checkpoint.Checkpoints(run / "autoencoder").finished():
        raise UserError(
            f"{field}: the autoencoder of {run} is not finished; train it to"
            " its end first"
        )
    config.autoencoder = workdir_lib.read_config(run).autoencoder


def copy_checkpoint(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Copies the other run's last checkpoint, unless that was done before.

    One process calls this, so that it may not read with orbax, which waits for all.
    """
    if checkpoint.Checkpoints(workdir / "autoencoder").steps():
        return
    source = origin.run_of(config, "autoencoder_from") / "autoencoder"
    step = checkpoint.Checkpoints(source).steps()[0]
    target = workdir / "autoencoder" / str(step)
    partial = target.with_name(f".{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / str(step), partial)
    partial.rename(target)
