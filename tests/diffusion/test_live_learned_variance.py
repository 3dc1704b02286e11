"""Ancestral steps with a learned variance, as diffusers takes them (extra: parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import denoiser, samplers, schedules

torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test,parity]'")


def test_ddpm_is_karlo_s(monkeypatch):
    """25 steps of UnCLIPScheduler from the same noise, on Karlo's own timesteps."""
    steps, shape = 25, (2, 4, 4, 3)
    scheduler = diffusers.UnCLIPScheduler(variance_type="learned_range")
    scheduler.set_timesteps(steps)
    schedule = schedules.make_schedule(schedule="squaredcos_cap_v2")
    np.testing.assert_allclose(schedule.betas, scheduler.betas, rtol=1e-4)
    # In float32 its 1 - alphas_cumprod has three digits at t = 0.
    scheduler.betas = torch.from_numpy(schedule.betas)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    rng = np.random.default_rng(0)
    z = rng.normal(size=shape).astype(np.float32)
    noise = rng.normal(size=(steps, *shape)).astype(np.float32)
    module = "diffusers.schedulers.scheduling_unclip.randn_tensor"
    drawn = iter(noise)
    monkeypatch.setattr(
        module,
        lambda *_, **__: torch.from_numpy(np.moveaxis(next(drawn), -1, 1).copy()),
    )

    def net(xp, z_t, t):
        """The same in both libraries: it points at an image and spreads its v."""
        eps = (z_t - 0.3 * xp.sin(3 * z_t)) * (0.2 + t / 1250)
        return eps, xp.cos(2 * z_t + t / 500)

    sample = torch.from_numpy(np.moveaxis(z, -1, 1).copy())
    times = [int(t) for t in scheduler.timesteps]
    for t, before in zip(times, [*times[1:], None], strict=True):
        out = torch.cat(net(torch, sample, t), dim=1)
        sample = scheduler.step(out, t, sample, prev_timestep=before).prev_sample
    expected = np.moveaxis(sample.numpy(), 1, -1)

    def apply(z_t, t, cond):
        level = denoiser.per_example(t.astype(jnp.float32), z_t)
        return jnp.concatenate(net(jnp, z_t, level), axis=-1)

    denoise = denoiser.make_denoiser(
        apply,
        schedule,
        "eps",
        [None],
        constrain=lambda x: jnp.clip(x, -1, 1),
        learned_variance=True,
    )
    ours, _ = samplers.SAMPLERS["ddpm"](
        denoise,
        jnp.asarray(z),
        schedule,
        jax.random.key(0),
        steps=steps,
        spacing="linspace",
        noise=jnp.asarray(noise),
    )
    np.testing.assert_allclose(ours, expected, atol=5e-5)
    assert np.std(expected) > 0.1
