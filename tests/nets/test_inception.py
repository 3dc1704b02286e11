import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import inception as convert
from ldm_jax.nets import inception

IMAGE = jax.ShapeDtypeStruct((2, 40, 30, 3), jnp.float32)


def test_outputs_and_size():
    net = inception.InceptionV3()
    (features, logits), variables = jax.eval_shape(
        lambda x: net.init_with_output(jax.random.key(0), x), IMAGE
    )
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == jnp.float32
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    trained = [x.size for path, x in leaves if path[-1].key not in ("mean", "variance")]
    # torchvision's has 23,834,568 without its auxiliary head, for 1000 classes.
    assert sum(trained) == 23_834_568 - 1000 + 8 * 2048


def test_means_leave_the_padding_out():
    x = jnp.ones((1, 4, 5, 2))
    np.testing.assert_allclose(inception._mean(x), x)


def test_the_last_block_takes_a_maximum():
    """A lone bright pixel: its neighbours all see it whole, not a ninth of it."""
    x = jnp.zeros((1, 5, 5, 8)).at[0, 2, 2].set(9.0)
    for use_maximum, bright in ((False, 1.0), (True, 9.0)):
        block = inception.BlockE(use_maximum)
        shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        pool = params["branch_pool"]
        pool |= {"kernel": jnp.ones((1, 1, 8, 192)) / 8, "scale": jnp.ones(192)}
        out = jax.jit(block.apply)({"params": params}, x)[0, :, :, -1]
        expected = np.zeros((5, 5))
        expected[1:4, 1:4] = bright / np.sqrt(1e-3)  # with a variance of 0
        np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (299, 299), (400, 310)])
def test_resizing_is_torchs(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(x, -1, 1)),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    )
    ours = np.moveaxis(np.asarray(inception.resize(jnp.asarray(x))), -1, 1)
    np.testing.assert_allclose(ours, expected.numpy(), atol=5e-5)


def _random_state_dict():
    """Weights under the file's keys that keep activations near one."""
    rng, state_dict = np.random.default_rng(0), {"fc.bias": np.ones(1008, np.float32)}
    shapes = convert.shapes()
    for rule in convert.rules(shapes):
        shape = shapes[rule.path]
        value = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            value *= np.sqrt(2 / np.prod(shape[:-1]))
        elif rule.path.endswith(("scale", "variance")):
            value = np.exp(0.2 * value)
        else:
            value *= 0.2
        state_dict[rule.key] = rule.layout.to_torch(value)
    return state_dict


@pytest.mark.slow
def test_the_net_is_torch_fidelitys(monkeypatch, tmp_path):
    """The same weights and pictures of 299 pixels, so without either's resizing."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("pip install --no-deps torch-fidelity")
    # The package itself wants torchvision at import; the net's file does not.
    package = types.ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    theirs = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    state_dict = _random_state_dict()
    tensors = {key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}
    torch.save(tensors, tmp_path / "weights.pth")
    reference = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    images = np.random.default_rng(1).integers(0, 256, (2, 299, 299, 3), np.uint8)
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
    x = jnp.asarray((images.astype(np.float32) - 128) / 128)
    ours = jax.jit(inception.InceptionV3().apply)(
        {"params": convert.params(state_dict)}, x
    )
    for a, b in zip(ours, expected, strict=True):
        b = b.numpy()
        np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max())
