import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.train import state as train_state


def _loss(params, batch, key):
    del key
    error = jnp.square(batch["x"] @ params["w"] - batch["y"])
    return jnp.mean(error), {"loss": (jnp.sum(error), jnp.float32(len(error)))}


def _problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    batch = {"x": jnp.float32(x), "y": jnp.float32(y)}
    return {"w": jnp.float32(rng.normal(size=(3, 2)))}, batch


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_accumulated_gradient_is_that_of_the_full_batch(micro_batches):
    params, batch = _problem()
    (_, _), expected = jax.value_and_grad(_loss, has_aux=True)(params, batch, None)

    @jax.jit
    def accumulated(params, batch, key):
        def gradients(seen, batch, key):
            grads, metrics = jax.grad(_loss, has_aux=True)(params, batch, key)
            return seen + batch["x"].shape[0], grads, metrics

        return train_state.accumulate(
            gradients, jnp.int32(0), batch, key, micro_batches
        )

    seen, grads, metrics = accumulated(params, batch, jax.random.key(0))
    assert seen == 8
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-5)
    total, count = metrics["loss"]
    assert count == 8
    np.testing.assert_allclose(total, _loss(params, batch, None)[1]["loss"][0], 1e-5)


def test_micro_batches_are_cut_with_stride_and_have_their_own_keys():
    seen = []

    def gradients(carry, batch, key):
        jax.debug.callback(
            lambda rows, key: seen.append((rows.tolist(), key.tolist())),
            batch,
            jax.random.key_data(key),
        )
        return carry, jnp.float32(0), {}

    rows = jnp.arange(6)
    train_state.accumulate(gradients, (), rows, jax.random.key(0), 2)
    jax.effects_barrier()
    assert sorted(rows for rows, _ in seen) == [[0, 2, 4], [1, 3, 5]]
    assert seen[0][1] != seen[1][1]


def test_step_keys_differ_by_seed_step_and_purpose():
    keys = [
        jax.random.key_data(train_state.step_key(*args)).tolist()
        for args in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, train_state.INIT)]
    ]
    assert len({tuple(key) for key in keys}) == 5
    again = jax.random.key_data(train_state.step_key(0, jnp.int32(1)))
    assert again.tolist() == keys[1]


def test_update_moves_params_and_averages():
    tx = optax.sgd(0.5)
    state = train_state.create({"w": jnp.array([1.0, 3.0])}, tx, 0.9999)
    state, metrics = train_state.update(state, {"w": jnp.array([4.0, 0.0])}, tx, 0.9999)
    assert state.step == 1
    np.testing.assert_allclose(state.params["w"], [-1, 3])
    # The first average keeps 2/11 (LitEma's warm-up).
    np.testing.assert_allclose(state.ema["w"], [(2 - 9) / 11, 3], rtol=1e-6)
    assert train_state.averaged(state) is state.ema
    np.testing.assert_allclose(metrics["grad_norm"][0], 4)
    np.testing.assert_allclose(metrics["update_norm"][0], 2)
    state, _ = train_state.update(state, {"w": jnp.zeros(2)}, tx, 0.9999)
    assert state.step == 2
    np.testing.assert_allclose(state.ema["w"][0], (-7 / 11 * 3 - 9) / 12, rtol=1e-6)


def test_without_decay_there_is_no_average():
    tx = optax.sgd(0.5)
    state = train_state.create({"w": jnp.ones(2)}, tx, 0.0)
    state, _ = train_state.update(state, {"w": jnp.ones(2)}, tx, 0.0)
    assert state.ema is None
    assert train_state.averaged(state) is state.params


def test_average_is_a_copy_so_that_both_may_be_donated():
    state = train_state.create({"w": jnp.ones(2)}, optax.sgd(0.5), 0.9)
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)


def test_a_step_that_is_not_finite_is_counted_and_forgotten():
    tx = optax.sgd(0.5)
    old = train_state.create({"w": jnp.ones(2)}, tx, 0.9)
    one = jnp.ones([])
    for loss, finite in ((1.0, True), (np.nan, False), (np.inf, False), (2.0, True)):
        new, norms = train_state.update(old, {"w": jnp.ones(2)}, tx, 0.9)
        metrics = {"loss": (jnp.float32(loss), one), **norms}
        kept, shown = jax.jit(train_state.keep_finite)(old, new, metrics)
        assert kept.step == old.step + 1
        expected = new if finite else old
        jax.tree.map(np.testing.assert_array_equal, kept.params, expected.params)
        jax.tree.map(np.testing.assert_array_equal, kept.ema, expected.ema)
        assert shown["loss"] == ((loss, 1) if finite else (0, 0))
        assert shown["skipped"] == (0 if finite else 1, 1)
        assert kept.skipped == (0 if finite else old.skipped + 1)
        old = kept
    bad = {"loss": (one, one), "grad_norm": (jnp.float32(np.nan), one)}
    kept, _ = train_state.keep_finite(old, old.replace(step=old.step + 1), bad)
    assert kept.skipped == 1
