"""What goes wrong in training without an error, told while it can still be mended.

An alarm looks at the mean metrics of one log period. It speaks once, when its metric is
beyond the threshold (for `PATIENCE` periods in a row where a bad start or a slow moment
is no failure); it clears when the metric is back by a margin, and may then speak again.
Alarms whose metrics are absent or not finite neither speak nor clear. All this is in
memory: a run that goes on from a checkpoint starts to listen anew.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ldm_jax.config import UserError

PATIENCE = 3
CLEAR = 0.8  # of the threshold; between the two an alarm stays as it is
REMIND = 50  # periods from one line of a standing alarm to the next

# A dimension with a KL of 0.001 nat moves by 4% of its own noise. The small preset has
# 3 to 7 nats, and a collapsed one goes to 0, so where between hardly matters.
KL_PER_DIM = 1e-3
# Published scale factors tell of 4 to 12: 1 / 0.2277, 1 / 0.18215 and 1 / 0.0833. At
# 0.05 the means alone are worth the 0.001 nat above, at 20 they cost 200.
LATENT_STD = (0.05, 20.0)
# In its first ten periods the latent of the small preset grows from 0.6 to 2.1, and is
# there when the run ends: a factor of two later on is not growth any more.
DRIFT = 2.0
DRIFT_PERIODS = 10
DEAD_CHANNEL = 1 / 20  # of the mean over channels
# Ten tokens for each code: evenly used, one code in 22,000 would be missed by chance.
DEAD_CODES = 0.5
TOKENS_PER_CODE = 10
# Real and fake are told apart for good. Hinge wants a gap of 2 between the mean logits
# and uses none beyond, so it gets twice that; at a gap of 8 a vanilla loss is 0.02.
DISC_LOSS = 0.02
LOGIT_GAP = {"hinge": 4.0, "vanilla": 8.0}
# The adaptive weight is disc_weight times a ratio, which adversarial.py keeps in
# [0, 1e4]; a mean near its end says that most steps are there.
RATIO_LOW, RATIO_HIGH = 1e-4, 0.9e4
DATA_WAIT = 0.5
GRAD_NORM = 1000.0  # times the running median
MEDIAN_PERIODS = (5, 50)  # fewest, most


class Sighting(NamedTuple):
    """How far a metric is beyond its threshold, above 1 if it is, and what to say."""

    excess: float
    line: str


Look = Callable[[Mapping[str, float]], Sighting | None]


@dataclasses.dataclass
class _Alarm:
    """One alarm's memory; see `Alarms`."""

    look: Look
    patience: int = PATIENCE
    bad: int = 0  # periods beyond the threshold: in a row, or since it spoke last
    standing: bool = False

    def check(self, values: Mapping[str, float]) -> str | None:
        seen = self.look(values)
        if seen is None:
            return None
        if self.standing and seen.excess < CLEAR:
            self.standing, self.bad = False, 0
        if seen.excess <= 1:
            self.bad = self.bad if self.standing else 0
            return None
        self.bad += 1
        if self.bad < (REMIND if self.standing else self.patience):
            return None
        line = f"still so: {seen.line}" if self.standing else seen.line
        self.standing, self.bad = True, 0
        return line


class Alarms:
    """Watches one stage of training.

    `settings` is the stage's config section; what it lacks is taken as the references
    have it, so that an empty one will do.
    """

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = settings
        self._latent_std = collections.deque(maxlen=DRIFT_PERIODS)
        self._settling = DRIFT_PERIODS
        self._alarms = [
            _Alarm(self._skipped, patience=1),
            _Alarm(_GradNorm("grad_norm", self._calmer()), patience=1),
            _Alarm(
                _GradNorm("disc_grad_norm", self._calmer("adversarial.")), patience=1
            ),
            _Alarm(self._kl_collapse),
            _Alarm(self._latent_range),
            _Alarm(self._latent_drift),
            _Alarm(self._dead_channels),
            _Alarm(self._dead_codes),
            _Alarm(self._discriminator),
            _Alarm(self._adaptive_weight),
            _Alarm(self._data_wait),
        ]
        self._not_finite = _Alarm(self._nan, patience=1)

    def check(self, values: Mapping[str, float]) -> list[str]:
        """Lines to say after a log period with these mean metrics, most often none."""
        finite = {name: v for name, v in values.items() if math.isfinite(v)}
        lines = [self._not_finite.check(values)]
        lines += [alarm.check(finite) for alarm in self._alarms]
        return [line for line in lines if line is not None]

    def _setting(self, path: str, default: Any) -> Any:
        """The value at a dotted path of the stage's section."""
        *sections, field = path.split(".")
        section = self._settings
        for name in sections:
            section = section.get(name) or {}
        return section.get(field, default)

    def _calmer(self, part: str = "") -> str:
        """How to make the steps of an optimizer of this stage smaller."""
        rate = self._setting(f"{part}optim.learning_rate", None)
        now = "" if rate is None else f" (now {rate:g})"
        mend = f"lower {part}optim.learning_rate of this stage{now}"
        if self._setting(f"{part}optim.clip_norm", 0.0):
            return mend
        return f"{mend}, or set its {part}optim.clip_norm=1.0"

    # --- any stage

    def _nan(self, values):
        names = [name for name, v in values.items() if not math.isfinite(v)]
        shown = ", ".join(f"{name} {values[name]}" for name in names)
        return Sighting(
            math.inf if names else 0.0,
            f"{shown}, which is no finite number: a metric that can't be trusted, and"
            f" no alarm on it; if the pictures suffer too, {self._calmer()}",
        )

    def _skipped(self, values):
        if "skipped" not in values:
            return None
        fraction = values["skipped"]
        return Sighting(
            math.inf if fraction > 0 else 0.0,
            f"skipped {100 * fraction:.3g}% of the last steps, where above 0% is too"
            f" many: loss or gradients were not finite; {self._calmer()}",
        )

    def _data_wait(self, values):
        if "data_wait" not in values:
            return None
        wait = values["data_wait"]
        mend = (
            "store the pictures at config.resolution, so that data.ops have less to do"
        )
        if not self._setting("cache_latents", True):
            mend = f"set cache_latents=True of this stage, or {mend}"
        return Sighting(
            wait / DATA_WAIT,
            f"data_wait {wait:.0%} is above {DATA_WAIT:.0%}: the device is idle while"
            f" batches are made; {mend}",
        )

    # --- the latent

    def _kl_collapse(self, values):
        kl_weight = self._setting("loss.kl_weight", 1e-6)
        if "kl_per_dim" not in values or not kl_weight > 0:
            return None
        kl = values["kl_per_dim"]
        return Sighting(
            _ratio(KL_PER_DIM, kl),
            f"kl_per_dim {kl:.2g} is below {KL_PER_DIM:g} nat: the posterior has"
            " collapsed, and latents tell nothing of the picture; lower"
            f" autoencoder_stage.loss.kl_weight (now {kl_weight:g}, the references"
            " have 1e-06), or start with less noise: autoencoder.init_logvar=-6.0",
        )

    def _latent_range(self, values):
        if "latent_std" not in values:
            return None
        std, (low, high) = values["latent_std"], LATENT_STD
        mend = "raise" if std > high else "lower"
        return Sighting(
            max(_ratio(low, std), std / high),
            f"latent_std {std:.3g} is outside of [{low:g}, {high:g}]: {mend}"
            " autoencoder_stage.loss.kl_weight, or codebook_weight of a VQ"
            " autoencoder, which holds the latent near its codes",
        )

    def _latent_drift(self, values):
        if "latent_std" not in values:
            return None
        if self._settling:
            self._settling -= 1
            return None
        std, past = values["latent_std"], self._latent_std
        past.append(std)
        return Sighting(
            max(_ratio(std, past[0]), _ratio(past[0], std)) / DRIFT,
            f"latent_std {std:.3g} was {past[0]:.3g} {len(past) - 1} log periods ago,"
            f" more than a factor {DRIFT:g}: the latent does not settle;"
            " lower autoencoder_stage.optim.learning_rate, or raise"
            " autoencoder_stage.loss.kl_weight (codebook_weight of a VQ autoencoder)",
        )

    def _dead_channels(self, values):
        stds = {
            int(name.removeprefix("latent_std/")): v
            for name, v in values.items()
            if name.startswith("latent_std/")
        }
        if not stds:
            return None
        mean = sum(stds.values()) / len(stds)
        limit = DEAD_CHANNEL * mean
        dead = [str(channel) for channel in sorted(stds) if stds[channel] < limit]
        shown = ", ".join(dead[:8]) + (", …" if len(dead) > 8 else "")
        lowest = min(stds.values())
        return Sighting(
            _ratio(limit, lowest),
            f"latent_std of {len(dead)} in {len(stds)} channels ({shown}) is down to"
            f" {lowest:.2g}, below a twentieth of the mean {mean:.3g}: they carry"
            " nothing; lower autoencoder_stage.loss.kl_weight, or take fewer of"
            " autoencoder.embed_dim and z_channels",
        )

    def _dead_codes(self, values):
        if not {"dead_codes", "code_tokens", "codes"} <= values.keys():
            return None
        dead, tokens, codes = (
            values[name] for name in ("dead_codes", "code_tokens", "codes")
        )
        if tokens < TOKENS_PER_CODE * codes:
            return None
        return Sighting(
            dead / DEAD_CODES,
            f"dead_codes {dead:.0%} is above {DEAD_CODES:.0%}: that many of {codes:.0f}"
            f" codes stood for none of {tokens:.0f} tokens; set"
            " autoencoder.ema_decay=0.99 and autoencoder.revive_below=0.01, or a"
            " smaller autoencoder.n_embed",
        )

    # --- the discriminator

    def _discriminator(self, values):
        if not {"disc_loss", "logits_real", "logits_fake"} <= values.keys():
            return None
        kind = self._setting("adversarial.disc_loss", "hinge")
        loss = values["disc_loss"]
        lowest = DISC_LOSS * self._setting("adversarial.disc_factor", 1.0)
        gap = values["logits_real"] - values["logits_fake"]
        excess = max(_ratio(lowest, loss), gap / LOGIT_GAP[kind])
        return Sighting(
            excess,
            f"disc_loss {loss:.2g} (saturated below {lowest:g}), logits_real -"
            f" logits_fake {gap:.3g} (above {LOGIT_GAP[kind]:g}): the discriminator"
            " has won and teaches nothing; lower"
            " autoencoder_stage.adversarial.optim.learning_rate or net.ndf, or start"
            " it later by adversarial.disc_start",
        )

    def _adaptive_weight(self, values):
        disc_weight = self._setting("adversarial.disc_weight", 0.5)
        if "d_weight" not in values or not disc_weight > 0:
            return None
        weight = values["d_weight"]
        low, high = RATIO_LOW * disc_weight, RATIO_HIGH * disc_weight
        if weight > high:
            text = (
                f"above {high:g}, at its clip: the discriminator counts for less than"
                " was asked; raise autoencoder_stage.adversarial.disc_weight (now"
                f" {disc_weight:g}), which moves the clip too"
            )
        else:
            text = (
                f"below {low:g}: the discriminator's gradient dwarfs that of the"
                " reconstruction; lower"
                " autoencoder_stage.adversarial.optim.learning_rate"
            )
        return Sighting(
            max(_ratio(low, weight), weight / high), f"d_weight {weight:.3g} is {text}"
        )


class _GradNorm:
    """Looks at a gradient norm against the median of its last calm periods."""

    def __init__(self, name: str, mend: str):
        self._name, self._mend = name, mend
        self._past = collections.deque(maxlen=MEDIAN_PERIODS[1])

    def __call__(self, values):
        if self._name not in values:
            return None
        norm, median = values[self._name], 0.0
        if len(self._past) >= MEDIAN_PERIODS[0]:
            median = statistics.median(self._past)
        excess = norm / (GRAD_NORM * median) if median else 0.0
        if excess <= 1:
            self._past.append(norm)
        return Sighting(
            excess,
            f"{self._name} {norm:.3g} is above {GRAD_NORM:g} times its running median"
            f" {median:.3g}; {self._mend}",
        )


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


def too_many_skips(
    in_row: int, limit: int, stage: str, learning_rate: float
) -> UserError | None:
    """The error that ends a run whose last `in_row` steps were not finite, if it must.

    `limit` is the number of such steps that ends it.
    """
    if in_row == 0 or in_row < limit:
        return None
    field = f"{stage}_stage.optim"
    return UserError(
        f"{field}.learning_rate: {learning_rate:g}, and loss or gradients of the last"
        f" {in_row} steps were not finite; lower it, or set {field}.clip_norm=1.0, and"
        " run again: it goes on from the last checkpoint"
    )
