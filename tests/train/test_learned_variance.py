"""A net that learns its variance, from config to picture."""

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import defaults
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
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


def test_the_vectors_of_karlo_s_decoder_are_the_picture_s_then_the_text_s():
    """Of one width, so that nothing else would tell if they were exchanged."""
    config = config_lib.load(f"{runs.CONFIGS / 'unclip.py'}:karlo_decoder")
    tower = dict(dim=16, depth=1, heads=2, projection_dim=16)
    for name in ("text", "pooled"):
        config.conditioners[name].net = tower | dict(
            kind="clip", zero_padding=name == "text"
        )
    del config.conditioners.text.net["projection_dim"]
    pixels = dict(image_size=16, patch_size=8)
    config.conditioners.picture.net = tower | pixels
    config.resolution = 16
    config.unet = dict(
        config.unet.to_dict(),
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        num_head_channels=16,
        context_dim=12,
        adm_in_channels=32,
        attention_resolutions=(2,),
    )
    model = model_lib.build(
        config, dict.fromkeys(config.conditioners, runs.tokenizer())
    )
    b, key = 2, jax.random.key(0)
    params = conditioning.init(model.conditioners, key)
    rows = conditioning.null_rows(model.conditioners, b)
    made = conditioning.encode(
        model.conditioners,
        params,
        jax.tree.map(np.asarray, rows),
        tools=conditioning.Tools(keys=jax.random.split(key, b)),
        dropped={"picture": np.array([True, False])},
    )
    assert made.context.shape == (b, 77, 16) and made.vector.shape == (b, 32)
    picture, text = np.split(np.asarray(made.vector), 2, axis=-1)
    assert not picture[0].any() and picture[1].any() and text.any(axis=-1).all()
    np.testing.assert_array_equal(text[0], text[1])
    z, t = np.zeros((b, 16, 16, 3), np.float32), np.array([1, 2])
    unet = model.unet.init(key, z, t, context=made.context, y=made.vector)
    unet = runs.random_like(jax.eval_shape(lambda: unet)["params"])
    out = model_lib.apply_unet(model, unet, z, t, made)
    unet["clip"]["null"] += 1  # of a picture that is not there, and of no other
    moved = np.abs(model_lib.apply_unet(model, unet, z, t, made) - out).max((1, 2, 3))
    assert moved[0] > 1e-3 and moved[1] == 0
