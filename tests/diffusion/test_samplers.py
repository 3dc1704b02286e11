"""DDIM, PLMS and DDPM against the reference's runs; editing around them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, editing, grids, guidance, samplers, schedules
from ldm_jax.diffusion import samplers_multistep as multistep
from tests import parity

SCHEDULE = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)
SPACINGS = ("uniform", "quad")

PLAIN = [
    f"ddim_{spacing}_S{steps}_eta{eta}"
    for spacing in SPACINGS
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
    for spacing in SPACINGS
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


def reference_grid(steps, spacing="uniform", schedule=SCHEDULE):
    timesteps = grids.ddim_timesteps(steps, 1000, spacing, reference=True)
    return grids.at_times(schedule, timesteps[::-1], clean=False)


def make_denoiser(io, guidance_scale=1.0, parameterization="eps", schedule=SCHEDULE):
    conds, scales = [io["context"]], []
    if guidance_scale != 1.0:
        conds, scales = [io["uncond_context"], io["context"]], [guidance_scale]
    return denoiser.make_denoiser(net, schedule, parameterization, conds, scales)


def run(io, case):
    """Samples one case of the fixture, with the noise that the reference drew."""
    steps = int(setting(case, "_S", None))
    return samplers.ddim(
        make_denoiser(io, setting(case, "cfg", 1.0), "v" if "_v_" in case else "eps"),
        jnp.asarray(io["x_T"]),
        reference_grid(steps, "quad" if "quad" in case else "uniform"),
        jax.random.key(0),
        eta=setting(case, "eta", 0.0),
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


def test_guidance_may_have_a_scale_for_each_step():
    """The reference's `ucg_schedule`."""
    _, _, io = parity.load("ddim")
    grid = reference_grid(10)
    scale = guidance.scale_per_step(grid.t, io["ddim_ucg_schedule_S10/scales"])
    denoise = make_denoiser(io, scale)
    z, _ = samplers.ddim(denoise, jnp.asarray(io["x_T"]), grid, jax.random.key(0))
    np.testing.assert_allclose(z, io["ddim_ucg_schedule_S10/out"], atol=5e-5)


def test_fewer_scales_than_steps_are_spread_over_them():
    scale = guidance.scale_per_step(np.array([900, 600, 300, 100, 0]), [1.0, 4.0])
    at = scale(jnp.asarray([950, 900, 600, 450, 100, 3]))
    np.testing.assert_allclose(at, [1.0, 1.0, 2.0, 2.5, 4.0, 4.0], atol=1e-6)


def test_a_shortened_run_is_the_reference_s():
    _, _, io = parity.load("ddim")
    timesteps = grids.ddim_timesteps(20, 1000)[
        : int(io["ddim_S20_timesteps10/n_steps"])
    ]
    grid = grids.at_times(SCHEDULE, timesteps[::-1], clean=False)
    z, _ = samplers.ddim(
        make_denoiser(io), jnp.asarray(io["x_T"]), grid, jax.random.key(0)
    )
    np.testing.assert_allclose(z, io["ddim_S20_timesteps10/out"], atol=5e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_blended_inpainting_is_the_reference_s(eta):
    _, _, io = parity.load("ddim")
    grid = reference_grid(10)
    noise = np.zeros([1000, *io["x0"].shape], np.float32)
    noise[np.int64(grid.t[:-1])] = io["noise_q"][:10]
    denoise = editing.inpainter(
        make_denoiser(io),
        SCHEDULE,
        jnp.asarray(io["x0"]),
        jnp.asarray(io["mask"]),
        jax.random.key(0),
        noise=jnp.asarray(noise),
    )
    z, _ = samplers.ddim(
        denoise,
        jnp.asarray(io["x_T"]),
        grid,
        jax.random.key(0),
        eta=eta,
        noise=jnp.asarray(io["noise"][:10]),
    )
    np.testing.assert_allclose(z, io[f"ddim_mask_S10_eta{eta}/out"], atol=5e-5)
    pasted = editing.paste(z, jnp.asarray(io["x0"]), jnp.asarray(io["mask"]))
    kept = np.broadcast_to(io["mask"] == 1, z.shape)
    np.testing.assert_array_equal(pasted[kept], io["x0"][kept])
    made = np.broadcast_to(io["mask"] == 0, z.shape)
    np.testing.assert_array_equal(pasted[made], z[made])


@pytest.mark.parametrize("name, scale", [("", 1.0), ("_cfg3", 3.0)])
def test_inversion_is_the_reference_s_but_for_the_time_it_tells(name, scale):
    """Its `encode` tells the net the number of the step."""
    _, _, io = parity.load("ddim")
    timesteps = grids.ddim_timesteps(50, 1000)
    grid = grids.at_times(SCHEDULE, timesteps[:30][::-1], clean=False)
    told = np.zeros(1000, np.float32)
    told[np.int64(grid.reversed().t[:-1])] = io["encode_S50_t30/t_inputs"]

    def misled(z_t, t, context):
        return net(z_t, jnp.asarray(told)[t], context)

    conds, scales = [io["context"]], []
    if scale != 1:
        conds, scales = [io["uncond_context"], *conds], [scale]
    denoise = denoiser.make_denoiser(misled, SCHEDULE, "eps", conds, scales)
    z, _ = editing.invert(denoise, jnp.asarray(io["x0"]), grid)
    np.testing.assert_allclose(z, io[f"encode_S50_t30{name}/out"], atol=5e-5)


def test_inversion_comes_back():
    """Told the time as it is, and the closer the more steps there are."""
    _, _, io = parity.load("ddim")
    z, worst = jnp.asarray(io["x0"]), []
    for steps in (25, 100):
        denoise, grid = make_denoiser(io), reference_grid(steps)
        noise, _ = editing.invert(denoise, z, grid)
        back, _ = samplers.ddim(denoise, noise, grid, jax.random.key(0))
        worst.append(np.abs(back - z).max())
    print(worst)
    assert worst[1] < worst[0] / 3 < 0.1
    assert np.abs(noise - z).max() > 0.5


@pytest.mark.parametrize("scale", [1, 7.5])
@pytest.mark.parametrize("steps", [1, 30, 49])
def test_noising_and_going_on_from_there_are_the_reference_s(steps, scale):
    _, _, io = parity.load("ddim")
    timesteps = grids.ddim_timesteps(50, 1000)
    noise = jnp.asarray(io["noise_q"][0])
    z_t = denoiser.q_sample(
        SCHEDULE, jnp.asarray(io["x0"]), jnp.int32(timesteps[steps]), noise
    )
    np.testing.assert_allclose(z_t, io[f"stoch_encode_S50_t{steps}"], atol=5e-5)
    grid = grids.at_times(SCHEDULE, timesteps[:steps][::-1], clean=False)
    z, _ = samplers.ddim(make_denoiser(io, scale), z_t, grid, jax.random.key(0))
    np.testing.assert_allclose(z, io[f"decode_S50_t{steps}_cfg{scale}"], atol=5e-5)


def test_going_on_with_eta_1_is_the_reference_s():
    _, _, io = parity.load("ddim")
    timesteps = grids.ddim_timesteps(50, 1000)
    z_t = jnp.asarray(io["stoch_encode_S50_t30"])
    grid = grids.at_times(SCHEDULE, timesteps[:30][::-1], clean=False)
    noise = jnp.asarray(io["noise"][:30])
    z, _ = samplers.ddim(
        make_denoiser(io), z_t, grid, jax.random.key(0), eta=1.0, noise=noise
    )
    np.testing.assert_allclose(z, io["decode_S50_t30_eta1_cfg1"], atol=5e-5)


def test_strength_1_is_pure_noise_and_0_the_picture_itself():
    _, _, io = parity.load("ddim")
    noise, init = jnp.asarray(io["x_T"]), jnp.asarray(io["x0"])
    grid = samplers.SAMPLERS["ddim"].grid(SCHEDULE, 10)
    z, start = grids.begin(grid, noise, init, 1.0)
    np.testing.assert_array_equal(z, noise)
    assert start == 0
    z, start = grids.begin(grid, noise, init, 0.0)
    np.testing.assert_array_equal(z, init)
    assert start == 10
    z, start = jax.jit(lambda s: grids.begin(grid, noise, init, s))(0.3)
    expected = denoiser.q_sample(SCHEDULE, init, jnp.int32(grid.t[7]), noise)
    np.testing.assert_allclose(z, expected, atol=1e-6)
    assert start == 7


PLMS = ["S20_cfg1.0", "S5_cfg1.0", "S20_cfg7.5", "S5_cfg7.5", "S20_normthreshold1.0"]


@pytest.mark.parametrize("case", PLMS)
def test_plms_is_the_reference_s(case):
    _, _, io = parity.load("plms")
    steps, seen = int(setting(case, "S", None)), []
    guided = make_denoiser(io, setting(case, "cfg", 1.0))

    def denoise(z_t, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return guided(z_t, t)

    def threshold(x0_hat):
        rms = jnp.sqrt(jnp.mean(x0_hat**2, (1, 2, 3), keepdims=True))
        return x0_hat / jnp.maximum(rms, 1)

    z, row = multistep.plms(
        denoise,
        jnp.asarray(io["x_T"]),
        reference_grid(steps),
        jax.random.key(0),
        threshold=threshold if "normthreshold" in case else None,
        trajectory=True,
    )
    worst = np.abs(z - io[f"plms_{case}/out"]).max()
    if f"plms_{case}/pred_x0" in io:
        worst = max(worst, np.abs(row - io[f"plms_{case}/pred_x0"][1:]).max())
        jax.effects_barrier()
        assert seen == io[f"plms_{case}/t_inputs"].tolist()
    print(f"{case}: {worst:.1e}")
    assert worst < 5e-5


ANCESTRAL = {
    "eps": {},
    "x0": {},
    "eps_clip": dict(constrain=lambda x: jnp.clip(x, -1, 1)),
    "eps_vpost0.5": {},
}


@pytest.mark.parametrize("case", ANCESTRAL)
def test_ddpm_is_the_reference_s(case):
    meta, _, io = parity.load("ddpm_ancestral")
    schedule = schedules.make_schedule(
        **meta["config"], v_posterior=setting(case, "vpost", 0.0)
    )
    denoise = denoiser.make_denoiser(
        net, schedule, case.split("_")[0], [io["context"]], **ANCESTRAL[case]
    )
    z, _ = samplers.ddpm(
        denoise,
        jnp.asarray(io["x_T"]),
        samplers.SAMPLERS["ddpm"].grid(schedule, 20),
        jax.random.key(0),
        noise=jnp.asarray(io["noise"][:20]),
    )
    worst = np.abs(z - io[f"{case}/out"]).max()
    print(f"{case}: {worst:.1e}")
    assert worst < 5e-5


def test_ddpm_s_own_blending_needs_no_code_of_ours():
    """The ancestral loop blends after each step, at the time where that began."""
    meta, _, io = parity.load("ddpm_ancestral")
    schedule = schedules.make_schedule(**meta["config"])
    plain = denoiser.make_denoiser(net, schedule, "eps", [io["context"]])
    known, mask = jnp.asarray(io["x0"]), jnp.asarray(io["mask"])
    noise = jnp.asarray(io["noise_q"])

    def noised(t):
        return denoiser.q_sample(schedule, known, t, noise[19 - t])

    def denoise(z_t, t):
        before = jnp.minimum(t[0] + 1, 19)
        return plain(
            jnp.where(t[0] < 19, editing.paste(z_t, noised(before), mask), z_t), t
        )

    def run(z):
        return samplers.ddpm(
            denoise,
            z,
            samplers.SAMPLERS["ddpm"].grid(schedule, 20),
            jax.random.key(0),
            noise=jnp.asarray(io["noise"][:20]),
        )[0]

    z = editing.paste(run(jnp.asarray(io["x_T"])), noised(0), mask)
    np.testing.assert_allclose(z, io["eps_mask/out"], atol=5e-5)


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_all_steps_with_eta_1_are_the_ancestral_sampler(parameterization):
    meta, _, io = parity.load("ddpm_ancestral")
    schedule = schedules.make_schedule(**meta["config"])
    z, _ = samplers.ddim(
        make_denoiser(io, parameterization=parameterization, schedule=schedule),
        jnp.asarray(io["x_T"]),
        samplers.SAMPLERS["ddim"].grid(schedule, 20),
        jax.random.key(0),
        eta=1.0,
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
            grids.ddim_timesteps(steps, total, spacing, reference=True)
    else:
        actual = grids.ddim_timesteps(steps, total, spacing, reference=True)
        np.testing.assert_array_equal(actual, io[name])


@pytest.mark.parametrize("spacing, steps, total", TIMESTEPS)
def test_default_timesteps_are_as_many_as_asked(spacing, steps, total):
    _, _, io = parity.load("ddim_timesteps")
    actual = grids.ddim_timesteps(steps, total, spacing)
    assert actual.shape == (steps,) and (np.diff(actual) > 0).all()
    assert actual[0] == (steps < total) and actual[-1] < total
    expected = io[f"{spacing}_S{steps}_T{total}"]
    if len(np.unique(expected)) == steps < total:
        np.testing.assert_array_equal(actual, expected)


def test_repaired_timesteps_are_evenly_spaced_to_the_end():
    for steps in (3, 30, 64, 150, 300, 333, 400, 600, 999):
        t = grids.ddim_timesteps(steps, 1000)
        assert np.ptp(np.diff(t)) <= 1
        assert t[-1] == 1001 - -(-1000 // steps)
    assert grids.ddim_timesteps(1000, 1000).tolist() == list(range(1000))


def test_every_step_count_is_in_range_for_both_spacings():
    for total in (2, 3, 7, 50):
        for steps in range(1, total + 1):
            for spacing in SPACINGS:
                t = grids.ddim_timesteps(steps, total, spacing)
                assert len(np.unique(t)) == steps and 0 <= t[0] and t[-1] < total


def test_diffusers_visits_the_same_timesteps():
    _, _, io = parity.load("diffusers_schedulers")
    actual = grids.ddim_timesteps(20, 1000)[::-1]
    np.testing.assert_array_equal(actual, io["ddim_timesteps_20"])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_tables_are_the_reference_s(spacing, steps, eta):
    _, _, io = parity.load("ddim_timesteps")
    name = f"params_{spacing}_S{steps}_eta{eta}"
    timesteps = grids.ddim_timesteps(steps, 1000, spacing, reference=True)
    # The reference starts from the float32 buffer, here as it was rounded.
    rounded = np.float64(np.float32(SCHEDULE.alphas_cumprod))
    as_stored = schedules.make_schedule(
        given_betas=1 - rounded / np.append(1.0, rounded[:-1])
    )
    grid = grids.at_times(as_stored, timesteps[::-1], clean=False)
    alpha = grid.alpha[::-1] ** 2
    for actual, key in ((alpha[1:], "alphas"), (alpha[:-1], "alphas_prev")):
        np.testing.assert_allclose(actual, io[f"{name}/{key}"], rtol=0, atol=1e-12)
    # It also takes 1 - alpha / alpha_prev in float32.
    _, spread = samplers.ancestral_noise(grid, eta)
    np.testing.assert_allclose(spread[::-1], io[f"{name}/sigmas"], atol=5e-8)
    exact = grids.at_times(SCHEDULE, timesteps[::-1], clean=False)
    _, spread = samplers.ancestral_noise(exact, eta)
    np.testing.assert_allclose(spread[::-1], io[f"{name}/sigmas"], atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_drawn_noise_has_the_variance_that_the_tables_say(eta):
    """For N(0, 1) the exact denoiser is linear, so variances follow by hand."""

    def denoise(z_t, t):
        a = denoiser.lookup(SCHEDULE.alphas_cumprod, t, z_t)
        return jnp.sqrt(a) * z_t, jnp.sqrt(1 - a) * z_t

    z = jax.random.normal(jax.random.key(0), [64, 128])
    grid = samplers.SAMPLERS["ddim"].grid(SCHEDULE, 20)
    out, _ = samplers.ddim(denoise, z, grid, jax.random.key(1), eta=eta)

    variance, kept = 1.0, 1.0
    bars, (_, spread) = grid.alpha**2, samplers.ancestral_noise(grid, eta)
    for a, a_prev, sigma in zip(bars[:-1], bars[1:], spread, strict=True):
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
        return samplers.SAMPLERS["ddim"](
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
            net, SCHEDULE, "eps", [0 * context, context], [guidance_scale]
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
    grid = reference_grid(5)
    plain, nothing = samplers.ddim(denoise, z, grid, jax.random.key(0))
    same, x0_hats = samplers.ddim(denoise, z, grid, jax.random.key(0), trajectory=True)
    assert nothing is None and x0_hats.shape == (5, 2, 4, 4, 3)
    np.testing.assert_array_equal(x0_hats[0], 0.5 * z)
    np.testing.assert_array_equal(plain, same)


def test_errors_name_the_value_and_the_legal_ones():
    with pytest.raises(UserError, match="steps: 0; choose from 1 to 1000"):
        grids.ddim_timesteps(0, 1000)
    with pytest.raises(UserError, match="'cubic'.*uniform, quad"):
        grids.ddim_timesteps(10, 1000, "cubic")
    with pytest.raises(UserError, match="eta: 1.5"):
        samplers.ancestral_noise(reference_grid(10), 1.5)
