"""The prior of unCLIP: CLIP's embedding as a latent, from config to picture."""

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import defaults, first_stage
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.convert import networks
from ldm_jax.nets import clip_vision, prior
from ldm_jax.train import loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
PRIOR = str(runs.CONFIGS / "prior.py")
TOWER = dict(image_size=16, patch_size=8, dim=16, depth=1, heads=2, projection_dim=12)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """(net, params, a file of them as the hub has them)."""
    net = clip_vision.CLIPVisionTransformer(**TOWER)
    x = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    params = runs.random_like(shapes)
    state = networks.export_network(net, {"params": params}, "huggingface")
    path = tmp_path_factory.mktemp("tower") / "model.safetensors"
    safetensors_numpy.save_file(state, path)
    return net, params, path


def _config(weights):
    """As `karlo`, tiny: a picture of 16 pixels is a vector of 12 numbers."""
    config = config_lib.load(f"{PRIOR}:debug")
    options = dict(kind="clip", tower=TOWER, weights=str(weights))
    options |= dict(ch_mult=(1,) * 5, z_channels=12, embed_dim=12)
    config.autoencoder.update(options)
    section = config.autoencoder_stage
    section.optim.train_only = "decoder|post_quant_conv|logvar"
    vector = dict(in_channels=12, out_channels=12, positions=1, query=True)
    config.unet.update(vector)
    return config


def test_the_latent_is_clip_s_and_its_decoder_is_trained(tower, tmp_path):
    net, params, path = tower
    config = _config(path)
    assert loop.train(config, tmp_path / "run")
    loaded = ldm_jax.load(tmp_path / "run")
    trained = loaded.first_stage.params
    jax.tree.map(np.testing.assert_array_equal, trained["tower"], params)
    _, fresh = runs.random_params(config, loaded.model)
    x = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    embedding = net.apply({"params": params}, clip_vision.preprocess(x, 16)).embedding
    z = first_stage.encode(
        loaded.model.autoencoder, loaded.first_stage, x, jax.random.key(0)
    )
    assert z.shape == (3, 1, 1, 12)
    mean, std = loaded.first_stage.mean, loaded.first_stage.std
    expected = (embedding - mean[None]) / std[None]
    np.testing.assert_allclose(z[:, 0, 0], expected, atol=5e-5)
    images = loaded.sample(["a red circle", "a blue square"], steps=2)
    assert images.shape == (2, 16, 16, 3) and not np.array_equal(*images)
    with pytest.raises(UserError, match="unet.positions: 1, but the latent is 2x2"):
        loaded.sample("a red circle", size=32)


def test_what_is_predicted_stays_within_ten_stds(tower):
    config = _config(tower[2])
    model = runs.build(config)
    _, params = runs.random_params(config, model)
    params = jax.tree.map(lambda x: 100 * x, params)
    context = jax.random.normal(jax.random.key(0), (2, 20, 32))
    cond = model_lib.conditioning.Conditioning(context=context)
    denoise = model_lib.make_denoiser(model, params, [cond])
    z = jax.random.normal(jax.random.key(1), (2, 1, 1, 12))
    x0_hat, _ = denoise(z, jax.numpy.asarray(500))
    assert np.abs(x0_hat).max() == 10.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(weights=None), "autoencoder.weights: None, but its tower is not trained"),
        (dict(weights="/no/where"), "autoencoder.weights: no file or folder"),
        (dict(embed_dim=8), "autoencoder: embed_dim 8 is not the tower's .* 12"),
    ],
)
def test_towers_that_are_none(tower, tmp_path, changes, words):
    config = _config(tower[2])
    with config.autoencoder.ignore_type():
        config.autoencoder.update(changes)
    with pytest.raises(UserError, match=words):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pattern", [None, "decoder|tower"])
def test_a_tower_is_not_trained(tower, tmp_path, pattern):
    config = _config(tower[2])
    with config.autoencoder_stage.ignore_type():
        config.autoencoder_stage.optim.train_only = pattern
    with pytest.raises(UserError, match="train_only: .* trains the tower, whose"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_context_of_another_length_is_named():
    net = prior.PriorTransformer(4, 4, 8, context_length=3, depth=1, heads=1)
    inputs = net.abstract_inputs()
    inputs["context"] = jax.ShapeDtypeStruct((1, 5, 8), np.float32)
    with pytest.raises(ValueError, match=r"context is \[5, 8\] a row, .* takes \[3, 8"):
        jax.eval_shape(lambda i: net.init(jax.random.key(0), **i), inputs)
    wide = net.clone(positions=4)
    with pytest.raises(ValueError, match="positions 4; with a query there is one"):
        jax.eval_shape(
            lambda i: wide.init(jax.random.key(0), **i), wide.abstract_inputs()
        )


def test_karlo_is_of_its_size():
    config = config_lib.load(f"{PRIOR}:karlo")
    model = runs.build(config)
    assert model.latent_shape == (1, 1, 768)
    init = jax.eval_shape(
        lambda: model_lib.init_diffusion(config, model, jax.random.key(0))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(init["unet"]))
    assert round(count / 1e6, 2) == 1022.03
    assert defaults.karlo_texts().keys() == set(config.conditioners)
