"""A net that learns its variance, from config to picture."""

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import defaults
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.train import loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
PIXEL = f"{runs.CONFIGS / 'pixel.py'}:learned_variance"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = defaults.debug(config_lib.load(PIXEL))
    assert loop.train(config, workdir)
    return workdir


def test_it_trains_and_says_the_bound(trained):
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(trained / "logs" / "diffusion"))
    events.Reload()
    names = {*events.Tags()["scalars"], *events.Tags()["tensors"]}
    assert {"train/loss_variance", "heldout/loss_variance"} <= names


def test_ddpm_draws_by_it_and_ddim_without(trained):
    loaded = ldm_jax.load(trained)
    unet = loaded.params["unet"]
    kernel = unet["conv_out"]["kernel"]
    moved = kernel.at[..., 3:].add(0.1 * jax.random.normal(jax.random.key(0), (3,)))
    unet = {**unet, "conv_out": {**unet["conv_out"], "kernel": moved}}
    params = {**loaded.params, "unet": unet}
    other = loaded_lib.LoadedModel(
        loaded.config, loaded.model, params, loaded.first_stage, 2, loaded.tokenizers
    )
    same = {}
    for sampler in ("ddpm", "ddim"):
        options = dict(prompts="a red circle", sampler=sampler, steps=3)
        images = loaded.sample(**options)
        assert images.shape == (1, 16, 16, 3)
        same[sampler] = np.array_equal(images, other.sample(**options))
    assert same == {"ddpm": False, "ddim": True}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["unet.out_channels=5"], "set it to 3, or 6 to learn the variance too"),
    ],
)
def test_other_numbers_of_channels(overrides, words):
    config = config_lib.load(PIXEL, overrides)
    with pytest.raises(UserError, match=f"^unet.out_channels: .*{words}"):
        model_lib.build(config, {"text": runs.tokenizer()})


def test_noise_levels_have_no_learned_variance():
    config = defaults.sigma_process(config_lib.load(PIXEL))
    with pytest.raises(UserError, match="^unet.out_channels: 6, .* set it to 3$"):
        model_lib.build(config, {"text": runs.tokenizer()})
