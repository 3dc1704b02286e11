"""Joint training: whom its losses teach, equal compute, a workdir like any other's."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from benchmarks import joint, joint_stage
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.train import autoencoder_loss
from tests import runs

DEBUG = f"{runs.TXT2IMG}:debug"


def _gradients(weight):
    """Gradients of a step, and those of stage one alone on the same draw."""
    config = joint_stage.load_config(DEBUG, (), weight)
    model = runs.build(config)
    first, second = runs.random_params(config, model)
    params = {"autoencoder": first, "diffusion": second}
    side = config.resolution
    x = jax.random.uniform(jax.random.key(1), (4, side, side, 3), minval=-1.0)
    batch = {"image": x, **conditioning.null_rows(model.conditioners, 4)}
    key = jax.random.key(2)
    loss = joint_stage.make_loss(config, model)
    grads, metrics = jax.jit(jax.grad(loss, has_aux=True))(params, {}, batch, key)
    alone = autoencoder_loss.make_gradients(config, model.autoencoder, None)
    key = jax.random.fold_in(key, joint_stage.RECONSTRUCTION)
    _, (of_first, _), _ = jax.jit(alone(first, None, {}))((None, None), batch, key)
    return grads, of_first, metrics


def _difference(a, b):
    return max(
        float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_at_weight_zero_the_autoencoder_learns_as_alone():
    none, alone, metrics = _gradients(0.0)
    assert _difference(none["autoencoder"], alone) < 1e-4
    assert {"psnr", "kl_per_dim", "loss", "loss_q0"} <= set(metrics)

    some, _, _ = _gradients(0.1)
    encoder, decoder = (
        _difference(some["autoencoder"]["autoencoder"][k], alone["autoencoder"][k])
        for k in ("encoder", "decoder")
    )
    assert encoder > 1e-3 and decoder < 1e-4
    # What the denoising net learns does not depend on the encoder's weight.
    assert _difference(some["diffusion"], none["diffusion"]) < 1e-4


def test_latents_are_seen_at_unit_variance():
    """By a batch's statistics; over a whole source they are those of stage one."""
    config = runs.debug()
    net = runs.build(config).autoencoder
    moments = jax.random.normal(jax.random.key(0), (8, 4, 4, 2 * net.embed_dim)) + 3.0
    mean, std = joint_stage.latent_statistics(net, moments)
    posterior_mean, logvar = jnp.split(moments, 2, axis=-1)
    noise = jax.random.normal(jax.random.key(1), (4000, *posterior_mean.shape))
    drawn = posterior_mean[None] + jnp.exp(logvar / 2)[None] * noise
    np.testing.assert_allclose(mean, drawn.mean((0, 1, 2, 3)), rtol=0.02)
    np.testing.assert_allclose(std, drawn.std((0, 1, 2, 3)), rtol=0.02)


def test_all_runs_cost_the_same():
    size = joint.SIZES["small"]._replace(flops=1e11)
    plans = joint.make_plans(DEBUG, (0.0, 1.0), size, ("batch_size=16",))
    assert [plan.name for plan in plans] == ["two_stages", "joint_0", "joint_1"]
    for plan in plans:
        spent = sum(plan.steps[k] * plan.flops[k] for k in plan.steps)
        assert spent == pytest.approx(size.flops, rel=0.02)
        config = plan.config()
        assert config.diffusion_stage.steps == plan.steps["diffusion"]
        assert config.batch_size == 16 and config.get("encoder_weight") == plan.weight
    assert plans[1].flops["diffusion"] > sum(plans[0].flops.values()) * 0.9


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--weights=0,-1"], "--weights: '-1'; numbers from 0 on"),
        (["--weights=a"], "--weights: 'a'"),
        (["--weights=inf"], "--weights: 'inf'"),
        (["--size=smal"], "--size: 'smal'"),
        (["--config.autoencoder_stage.steps=3"], "steps follow from equal compute"),
    ],
)
def test_mistakes_take_one_line_and_write_nothing(tmp_path, capsys, flags, error):
    with pytest.raises(SystemExit) as stopped:
        joint.main([f"--out={tmp_path / 'out'}", *flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(joint.SIZES, "debug", joint.SIZES["debug"]._replace(flops=2e9))
    flags = [f"--config={DEBUG}", f"--out={tmp_path}", "--size=debug", "--weights=0.1"]
    joint.main(flags)
    assert "| joint 0.1 |" in capfd.readouterr().out
    with (tmp_path / "joint.csv").open() as file:
        two, one = csv.DictReader(file)
    assert two["encoder_weight"] == "" and one["encoder_weight"] == "0.1"
    for row in (two, one):
        assert float(row["psnr"]) > 3 and float(row["sample_random_net_distance"]) > 0
    with Image.open(tmp_path / "joint.png") as image:
        assert min(image.size) > 400

    loaded = ldm_jax.load(tmp_path / "joint_0.1")
    assert loaded.step == int(one["diffusion_steps"])
    assert loaded.sample("a red circle").shape == (1, 16, 16, 3)
    assert np.all(np.asarray(loaded.first_stage.std) > 0)

    joint.main(flags)
    assert "joint_0.1: finished, kept as it is" in capfd.readouterr().out
