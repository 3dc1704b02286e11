import math
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from ldm_jax import defaults
from ldm_jax.config import UserError
from ldm_jax.train import alarms as alarms_lib
from ldm_jax.train.alarms import PATIENCE, REMIND, Alarms

CODES = dict(code_tokens=10_240.0, codes=1024.0)
FAIR = dict(disc_loss=0.5, logits_real=1.0, logits_fake=-1.0)


class Case(NamedTuple):
    """An alarm on both sides of its threshold."""

    patience: int  # periods until it speaks
    fires: dict
    edge: dict  # a hair within the threshold
    margin: dict | None  # within it, but not by as much as clears
    clears: dict
    words: list  # of the line


CASES = {
    "kl": Case(
        PATIENCE,
        dict(kl_per_dim=9.9e-4),
        dict(kl_per_dim=1e-3),
        dict(kl_per_dim=1.2e-3),
        dict(kl_per_dim=1.3e-3),
        ["kl_per_dim 0.00099", "below 0.001 nat", "autoencoder_stage.loss.kl_weight"],
    ),
    "latent_low": Case(
        PATIENCE,
        dict(latent_std=0.049),
        dict(latent_std=0.05),
        dict(latent_std=0.06),
        dict(latent_std=0.063),
        ["latent_std 0.049", "[0.05, 20]", "lower autoencoder_stage.loss.kl_weight"],
    ),
    "latent_high": Case(
        PATIENCE,
        dict(latent_std=20.1),
        dict(latent_std=20.0),
        dict(latent_std=16.1),
        dict(latent_std=15.9),
        ["latent_std 20.1", "[0.05, 20]", "raise autoencoder_stage.loss.kl_weight"],
    ),
    "channels": Case(
        PATIENCE,
        {"latent_std/0": 2.0, "latent_std/1": 0.01, "latent_std/2": 1.99},
        {"latent_std/0": 2.0, "latent_std/1": 0.1, "latent_std/2": 1.9},
        {"latent_std/0": 2.0, "latent_std/1": 0.08, "latent_std/2": 2.0},
        {"latent_std/0": 2.0, "latent_std/1": 0.09, "latent_std/2": 2.0},
        ["1 in 3 channels (1)", "0.01", "a twentieth", "autoencoder.embed_dim"],
    ),
    "codes": Case(
        PATIENCE,
        CODES | dict(dead_codes=0.51),
        CODES | dict(dead_codes=0.5),
        CODES | dict(dead_codes=0.41),
        CODES | dict(dead_codes=0.39),
        ["dead_codes 51%", "above 50%", "1024 codes", "autoencoder.revive_below"],
    ),
    "disc_loss": Case(
        PATIENCE,
        FAIR | dict(disc_loss=0.019),
        FAIR | dict(disc_loss=0.02),
        FAIR | dict(disc_loss=0.024),
        FAIR | dict(disc_loss=0.026),
        ["disc_loss 0.019", "below 0.02", "adversarial.optim.learning_rate"],
    ),
    "logit_gap": Case(
        PATIENCE,
        FAIR | dict(logits_real=3.1),
        FAIR | dict(logits_real=3.0),
        FAIR | dict(logits_real=2.3),
        FAIR | dict(logits_real=2.1),
        ["logits_real - logits_fake 4.1", "above 4", "adversarial.disc_start"],
    ),
    "d_weight_high": Case(
        PATIENCE,
        dict(d_weight=4501.0),
        dict(d_weight=4500.0),
        dict(d_weight=3601.0),
        dict(d_weight=3599.0),
        ["d_weight 4.5e+03", "above 4500", "adversarial.disc_weight (now 0.5)"],
    ),
    "d_weight_low": Case(
        PATIENCE,
        dict(d_weight=4.9e-5),
        dict(d_weight=5e-5),
        dict(d_weight=6.2e-5),
        dict(d_weight=6.3e-5),
        ["d_weight 4.9e-05", "below 5e-05", "adversarial.optim.learning_rate"],
    ),
    "skipped": Case(
        1,
        dict(skipped=0.03),
        dict(skipped=0.0),
        None,
        dict(skipped=0.0),
        ["skipped 3% of the last steps", "above 0%", "optim.clip_norm=1.0"],
    ),
    "data_wait": Case(
        PATIENCE,
        dict(data_wait=0.51),
        dict(data_wait=0.5),
        dict(data_wait=0.41),
        dict(data_wait=0.39),
        ["data_wait 51%", "above 50%", "data.ops"],
    ),
    "nan": Case(
        1,
        dict(psnr=math.nan, lpips=-math.inf),
        dict(psnr=20.0),
        None,
        dict(psnr=20.0),
        ["psnr nan, lpips -inf", "optim.learning_rate"],
    ),
}
each_alarm = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _heard(alarms, values, periods=1):
    """How many lines were said in each of some equal periods."""
    return [len(alarms.check(values)) for _ in range(periods)]


@pytest.fixture
def alarms():
    return Alarms(ConfigDict())


@each_alarm
def test_speaks_once_until_it_has_cleared(alarms, case):
    wait = [0] * (case.patience - 1)
    assert _heard(alarms, case.fires, case.patience + 5) == wait + [1] + [0] * 5
    if case.margin is not None:
        assert _heard(alarms, case.margin) == [0]
        assert _heard(alarms, case.fires, case.patience + 2) == [0] * (
            case.patience + 2
        )
    assert _heard(alarms, case.clears) == [0]
    assert _heard(alarms, case.fires, case.patience + 1) == wait + [1, 0]


@each_alarm
def test_says_metric_value_threshold_and_mend(alarms, case):
    lines = [line for _ in range(case.patience) for line in alarms.check(case.fires)]
    assert len(lines) == 1 and "\n" not in lines[0]
    for word in case.words:
        assert word in lines[0]


@each_alarm
def test_is_silent_within_its_threshold(alarms, case):
    for values in (case.edge, case.clears):
        assert not any(_heard(alarms, values, case.patience + 1))


@each_alarm
def test_a_short_trouble_is_none(alarms, case):
    """Periods beyond the threshold count only in a row."""
    for _ in range(3):
        assert not any(_heard(alarms, case.fires, case.patience - 1))
        assert _heard(alarms, case.edge) == [0]


@pytest.mark.parametrize("case", [CASES[k] for k in CASES if k != "nan"])
def test_absent_metrics_neither_speak_nor_clear(alarms, case):
    assert _heard(alarms, {}, case.patience) == [0] * case.patience
    assert sum(_heard(alarms, case.fires, case.patience)) == 1
    assert _heard(alarms, {"loss": 1.0}) == [0]
    assert not any(_heard(alarms, case.fires, case.patience))


@each_alarm
def test_reminds_while_it_stands(alarms, case):
    first = case.patience - 1
    said = [
        (n, line)
        for n in range(first + 2 * REMIND + 1)
        for line in alarms.check(case.fires)
    ]
    assert [n for n, _ in said] == [first, first + REMIND, first + 2 * REMIND]
    assert said[1][1] == f"still so: {said[0][1]}"


def test_several_at_once(alarms):
    values = dict(skipped=0.5, kl_per_dim=0.0, data_wait=1.0)
    assert _heard(alarms, values, 3) == [1, 0, 2]


@pytest.mark.parametrize("name", ["kl_per_dim", "latent_std", "d_weight", "disc_loss"])
def test_zero_is_a_value(alarms, name):
    values = (FAIR if name == "disc_loss" else {}) | {name: 0.0}
    assert sum(_heard(alarms, values, PATIENCE)) == 1


def test_a_metric_that_is_not_finite_leaves_its_alarm_as_it_is(alarms):
    lost = dict(data_wait=math.nan, grad_norm=math.nan)
    (line,) = [line for _ in range(5) for line in alarms.check(lost)]
    assert line.startswith("data_wait nan, grad_norm nan, which")
    assert alarms.check(dict(data_wait=0.0)) == []
    assert sum(_heard(alarms, dict(data_wait=0.9), PATIENCE)) == 1
    (line,) = alarms.check(dict(data_wait=math.nan))
    assert line.startswith("data_wait nan")
    assert _heard(alarms, dict(data_wait=0.9)) == [0]


# --- the single alarms


def test_few_tokens_say_nothing_of_codes(alarms):
    few = dict(dead_codes=0.9, code_tokens=10_239.0, codes=1024.0)
    assert not any(_heard(alarms, few, 10))
    assert sum(_heard(alarms, few | dict(code_tokens=10_240.0), 10)) == 1


def test_latent_that_drifts(alarms):
    settled = dict(latent_std=2.0)
    assert not any(_heard(alarms, settled, 20))
    assert not any(_heard(alarms, dict(latent_std=4.0), 20))  # a factor of 2, no more
    jump = dict(latent_std=8.1)
    said = [alarms.check(jump) for _ in range(20)]
    (line,) = said[PATIENCE - 1]
    assert "latent_std 8.1 was 4 9 log periods ago" in line
    assert "more than a factor 2" in line
    assert "autoencoder_stage.optim.learning_rate" in line
    assert sum(map(len, said)) == 1
    # It has settled at another value, which clears the alarm; down is a drift too.
    assert sum(_heard(alarms, dict(latent_std=4.0), 20)) == 1


def test_slow_drift_adds_up_over_the_window(alarms):
    said = [alarms.check(dict(latent_std=1.1**n)) for n in range(28)]
    assert sum(map(len, said[:20])) == 0
    # 1.1^9 = 2.4 over the window, 1.1^8 = 2.1 the check before.
    (line,) = said[20]
    assert "latent_std 6.73 was 2.85 9 log periods ago" in line


def test_the_first_periods_are_no_drift(alarms):
    grown = [_heard(alarms, dict(latent_std=0.5 * 1.3**n))[0] for n in range(10)]
    assert not any(grown)
    assert not any(_heard(alarms, dict(latent_std=5.0), 10))


def test_dead_channels_are_listed_in_order(alarms):
    values = {f"latent_std/{n}": 0.001 if 2 <= n < 12 else 1.0 for n in range(64)}
    _heard(alarms, values, PATIENCE - 1)
    (line,) = alarms.check(values)
    assert "10 in 64 channels (2, 3, 4, 5, 6, 7, 8, 9, …)" in line


def test_no_kl_weight_no_collapse():
    alarms = Alarms(ConfigDict(dict(loss=dict(kl_weight=0.0))))
    assert not any(_heard(alarms, dict(kl_per_dim=0.0), 5))


def test_the_discriminator_by_its_own_loss():
    """A softplus loss uses gaps that the hinge has no use for."""
    vanilla = Alarms(ConfigDict(dict(adversarial=dict(disc_loss="vanilla"))))
    assert not any(_heard(vanilla, FAIR | dict(logits_real=7.0), 5))
    assert sum(_heard(vanilla, FAIR | dict(logits_real=7.1), 5)) == 1


def test_the_discriminators_factor_scales_its_loss():
    section = ConfigDict(dict(adversarial=dict(disc_factor=0.1)))
    assert not any(_heard(Alarms(section), FAIR | dict(disc_loss=0.002), 5))
    assert sum(_heard(Alarms(section), FAIR | dict(disc_loss=0.0019), 5)) == 1


def test_the_clip_scales_with_the_discriminators_weight():
    section = ConfigDict(dict(adversarial=dict(disc_weight=0.75)))
    assert not any(_heard(Alarms(section), dict(d_weight=6750.0), 5))
    assert sum(_heard(Alarms(section), dict(d_weight=6751.0), 5)) == 1


def test_a_weight_of_zero_can_not_be_stuck():
    section = ConfigDict(dict(adversarial=dict(disc_weight=0.0)))
    assert not any(_heard(Alarms(section), dict(d_weight=0.0), 5))


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("grad_norm", "lower optim.learning_rate of this stage"),
        ("disc_grad_norm", "lower adversarial.optim.learning_rate of this stage"),
    ],
)
def test_gradients_that_explode(alarms, name, mend):
    calm = [1.0, 2.0, 3.0, 4.0]
    for norm in calm:
        assert alarms.check({name: norm}) == []
    # Too few for a median; what follows is one of six, whose median is 3.5.
    assert alarms.check({name: 1e6}) == []
    assert alarms.check({name: 4.0}) == []
    assert alarms.check({name: 3500.0}) == []  # now the median is 4
    (line,) = alarms.check({name: 4001.0})
    assert f"{name} 4e+03 is above 1000 times its running median 4;" in line
    assert mend in line and "clip_norm=1.0" in line
    # Norms of an explosion don't move the median, so a long one does not clear itself.
    assert not any(_heard(alarms, {name: 1e5}, 40))
    assert _heard(alarms, {name: 3201.0}) == [0]
    assert alarms.check({name: 1e5}) == []
    assert _heard(alarms, {name: 10.0}) == [0]
    assert _heard(alarms, {name: 1e5}) == [1]


def test_the_median_runs(alarms):
    assert not any(_heard(alarms, dict(grad_norm=1e-3), 50))
    for norm in (0.9, 2.0):  # the last 50 are what counts
        assert not any(_heard(alarms, dict(grad_norm=norm), 51))
    assert not any(_heard(alarms, dict(grad_norm=1900.0)))
    assert any(_heard(alarms, dict(grad_norm=2100.0)))


def test_mends_fit_the_settings():
    section = defaults.stage()
    section.cache_latents = False
    section.optim.update(dict(learning_rate=2e-3, clip_norm=1.0))
    (line,) = Alarms(section).check(dict(skipped=1.0))
    assert "skipped 100% of the last steps" in line
    assert line.endswith("lower optim.learning_rate of this stage (now 0.002)")
    alarms = Alarms(section)
    _heard(alarms, dict(data_wait=0.9), 2)
    (line,) = alarms.check(dict(data_wait=0.9))
    assert "set cache_latents=True of this stage, or" in line


# Means of the default run, openmoji, whose stages both ended well.
LATENT_STD = """
    0.64 1.12 1.39 1.63 1.74 1.87 1.97 2.00 2.04 2.13 2.16 2.18 2.20 2.19 2.20
    2.19 2.18 2.18 2.16 2.15 2.13 2.12 2.12 2.10 2.09 2.08 2.07 2.07 2.06 2.06
"""
GRAD_NORM = """
    3720 2950 2860 3080 2890 3550 3310 2920 3300 3170 3270 3110 2790 3010 2580
    2730 3050 2680 2520 2700 2160 1990 1920 2000 1510 1420 1460 1180 1230 1030
"""


def test_a_good_run_hears_nothing():
    alarms = Alarms(defaults.autoencoder_stage())
    rows = zip(LATENT_STD.split(), GRAD_NORM.split(), strict=True)
    for std, norm in rows:
        values = {"latent_std": float(std), "grad_norm": float(norm)}
        values |= {"kl_per_dim": 2.7, "skipped": 0.0, "data_wait": 0.002}
        # Per channel as at the end: from 1.1 to 2.9.
        values |= {f"latent_std/{c}": float(std) * r for c, r in enumerate((0.5, 1.4))}
        assert alarms.check(values) == []


def test_too_many_skips():
    ask = alarms_lib.too_many_skips
    assert ask(49, 50, "diffusion", 2e-3) is None
    assert ask(0, 0, "diffusion", 2e-3) is None
    error = ask(50, 50, "diffusion", 2e-3)
    assert isinstance(error, UserError)
    assert str(error) == (
        "diffusion_stage.optim.learning_rate: 0.002, and loss or gradients of the last"
        " 50 steps were not finite; lower it, or set"
        " diffusion_stage.optim.clip_norm=1.0, and run again: it goes on from the last"
        " checkpoint"
    )
    assert "autoencoder_stage.optim" in str(ask(1, 0, "autoencoder", 1.0))
