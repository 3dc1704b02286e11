"""What a person sees of a run: console lines, TensorBoard, and how long is left."""

import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import metric_writers, parameter_overview, periodic_actions

from ldm_jax import config as config_lib
from ldm_jax import picture
from ldm_jax.config import UserError
from ldm_jax.train.state import Metrics, TrainState


def say(line: str) -> None:
    """Prints one line, on the first process only."""
    if jax.process_index() == 0:
        print(line, flush=True)


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def count(tree: Any) -> int:
    """Number of parameters in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def state_memory(state: TrainState) -> str:
    """What an abstract, placed state takes on each device, in words, before compiling.

    Raises UserError where that is more than the device has, where it says what it has.
    """

    def size(tree):
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    gigabytes = [size(tree) / 1e9 for tree in (state, state.params)]
    stats = jax.local_devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit", math.inf) / 1e9
    if sum(gigabytes) > there:
        raise UserError(
            f"mesh.fsdp: state and gradients take {sum(gigabytes):.1f} GB on each"
            f" device, which has {there:.1f}; shard them over more devices, or train"
            " fewer params (diffusion_stage.lora.rank)"
        )
    return "a device holds {:.2f} GB of its state and {:.2f} of gradients".format(
        *gigabytes
    )


def step_memory(compiled: Any) -> str:
    """What XLA says that a compiled step needs on each device, in words; "" if nothing.

    State, batch and frozen arrays, and the most that is alive in between.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return ""
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    kept -= sizes.alias_size_in_bytes  # the state's old and new place are one
    return (
        f"; a step needs {(kept + sizes.temp_size_in_bytes) / 1e9:.2f} GB on each"
        f" device, {kept / 1e9:.2f} of them for what it is given and gives"
    )


def peak_memory_gb() -> float:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def mean_metrics(steps: Sequence[Metrics]) -> dict[str, np.ndarray]:
    """Pools (sum, count) pairs; a metric without any count is left out."""
    totals: dict[str, list[np.ndarray]] = {}
    for metrics in jax.device_get(list(steps)):
        for name, pair in metrics.items():
            old = totals.get(name, (0.0, 0.0))
            totals[name] = [
                o + np.asarray(p, np.float64) for o, p in zip(old, pair, strict=True)
            ]
    return {k: total / n for k, (total, n) in sorted(totals.items()) if n}


class Dashboard:
    """TensorBoard of one stage through CLU writers."""

    def __init__(self, workdir: pathlib.Path, stage: str, profile: bool):
        logdir = workdir / "logs" / stage
        self._workdir, self._stage = workdir, stage
        self._writer = metric_writers.create_default_writer(
            str(logdir), just_logging=jax.process_index() > 0, asynchronous=True
        )
        self._profile = None
        if profile:
            self._profile = periodic_actions.Profile(
                logdir=str(logdir), num_profile_steps=5, first_profile=10
            )

    def start(self, config: ml_collections.ConfigDict, params: Any) -> None:
        """Hyperparameters and the table of parameters."""
        flat = config_lib.flatten(config)
        simple = {
            k: v if isinstance(v, bool | int | float | str) else repr(v)
            for k, v in flat.items()
        }
        self._writer.write_hparams(simple)
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        self._writer.write_texts(0, {"parameters": f"```\n{table}\n```"})

    def step(self, step: int) -> None:
        """Lets a profile start or end, if one was asked for."""
        if self._profile is not None:
            self._profile(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers."""
        self._writer.write_scalars(step, values)

    def images(self, step: int, panels: Mapping[str, np.ndarray]) -> None:
        """Writes pictures in [-1, 1], to TensorBoard and as PNG grids."""
        panels = {name: picture.to_uint8(x) for name, x in panels.items()}
        self._writer.write_images(step, panels)
        if jax.process_index() == 0:
            for name, x in panels.items():
                path = self._workdir / "pictures" / f"{self._stage}_{name}.png"
                picture.save(picture.grid(x), path)

    def close(self) -> None:
        """Writes out what is left."""
        self._writer.flush()
        self._writer.close()


class Progress:
    """One line per log period: step, loss, images/s, wait on data, time left."""

    def __init__(self, stage: str, first_step: int, steps: int, batch_size: int):
        self._stage, self._steps, self._batch_size = stage, steps, batch_size
        self._began = self._last = time.monotonic()
        self._first_step = self._last_step = first_step
        self._waited = 0.0

    def line(
        self, step: int, values: Mapping[str, float], waited: float
    ) -> dict[str, float]:
        """Prints the line of `step`; returns its rates for the dashboard."""
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        rate = (step - self._last_step) * self._batch_size / seconds
        wait = (waited - self._waited) / seconds
        per_step = (now - self._began) / max(step - self._first_step, 1)
        shown = "  ".join(
            f"{name} {values[name]:.4g}" for name in ("loss", "psnr") if name in values
        )
        say(
            f"{self._stage} {step}/{self._steps}  {shown}  {rate:.1f} images/s"
            f"  waiting on data {wait:.0%}"
            f"  {duration(per_step * (self._steps - step))} left"
        )
        self._last, self._last_step, self._waited = now, step, waited
        return {"images_per_second": rate, "data_wait": wait}
