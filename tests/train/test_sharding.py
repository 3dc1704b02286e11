"""Places of parameters, and one step on many devices against one step on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.train import sharding, stage, step_autoencoder, step_diffusion
from ldm_jax.train import state as train_state
from tests import runs


def _mesh(data=-1, fsdp=1, tensor=1):
    section = dict(data=data, fsdp=fsdp, tensor=tensor, dcn_data=1)
    return sharding.make_mesh(ConfigDict(section))


def test_one_axis_takes_the_rest():
    assert dict(_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_named(sizes):
    with pytest.raises(UserError, match="^mesh: .*8 devices"):
        _mesh(*sizes)


def test_batch_size_must_divide_over_devices_and_micro_batches():
    mesh = _mesh(2, 2, 2)
    sharding.check_batch_size("batch_size", 8, mesh, 2)
    message = "batch_size: 6 is not divisible by 4 devices; use 4 or 8"
    with pytest.raises(UserError, match=message):
        sharding.check_batch_size("batch_size", 6, mesh)
    with pytest.raises(UserError, match=r"12 .* 4 devices x 2 micro.*use 8 or 16"):
        sharding.check_batch_size("batch_size", 12, mesh, 2)
    with pytest.raises(UserError, match="use 4 or 8"):
        sharding.check_batch_size("batch_size", 2, mesh)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("unet/mid/attn1/to_q/kernel", (512, 512), P("fsdp", "tensor")),
        ("opt_state/0/mu/unet/attn1/to_out/kernel", (512, 512), P("tensor", "fsdp")),
        ("ff/ff_in/kernel", (256, 2048), P("fsdp", "tensor")),
        ("ff/ff_out/kernel", (1024, 256), P("tensor", "fsdp")),
        ("text/token_emb", (30522, 1280), P("tensor", "fsdp")),
        ("text/token_emb", (30521, 1280), P(None, "fsdp")),
        ("mid/conv1/kernel", (3, 3, 512, 1024), P(None, None, None, "fsdp")),
        ("mid/conv1/kernel", (3, 3, 512, 513), P(None, None, "fsdp", None)),
        ("mid/conv1/kernel", (3, 3, 511, 513), P()),
        ("to_q/kernel", (8, 8), P()),
    ],
)
def test_partition_spec(path, shape, spec):
    assert sharding.partition_spec(path, shape, _mesh(2, 2, 2)) == spec


def test_every_rule_matches_a_parameter_of_the_nets():
    config = runs.debug("unet.transformer_depth=1")
    _, second = runs.random_params(config, runs.build(config))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(second)
    ]
    for pattern, spec in sharding.RULES:
        for name in pattern.split("/")[0].strip("()").replace("?$", "").split("|"):
            name = name.removesuffix("(edding)")
            assert any(name in path for path in paths), (name, spec)


def test_unsharded_names_large_replicated_parameters():
    tree = {
        "fits": jax.ShapeDtypeStruct((512, 256), jnp.float32),
        "odd": jax.ShapeDtypeStruct((511, 257), jnp.float32),
        "small": jax.ShapeDtypeStruct((3, 5), jnp.float32),
    }
    assert sharding.unsharded(tree, _mesh(1, 8, 1)) == ["odd"]
    assert sharding.unsharded(tree, _mesh(8, 1, 1)) == []


# ---- One step, sharded and not -------------------------------------------------------


def _tx(eps):
    # The first update, -g / (|g| + eps), neither blows up nor hides an error of g.
    return optax.adamw(1.0, eps=eps, weight_decay=0.0)


def _autoencoder_step(kind):
    """The adversarial step: both optimizers, running statistics, a moving codebook."""
    config = config_lib.load(f"{runs.AUTOENCODER}:{kind}")
    mesh = _mesh(8)
    net = model_lib.build_autoencoder(config)
    disc = step_autoencoder.make_discriminator(config, mesh)
    x = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    abstract = jax.eval_shape(
        lambda: (
            *model_lib.init_autoencoder(config, net, jax.random.key(0)),
            disc.init(jax.random.key(0), x, train=True),
        )
    )
    params, variables, made = runs.random_like(abstract)
    variables = jax.tree.map(jnp.abs, variables)
    disc_variables = {"batch_stats": jax.tree.map(jnp.abs, made["batch_stats"])}
    # A KL autoencoder's loss is a sum over pixels, its gradients are that much larger.
    tx, disc_tx = _tx(1000.0 if kind == "debug" else 10.0), _tx(10.0)
    adversary = train_state.Adversary(
        made["params"], disc_tx.init(made["params"]), disc_variables
    )
    config.autoencoder_stage.ema_decay = 0.9
    state = train_state.create(params, tx, 0.9, variables, adversary)
    step = step_autoencoder.make_step(config, net, tx, disc, disc_tx)
    return step, state, {}, {"image": x}


def _diffusion_step():
    config = runs.debug()
    model = runs.build(config)
    rng = np.random.default_rng(0)
    h, w, c = model.latent_shape
    first_stage = first_stage_lib.FirstStage({}, jnp.zeros(c), jnp.ones(c))
    batch = {
        "moments": rng.normal(size=(8, h, w, 2 * c)).astype(np.float32),
        "text": rng.integers(4, 40, (8, *model.conditioners["text"].null.shape)),
    }
    batch["text"] = batch["text"].astype(np.int32)
    loss = step_diffusion.make_loss(model, config.diffusion_stage)
    params, tx = runs.random_params(config, model)[1], _tx(10.0)
    step = stage.make_step(loss, tx, seed=0, micro_batches=1, ema_decay=0.9)
    state = train_state.create(params, tx, 0.9)
    return step, state, {"first_stage": first_stage}, batch


STEPS = {
    "kl": functools.partial(_autoencoder_step, "debug"),
    "vq": functools.partial(_autoencoder_step, "debug_vq"),
    "diffusion": _diffusion_step,
}


@pytest.fixture(scope="module", params=STEPS)
def one_step(request, fast_compile):
    """(step, state, frozen, batch) of a stage, and the result on one device."""
    step, *inputs = STEPS[request.param]()
    return step, *inputs, jax.jit(step)(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_sharded_step_is_the_unsharded_one(one_step, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 32)
    step, state, frozen, batch, (expected, expected_metrics) = one_step
    mesh = _mesh(*sizes)
    shardings = sharding.tree_shardings(state, mesh)
    if sizes[1] > 1:
        cut = [not s.is_fully_replicated for s in jax.tree.leaves(shardings.params)]
        assert sum(cut) > len(cut) / 5
    rows = sharding.batch_sharding(mesh)
    sharded = jax.jit(
        step,
        in_shardings=(shardings, sharding.replicated(mesh), rows),
        out_shardings=(shardings, None),
    )
    got, metrics = sharded(
        jax.device_put(state, shardings),
        jax.device_put(frozen, sharding.replicated(mesh)),
        jax.device_put(batch, rows),
    )

    def moving(state):
        adversary = state.adversary
        if adversary is not None:
            adversary = adversary.params, adversary.variables
        return state.params, state.ema, state.variables, adversary

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        moving(got),
        moving(expected),
    )
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - b).max(), got.params, state.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-2
    for name, (total, count) in expected_metrics.items():
        np.testing.assert_allclose(
            metrics[name][0], total, rtol=1e-4, atol=1e-6, err_msg=name
        )
        assert metrics[name][1] == count
