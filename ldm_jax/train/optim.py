"""Optimizers and learning-rate schedules from a config section."""

import ml_collections
import optax

from ldm_jax.config import UserError

SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(
    *, peak: float, steps: int, schedule: str, warmup_steps: int, final: float
) -> optax.Schedule:
    """Linear warm-up to `peak` over `warmup_steps`, then `schedule` down to `final`.

    `final` is a fraction of the peak, reached at `steps`.
    """
    decay_steps = max(steps - warmup_steps, 1)
    if schedule == "constant":
        after = optax.constant_schedule(peak)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=final)
    elif schedule == "linear":
        after = optax.linear_schedule(peak, peak * final, decay_steps)
    else:
        raise UserError(
            f"optim.schedule: {schedule!r}; choose one of {', '.join(SCHEDULES)}"
        )
    # The first update already moves: step 0 has 1/warmup_steps of the peak.
    warmup = optax.linear_schedule(
        peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    section: ml_collections.ConfigDict, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with global-norm clipping from `config.*.optim`; also its schedule.

    As in the references, weight decay applies to every parameter.
    """
    schedule = learning_rate(
        peak=section.learning_rate,
        steps=steps,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        final=section.final_fraction,
    )
    adamw = optax.adamw(
        schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    if not section.clip_norm:
        return adamw, schedule
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), adamw), schedule
