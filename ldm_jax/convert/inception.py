"""The weights of FID's InceptionV3 under torchvision's names to this package's params.

The file is pt_inception-2015-12-05-6726825d.pth, TensorFlow's graph as pytorch-fid
ported it.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import plans
from ldm_jax.nets import inception

_NAMES = {
    "conv_1a": "Conv2d_1a_3x3",
    "conv_2a": "Conv2d_2a_3x3",
    "conv_2b": "Conv2d_2b_3x3",
    "conv_3b": "Conv2d_3b_1x1",
    "conv_4a": "Conv2d_4a_3x3",
    "classifier": "fc.weight",
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}
_LAYOUTS = {"kernel": plans.CONV, "classifier": plans.LINEAR}


def rules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[plans.Rule]:
    """Rules of every parameter of the net."""
    for path in shapes:
        words = [word.replace("mixed_", "Mixed_") for word in path.split("/")]
        key = ".".join(_NAMES.get(word, word) for word in words)
        yield plans.Rule(path, key, _LAYOUTS.get(words[-1], plans.AS_IS))


def shapes() -> dict[str, tuple[int, ...]]:
    """{"path/of/param": shape} of the net."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return plans.abstract_params(inception.InceptionV3(), image)


def params(state_dict: Mapping[str, np.ndarray]) -> dict:
    """Params of `InceptionV3` from the state dict; ValueError where one doesn't fit.

    The classifier's bias is left out, see the net. torchvision's own weights (1000
    classes, an auxiliary head) are another net and don't fit.
    """
    expected = shapes()
    beside = r"fc\.bias|.*\.num_batches_tracked"
    plan = plans.Plan(list(rules(expected)), expected, beside)
    return plans.convert(state_dict, plan)
