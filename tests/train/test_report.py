"""What the console says."""

import types

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, report, sharding
from ldm_jax.train import state as train_state


def test_the_memory_of_a_step_is_that_of_its_arrays():
    x = jax.ShapeDtypeStruct((250_000_000,), jnp.float32)  # 1 GB, not made
    compiled = jax.jit(lambda x: x + 1).lower(x).compile()
    assert report.step_memory(compiled) == (
        "; a step needs 2.00 GB on each device, 2.00 of them for what it is given and"
        " gives"
    )
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert "needs 1.00 GB" in report.step_memory(donated)


def test_the_memory_of_a_state_is_known_before_anything_is_made(monkeypatch):
    """Of each device: large params in parts, small ones whole."""
    mesh = sharding.make_mesh(ConfigDict(dict(data=2, fsdp=4, tensor=1, dcn_data=1)))
    params = {
        "large": jax.ShapeDtypeStruct((4000, 250_000), jnp.float32),  # 4 GB
        "small": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    state = jax.eval_shape(
        lambda params: train_state.create(params, optax.adam(0.1), 0.9), params
    )
    state = checkpoint.placed(state, sharding.tree_shardings(state, mesh))
    assert report.state_memory(state) == (
        "a device holds 4.00 GB of its state and 1.00 of gradients"
    )
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 4.5e9})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(UserError, match=r"^mesh.fsdp: .* take 5.0 GB .* has 4.5;"):
        report.state_memory(state)
