"""The PatchGAN against taming-transformers' data, its norms, and many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.convert import discriminator as convert
from ldm_jax.nets import discriminator
from tests import parity

TINY = dict(ndf=16, n_layers=1)


@functools.cache
def fixture(name, norm):
    """(net, variables, io, the state dict) of a fixture."""
    meta, weights, io = parity.load(name)
    sizes = {key: meta["config"][key] for key in ("ndf", "n_layers")}
    net = discriminator.PatchDiscriminator(norm=norm, **sizes)
    return net, convert.discriminator_variables(weights, net), io, weights


def batch_norms():
    return fixture("nlayer_discriminator", "batch")


def act_norms():
    return fixture("actnorm_discriminator", "actnorm")


def _train(net, variables, x):
    """Logits in train mode, and the variables with what the call has moved."""
    logits, moved = net.apply(variables, x, train=True, mutable=["batch_stats"])
    return logits, variables | moved


def _tiny(norm, rows=8, **options):
    """(net, variables that are all random, x) of a small net."""
    net = discriminator.PatchDiscriminator(norm=norm, **TINY | options)
    x = jax.random.normal(jax.random.key(0), (rows, 8, 6, 3))
    x = x + jnp.arange(rows, dtype=jnp.float32)[:, None, None, None]
    variables = net.init(jax.random.key(1), x, train=False)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf if leaf.dtype == bool else leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return net, jax.tree.unflatten(tree, leaves), x


def _assert_trees_close(got, expected, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, expected
    )


# --- against the reference


def _assert_stats_match(variables, net, io, prefix):
    for rule in convert.discriminator_rules(net, convert.abstract_variables(net)):
        collection, layer, leaf = rule.path.split("/")
        if f"{prefix}/{rule.key}" in io:
            expected = rule.layout.to_flax(io[f"{prefix}/{rule.key}"])
            got = variables[collection][layer][leaf]
            np.testing.assert_allclose(got, expected, atol=5e-5, err_msg=rule.key)


def test_batch_norm_net_matches_the_reference_in_train_and_eval_mode():
    net, variables, io, _ = batch_norms()
    x = jnp.asarray(parity.nhwc(io["x"]))
    logits, variables = _train(net, variables, x)
    np.testing.assert_allclose(logits, parity.nhwc(io["out_train"]), atol=5e-5)
    _assert_stats_match(variables, net, io, "after1")
    logits, variables = _train(net, variables, 0.5 * x)
    np.testing.assert_allclose(logits, parity.nhwc(io["out_train_second"]), atol=5e-5)
    _assert_stats_match(variables, net, io, "after2")
    logits = net.apply(variables, x, train=False)
    np.testing.assert_allclose(logits, parity.nhwc(io["out_eval"]), atol=5e-5)


def test_act_norm_net_matches_the_reference_and_is_initialized_once():
    net, variables, io, _ = act_norms()
    x = jnp.asarray(parity.nhwc(io["x"]))
    initialize = functools.partial(
        net.apply, train=True, initialize=True, mutable=["params", "batch_stats"]
    )
    logits, variables = initialize(variables, x)
    np.testing.assert_allclose(logits, parity.nhwc(io["out_first"]), atol=5e-5)
    _assert_stats_match(variables, net, io, "after1")
    assert variables["batch_stats"]["norm_1"]["initialized"]
    np.testing.assert_array_equal(_train(net, variables, x)[0], logits)

    second = 0.5 * x + 0.1
    logits, again = initialize(variables, second)
    np.testing.assert_allclose(logits, parity.nhwc(io["out_second"]), atol=5e-5)
    _assert_trees_close(again, variables, atol=0)


@pytest.mark.parametrize("case", [batch_norms, act_norms])
def test_rules_read_both_ways(case):
    net, variables, _, weights = case()
    exported = {}
    for rule in convert.discriminator_rules(net, convert.abstract_variables(net)):
        collection, layer, leaf = rule.path.split("/")
        value = np.asarray(variables[collection][layer][leaf])
        exported[rule.key] = rule.layout.to_torch(value)
    counters = {key for key in weights if key.endswith("num_batches_tracked")}
    assert set(exported) == set(weights) - counters
    for key, value in exported.items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)
        assert value.dtype == weights[key].dtype


def test_converter_names_what_does_not_fit():
    net, _, _, weights = batch_norms()
    weights = {k: v for k, v in weights.items() if k != "main.9.running_var"}
    with pytest.raises(ValueError, match=r"missing main\.9\.running_var.*main\.99"):
        convert.discriminator_variables(weights | {"main.99.weight": 0}, net)


# --- norms


def test_running_statistics_move_in_train_mode_only():
    net, variables, x = _tiny("batch")
    _, same = net.apply(variables, x, train=False, mutable=["batch_stats"])
    _assert_trees_close(same["batch_stats"], variables["batch_stats"], atol=0)
    fresh = net.init(jax.random.key(0), x, train=True)["batch_stats"]["norm_1"]
    np.testing.assert_array_equal(fresh["mean"], jnp.zeros(32))
    np.testing.assert_array_equal(fresh["var"], jnp.ones(32))


def test_groups_of_rows_are_normalised_apart():
    net, variables, x = _tiny("batch_per_device", statistic_groups=4)
    logits, moved = _train(net, variables, x)
    whole = _tiny("batch")[0]
    apart = [_train(whole, variables, rows) for rows in jnp.split(x, 4)]
    expected = jnp.concatenate([logits for logits, _ in apart])
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    mean = jax.tree.map(lambda *stats: sum(stats) / 4, *[v for _, v in apart])
    _assert_trees_close(moved, mean, atol=1e-5)
    assert jnp.abs(logits - _train(whole, variables, x)[0]).max() > 0.1
    # Running statistics know no groups, and a last batch may have any number of rows.
    got = net.apply(variables, x[:3], train=False)
    np.testing.assert_array_equal(got, whole.apply(variables, x[:3], train=False))


def test_act_norm_starts_as_the_identity_until_it_is_initialized():
    net = discriminator.PatchDiscriminator(norm="actnorm", **TINY)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = net.init(jax.random.key(1), x, train=False)
    norm = variables["params"]["norm_1"]
    np.testing.assert_array_equal(norm["loc"], jnp.zeros(32))
    np.testing.assert_array_equal(norm["scale"], jnp.ones(32))
    assert not variables["batch_stats"]["norm_1"]["initialized"]


def test_group_norm_looks_at_one_image_and_keeps_no_statistics():
    net, variables, x = _tiny("group")
    assert set(variables) == {"params"}
    logits = net.apply(variables, x, train=True)
    alone = net.apply(variables, x[3:4], train=True)
    np.testing.assert_allclose(logits[3:4], alone, atol=1e-5)


# --- many devices


def _on_eight_devices(net, variables, x):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    return jax.jit(functools.partial(_train, net), in_shardings=(everywhere, rows))(
        variables, jax.device_put(x, rows)
    )


@pytest.mark.parametrize("norm", ["batch", "batch_per_device"])
def test_sharded_batch_gives_what_the_unsharded_one_gives(norm):
    net, variables, x = _tiny(norm, statistic_groups=8)
    got = _on_eight_devices(net, variables, x)
    _assert_trees_close(got, _train(net, variables, x), atol=1e-5)


def test_whole_batch_statistics_are_those_of_all_devices():
    net, variables, x = _tiny("batch", statistic_groups=8)
    logits, moved = _on_eight_devices(net, variables, x)
    alone, _ = _train(net, variables, x[:1])
    assert jnp.abs(logits[:1] - alone).max() > 0.1
    h = _before_norm(net, variables, x)
    running = variables["batch_stats"]["norm_1"]
    stats = moved["batch_stats"]["norm_1"]
    mean = 0.9 * running["mean"] + 0.1 * h.mean((0, 1, 2))
    var = 0.9 * running["var"] + 0.1 * h.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


def _before_norm(net, variables, x):
    _, state = net.apply(variables, x, train=False, capture_intermediates=True)
    return np.asarray(state["intermediates"]["conv_1"]["__call__"][0], np.float64)


def test_per_device_statistics_need_no_communication():
    net, variables, x = _tiny("batch_per_device", statistic_groups=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def collectives(net):
        step = jax.jit(
            lambda v, x: _train(net, v, x)[0], in_shardings=(everywhere, rows)
        )
        text = step.lower(variables, x).compile().as_text()
        return text.count("all-reduce(") + text.count("all-gather(")

    assert collectives(net) == 0
    assert collectives(_tiny("batch")[0]) > 0


# --- shapes, start, precision, errors


def test_parameters_start_as_the_reference_starts_them():
    net = discriminator.PatchDiscriminator()
    x = net.abstract_inputs()["x"]
    init = jax.jit(functools.partial(net.init, train=False))
    params = init(jax.random.key(0), jnp.zeros(x.shape))["params"]
    widths = [64, 128, 256, 512]
    shapes = [params[f"conv_{i}"]["kernel"].shape[2:] for i in range(4)]
    assert shapes == list(zip([3, *widths], widths, strict=False))
    for i in range(4):
        np.testing.assert_allclose(params[f"conv_{i}"]["kernel"].std(), 0.02, rtol=0.05)
        assert ("bias" in params[f"conv_{i}"]) == (i == 0)
    for i in range(1, 4):
        scale = params[f"norm_{i}"]["scale"]
        np.testing.assert_allclose(scale.mean(), 1, atol=0.01)
        np.testing.assert_allclose(scale.std(), 0.02, rtol=0.2)
        np.testing.assert_array_equal(
            params[f"norm_{i}"]["bias"], jnp.zeros_like(scale)
        )
    bias, limit = params["conv_0"]["bias"], 48**-0.5
    assert 0.8 * limit < jnp.abs(bias).max() <= limit
    assert jnp.abs(params["conv_out"]["bias"]).max() <= 8192**-0.5


def test_size_of_the_logits_and_the_least_image():
    net = discriminator.PatchDiscriminator(ndf=16, in_channels=5)
    x = net.abstract_inputs()["x"]
    assert x.shape == (1, 24, 24, 5)
    init = functools.partial(net.init_with_output, jax.random.key(0), train=False)
    assert jax.eval_shape(init, x)[0].shape == (1, 1, 1, 1)
    x = jax.ShapeDtypeStruct((2, 48, 256, 5), jnp.float32)
    assert jax.eval_shape(init, x)[0].shape == (2, 4, 30, 1)
    deep = discriminator.PatchDiscriminator(
        ndf=16, n_layers=5, norm="batch_per_device", statistic_groups=2
    )
    x = deep.abstract_inputs()["x"]
    init_deep = functools.partial(deep.init, jax.random.key(0), train=True)
    params = jax.eval_shape(init_deep, x)["params"]
    widths = [params[f"conv_{i}"]["kernel"].shape[-1] for i in range(6)]
    assert widths == [16, 32, 64, 128, 128, 128]
    with pytest.raises(ValueError, match="23x256 leave no patch.*24 pixels"):
        jax.eval_shape(init, jax.ShapeDtypeStruct((2, 23, 256, 5), jnp.float32))


@pytest.mark.parametrize("norm", ["batch", "actnorm", "group"])
def test_half_precision_stays_close_and_keeps_float32_logits_and_statistics(norm):
    net, variables, x = _tiny(norm)
    half = net.clone(dtype=jnp.bfloat16)
    logits, moved = _train(half, variables, x)
    expected, expected_moved = _train(net, variables, x)
    assert logits.dtype == jnp.float32
    dtypes = functools.partial(jax.tree.map, lambda leaf: leaf.dtype)
    assert dtypes(moved) == dtypes(expected_moved)
    spread = jnp.abs(expected).max()
    assert 0 < jnp.abs(logits - expected).max() < 0.05 * spread


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(norm="layer"), "norm 'layer'; choose one of batch, batch_per_device"),
        (dict(norm="batch_per_device", statistic_groups=3), "8 .* 3 statistic_groups"),
    ],
)
def test_wrong_options_are_named(options, words):
    net = discriminator.PatchDiscriminator(**TINY | options)
    with pytest.raises(ValueError, match=words):
        net.init(jax.random.key(0), jnp.zeros((8, 8, 8, 3)), train=True)
