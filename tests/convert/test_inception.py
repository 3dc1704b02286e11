import flax
import numpy as np
import pytest

from ldm_jax.convert import inception


def _state_dict(seed=0):
    """Zeros-free arrays under every key of the file, in torch's layouts."""
    rng = np.random.default_rng(seed)
    shapes = inception.shapes()
    state_dict = {"fc.bias": np.zeros(1008, np.float32)}
    for rule in inception.rules(shapes):
        value = rng.standard_normal(shapes[rule.path], np.float32)
        state_dict[rule.key] = rule.layout.to_torch(value)
    return state_dict


def test_the_files_keys_and_shapes():
    shapes = {key: value.shape for key, value in _state_dict().items()}
    # 94 convolutions with four vectors of normalisation each, and the classifier.
    assert len(shapes) == 94 * 5 + 2
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_3b_1x1.bn.weight": (80,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.bn.running_var": (192,),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.bn.running_mean": (320,),
        "fc.weight": (1008, 2048),
    }
    assert expected.items() <= shapes.items()


def test_every_array_arrives_once():
    state_dict = _state_dict()
    params = flax.traverse_util.flatten_dict(inception.params(state_dict), sep="/")
    assert {path: value.shape for path, value in params.items()} == inception.shapes()
    for rule in inception.rules(inception.shapes()):
        back = rule.layout.to_torch(params[rule.path])
        np.testing.assert_array_equal(back, state_dict.pop(rule.key))
    assert list(state_dict) == ["fc.bias"]


def test_counters_of_batches_are_left_out():
    extra = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    inception.params(_state_dict() | extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": np.zeros((1000, 2048))}, "fc.weight of shape .1000, 2048."),
        ({"AuxLogits.fc.bias": np.zeros(1000)}, "unknown AuxLogits.fc.bias"),
        ({"Mixed_7c.branch1x1.bn.bias": None}, "missing Mixed_7c.branch1x1.bn.bias"),
    ],
)
def test_another_nets_weights_are_refused(change, message):
    state_dict = _state_dict() | change
    state_dict = {key: value for key, value in state_dict.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        inception.params(state_dict)
