"""Processes: when this one is part of a larger job, and the compilation cache."""

import os
import pathlib

import jax

from ldm_jax.config import UserError

# Each of these says that a launcher started several processes.
_CLUSTER = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


def is_multi_process() -> bool:
    """Whether the environment announces more than one process."""
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    named = any(os.environ.get(name) for name in _CLUSTER)
    return named or "," in workers or tasks > 1


def initialize() -> None:
    """Joins the job's other processes; an error where that fails, never one host alone.

    On TPU pods and under SLURM, JAX finds its peers itself. Elsewhere the environment
    says who they are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    """
    cache = pathlib.Path(
        os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    )
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache / "ldm_jax" / "xla"))
    if not is_multi_process():
        if jax.process_count() > 1:  # a TPU pod that announces itself otherwise
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS: not set, but the devices belong to"
                f" {jax.process_count()} hosts; set it to the first host's address and"
                " a port on every host"
            )
        return
    kwargs = {}
    if "JAX_NUM_PROCESSES" in os.environ:
        kwargs = dict(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    try:
        jax.distributed.initialize(**kwargs)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"jax.distributed.initialize: {reason}; start the same command on every"
            " host at once, or unset the variables that announce several processes"
        ) from error
