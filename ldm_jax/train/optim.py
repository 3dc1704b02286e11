"""Optimizers and learning-rate schedules from a config section."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ldm_jax.config import UserError, nearest

# latent-diffusion's lr_scheduler.py, of which warmup_cosine has one cycle:
# LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2, LambdaLinearScheduler.
CYCLIC = ("warmup_cosine", "warmup_cosine2", "warmup_linear")
SCHEDULES = ("constant", "cosine", "linear", *CYCLIC)
CYCLE_FIELDS = ("warm_up_steps", "f_start", "f_max", "f_min", "cycle_lengths")


def read_cycles(schedule: str, section: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`optim.cycles` of a schedule in CYCLIC: one number a field and cycle, float64."""
    for field in section:
        if field not in CYCLE_FIELDS:
            hint = nearest(field, CYCLE_FIELDS)
            raise UserError(f"optim.cycles.{field}: no such field; {hint}")
    cycles = {}
    for field in CYCLE_FIELDS:
        name = f"optim.cycles.{field}"
        if field not in section:
            raise UserError(
                f"{name}: missing, and schedule {schedule!r} needs it; set"
                f" {', '.join(CYCLE_FIELDS)}, each with one number for each cycle"
            )
        values = section[field]
        numbers = isinstance(values, tuple | list) and all(
            isinstance(v, int | float) and np.isfinite(v) for v in values
        )
        if not numbers or not values:
            raise UserError(
                f"{name}: {values!r}; give a tuple of one number for each cycle"
            )
        if field != "warm_up_steps" and len(values) != len(cycles["warm_up_steps"]):
            raise UserError(
                f"{name}: {len(values)} number(s), but optim.cycles.warm_up_steps has"
                f" {len(cycles['warm_up_steps'])}; give one for each cycle"
            )
        cycles[field] = np.array(values, np.float64)
    warm_up, lengths = cycles["warm_up_steps"], cycles["cycle_lengths"]
    for i, (w, length) in enumerate(zip(warm_up, lengths, strict=True)):
        if not 0 <= w < length:
            raise UserError(
                f"optim.cycles.warm_up_steps: {w:g} in cycle {i}; it must be at least 0"
                f" and below the {length:g} of optim.cycles.cycle_lengths"
            )
    if schedule == "warmup_cosine" and len(lengths) > 1:
        raise UserError(
            f"optim.cycles.cycle_lengths: {len(lengths)} cycles, but schedule"
            " 'warmup_cosine' has one; set optim.schedule='warmup_cosine2'"
        )
    return cycles


def cycle_factor(step: Any, *, schedule: str, cycles: Mapping[str, np.ndarray]) -> Any:
    """What latent-diffusion's schedule multiplies the learning rate by at `step`.

    From f_start up to f_max in warm_up_steps, then down to f_min until the cycle ends;
    the step of its end is still the cycle's. After the last cycle, where the reference
    stops with an error unless it has just one, the last value stays. Float64 for
    numbers of the host, float32 for arrays of JAX. `step` may be an array.
    """
    if isinstance(step, jax.Array):
        xp, dtype = jnp, jnp.float32
    else:
        xp, dtype = np, np.float64
    # Floats from the start: an int32 doesn't hold Stable Diffusion's cycle of 1e13.
    ends = np.cumsum(cycles["cycle_lengths"])
    n = xp.minimum(xp.asarray(step, dtype), float(ends[-1]))
    cycle = xp.searchsorted(xp.asarray(ends, dtype), n, side="left")
    before = xp.asarray(ends - cycles["cycle_lengths"], dtype)[cycle]
    warm_up, f_start, f_max, f_min, length = (
        xp.asarray(cycles[field], dtype)[cycle] for field in CYCLE_FIELDS
    )
    n = n - before
    rising = f_start + (f_max - f_start) * n / xp.maximum(warm_up, 1.0)
    if schedule == "warmup_linear":
        # As in the reference the line starts with the cycle, so warm-up ends in a drop.
        falling = f_min + (f_max - f_min) * (length - n) / length
    else:
        t = (n - warm_up) / (length - warm_up)
        falling = f_min + 0.5 * (f_max - f_min) * (1.0 + xp.cos(np.pi * t))
    return xp.where(n < warm_up, rising, falling)


def learning_rate(
    *,
    peak: float,
    steps: int,
    schedule: str,
    warmup_steps: int,
    final: float,
    cycles: Mapping[str, Any] | None = None,
) -> optax.Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, then `schedule` down to `final`.

    `final` is a fraction of the peak, reached at `steps`. The schedules in CYCLIC are
    `peak` times `cycle_factor` instead, and `cycles` are all that they go by.
    """
    decay_steps = max(steps - warmup_steps, 1)
    if schedule == "constant":
        after = optax.constant_schedule(peak)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=final)
    elif schedule == "linear":
        after = optax.linear_schedule(peak, peak * final, decay_steps)
    elif schedule in CYCLIC:
        cycles = read_cycles(schedule, cycles or {})
        return lambda step: peak * cycle_factor(step, schedule=schedule, cycles=cycles)
    else:
        raise UserError(
            f"optim.schedule: {schedule!r}; choose one of {', '.join(SCHEDULES)}"
        )
    # The first update already moves: step 0 has 1/warmup_steps of the peak.
    warmup = optax.linear_schedule(
        peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [warmup_steps])


def peak_learning_rate(section: ml_collections.ConfigDict, batch_size: int) -> float:
    """`learning_rate`, which with `scale_lr` is meant for each image of a step.

    The reference's --scale_lr multiplies by accumulated batches, devices and images on
    a device; `batch_size`, the images of one optimizer step, is their product.
    """
    return section.learning_rate * (batch_size if section.scale_lr else 1)


def make_optimizer(
    section: ml_collections.ConfigDict, steps: int, batch_size: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with global-norm clipping from `config.*.optim`; also its schedule.

    As in the references, weight decay applies to every parameter; without it this is
    Adam.
    """
    schedule = learning_rate(
        peak=peak_learning_rate(section, batch_size),
        steps=steps,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        final=section.final_fraction,
        cycles=section.cycles,
    )
    adamw = optax.adamw(
        schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    # Either way the state has the same structure, so that clipping can be switched on
    # for a run that goes on from a checkpoint.
    clip = optax.identity()
    if section.clip_norm:
        clip = optax.clip_by_global_norm(section.clip_norm)
    tx = optax.chain(clip, adamw)
    if section.get("train_only"):
        parts = {"train": tx, "keep": optax.set_to_zero()}
        tx = optax.multi_transform(parts, partial(labels, section.train_only))
    return tx, schedule


def labels(pattern: str, params: Any) -> Any:
    """A tree like `params` of "train" where `pattern` is found in the path, or "keep".

    Paths are as unet/mid_attn/block_0/attn2/to_k/kernel. Raises UserError where it is
    found in none.
    """
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(entry.key) for entry in path), params
    )
    try:
        found = jax.tree.map(lambda path: bool(re.search(pattern, path)), paths)
    except re.error as error:
        raise UserError(
            f"optim.train_only: {pattern!r} is no pattern, {error}"
        ) from error
    if not any(jax.tree.leaves(found)):
        raise UserError(
            f"optim.train_only: {pattern!r} is found in no param's path; they are such"
            f" as {jax.tree.leaves(paths)[0]}"
        )
    return jax.tree.map(lambda kept: "train" if kept else "keep", found)


def describe(section: ml_collections.ConfigDict, batch_size: int) -> str:
    """The words "learning rate 5.4e-05 = 4.5e-06 x 12 images, cosine after …"."""
    peak = peak_learning_rate(section, batch_size)
    words = f"learning rate {peak:g}"
    if section.scale_lr:
        words += f" = {section.learning_rate:g} x {batch_size} images"
    words += f", {section.schedule}"
    if section.schedule in CYCLIC:
        lengths = section.cycles.cycle_lengths
        cycles = "a cycle" if len(lengths) == 1 else "cycles"
        return f"{words} in {cycles} of {', '.join(f'{n:g}' for n in lengths)} steps"
    if section.schedule != "constant" and section.final_fraction:
        words += f" to {peak * section.final_fraction:g}"
    if section.warmup_steps:
        words += f" after {section.warmup_steps} warm-up steps"
    return words
