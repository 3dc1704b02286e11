"""DDIM against the reference's runs, a closed-form flow, and DDPM's ancestral loop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, samplers, schedules
from tests import parity

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)

PLAIN = [
    f"ddim_{spacing}_S{steps}_eta{eta}"
    for spacing in samplers.SPACINGS
    for steps in (5, 10, 20, 50)
    for eta in (0.0, 0.5, 1.0)
]
OTHERS = [
    "ddim_cfg7.5_S10_eta0.0",
    "ddim_cfg7.5_S20_eta0.0",
    "ddim_v_S10_eta0.0_cfg1.0",
    "ddim_v_S10_eta0.5_cfg1.0",
    "ddim_v_S10_eta0.0_cfg7.5",
    "ddim_temperature0.7_S10_eta0.5",
]
TIMESTEPS = [
    (spacing, steps, total)
    for spacing in samplers.SPACINGS
    for total, counts in (
        (20, (1, 2, 3, 5, 7, 10, 20)),
        (1000, (1, 2, 3, 5, 7, 10, 20, 25, 30, 50, 64, 100, 150, 200, 250, 300)),
        (1000, (333, 400, 500, 600, 999, 1000)),
    )
    for steps in counts
]


def net(z_t, t, context):
    """The fixtures' net; it is elementwise, so their channel order may stay."""
    t = t.astype(jnp.float32)
    out = 0.3 * z_t + 0.2 * jnp.tanh(z_t)
    out += denoiser.per_example(0.1 * jnp.sin(t / 100), z_t)
    shift = 0.2 * jnp.mean(context, (1, 2)) * jnp.cos(t / 250)
    return out + denoiser.per_example(shift, z_t)


def setting(case, name, default):
    found = re.search(rf"{name}([\d.]+)", case)
    return float(found[1]) if found else default


def run(io, case):
    """Samples one case of the fixture, with the noise that the reference drew."""
    steps, spacing = (
        int(setting(case, "_S", None)),
        "quad" if "quad" in case else "uniform",
    )
    guidance_scale = setting(case, "cfg", 1.0)
    uncond = None if guidance_scale == 1.0 else io["uncond_context"]
    denoise = denoiser.make_denoiser(
        net,
        SCHEDULE,
        "v" if "_v_" in case else "eps",
        io["context"],
        uncond,
        guidance_scale,
    )
    timesteps = samplers.ddim_timesteps(steps, 1000, spacing, reference=True)
    tables = samplers.ddim_tables(SCHEDULE, timesteps, setting(case, "eta", 0.0))
    return samplers.ddim(
        denoise,
        jnp.asarray(io["x_T"]),
        tables,
        jax.random.key(0),
        temperature=setting(case, "temperature", 1.0),
        noise=jnp.asarray(io["noise"][:steps]),
        trajectory=True,
    )


@pytest.mark.parametrize("case", PLAIN + OTHERS)
def test_ddim_is_the_reference_s(case):
    _, _, io = parity.load("ddim")
    z, trajectory = run(io, case)
    final = io[f"{case}/out"] if f"{case}/out" in io else io[f"{case}/x_inter"][-1]
    worst = np.abs(z - final).max()
    if f"{case}/pred_x0" in io:  # its entry 0 is x_T
        worst = max(worst, np.abs(trajectory - io[f"{case}/pred_x0"][1:]).max())
    if f"{case}/pred_x0_last" in io:
        worst = max(worst, np.abs(trajectory[-1] - io[f"{case}/pred_x0_last"]).max())
    print(f"{case}: {worst:.1e}")
    assert worst < 5e-5


def test_guidance_may_depend_on_t():
    """The reference's `ucg_schedule`, a scale for each step, needs no code of ours."""
    _, _, io = parity.load("ddim")
    scales = io["ddim_ucg_schedule_S10/scales"]
    timesteps = samplers.ddim_timesteps(10, 1000)
    scale_at = np.zeros(1000)
    scale_at[timesteps[::-1]] = scales

    def denoise(z_t, t):
        return denoiser.make_denoiser(
            net,
            SCHEDULE,
            "eps",
            io["context"],
            io["uncond_context"],
            jnp.asarray(scale_at, jnp.float32)[t],
        )(z_t, t)

    tables = samplers.ddim_tables(SCHEDULE, timesteps)
    z, _ = samplers.ddim(denoise, jnp.asarray(io["x_T"]), tables, jax.random.key(0))
    np.testing.assert_allclose(z, io["ddim_ucg_schedule_S10/out"], atol=5e-5)


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_all_steps_with_eta_1_are_the_ancestral_sampler(parameterization):
    meta, _, io = parity.load("ddpm_ancestral")
    schedule = schedules.make_schedule(**meta["config"])
    tables = samplers.ddim_tables(schedule, samplers.ddim_timesteps(20, 20), eta=1.0)
    denoise = denoiser.make_denoiser(net, schedule, parameterization, io["context"])
    z, _ = samplers.ddim(
        denoise,
        jnp.asarray(io["x_T"]),
        tables,
        jax.random.key(0),
        noise=jnp.asarray(io["noise"][:20]),
    )
    worst = np.abs(z - io[f"{parameterization}/out"]).max()
    print(f"{parameterization}: {worst:.1e}")
    assert worst < 5e-5


@pytest.mark.parametrize("spacing, steps, total", TIMESTEPS)
def test_reference_timesteps(spacing, steps, total):
    meta, _, io = parity.load("ddim_timesteps")
    name = f"{spacing}_S{steps}_T{total}"
    if name in meta["out_of_range"]:
        with pytest.raises(UserError, match=f"steps: {steps} .*reference=False"):
            samplers.ddim_timesteps(steps, total, spacing, reference=True)
    else:
        actual = samplers.ddim_timesteps(steps, total, spacing, reference=True)
        np.testing.assert_array_equal(actual, io[name])


@pytest.mark.parametrize("spacing, steps, total", TIMESTEPS)
def test_default_timesteps_are_as_many_as_asked(spacing, steps, total):
    _, _, io = parity.load("ddim_timesteps")
    actual = samplers.ddim_timesteps(steps, total, spacing)
    assert actual.shape == (steps,) and (np.diff(actual) > 0).all()
    assert actual[0] == (steps < total) and actual[-1] < total
    expected = io[f"{spacing}_S{steps}_T{total}"]
    if len(np.unique(expected)) == steps < total:
        np.testing.assert_array_equal(actual, expected)


def test_repaired_timesteps_are_evenly_spaced_to_the_end():
    for steps in (3, 30, 64, 150, 300, 333, 400, 600, 999):
        t = samplers.ddim_timesteps(steps, 1000)
        assert np.ptp(np.diff(t)) <= 1
        assert t[-1] == 1001 - -(-1000 // steps)
    assert samplers.ddim_timesteps(1000, 1000).tolist() == list(range(1000))


def test_every_step_count_is_in_range_for_both_spacings():
    for total in (2, 3, 7, 50):
        for steps in range(1, total + 1):
            for spacing in samplers.SPACINGS:
                t = samplers.ddim_timesteps(steps, total, spacing)
                assert len(np.unique(t)) == steps and 0 <= t[0] and t[-1] < total


def test_diffusers_visits_the_same_timesteps():
    _, _, io = parity.load("diffusers_schedulers")
    actual = samplers.ddim_timesteps(20, 1000)[::-1]
    np.testing.assert_array_equal(actual, io["ddim_timesteps_20"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_tables_are_the_reference_s(spacing, steps, eta):
    _, _, io = parity.load("ddim_timesteps")
    name = f"params_{spacing}_S{steps}_eta{eta}"
    timesteps = samplers.ddim_timesteps(steps, 1000, spacing, reference=True)
    # The reference starts from the float32 buffer, here as it was rounded.
    rounded = np.float64(np.float32(SCHEDULE.alphas_cumprod))
    as_stored = schedules.make_schedule(
        given_betas=1 - rounded / np.append(1.0, rounded[:-1])
    )
    tables = samplers.ddim_tables(as_stored, timesteps, eta)
    for actual, key in ((tables.alpha, "alphas"), (tables.alpha_prev, "alphas_prev")):
        np.testing.assert_allclose(actual, io[f"{name}/{key}"], rtol=0, atol=1e-12)
    # It also takes 1 - alpha / alpha_prev in float32.
    np.testing.assert_allclose(tables.sigma, io[f"{name}/sigmas"], atol=5e-8)
    exact = samplers.ddim_tables(SCHEDULE, timesteps, eta)
    np.testing.assert_allclose(exact.sigma, io[f"{name}/sigmas"], atol=1e-5)


def test_ddim_converges_to_the_flow_of_a_gaussian_with_order_1():
    """For z ~ N(m, s²) the exact denoiser and its probability flow are known."""
    m, s = 0.3, 0.5

    def flow(z, start, end):
        scale = np.sqrt((end * s**2 + 1 - end) / (start * s**2 + 1 - start))
        return np.sqrt(end) * m + scale * (z - np.sqrt(start) * m)

    def denoise(z_t, t):
        a = denoiser.lookup(SCHEDULE.alphas_cumprod, t, z_t)
        away = (z_t - jnp.sqrt(a) * m) / (a * s**2 + 1 - a)
        return m + jnp.sqrt(a) * s**2 * away, jnp.sqrt(1 - a) * away

    z = jnp.linspace(-3, 3, 13)[:, None]
    errors = []
    for steps in (25, 50, 100, 200):
        tables = samplers.ddim_tables(SCHEDULE, samplers.ddim_timesteps(steps, 1000))
        out, _ = samplers.ddim(denoise, z, tables, jax.random.key(0))
        exact = flow(np.asarray(z), tables.alpha[-1], tables.alpha_prev[0])
        errors.append(np.abs(out - exact).max())
    ratios = np.divide(errors[:-1], errors[1:])
    print("errors", errors, "ratios", ratios)
    np.testing.assert_allclose(ratios, 2, atol=0.35)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_drawn_noise_has_the_variance_that_the_tables_say(eta):
    """For N(0, 1) the exact denoiser is linear, so variances follow by hand."""

    def denoise(z_t, t):
        a = denoiser.lookup(SCHEDULE.alphas_cumprod, t, z_t)
        return jnp.sqrt(a) * z_t, jnp.sqrt(1 - a) * z_t

    z = jax.random.normal(jax.random.key(0), [64, 128])
    tables = samplers.ddim_tables(SCHEDULE, samplers.ddim_timesteps(20, 1000), eta)
    out, _ = samplers.ddim(denoise, z, tables, jax.random.key(1))

    variance, kept = 1.0, 1.0
    for _, a, a_prev, sigma in zip(*(table[::-1] for table in tables), strict=True):
        gain = np.sqrt(a_prev * a) + np.sqrt((1 - a_prev - sigma**2) * (1 - a))
        variance, kept = gain**2 * variance + sigma**2, gain * kept
    assert abs(np.var(out) - variance) < 0.03
    assert abs(np.mean(out * z) - kept) < 0.03
    fresh = out - kept * z  # each example gets its own
    assert abs(np.corrcoef(fresh[0], fresh[1])[0, 1]) < 0.3


def test_one_key_per_example_makes_noise_independent_of_the_batch():
    def denoise(z_t, t):
        return 0.5 * z_t, 0.5 * z_t

    def sample(rows):
        return samplers.sample_ddim(
            denoise, z[rows], SCHEDULE, keys[rows], steps=5, eta=1.0
        )[0]

    keys = jax.random.split(jax.random.key(0), 4)
    z = jax.random.normal(jax.random.key(1), [4, 2, 2, 3])
    together = sample(jnp.arange(4))
    np.testing.assert_array_equal(together[2:], sample(jnp.asarray([2, 3])))
    assert not np.allclose(together[0] - together[1], 0)


def test_guidance_and_seed_compile_once():
    traces = []

    @jax.jit
    def sample(seed, guidance_scale):
        traces.append(1)
        key = jax.random.key(seed)
        z = jax.random.normal(key, [2, 4, 4, 3])
        context = jnp.ones([2, 3, 5])
        denoise = denoiser.make_denoiser(
            net, SCHEDULE, "eps", context, 0 * context, guidance_scale
        )
        return samplers.SAMPLERS["ddim"](
            denoise, z, SCHEDULE, jax.random.fold_in(key, 1), steps=3, eta=0.5
        )[0]

    pictures = [sample(seed, scale) for seed in (0, 1) for scale in (1.0, 7.5)]
    assert len(traces) == 1
    assert len({float(p.sum()) for p in pictures}) == 4


def test_trajectory_only_where_asked():
    def denoise(z_t, t):
        return 0.5 * z_t, z_t

    z = jnp.ones([2, 4, 4, 3])
    tables = samplers.ddim_tables(SCHEDULE, samplers.ddim_timesteps(6, 1000))
    plain, nothing = samplers.ddim(denoise, z, tables, jax.random.key(0))
    same, x0_hats = samplers.ddim(
        denoise, z, tables, jax.random.key(0), trajectory=True
    )
    assert nothing is None and x0_hats.shape == (6, 2, 4, 4, 3)
    np.testing.assert_array_equal(x0_hats[0], 0.5 * z)
    np.testing.assert_array_equal(plain, same)


def test_errors_name_the_value_and_the_legal_ones():
    with pytest.raises(UserError, match="steps: 0; choose from 1 to 1000"):
        samplers.ddim_timesteps(0, 1000)
    with pytest.raises(UserError, match="'cubic'.*uniform, quad"):
        samplers.ddim_timesteps(10, 1000, "cubic")
    with pytest.raises(UserError, match="eta: 1.5"):
        samplers.ddim_tables(SCHEDULE, samplers.ddim_timesteps(10, 1000), 1.5)
