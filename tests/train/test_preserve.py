"""Prior preservation: the loss of two sets, what is drawn and kept, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax.config import UserError
from ldm_jax.diffusion import objective, schedules
from ldm_jax.train import loop, preserve
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize(("own", "kept"), [(3, 8), (8, 3), (4, 4)])
def test_the_mean_of_weighted_losses_is_both_means(own, kept):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=own), rng.normal(size=kept)
    rows = preserve.join({"loss": a}, {"loss": b}, 0.7)
    wanted = a.mean() + 0.7 * b.mean()
    np.testing.assert_allclose(
        np.mean(rows["loss"] * rows[preserve.WEIGHT]), wanted, rtol=1e-6
    )
    # Neither is so rare that most batches lack it.
    share = np.isin(rows["loss"], a).mean()
    assert 0.3 < share < 0.7


def test_an_examples_loss_is_multiplied_by_its_weight():
    schedule = schedules.make_schedule(
        schedule="linear", timesteps=10, linear_start=0.001, linear_end=0.02
    )
    z = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))

    def losses(**options):
        total, pairs = objective.diffusion_loss(
            lambda z_t, t, cond: 0.5 * z_t,
            schedule,
            z,
            None,
            jax.random.key(1),
            parameterization="eps",
            **options,
        )
        return float(total), float(pairs["loss_simple"][0])

    alone = [losses(mask=jnp.eye(4)[i])[0] for i in range(4)]
    weight = jnp.asarray([2.0, 0.5, 0.0, 1.0])
    weighted, simple = losses(weight=weight)
    np.testing.assert_allclose(weighted, np.mean(np.multiply(alone, weight)), rtol=1e-5)
    np.testing.assert_allclose(simple, np.sum(alone), rtol=1e-5)


def test_a_run_is_trained_on_what_the_other_draws(tmp_path):
    other, heir = tmp_path / "other", tmp_path / "heir"
    runs.untrained(other, runs.debug())
    config = runs.debug(
        f"init_from={other}",
        "diffusion_stage.preserve.prompt=a red circle",
        "diffusion_stage.preserve.pictures=3",
    )
    assert loop.train(config, heir)
    size = config.resolution
    wanted = ldm_jax.load(other).sample("a red circle", count=3, seed=config.seed)
    files = sorted((heir / "preserve").iterdir())
    kept = np.stack([np.asarray(Image.open(path)) for path in files])
    np.testing.assert_array_equal(kept, wanted)
    assert kept.shape == (3, size, size, 3)

    # Read again, not drawn again: also where the other run is gone.
    config.init_from = str(tmp_path / "gone")
    again = preserve.drawn(config, heir)
    np.testing.assert_array_equal(again.fields["image"], kept)
    assert again.fields["caption"].tolist() == ["a red circle"] * 3

    # Other pictures or another weight: other params.
    def params(workdir, *overrides):
        loop.train(runs.debug(f"init_from={other}", *overrides), workdir)
        return jax.tree.leaves(ldm_jax.load(workdir).params["unet"])

    first = jax.tree.leaves(ldm_jax.load(heir).params["unet"])
    plain = params(tmp_path / "plain")
    assert any(np.any(a != b) for a, b in zip(first, plain, strict=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=None"], "no model to draw it; set init_from"),
        (["diffusion_stage.preserve.pictures=0"], "pictures: 0; choose 1 or more"),
        (["diffusion_stage.preserve.weight=-1.0"], "weight: -1.0; choose one above 0"),
        (["diffusion_stage.cache_latents=False"], "set it to True"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    config = runs.debug(
        "init_from=x", "diffusion_stage.preserve.prompt=a dog", *overrides
    )
    with pytest.raises(UserError, match=message) as error:
        preserve.check(config, runs.build(config))
    assert "\n" not in str(error.value)


def test_a_model_of_other_conditions_is_refused():
    config = runs.debug("init_from=x", "diffusion_stage.preserve.prompt=a dog")
    model = dataclasses.replace(runs.build(config), conditioners={})
    with pytest.raises(UserError, match="told more, or other things, than a caption"):
        preserve.check(config, model)
