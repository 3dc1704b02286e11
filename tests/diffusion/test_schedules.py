"""Tables against the reference's buffers, and the mistakes that a user can make."""

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import schedules
from tests import parity

CASES = {
    "linear_0.00085_0.012": dict(linear_start=0.00085, linear_end=0.012),
    "linear_0.0015_0.0195": dict(linear_start=0.0015, linear_end=0.0195),
    "cosine": dict(schedule="cosine"),
    "sqrt_linear_0.00085_0.012": dict(
        schedule="sqrt_linear", linear_start=0.00085, linear_end=0.012
    ),
    "sqrt_linear_0.0015_0.0195": dict(
        schedule="sqrt_linear", linear_start=0.0015, linear_end=0.0195
    ),
    "sqrt_0.00085_0.012": dict(schedule="sqrt", linear_start=0.00085, linear_end=0.012),
    "sqrt_0.0015_0.0195": dict(schedule="sqrt", linear_start=0.0015, linear_end=0.0195),
    "linear_vpost0.3": dict(linear_start=0.00085, linear_end=0.012, v_posterior=0.3),
    "squaredcos_cap_v2": dict(schedule="squaredcos_cap_v2"),
}


def test_cases_are_all_that_the_fixture_has():
    _, _, io = parity.load("schedules")
    assert {name.split("/")[0] for name in io if "/" in name} == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_tables_are_the_reference_s(case):
    _, _, io = parity.load("schedules")
    schedule = schedules.make_schedule(**CASES[case])
    checked = 0
    for name, expected in io.items():
        prefix, _, table = name.partition("/")
        if prefix != case:
            continue
        checked += 1
        if table.endswith("_f64"):
            actual = getattr(schedule, table.removesuffix("_f64"))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
        elif table.startswith("lvlb_weights_"):
            # The reference computes these in float32, from float32 tables, whose
            # alphas_cumprod are denormal at the end of `sqrt`.
            actual = schedules.lvlb_weights(schedule, table.rpartition("_")[2])
            np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-18)
        else:
            actual = getattr(schedule, table).astype(np.float32)
            np.testing.assert_array_equal(actual, expected, err_msg=table)
        assert actual.shape == expected.shape
    assert checked


def test_diffusers_has_the_same_stable_diffusion_schedule():
    _, _, io = parity.load("diffusers_schedulers")
    schedule = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)
    expected = io["ddim_alphas_cumprod"]
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, atol=1e-6)


def test_linear_is_the_square_of_evenly_spaced_roots():
    actual = schedules.betas("linear", 3, 0.01, 0.09)
    np.testing.assert_allclose(actual, [0.01, 0.04, 0.09], rtol=1e-14)


def test_given_betas_replace_the_named_schedule():
    schedule = schedules.make_schedule(given_betas=[0.1, 0.5])
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.45], rtol=1e-15)
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, [1.0, 0.9], rtol=1e-15)
    np.testing.assert_allclose(
        schedule.posterior_variance, [0.0, 0.5 * 0.1 / 0.55], rtol=1e-14
    )
    assert schedule.posterior_log_variance_clipped[0] == np.log(1e-20)


def test_x0_weights_keep_the_slip_and_entry_0_repeats_entry_1():
    schedule = schedules.make_schedule(given_betas=[0.1, 0.5])
    expected = 0.5 * np.sqrt(0.45) / (2 - 0.45)
    actual = schedules.lvlb_weights(schedule, "x0")
    np.testing.assert_allclose(actual, [expected, expected], rtol=1e-14)


def test_errors_list_the_legal_names():
    with pytest.raises(UserError, match="'lineer'.*linear, cosine, sqrt_linear, sqrt,"):
        schedules.make_schedule(schedule="lineer")
    with pytest.raises(UserError, match="'epsilon'.*eps, x0, v"):
        schedules.lvlb_weights(schedules.make_schedule(), "epsilon")
