import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import depth
from ldm_jax.nets import dpt

TINY = dpt.DPTHybrid(
    stem=16,
    widths=(32, 64, 96),
    depths=(2, 1, 2),
    dim=32,
    heads=4,
    grid=4,
    taps=(1, 3),
    reassembled=(24, 40),
    fusion=16,
    groups=4,
)


def _reference(transformers, net: dpt.DPTHybrid):
    """transformers' untrained model of the same widths and depths."""
    backbone = transformers.BitConfig(
        embedding_size=net.stem,
        hidden_sizes=net.widths,
        depths=net.depths,
        num_groups=net.groups,
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        hidden_size=net.dim,
        intermediate_size=4 * net.dim,
        num_hidden_layers=net.taps[-1] + 1,
        num_attention_heads=net.heads,
        image_size=16 * net.grid,
        patch_size=16,
        backbone_out_indices=[0, 1, *net.taps],
        backbone_featmap_shape=[1, net.widths[-1], net.grid, net.grid],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[*net.widths[:2], *net.reassembled],
        fusion_hidden_size=net.fusion,
    )
    return transformers.DPTForDepthEstimation(config).eval()


def _randomise(torch, model):
    """Weights with which no part is idle: biases, places, norms off one and zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.ndim == 1 or "embeddings." in name else 0.1)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
            elif p.ndim > 1 and name.endswith("weight"):
                p.normal_(std=(2 / p[0].numel()) ** 0.5)


@pytest.fixture(scope="module")
def reference():
    torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
    model = _reference(pytest.importorskip("transformers"), TINY)
    _randomise(torch, model)
    return model


@pytest.fixture(scope="module")
def params(reference):
    state_dict = {k: v.numpy() for k, v in reference.state_dict().items()}
    return depth.dpt_params(state_dict, TINY)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 32), (64, 96)])
def test_depth_is_that_of_transformers(reference, params, size, monkeypatch):
    import torch

    x = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    # Theirs takes other sizes than its own, and oblong ones, only where told.
    monkeypatch.setattr(reference.dpt.embeddings, "image_size", size)
    stage, tokens = reference.neck.reassemble_stage, [n // 16 for n in size]
    forward = stage.forward
    monkeypatch.setattr(stage, "forward", lambda maps, *_: forward(maps, *tokens))
    with torch.no_grad():
        expected = reference(torch.from_numpy(np.moveaxis(x, -1, 1))).predicted_depth
    expected = expected.numpy()
    ours = jax.jit(TINY.apply)({"params": params}, x)
    assert ours.shape == (2, *size) and ours.dtype == jnp.float32
    assert ours.min() >= 0 and 0.3 < (expected > 0).mean()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours / scale, expected / scale, atol=5e-5)


def test_every_weight_matters(params):
    """None of the net's weights could be left out or be read from elsewhere."""
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 32, 3)).astype(np.float32)
    total = jax.jit(jax.grad(lambda p: (TINY.apply({"params": p}, x) ** 2).sum()))
    for path, slope in jax.tree_util.tree_leaves_with_path(total(params)):
        # The softmax doesn't notice what all keys have in common.
        if "to_k" not in jax.tree_util.keystr(path) or path[-1].key != "bias":
            assert np.abs(slope).max() > 0, path


def test_depth_is_never_negative(params):
    """Where the last layer's bias says so, the net's answer is 0, not less."""
    head = params["head_2"] | {"bias": jnp.full(1, -1e3)}
    x = jnp.zeros((1, 32, 32, 3))
    out = jax.jit(TINY.apply)({"params": params | {"head_2": head}}, x)
    np.testing.assert_array_equal(out, 0)


def test_full_size_has_as_many_parameters():
    torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
    transformers = pytest.importorskip("transformers")
    net = dpt.DPTHybrid(**dpt.VARIANTS["dpt_hybrid"])
    with torch.device("meta"):
        reference = _reference(transformers, net)
    # A state dict of shapes fits, without anything in it: zeros that take no memory.
    state_dict = {
        k: np.broadcast_to(np.float32(0), v.shape)
        for k, v in reference.state_dict().items()
    }
    image = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    out, variables = jax.eval_shape(
        lambda x: net.init_with_output(jax.random.key(0), x), image
    )
    assert out.shape == (1, 64, 32)
    ours = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    params = depth.dpt_params(state_dict, net)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == ours
    size = sum(leaf.size for leaf in jax.tree.leaves(variables))
    # Theirs has two parts that nothing uses.
    unused = [reference.dpt.layernorm, reference.neck.fusion_stage.layers[0]]
    unused[1] = unused[1].residual_layer1
    idle = sum(p.numel() for part in unused for p in part.parameters())
    assert size + idle == sum(p.numel() for p in reference.parameters())
    assert size == 121_196_289


def test_sides_are_multiples_of_32():
    with pytest.raises(ValueError, match="multiples of 32"):
        jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 48, 64, 3)))


def test_misfits_are_named(reference):
    state_dict = {k: v.numpy() for k, v in reference.state_dict().items()}
    del state_dict["neck.convs.2.weight"]
    state_dict["dpt.pooler.dense.bias"] = np.zeros(4)
    with pytest.raises(ValueError, match=r"neck\.convs\.2.*unknown dpt\.pooler"):
        depth.dpt_params(state_dict, TINY)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (384, 384)),
        ((480, 640), (384, 512)),  # 0.8 of 480 changes less than 0.6 of 640
        ((640, 480), (512, 384)),
        ((200, 300), (256, 384)),  # 1.28 of 300 changes less than 1.92 of 200
        ((1000, 10), (384, 32)),
    ],
)
def test_pictures_are_looked_at_near_384(size, expected):
    assert dpt.size_for(*size) == expected


def test_sizes_are_those_of_transformers():
    pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")
    for height, width in np.random.default_rng(0).integers(100, 1000, (200, 2)):
        picture = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = theirs.get_resize_output_image_size(picture, (384, 384), True, 32)
        ours = dpt.size_for(int(height), int(width))
        assert ours == (expected.height, expected.width)


@pytest.mark.parametrize("size", [(40, 60), (64, 64), (200, 130)])
def test_preprocessing_is_opencvs(size):
    cv2 = pytest.importorskip("cv2")
    x = np.random.default_rng(0).uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    ours = dpt.preprocess(jnp.asarray(x), 64)
    height, width = dpt.size_for(*size, 64)
    resized = cv2.resize((x[0] + 1) / 2, (width, height), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(ours[0], (resized - 0.5) / 0.5, atol=1e-5)
