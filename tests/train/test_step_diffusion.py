import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import defaults
from ldm_jax import first_stage as first_stage_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.train import loop, preserve, stage, step_diffusion
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def setup():
    """(config, model, first stage, params)."""
    config = runs.debug()
    model = runs.build(config)
    first, params = runs.random_params(config, model)
    c = model.latent_shape[-1]
    first_stage = first_stage_lib.FirstStage(
        first["autoencoder"], jnp.full(c, 0.2), jnp.full(c, 1.5)
    )
    return config, model, first_stage, params


def _batch(model, n=4):
    h, w, c = model.latent_shape
    rng = np.random.default_rng(0)
    captions = [runs.CAPTIONS[i % 3] for i in range(n)]
    return {
        "moments": rng.normal(size=(n, h, w, 2 * c)).astype(np.float32),
        "text": model.conditioners["text"].prepare(captions),
    }


def _with_dropout(conditioners, rate):
    return {k: dataclasses.replace(c, dropout=rate) for k, c in conditioners.items()}


def test_the_loss_of_an_example_is_weighted(setup):
    config, model, first_stage, params = setup
    loss = jax.jit(step_diffusion.make_loss(model, config.diffusion_stage))
    batch, frozen = _batch(model), {"first_stage": first_stage}

    def of(*weights):
        rows = {preserve.WEIGHT: np.float32(weights)} if weights else {}
        return loss(params, frozen, batch | rows, jax.random.key(0))[0]

    parts = [of(*row) for row in np.eye(4)]
    np.testing.assert_allclose(np.sum(parts), of(), rtol=1e-5)
    np.testing.assert_allclose(of(0, 3, 0, 0), 3 * parts[1], rtol=1e-5)


def test_a_dropped_caption_becomes_the_null_caption(setup):
    _, model, _, params = setup
    batch = _batch(model, 64)
    dropped = _with_dropout(model.conditioners, 0.5)
    context = conditioning.encode(
        dropped, params["conditioners"], batch, key=jax.random.key(0)
    ).context
    kept = conditioning.encode(
        model.conditioners, params["conditioners"], batch
    ).context
    null = conditioning.encode(
        model.conditioners,
        params["conditioners"],
        batch,
        dropped={"text": jnp.ones(64, bool)},
    ).context[0]
    is_null = np.array([np.allclose(row, null, atol=1e-5) for row in context])
    is_kept = np.array(
        [np.allclose(a, b, atol=1e-5) for a, b in zip(context, kept, strict=True)]
    )
    assert (is_null ^ is_kept).all()
    assert 16 < is_null.sum() < 48


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_rates_at_the_ends(setup, rate):
    _, model, _, _ = setup
    values = _batch(model)["text"]
    conditioners = _with_dropout(model.conditioners, rate)
    dropped = conditioning.draw_dropped(conditioners, 4, jax.random.key(0))
    null = model.conditioners["text"].null
    out = conditioning.drop(jnp.asarray(values), null, dropped["text"])
    expected = values if rate == 0 else np.stack([null] * 4)
    np.testing.assert_array_equal(out, expected)


def test_evaluation_drops_no_caption_and_is_repeatable(setup):
    config, model, first_stage, params = setup
    frozen, batch = {"first_stage": first_stage}, _batch(model)
    always = dataclasses.replace(
        model, conditioners=_with_dropout(model.conditioners, 1.0)
    )
    values = []
    for m in (model, always):
        loss = step_diffusion.make_loss(m, config.diffusion_stage)
        evaluate = stage.make_evaluate(
            lambda *args, loss=loss: loss(*args, deterministic=True)[1], seed=0
        )
        total, count = evaluate(params, frozen, batch, 3)["loss"]
        values.append(float(total / count))
        assert evaluate(params, frozen, batch, 3)["loss"][0] == total
        assert evaluate(params, frozen, batch, 4)["loss"][0] != total
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    loss = jax.jit(step_diffusion.make_loss(always, config.diffusion_stage))
    trained = loss(params, frozen, batch, jax.random.key(5))[0]
    loss = jax.jit(step_diffusion.make_loss(model, config.diffusion_stage))
    assert abs(trained - loss(params, frozen, batch, jax.random.key(5))[0]) > 1e-5


def test_padding_counts_for_nothing(setup):
    config, model, first_stage, params = setup
    loss = jax.jit(step_diffusion.make_loss(model, config.diffusion_stage))
    frozen, key = {"first_stage": first_stage}, jax.random.key(0)
    batch = _batch(model) | {"_mask": np.array([1, 1, 1, 0], np.float32)}
    other = {k: v.copy() for k, v in batch.items()}
    other["moments"][3] = 7.0
    a, metrics = loss(params, frozen, batch, key)
    b, _ = loss(params, frozen, other, key)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert metrics["loss"][1] == 3
    other["moments"][2] = 7.0
    assert abs(a - loss(params, frozen, other, key)[0]) > 1e-3


def test_cached_moments_are_the_encoded_images(setup):
    config, model, first_stage, params = setup
    source = sources.load("synthetic", "train", resolution=16, count=10)
    moments = step_diffusion.encode_source(
        model, first_stage, source, config.data.ops, batch=4
    )
    assert moments.shape[0] == 10
    image = source.fields["image"].astype(np.float32) / 127.5 - 1
    loss = jax.jit(step_diffusion.make_loss(model, config.diffusion_stage))
    frozen, key = {"first_stage": first_stage}, jax.random.key(0)
    batch = {"text": _batch(model, 10)["text"]}
    cached = loss(params, frozen, batch | {"moments": moments}, key)[0]
    encoded = loss(params, frozen, batch | {"image": image}, key)[0]
    np.testing.assert_allclose(cached, encoded, rtol=1e-4)


def test_everything_that_is_trained_gets_a_gradient(setup):
    config, model, first_stage, params = setup
    loss = step_diffusion.make_loss(model, config.diffusion_stage)
    logvar = jnp.zeros(len(model.schedule.betas))
    grads = jax.jit(jax.grad(lambda *a: loss(*a)[0]))(
        params | {"logvar": logvar},
        {"first_stage": first_stage},
        _batch(model, 8),
        jax.random.key(0),
    )
    # Only the timesteps that were drawn.
    assert 1 <= np.count_nonzero(grads["logvar"]) <= 8
    for part in ("unet", "conditioners"):
        size = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[part])]
        # A key's bias shifts all logits alike; all else must move.
        assert np.mean(np.array(size) > 0) > 0.95


def test_prepared_fields_are_one_row_a_caption(setup):
    _, model, _, _ = setup
    source = sources.load("synthetic", "train", resolution=16, count=5)
    fields = conditioning.prepare(model.conditioners, source.fields)
    assert fields["text"].shape == (5, *model.conditioners["text"].null.shape)
    assert fields["text"].dtype == np.int32


def test_panels_show_the_data_unless_prompts_are_given(setup):
    config, *_ = setup
    source = sources.load("synthetic", "train", resolution=16, count=16)
    fields = {"caption": source.fields["caption"]}
    shown = step_diffusion.panel_rows(config, fields)
    assert list(shown["caption"]) == list(fields["caption"][::2])
    given = runs.debug("report.prompts=('a', 'b')")
    assert step_diffusion.panel_rows(given, fields) == {"caption": ["a", "b"]}
    # Prompts alone can't stand for a picture to be completed.
    pictures = fields | {"image": source.fields["image"]}
    assert len(step_diffusion.panel_rows(given, pictures)["image"]) == 8
    assert step_diffusion.panel_rows(config, {}) == {}


def _configs():
    edm = defaults.sigma_process(runs.debug())
    terminal = runs.debug(
        "diffusion.zero_terminal_snr=True",
        "diffusion_stage.loss.min_snr_gamma=5.0",
        "diffusion_stage.loss.offset_noise=0.1",
        "diffusion_stage.loss.timestep_sampling=logit_normal",
    )
    return {"edm": edm, "zero terminal SNR": terminal}


@pytest.mark.parametrize("name", ["edm", "zero terminal SNR"])
def test_other_processes_train_and_sample(name, tmp_path):
    config = _configs()[name]
    step_diffusion.check(config)
    model = runs.build(config)
    first, params = runs.random_params(config, model)
    c = model.latent_shape[-1]
    frozen = {
        "first_stage": first_stage_lib.FirstStage(
            first["autoencoder"], jnp.zeros(c), jnp.ones(c)
        )
    }
    loss = step_diffusion.make_loss(model, config.diffusion_stage)
    batch = {k: jnp.asarray(v) for k, v in _batch(model).items()}
    gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    assert np.isfinite(metrics["loss"][0])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient["unet"]["conv_in"]["kernel"]).max() > 0

    runs.untrained(tmp_path / "run", config)
    loaded = ldm_jax.load(tmp_path / "run")
    for sampler in ("ddim", "edm"):
        drawn = loaded.sample(runs.CAPTIONS, sampler=sampler, steps=4)
        assert drawn.std() > 8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("diffusion.parameterization=eps", "diffusion.zero_terminal_snr=True"), "'v'"),
        (("diffusion_stage.loss.min_snr_gamma=-1.0",), "min_snr_gamma: -1.0; choose"),
        (("diffusion_stage.loss.timestep_sampling=cos",), "sampling: 'cos'; choose"),
    ],
)
def test_processes_that_cannot_be(overrides, words):
    with pytest.raises(UserError, match=words):
        step_diffusion.check(runs.debug(*overrides))


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("diffusion", "parameterization", "epsilon", "with the schedule sigma choose"),
        ("diffusion", "sigma_min", 90.0, "sigma_min: 90.0; choose more than 0 and"),
        ("diffusion_stage.loss", "weighting", "snr", "weighting: 'snr'; choose"),
        ("diffusion_stage.loss", "min_snr_gamma", 5.0, "min_snr_gamma: no such option"),
    ],
)
def test_sigma_processes_that_cannot_be(section, field, value, words):
    config = defaults.sigma_process(runs.debug())
    place = config
    for part in section.split("."):
        place = place[part]
    place[field] = value
    with pytest.raises(UserError, match=words):
        step_diffusion.check(config)


def test_endless_scenes_train(tmp_path, capsys):
    """Depth and captions of scenes that no epoch repeats."""
    config = config_lib.load(f"{runs.CONFIGS / 'depth2img.py'}:debug")
    config.data.options.update(dict(count=24, endless=True))
    with pytest.raises(UserError, match="cache_latents: True, but the data is endless"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.diffusion_stage.cache_latents = False
    config.report.retrieval_captions = 2
    assert loop.train(config, tmp_path / "run")
    assert "diffusion 2/2" in capsys.readouterr().out
