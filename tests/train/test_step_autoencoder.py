import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import first_stage as first_stage_lib
from ldm_jax.data import sources
from ldm_jax.train import step_autoencoder
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def net_and_params():
    config = runs.debug()
    model = runs.build(config)
    return model.autoencoder, runs.random_params(config, model)[0]["autoencoder"]


def _section(**loss):
    section = runs.debug().autoencoder_stage
    section.loss.update(loss)
    return section


def _images(n=4):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32)


def _loss(net, section):
    return jax.jit(
        step_autoencoder.make_loss(net, section), static_argnames="deterministic"
    )


def test_reconstruction_nll_literals():
    x, x_hat = jnp.zeros((2, 2, 2, 3)), jnp.full((2, 2, 2, 3), 0.5)
    nll = step_autoencoder.reconstruction_nll(x, x_hat, jnp.float32(0.0))
    np.testing.assert_allclose(nll, [6.0, 6.0])  # twelve values, summed
    wider = step_autoencoder.reconstruction_nll(x, x_hat, jnp.float32(np.log(2)))
    np.testing.assert_allclose(wider, 12 * (0.25 + np.log(2)), rtol=1e-6)


def test_loss_is_nll_plus_weighted_kl(net_and_params):
    net, params = net_and_params
    loss = _loss(net, _section(kl_weight=0.25))
    total, metrics = loss(
        {"autoencoder": params}, {}, {"image": _images()}, jax.random.key(0)
    )
    mean = {name: float(s / n) for name, (s, n) in metrics.items()}
    np.testing.assert_allclose(total, mean["nll"] + 0.25 * mean["kl"], rtol=1e-5)
    np.testing.assert_allclose(mean["nll"], mean["l1"] * 16 * 16 * 3, rtol=1e-5)
    assert mean["kl"] > 1


def test_training_samples_and_evaluation_does_not(net_and_params):
    net, params = net_and_params
    loss = _loss(net, _section())
    inputs = {"autoencoder": params}, {}, {"image": _images()}
    keys = jax.random.key(0), jax.random.key(1)
    a, b = (loss(*inputs, key)[0] for key in keys)
    assert abs(a - b) > 1e-3
    a, b = (loss(*inputs, key, deterministic=True)[0] for key in keys)
    assert a == b


def test_padding_counts_for_nothing(net_and_params):
    net, params = net_and_params
    loss = _loss(net, _section(kl_weight=0.1))
    x, params = _images(), {"autoencoder": params}
    key = jax.random.key(0)
    expected, whole = loss(params, {}, {"image": x[:3]}, key, deterministic=True)
    padded = {"image": x, "_mask": np.array([1, 1, 1, 0], np.float32)}
    total, metrics = loss(params, {}, padded, key, deterministic=True)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, (value, count) in metrics.items():
        np.testing.assert_allclose(value, whole[name][0], rtol=1e-4, atol=1e-4)
        assert count == 3


def test_learned_logvar_gets_a_gradient(net_and_params):
    net, params = net_and_params
    loss = step_autoencoder.make_loss(net, _section(kl_weight=0.0))
    params = {"autoencoder": params, "logvar": jnp.float32(0.3)}
    batch = {"image": _images()}
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(
        params, {}, batch, jax.random.key(0)
    )
    # d/ds of sum(|e| exp(-s) + s) is n - sum|e| exp(-s).
    total, count = metrics["l1"]
    expected = 16 * 16 * 3 * (1 - float(total / count) * np.exp(-0.3))
    np.testing.assert_allclose(grads["logvar"], expected, rtol=1e-4)


def test_latents_have_unit_variance_under_their_statistics(net_and_params):
    net, params = net_and_params
    source = sources.load("synthetic", "train", resolution=16, count=70)
    ops = runs.debug().data.ops
    facts = step_autoencoder.latent_statistics(net, params, source, ops, 32)
    assert facts["images"] == 70
    first_stage = first_stage_lib.FirstStage(
        params, jnp.float32(facts["mean"]), jnp.float32(facts["std"])
    )
    x = source.fields["image"].astype(np.float32) / 127.5 - 1
    moments = first_stage_lib.encode_moments(net, params, x)
    draw = jax.jit(jax.vmap(first_stage_lib.sample_moments, in_axes=(None, None, 0)))
    z = draw(first_stage, moments, jax.random.split(jax.random.key(0), 64))
    np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=0.1)
    # Without the noise of drawing: the variance of a mixture of Gaussians.
    means, logvars = np.split(np.asarray(moments, np.float64), 2, axis=-1)
    variance = means.var((0, 1, 2)) + np.exp(logvars).mean((0, 1, 2))
    np.testing.assert_allclose(np.sqrt(variance), facts["std"], rtol=1e-4)
    np.testing.assert_allclose(means.mean((0, 1, 2)), facts["mean"], atol=1e-4)
    # And decoding undoes the change of scale.
    raw = net.apply({"params": params}, moments[..., : z.shape[-1]], method="decode")
    mode = moments[..., : z.shape[-1]]
    scaled = (mode - first_stage.mean[None, None, None]) / first_stage.std[
        None, None, None
    ]
    decoded = first_stage_lib.decode(net, first_stage, scaled)
    np.testing.assert_allclose(decoded, raw, atol=1e-3)
