import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.nets import quantize
from tests import parity

N, D = 16, 3


def _latents(seed=0, shape=(8, 2, 2, D)):
    return jax.random.normal(jax.random.key(seed), shape)


def _codes(seed=1, n=N):
    return jax.random.normal(jax.random.key(seed), (n, D))


def _apply(net, embedding, *args, **kwargs):
    return net.apply({"params": {"embedding": embedding}}, *args, **kwargs)


# --- against the reference


@functools.cache
def fixture():
    meta, weights, io = parity.load("vq_model")
    config = meta["config"]
    options = dict(n_embed=config["n_embed"], embed_dim=config["embed_dim"])
    embedding = jnp.asarray(weights["quantize.embedding.weight"])
    h = jnp.asarray(parity.nhwc(io["h"]))
    return options | {"beta": config["beta"]}, embedding, h, io


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_its_gradients_match_the_reference(legacy):
    options, embedding, h, io = fixture()
    net = quantize.VectorQuantizer(**options, legacy=legacy)

    def loss(embedding, h):
        out = _apply(net, embedding, h)
        assert out.loss.shape == (len(h),)
        return jnp.mean(out.loss)

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(embedding, h)
    name = f"loss_legacy_{str(legacy).lower()}"
    np.testing.assert_allclose(value, io[name], atol=5e-5)
    expected = parity.nhwc(io[f"grad_h_{name}"])
    np.testing.assert_allclose(grads[1], expected, rtol=1e-5, atol=1e-8)
    expected = io[f"grad_codebook_{name}"]
    np.testing.assert_allclose(grads[0], expected, rtol=1e-5, atol=1e-7)


def test_loss_of_an_image_is_that_of_the_image_alone():
    options, embedding, h, _ = fixture()
    net = quantize.VectorQuantizer(**options)
    both = _apply(net, embedding, h).loss
    alone = [_apply(net, embedding, h[i : i + 1]).loss[0] for i in range(2)]
    np.testing.assert_allclose(both, jnp.stack(alone), rtol=1e-6)
    assert jnp.abs(both[0] - both[1]) > 1e-3


@pytest.mark.parametrize("sane", [False, True])
def test_codes_match_the_reference(sane):
    options, embedding, h, io = fixture()
    net = quantize.VectorQuantizer(**options, sane_index_shape=sane)
    out = _apply(net, embedding, h)
    quant = parity.nhwc(io["quant"])
    np.testing.assert_array_equal(
        out.indices, io["indices_sane" if sane else "indices"]
    )
    np.testing.assert_allclose(out.z_q, quant, atol=5e-5)
    entry = functools.partial(_apply, net, embedding, method="get_codebook_entry")
    expected = parity.nhwc(io["codebook_entry"])
    np.testing.assert_array_equal(entry(out.indices, h.shape), expected)
    np.testing.assert_array_equal(entry(io["indices_sane"]), expected)
    alone = _apply(net, embedding, h, method="straight_through")
    np.testing.assert_array_equal(alone, out.z_q)


def test_gradient_goes_straight_through():
    options, embedding, h, io = fixture()
    net = quantize.VectorQuantizer(**options)
    w = jnp.asarray(parity.nhwc(io["grad_w"]))
    expected = parity.nhwc(io["grad_straight_through"])
    quantized = [
        lambda h: _apply(net, embedding, h).z_q,
        lambda h: _apply(net, embedding, h, method="straight_through"),
    ]
    for z_q in quantized:
        grad = jax.grad(lambda h, z_q=z_q: jnp.sum(z_q(h) * w))(h)
        np.testing.assert_allclose(grad, expected, atol=5e-5)


def test_codes_match_diffusers():
    meta, weights, io = parity.load("diffusers_vq")
    embedding = weights["quantize.embedding.weight"]
    net = quantize.VectorQuantizer(*embedding.shape)
    out = _apply(net, jnp.asarray(embedding), parity.nhwc(io["h"]))
    np.testing.assert_array_equal(out.indices, io["indices"])
    np.testing.assert_allclose(out.z_q, parity.nhwc(io["quant"]), atol=5e-5)


# --- options


def test_codebook_starts_uniform_within_one_over_n():
    net = quantize.VectorQuantizer(512, 8)
    variables = net.init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))
    assert variables.keys() == {"params"}
    codes = variables["params"]["embedding"] * 512
    assert codes.shape == (512, 8) and codes.dtype == jnp.float32
    assert jnp.abs(codes).max() <= 1
    np.testing.assert_allclose([codes.mean(), codes.std()], [0, 3**-0.5], atol=0.02)


def test_half_precision_latents_are_compared_in_float32():
    # 1 + 2^-8 is no bfloat16: rounded, the two codes would be the same.
    net = quantize.VectorQuantizer(2, 1)
    codes = jnp.asarray([[1.0], [1.0 + 2**-8]])
    z = jnp.full((1, 1, 1, 1), 1.0 + 2**-7, jnp.bfloat16)
    out = _apply(net, codes, z)
    assert out.indices.item() == 1 and out.z_q.dtype == jnp.float32
    # A CPU multiplies in float32 anyway; accelerators do if asked.
    apply = jax.jit(functools.partial(_apply, net))
    assert "precision = [HIGHEST, HIGHEST]" in apply.lower(codes, z).as_text()


def test_unit_length_lookup_compares_directions():
    net = quantize.VectorQuantizer(N, D, l2_normalize=True)
    z, codes = _latents(), _codes()
    out = _apply(net, codes, z)

    def unit(a):
        a = np.asarray(a, np.float64)
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    expected = (unit(z).reshape(-1, D) @ unit(codes).T).argmax(-1)
    np.testing.assert_array_equal(out.indices, expected)
    z_q = unit(codes)[expected].reshape(z.shape)
    np.testing.assert_allclose(out.z_q, z_q, atol=1e-6)
    loss = 1.25 * np.square(z_q - unit(z)).mean((1, 2, 3))
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    entry = _apply(net, codes, out.indices, z.shape, method="get_codebook_entry")
    np.testing.assert_allclose(entry, z_q, atol=1e-6)
    plain = _apply(quantize.VectorQuantizer(N, D), codes, z)
    assert (plain.indices != out.indices).any()
    longer = _apply(net, 3 * codes, 7 * z)
    np.testing.assert_array_equal(longer.indices, out.indices)
    np.testing.assert_allclose(longer.loss, out.loss, rtol=1e-5)


def test_unit_length_of_a_zero_latent_is_finite():
    net = quantize.VectorQuantizer(N, D, l2_normalize=True)
    z = jnp.zeros((1, 1, 1, D))
    grad = jax.grad(lambda z: jnp.sum(_apply(net, _codes(), z).loss))(z)
    assert jnp.isfinite(grad).all()


USED = (5, 0, 9, 12)


@pytest.mark.parametrize(("unknown", "value"), [("extra", 4), (2, 2), (-1, -1)])
def test_remap_counts_within_the_used_codes(unknown, value):
    net = quantize.VectorQuantizer(N, D, remap=USED, unknown_index=unknown)
    codes, z = _codes(), _latents()
    plain = _apply(quantize.VectorQuantizer(N, D), codes, z)
    out = _apply(net, codes, z)
    expected = [USED.index(i) if i in USED else value for i in plain.indices.tolist()]
    np.testing.assert_array_equal(out.indices, expected)
    np.testing.assert_array_equal(out.z_q, plain.z_q)  # remap renames codes only
    assert {True, False} == {i in USED for i in plain.indices.tolist()}
    back = _apply(net, codes, out.indices, method="unmap_to_all")
    expected = [USED[i] if 0 <= i < len(USED) else USED[0] for i in expected]
    np.testing.assert_array_equal(back, expected)
    entry = _apply(net, codes, out.indices, z.shape, method="get_codebook_entry")
    np.testing.assert_array_equal(entry.reshape(-1, D), codes[back])


def test_remap_draws_for_unknown_codes_with_a_key():
    net = quantize.VectorQuantizer(N, D, remap=USED)
    remap = functools.partial(_apply, net, _codes(), method="remap_to_used")
    indices = jnp.arange(N).repeat(64).reshape(32, 32)
    out = remap(indices, jax.random.key(0))
    known = np.isin(indices, USED)
    expected = [USED.index(i) for i in np.asarray(indices)[known]]
    np.testing.assert_array_equal(out[known], expected)
    drawn = np.bincount(out[~known], minlength=4)
    assert drawn.sum() == 12 * 64
    np.testing.assert_allclose(drawn / drawn.sum(), 0.25, atol=0.06)
    np.testing.assert_array_equal(out, remap(indices, jax.random.key(0)))
    assert (out != remap(indices, jax.random.key(1))).any()
    with pytest.raises(ValueError, match="'random' needs a key"):
        _apply(net, _codes(), _latents())
    # Decoding needs no index, so no key.
    _apply(net, _codes(), _latents(), method="straight_through")


def test_wrong_unknown_index_is_named():
    net = quantize.VectorQuantizer(N, D, remap=USED, unknown_index="first")
    with pytest.raises(ValueError, match="unknown_index 'first'"):
        net.init(jax.random.key(0), _latents())


# --- codebooks that move without gradients


def _step(net, embedding, codebook, z, key):
    """One training step as far as the codebook is concerned."""
    variables = {"params": {"embedding": embedding}, "codebook": codebook}
    out, moved = net.apply(variables, z, key, mutable=["codebook"])
    return out, *quantize.move_codebook(net, embedding, moved["codebook"])


def _start(net):
    """Params and collection, with codes that the latents can reach."""
    variables = net.init(jax.random.key(0), _latents())
    start = quantize.initial_cluster_size(net)
    codebook = dict(variables["codebook"])
    if "embed_sum" in codebook:
        np.testing.assert_allclose(
            codebook["embed_sum"], start * variables["params"]["embedding"], rtol=1e-6
        )
        codebook["embed_sum"] = start * _codes()
    np.testing.assert_allclose(codebook["cluster_size"], np.full(N, start), rtol=1e-6)
    return _codes(), codebook


def test_init_makes_the_collection_and_leaves_it_as_it_starts():
    net = quantize.VectorQuantizer(N, D, ema_decay=0.9, revive_below=0.5)
    codebook = net.init(jax.random.key(0), _latents())["codebook"]
    shapes = {name: value.shape for name, value in codebook.items()}
    assert shapes == {"cluster_size": (N,), "embed_sum": (N, D), "candidates": (N, D)}
    _start(net)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_averaged_codebook_matches_numpy(l2_normalize):
    decay, eps = 0.9, 1e-5
    net = quantize.VectorQuantizer(N, D, ema_decay=decay, l2_normalize=l2_normalize)
    embedding, codebook = _start(net)
    step = jax.jit(functools.partial(_step, net))

    def unit(a):
        return a / np.linalg.norm(a, axis=-1, keepdims=True) if l2_normalize else a

    codes = np.asarray(_codes(), np.float64)
    size, total = np.ones(N), codes.copy()
    for i in range(3):
        z = _latents(10 + i) + 0.5 * i
        out, embedding, codebook = step(embedding, codebook, z, None)
        tokens = unit(np.asarray(z, np.float64).reshape(-1, D))
        distance = np.square(tokens[:, None] - unit(codes)[None]).sum(-1)
        chosen = distance.argmin(-1)
        np.testing.assert_array_equal(out.indices, chosen)
        one_hot = np.eye(N)[chosen]
        size = decay * size + (1 - decay) * one_hot.sum(0)
        total = decay * total + (1 - decay) * one_hot.T @ tokens
        smoothed = (size + eps) / (size.sum() + N * eps) * size.sum()
        codes = total / smoothed[:, None]
        np.testing.assert_allclose(codebook["cluster_size"], size, rtol=1e-5)
        np.testing.assert_allclose(codebook["embed_sum"], total, atol=1e-5)
        np.testing.assert_allclose(embedding, codes, atol=1e-5)


def test_averaged_codebook_gets_no_gradient_and_keeps_the_commitment():
    z, codes = _latents(), _codes()
    averaged = quantize.VectorQuantizer(N, D, ema_decay=0.99)
    trained = quantize.VectorQuantizer(N, D, legacy=False)

    def loss(net, codes, z):
        out = _apply(net, codes, z)
        return jnp.mean(out.loss) + jnp.sum(out.z_q)

    grads = jax.grad(loss, argnums=(1, 2))(averaged, codes, z)
    assert not grads[0].any()
    expected = jax.grad(loss, argnums=2)(trained, codes, z)
    np.testing.assert_allclose(grads[1], expected, rtol=1e-6)
    entry = functools.partial(_apply, averaged, method="get_codebook_entry")
    assert not jax.grad(lambda codes: jnp.sum(entry(codes, jnp.arange(N))))(codes).any()
    ratio = _apply(averaged, codes, z).loss / _apply(trained, codes, z).loss
    np.testing.assert_allclose(ratio, 0.25 / 1.25, rtol=1e-5)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_dead_codes_and_only_those_are_revived(ema_decay):
    net = quantize.VectorQuantizer(N, D, ema_decay=ema_decay, revive_below=0.5)
    embedding, codebook = _start(net)
    size = jnp.where(jnp.arange(N) % 3 == 0, 0.1, 4.0)
    codebook["cluster_size"] = size
    z = _latents()
    out, after, moved = _step(net, embedding, codebook, z, jax.random.key(3))
    decay = ema_decay or quantize.USE_DECAY
    uses = np.bincount(out.indices, minlength=N)
    expected_size = decay * size + (1 - decay) * uses
    dead = np.asarray(expected_size) < 0.5
    assert 0 < dead.sum() < N and (dead <= (np.arange(N) % 3 == 0)).all()
    tokens = np.asarray(z).reshape(-1, D)
    new = np.asarray(after[dead])
    places = [np.flatnonzero((tokens == code).all(-1)) for code in new]
    assert all(len(place) == 1 for place in places)  # a latent of the batch
    assert len({place.item() for place in places}) == dead.sum()  # each another
    start = quantize.initial_cluster_size(net)
    expected = np.where(dead, start, expected_size)
    np.testing.assert_allclose(moved["cluster_size"], expected, rtol=1e-6)
    if not ema_decay:
        np.testing.assert_array_equal(after[~dead], embedding[~dead])
        assert "embed_sum" not in moved
    else:
        plain = quantize.VectorQuantizer(N, D, ema_decay=ema_decay)
        averages = {k: codebook[k] for k in ("cluster_size", "embed_sum")}
        _, unrevived, averages = _step(plain, embedding, averages, z, None)
        np.testing.assert_array_equal(after[~dead], unrevived[~dead])
        np.testing.assert_allclose(moved["embed_sum"][dead], start * after[dead])
        np.testing.assert_array_equal(
            moved["embed_sum"][~dead], averages["embed_sum"][~dead]
        )


@pytest.mark.parametrize("revive_below", [0.01, 3.0])
def test_no_code_is_revived_before_its_time(revive_below):
    decay = 0.9
    net = quantize.VectorQuantizer(N, D, ema_decay=decay, revive_below=revive_below)
    embedding, codebook = _start(net)
    embedding = embedding.at[1].set(100.0)  # never chosen
    codebook["embed_sum"] = codebook["embed_sum"].at[1].set(100.0)
    step = jax.jit(functools.partial(_step, net))
    revived = []
    for i in range(25):
        _, embedding, codebook = step(
            embedding, codebook, _latents(i), jax.random.key(i)
        )
        start = quantize.initial_cluster_size(net)
        revived.append(bool(codebook["cluster_size"][1] == np.float32(start)))
        if revived[-1]:
            break
    assert len(revived) == round(1 / (1 - decay)) and revived[-1]


def test_more_codes_than_latents_find_candidates():
    net = quantize.VectorQuantizer(N, D, revive_below=100.0)
    embedding, codebook = _start(net)
    codebook["cluster_size"] = jnp.zeros(N)
    z = _latents(shape=(1, 1, 5, D))
    _, after, _ = _step(net, embedding, codebook, z, jax.random.key(0))
    assert sorted(np.unique(after, axis=0, return_counts=True)[1]) == [3, 3, 3, 3, 4]


def test_revival_without_a_key_is_an_error():
    net = quantize.VectorQuantizer(N, D, revive_below=0.5)
    embedding, codebook = _start(net)
    with pytest.raises(ValueError, match="revive_below needs a key"):
        _step(net, embedding, codebook, _latents(), None)


def test_a_call_that_may_not_change_the_collection_ignores_it():
    net = quantize.VectorQuantizer(N, D, ema_decay=0.9, revive_below=0.5)
    out = _apply(net, _codes(), _latents())
    plain = _apply(quantize.VectorQuantizer(N, D), _codes(), _latents())
    np.testing.assert_array_equal(out.z_q, plain.z_q)


def test_batch_over_eight_devices_moves_the_codebook_as_on_one():
    net = quantize.VectorQuantizer(N, D, ema_decay=0.9, revive_below=1.0)
    embedding, codebook = _start(net)
    z, key = _latents(shape=(16, 2, 2, D)), jax.random.key(5)
    codebook["cluster_size"] = jnp.linspace(0.0, 4.0, N)
    step = jax.jit(functools.partial(_step, net))
    one = step(embedding, codebook, z, key)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    eight = step(
        *jax.device_put((embedding, codebook), whole),
        jax.device_put(z, NamedSharding(mesh, P("data"))),
        jax.device_put(key, whole),
    )
    assert len(eight[0].z_q.sharding.device_set) == 8
    dead = one[2]["cluster_size"] == np.float32(quantize.initial_cluster_size(net))
    assert 0 < dead.sum() < N
    np.testing.assert_array_equal(eight[0].indices, one[0].indices)
    np.testing.assert_array_equal(eight[1][dead], one[1][dead])  # the same latents
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), eight, one
    )
    again = step(embedding, codebook, z, key)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    other = step(embedding, codebook, z, jax.random.key(6))
    assert (other[1][dead] != one[1][dead]).any()


# --- statistics


@pytest.mark.parametrize(
    ("histogram", "perplexity", "usage"),
    [
        ([7, 7, 7, 7], 4.0, 1.0),
        ([0, 9, 0, 0], 1.0, 0.25),
        ([2, 1, 1, 0], 2**1.5, 0.75),
    ],
)
def test_perplexity_and_usage_of_a_histogram(histogram, perplexity, usage):
    for h in (np.asarray(histogram), jnp.asarray(histogram, jnp.float32)):
        np.testing.assert_allclose(quantize.perplexity(h), perplexity, rtol=1e-6)
        np.testing.assert_allclose(quantize.usage(h), usage)
