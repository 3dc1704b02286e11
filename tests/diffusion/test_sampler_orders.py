"""Every sampler on a mixture of Gaussians, whose exact denoiser is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sampler_orders
from ldm_jax.diffusion import denoiser, editing, edm, grids, samplers, schedules

pytestmark = pytest.mark.usefixtures("fast_compile")
MIXTURE = sampler_orders.Mixture()
SCHEDULE = sampler_orders.SCHEDULE
TERMINAL = schedules.make_schedule(
    linear_start=0.00085, linear_end=0.012, zero_terminal_snr=True
)
# At its last timestep a schedule still has this much signal, and z_t isn't N(0, 1).
NOISY = schedules.make_schedule(linear_start=0.0015, linear_end=0.0195)
STEPS = {1: (32, 64), 2: (32, 64), 3: (16, 32)}
DETERMINISTIC = [name for name, s in samplers.SAMPLERS.items() if not s.stochastic]


def apply_of(schedule, parameterization):
    """What a perfect net of this parameterization puts out."""

    def apply(z_t, t, cond):
        del cond
        x0_hat, eps_hat = MIXTURE.denoise(schedule)(z_t, t)
        return denoiser.target(parameterization, schedule, x0_hat, t, eps_hat)

    return apply


def net_denoiser(schedule, parameterization):
    apply = apply_of(schedule, parameterization)
    return denoiser.make_denoiser(apply, schedule, parameterization, conds=[None])


@pytest.mark.parametrize("name", sampler_orders.DETERMINISTIC)
def test_order_of_convergence(name):
    sampler, _, order = sampler_orders.DETERMINISTIC[name]
    worst = sampler_orders.errors(sampler, STEPS[order])
    measured = sampler_orders.order(worst, STEPS[order])
    print(f"{name}: errors {worst}, order {measured:.2f}")
    assert measured > order - 0.2
    if order == 1:
        assert measured < 1.2


def test_flow_is_that_of_a_single_gaussian():
    """The mixture's own reference, against the closed form."""
    one = sampler_orders.Mixture((1.0,), (0.3,), (0.5,))
    z, begin, end = np.linspace(-1, 1, 5), (0.6, 0.8), (0.96, 0.28)
    scale = np.hypot(0.48, 0.28) / np.hypot(0.3, 0.8)
    expected = 0.96 * 0.3 + scale * (z - 0.6 * 0.3)
    np.testing.assert_allclose(one.flow(z, begin, end), expected, atol=1e-12)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_eps_x0_and_v_give_the_same(name):
    z = jnp.linspace(-2, 2, 16)[:, None]
    outs = [
        jax.jit(
            lambda z, p=p: samplers.SAMPLERS[name](
                net_denoiser(SCHEDULE, p), z, SCHEDULE, jax.random.key(1), steps=12
            )[0]
        )(z)
        for p in schedules.PARAMETERIZATIONS
    ]
    assert np.isfinite(outs[0]).all() and np.ptp(outs[0]) > 1
    np.testing.assert_allclose(outs[1], outs[0], atol=3e-4)
    np.testing.assert_allclose(outs[2], outs[0], atol=3e-4)


def distance(draws, alpha=1.0, sigma=0.0):
    """Kolmogorov and Smirnov's: the greatest gap between the distributions."""
    draws = np.sort(np.asarray(draws, np.float64).ravel())
    places = (np.arange(len(draws)) + 0.5) / len(draws)
    return np.abs(MIXTURE.cdf(draws, alpha, sigma) - places).max()


def starts(schedule, n=8192):
    """z_{T-1} of the mixture, evenly: what is tested is the sampler, not the start."""
    p = (np.arange(n) + 0.5) / n
    alpha, sigma = schedule.at_time(np.int64(len(schedule.betas) - 1))
    z = MIXTURE.quantile(p, alpha, sigma)
    return jnp.asarray(z, jnp.float32)[:, None]


@pytest.mark.parametrize(
    "name, steps, options",
    [
        ("ddpm", 200, {}),
        ("ddim", 100, dict(eta=0.5, spacing="trailing")),
        ("euler_ancestral", 200, {}),
        ("edm", 40, dict(s_churn=10.0, s_noise=1.0)),
        ("heun", 30, dict(spacing="karras")),
        ("unipc", 30, dict(spacing="log_snr")),
    ],
)
def test_the_mixture_is_recovered(name, steps, options):
    z = starts(NOISY)
    out, _ = samplers.SAMPLERS[name](
        MIXTURE.denoise(NOISY), z, NOISY, jax.random.key(2), steps=steps, **options
    )
    gap = distance(out)
    print(f"{name}: {gap:.4f}, share below 0: {np.mean(out < 0):.3f}")
    assert gap < 0.02  # of 8,192 exact draws it is less than 0.018 in 99 of 100 cases
    if samplers.SAMPLERS[name].stochastic:
        assert abs(np.corrcoef(z[:, 0], out[:, 0])[0, 1]) < 0.7


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_pure_noise_at_the_last_timestep_is_no_pole(name):
    """alpha is 0 there, so that sigma / alpha is infinite."""
    z = jax.random.normal(jax.random.key(0), [512, 1])
    sampler = samplers.SAMPLERS[name]
    for spacing, parameterization in (("trailing", "x0"), ("karras", "v")):
        denoise = net_denoiser(TERMINAL, parameterization)
        grid = sampler.grid(TERMINAL, 24, spacing)
        assert grid.alpha[0] == 0 and grid.sigma[0] == 1
        out, _ = sampler(
            denoise, z, TERMINAL, jax.random.key(1), steps=24, spacing=spacing
        )
        assert np.isfinite(out).all()
        assert abs(np.mean(out) - 0.26) < 0.15
        assert abs(np.std(out) - 0.89) < 0.2  # too little at order 1 in few steps


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sigma_schedule_needs_no_other_sampler(name):
    """EDM's own process: the times are noise levels and alpha is 1."""
    schedule = schedules.SigmaSchedule(0.01, 40.0)
    noise = jax.random.normal(jax.random.key(0), [4096, 1])
    sampler = samplers.SAMPLERS[name]
    z, _ = grids.begin(sampler.grid(schedule, 32), noise)
    assert abs(np.std(z) / 40 - 1) < 0.05

    def apply(z_t, t, cond):
        return MIXTURE.denoise(schedule)(z_t, t)[0]

    denoise = denoiser.make_denoiser(apply, schedule, "x0", conds=[None])
    out, _ = sampler(denoise, z, schedule, jax.random.key(1), steps=32)
    gap = distance(out)
    print(f"{name}: {gap:.4f}")
    assert gap < 0.05


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_come_nearer_to_the_flow(name):
    """To the clean end, as users run it."""
    z = np.linspace(-2, 2, 21)
    t = len(SCHEDULE.betas) - 1
    exact = MIXTURE.flow(z, SCHEDULE.at_time(np.int64(t)), (1, 0))
    worst = []
    for steps in (10, 40):
        out, _ = samplers.SAMPLERS[name](
            MIXTURE.denoise(SCHEDULE),
            jnp.asarray(z, jnp.float32)[:, None],
            SCHEDULE,
            jax.random.key(0),
            steps=steps,
            spacing="karras",
        )
        worst.append(np.abs(out[:, 0] - exact).max())
    print(f"{name}: {worst}")
    # Those that end at timestep 0 keep a noise of 0.03.
    assert worst[1] < max(0.6 * worst[0], 0.02)
    assert worst[1] < 0.1


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_start_is_the_tail_of_the_grid(name):
    """Skipping steps, traced, is sampling on the rest, its warm-up included."""
    sampler = samplers.SAMPLERS[name]
    z = jnp.linspace(-1, 1, 8)[:, None]
    denoise, key = MIXTURE.denoise(SCHEDULE), jax.random.key(3)
    traces = []

    @jax.jit
    def run(start):
        traces.append(1)
        return sampler(denoise, z, SCHEDULE, key, steps=9, start=start, trajectory=True)

    grid = sampler.grid(SCHEDULE, 9)
    options = {}
    if sampler.eta is not None:
        options["eta"] = sampler.eta
    for start in (0, 4, 8, 9):
        out, row = run(start)
        np.testing.assert_array_equal(row[:start], np.broadcast_to(z, [start, 8, 1]))
        if start == 9:
            np.testing.assert_array_equal(out, z)
        elif not sampler.stochastic:
            tail = grids.Grid(*(x[start:] for x in grid[:3]), SCHEDULE)
            expected, _ = sampler.run(denoise, z, tail, key, **options)
            np.testing.assert_allclose(out, expected, atol=2e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_net_calls_are_as_many_as_said(name):
    sampler, seen = samplers.SAMPLERS[name], []

    def denoise(z_t, t):
        seen.append(float(t[0]))
        return MIXTURE.denoise(SCHEDULE)(z_t, t)

    with jax.disable_jit():
        sampler(denoise, jnp.ones([1, 1]), SCHEDULE, jax.random.key(0), steps=5)
    last = 1 if sampler.clean else sampler.calls  # a clean end takes one call
    extra = 1 if name == "plms" else 0
    assert len(seen) == 4 * sampler.calls + last + extra
    assert seen[0] == sampler.grid(SCHEDULE, 5).t[0]


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("process", ["sigma", "zero terminal SNR"])
def test_inversion_comes_back_from_a_clean_end_and_from_pure_noise(process, name):
    """There the one has no eps_hat, and here the other no ratio."""
    sampler = samplers.SAMPLERS[name]
    if process == "sigma":
        schedule, parameterization = schedules.SigmaSchedule(0.01, 40.0), "x0"
    else:
        schedule, parameterization = TERMINAL, "v"

    def apply(z_t, t, cond):
        x0_hat, eps_hat = MIXTURE.denoise(schedule)(z_t, t)
        return denoiser.target(parameterization, schedule, x0_hat, t, eps_hat)

    denoise = denoiser.make_denoiser(apply, schedule, parameterization, conds=[None])
    z = jnp.linspace(-1.5, 1.2, 28)[:, None]
    grid = sampler.grid(schedule, 200)
    noise, _ = editing.invert(denoise, z, grid)
    assert np.isfinite(noise).all()
    scale = np.hypot(grid.alpha[0], grid.sigma[0])
    assert 0.3 < np.std(noise) / scale < 2
    back, _ = sampler(denoise, noise, schedule, jax.random.key(0), steps=200)
    print(np.abs(back - z).max())
    assert np.abs(back - z).max() < 0.15


def test_scaled_nets_of_edm_are_the_same_denoiser():
    """A net that answers as its scaling asks gives the exact x0_hat back."""
    schedule = schedules.SigmaSchedule()
    z, sigma = jnp.linspace(-2, 2, 8)[:, None], jnp.geomspace(0.05, 20.0, 8)
    exact, _ = MIXTURE.denoise(schedule)(z, sigma)
    for scaling in edm.SCALINGS:
        skip, out, inner, noise = edm.scales(scaling, sigma)

        def net(scaled, told, cond, skip=skip, out=out, inner=inner, noise=noise):
            np.testing.assert_allclose(scaled, inner[:, None] * z, rtol=1e-6)
            np.testing.assert_allclose(told, noise, rtol=1e-6)
            return (exact - skip[:, None] * z) / out[:, None]

        actual = edm.precondition(net, scaling)(z, sigma, None)
        np.testing.assert_allclose(actual, exact, atol=1e-5)
