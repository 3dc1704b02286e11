"""What the console says."""

import jax
import jax.numpy as jnp

from ldm_jax.train import report


def test_the_memory_of_a_step_is_that_of_its_arrays():
    x = jax.ShapeDtypeStruct((250_000_000,), jnp.float32)  # 1 GB, not made
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    assert report.step_memory(compiled) == (
        "; a step needs 2.00 GB on each device, 2.00 of them for what it is given and"
        " gives"
    )
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert "needs 1.00 GB" in report.step_memory(donated)
