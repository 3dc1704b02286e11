"""The classifier of noisy latents: its loss, what it refuses, and what it draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.train import step_classifier
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
CONFIG = f"{runs.CONFIGS / 'unconditional.py'}:debug"


@pytest.fixture(scope="module")
def made():
    """(config, model, frozen, params)."""
    config = config_lib.load(CONFIG)
    model = runs.build(config)
    first, _ = runs.random_params(config, model)
    c = model.latent_shape[-1]
    first_stage = first_stage_lib.FirstStage(
        first["autoencoder"], jnp.full(c, 0.2), jnp.full(c, 1.5)
    )
    abstract = jax.eval_shape(
        lambda: model_lib.init_classifier(model, jax.random.key(0))
    )
    return config, model, {"first_stage": first_stage}, runs.random_like(abstract)


def _batch(model, n=64):
    h, w, c = model.latent_shape
    rng = np.random.default_rng(0)
    return {
        "moments": rng.normal(size=(n, h, w, 2 * c)).astype(np.float32),
        "class": rng.integers(0, 24, n).astype(np.int32),
        "_mask": (np.arange(n) < n - 3).astype(np.float32),
    }


def test_loss_and_accuracies(made):
    """An untrained net guesses: its loss is about ln 24 or more, top-5 beats top-1."""
    _, model, frozen, params = made
    loss = jax.jit(step_classifier.make_loss(model), static_argnums=4)
    batch = _batch(model)
    value, metrics = loss(params, frozen, batch, jax.random.key(0), True)
    assert metrics["loss"][1] == 61
    np.testing.assert_allclose(value, metrics["loss"][0] / 61, rtol=1e-6)
    assert value > 0.8 * np.log(24)
    assert metrics["top1"][0] <= metrics["top5"][0] <= 61
    parts = np.array([metrics[f"top1_q{q}"] for q in range(4)])
    np.testing.assert_allclose(parts.sum(0), [metrics["top1"][0], 61])


def test_it_learns(made):
    """Latents that show their class are told apart after some steps of descent."""
    _, model, frozen, params = made
    batch = _batch(model)
    batch["moments"] = batch["moments"] * 0 + 8.0 * (batch["class"] % 2)[
        :, None, None, None
    ].astype(np.float32)
    batch["class"] = batch["class"] % 2
    loss = step_classifier.make_loss(model)
    step = jax.jit(
        lambda p, k: jax.tree.map(
            lambda p, g: p - 0.02 * jnp.clip(g, -1, 1),
            p,
            jax.grad(loss, has_aux=True)(p, frozen, batch, k)[0],
        )
    )
    before = loss(params, frozen, batch, jax.random.key(9), True)[0]
    for i in range(30):
        params = step(params, jax.random.key(i))
    after = loss(params, frozen, batch, jax.random.key(9), True)[0]
    assert after < before / 2


def test_samples_are_drawn_towards_a_class(made, tmp_path):
    config, model, _, params = made
    runs.untrained(tmp_path / "run", _without_stage(config))
    plain = loaded_lib.load(tmp_path / "run")
    guided = dataclasses.replace(plain, classifier=params["classifier"])
    labels = {"label": np.array([3, 4])}

    def draw(**options):
        return guided.sample(steps=8, **options)

    free = plain.sample(count=2, steps=8)
    np.testing.assert_array_equal(draw(count=2), free)
    np.testing.assert_array_equal(draw(inputs=labels, classifier_scale=0.0), free)
    towards = draw(inputs=labels, classifier_scale=3.0)
    assert np.abs(towards.astype(int) - free).max() > 2
    with pytest.raises(UserError, match="label: 24 is no class; choose from 0 to 23"):
        draw(inputs={"label": np.array([24])})
    with pytest.raises(
        UserError, match="--classifier_scale: 2.0, but there is no --la"
    ):
        draw(count=1, classifier_scale=2.0)
    with pytest.raises(UserError, match="this run trained no classifier"):
        plain.sample(count=1, classifier_scale=2.0)
    with pytest.raises(UserError, match="label: this model takes none"):
        plain.sample(inputs=labels)


def _without_stage(config):
    config = config_lib.from_json(config_lib.to_json(config))
    config.stages = ("autoencoder", "diffusion")
    return config


def test_what_cannot_be_learned_is_named():
    config = config_lib.load(CONFIG)
    step_classifier.check(config)
    config.stages = ("autoencoder", "classifier")
    with pytest.raises(UserError, match="'classifier' without 'diffusion'"):
        step_classifier.check(config)
    config = config_lib.load(f"{runs.CONFIGS / 'txt2img.py'}:debug")
    config.stages = (*config.stages, "classifier")
    with pytest.raises(UserError, match="the config has no section of that name"):
        step_classifier.check(config)


def test_labels_must_be_there_and_fit(made):
    config, model, _, _ = made
    x = np.zeros((2, 16, 16, 3), np.uint8)
    good = sources.Source({"image": x, "label": np.array([0, 23])})
    step_classifier.check_labels(config, model, good)
    with pytest.raises(UserError, match="classifier.field: 'label' is not in the data"):
        step_classifier.check_labels(config, model, sources.Source({"image": x}))
    far = good.with_fields(label=np.array([0, 25]))
    with pytest.raises(UserError, match="num_classes: 24, but label .* set it to 26"):
        step_classifier.check_labels(config, model, far)
