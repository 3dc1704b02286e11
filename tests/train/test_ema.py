"""The averages against the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.train import ema
from tests import parity


@pytest.mark.parametrize(
    "case",
    [
        "decay0.9999_numupdates",
        "decay0.9999_plain",
        "decay0.3_numupdates",
        "decay0.9_plain",
    ],
)
def test_ema_is_the_reference_s(case):
    meta, _, io = parity.load("ema")
    decay, warmup = meta["cases"][case]
    names = list(meta["name_map"])

    def params(i):
        return {name: jnp.asarray(io[f"params/{name}"][i]) for name in names}

    average = params(0)
    update = jax.jit(ema.update, static_argnames="warmup")
    for n in range(10):
        average = update(average, params(n + 1), n, decay, warmup=warmup)
        for name in names:
            expected = io[f"{case}/{name}"][n]
            np.testing.assert_allclose(average[name], expected, atol=1e-6)


def test_first_update_keeps_two_elevenths():
    average = ema.update({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, 0, 0.9999)
    np.testing.assert_allclose(average["w"], [2 / 11, 2 / 11], rtol=1e-6)


def test_average_is_float32_whatever_the_params_are():
    """A bfloat16 average would never move by one part in ten thousand."""
    average = {"w": jnp.zeros(2)}
    for n in range(3):
        average = ema.update(
            average, {"w": jnp.ones(2, jnp.bfloat16)}, n, 0.9999, warmup=False
        )
    assert average["w"].dtype == jnp.float32
    np.testing.assert_allclose(average["w"], 1 - 0.9999**3, rtol=1e-3)
