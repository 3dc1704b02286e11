"""Numerics against torch, diffusers and transformers as installed (extra: parity)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import compvis
from ldm_jax.diffusion import denoiser, samplers, schedules
from ldm_jax.nets import layers, text_encoder

torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test,parity]'")
transformers = pytest.importorskip("transformers")

ATOL = 5e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text_tower_is_that_of_transformers(activation):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act=activation,
        eos_token_id=59,
    )
    reference = transformers.CLIPTextModel(config).eval()
    tokens = np.random.default_rng(0).integers(0, 59, (3, 12)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    state_dict = {k: v.numpy() for k, v in reference.state_dict().items()}
    if not any(key.startswith("text_model.") for key in state_dict):
        state_dict = {f"text_model.{k}": v for k, v in state_dict.items()}
    net = text_encoder.CLIPTextTransformer(
        vocab_size=60, max_seq_len=12, dim=32, depth=3, heads=4, activation=activation
    )
    params = compvis.clip_params(state_dict, net)
    out = jax.jit(net.apply)({"params": params}, tokens)
    np.testing.assert_allclose(out, expected, atol=ATOL)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_ddim_is_that_of_diffusers(parameterization):
    """One trajectory of the same made-up net, 20 steps from the same noise."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[parameterization],
    )
    scheduler.set_timesteps(20)
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)

    def net(z_t, t, module):
        return 0.3 * z_t + 0.2 * module.tanh(z_t) + 0.1 * np.sin(float(t) / 100)

    z_t = torch.from_numpy(z)
    for t in scheduler.timesteps:
        z_t = scheduler.step(net(z_t, t, torch), t, z_t).prev_sample

    schedule = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)

    def apply(z_t, t, cond):
        del cond
        wave = jnp.sin(t.astype(jnp.float32) / 100)[:, None, None, None]
        return 0.3 * z_t + 0.2 * jnp.tanh(z_t) + 0.1 * wave

    denoise = denoiser.make_denoiser(apply, schedule, parameterization, conds=[None])
    ours, _ = samplers.SAMPLERS["ddim"](
        denoise, jnp.asarray(z), schedule, jax.random.key(0), steps=20
    )
    np.testing.assert_allclose(ours, z_t.numpy(), atol=ATOL)


SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(final_sigmas_type="zero")),
    "unipc": ("UniPCMultistepScheduler", dict(final_sigmas_type="zero")),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samplers_are_those_of_diffusers(name):
    """Trailing steps to a clean end; some of theirs work on z_t / alpha."""
    kind, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        **options,
    )
    scheduler.set_timesteps(12)
    z = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    schedule = schedules.make_schedule(linear_start=0.00085, linear_end=0.012)

    def net(z_t, t, module):
        return 0.3 * z_t + 0.2 * module.tanh(z_t) + 0.1 * module.sin(t / 100)

    x = torch.from_numpy(z)
    over_alpha = name in ("euler", "heun", "lms")
    if over_alpha:
        x = x / schedule.sqrt_alphas_cumprod[999]
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), torch.as_tensor(float(t)), torch)
        x = scheduler.step(out, t, x).prev_sample

    def apply(z_t, t, cond):
        del cond
        return net(z_t, t.astype(jnp.float32)[:, None, None, None], jnp)

    denoise = denoiser.make_denoiser(apply, schedule, "eps", conds=[None])
    ours, _ = samplers.SAMPLERS[name](
        denoise, jnp.asarray(z), schedule, jax.random.key(0), steps=12
    )
    scale = np.abs(x.numpy()).max()
    np.testing.assert_allclose(ours / scale, x.numpy() / scale, atol=ATOL)


def test_group_norm_and_strided_conv_are_torchs():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 12)
    norm, conv = torch.nn.GroupNorm(32, 32, eps=1e-6), torch.nn.Conv2d(32, 16, 3, 2, 1)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        expected = conv(norm(x)).permute(0, 2, 3, 1).numpy()
    ours = layers.GroupNorm(32, 1e-6).apply(
        {
            "params": {
                "scale": norm.weight.detach().numpy(),
                "bias": norm.bias.detach().numpy(),
            }
        },
        jnp.asarray(x.permute(0, 2, 3, 1).numpy()),
    )
    kernel = conv.weight.detach().permute(2, 3, 1, 0).numpy()
    ours = layers.Conv(16, 3, strides=2, padding=1).apply(
        {"params": {"kernel": kernel, "bias": conv.bias.detach().numpy()}}, ours
    )
    np.testing.assert_allclose(ours, expected, atol=ATOL)
