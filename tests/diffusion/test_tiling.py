"""Windows over large inputs, against the reference's fold and unfold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.diffusion import tiling
from tests import parity


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("ties", [0, 1])
def test_fold_unfold_is_the_reference_s(factor, ties):
    """Its crops, scaled one by one, put together; enlarged ones too, as a decoder."""
    meta, _, io = parity.load("fold_unfold")
    x = jnp.moveaxis(jnp.asarray(io["x"]), 1, -1)
    h, w = x.shape[1:3]
    window, stride = (meta["params"][name] for name in ("ks", "stride"))
    tops, lefts = (tiling.starts(side, window[0], stride[0]) for side in (h, w))
    gains = np.linspace(0.5, 1.5, len(tops) * len(lefts), dtype=np.float32)
    # A window knows its place by a second input, for f sees nothing else.
    places = jnp.arange(h * w, dtype=jnp.float32).reshape(1, h, w, 1)
    corner = {
        float(top * w + left): i
        for i, (top, left) in enumerate((top, left) for top in tops for left in lefts)
    }
    gain_at = np.zeros(h * w, np.float32)
    for place, index in corner.items():
        gain_at[int(place)] = gains[index]

    def f(parts):
        crop, place = parts
        gain = jnp.asarray(gain_at)[place[0, 0, 0, 0].astype(jnp.int32)]
        crop = jnp.repeat(jnp.repeat(crop, factor, 1), factor, 2)
        return crop * gain

    out = tiling.tiled(f, tuple(window), tuple(stride), break_ties=bool(ties))(
        [x, places]
    )
    expected = np.moveaxis(io[f"uf{factor}_tb{ties}/reconstructed"], 1, -1)
    np.testing.assert_allclose(out, expected, atol=5e-5)
    weights = tiling.border_weights(window[0] * factor, window[1] * factor)
    crops = io[f"uf{factor}_tb{ties}/weighting"][0, 0]
    if not ties:
        np.testing.assert_allclose(weights, crops[..., 0], atol=1e-6)


def test_a_local_function_is_the_same_in_windows():
    x = jax.random.normal(jax.random.key(0), [2, 21, 17, 3])

    def f(x):
        return jnp.tanh(x) + 1

    out = jax.jit(tiling.tiled(f, 8, 5))(x)
    np.testing.assert_allclose(out, f(x), atol=1e-6)


def test_what_fits_into_a_window_is_left_alone():
    x, seen = jnp.ones([1, 8, 8, 2]), []
    tiling.tiled(lambda x: seen.append(x.shape) or x, 8)(x)
    assert seen == [(1, 8, 8, 2)]


def test_the_last_window_ends_with_the_input():
    assert tiling.starts(21, 8, 5) == [0, 5, 10, 13]
    assert tiling.starts(8, 8, 4) == [0]
    assert tiling.starts(5, 8, 4) == [0]
    with pytest.raises(UserError, match="stride: 9; choose from 1 to the window's 8"):
        tiling.starts(21, 8, 9)


def test_pictures_among_the_conditions_are_cut_and_tokens_are_not():
    seen = []

    def apply(z_t, t, cond):
        seen.append((z_t.shape, cond["map"].shape, cond["tokens"].shape))
        return z_t + cond["map"][..., :1] + cond["tokens"].mean()

    z_t = jax.random.normal(jax.random.key(0), [2, 12, 12, 3])
    cond = {
        "map": jax.random.normal(jax.random.key(1), [2, 12, 12, 2]),
        "tokens": jnp.ones([2, 5, 7]),
        "none": None,
    }
    out = tiling.tiled_apply(apply, 8)(z_t, jnp.zeros([2], jnp.int32), cond)
    np.testing.assert_allclose(out, z_t + cond["map"][..., :1] + 1, atol=1e-5)
    assert {shapes[0] for shapes in seen} == {(2, 8, 8, 3)}
    assert {shapes[1:] for shapes in seen} == {((2, 8, 8, 2), (2, 5, 7))}
    with pytest.raises(UserError, match="does not lie over"):
        cond["map"] = cond["map"][:, :6]
        tiling.tiled_apply(apply, 8)(z_t, jnp.zeros([2], jnp.int32), cond)


def test_every_window_has_its_own_condition():
    z_t = jnp.zeros([2, 12, 20, 3])
    frames = tiling.frames((12, 20), 8)
    np.testing.assert_allclose(frames[0], [0, 0, 8 / 20, 8 / 12])
    np.testing.assert_allclose(frames[-1], [12 / 20, 4 / 12, 8 / 20, 8 / 12])
    places = jnp.arange(12.0 * 20).reshape(12, 20)
    cond = tiling.PerWindow(
        {
            "corner": jnp.tile(frames[None, :, :2], [2, 1, 1]),
            "map": jnp.tile(places[None, None, :, :, None], [2, len(frames), 1, 1, 1]),
        }
    )

    def apply(z_window, t, cond):  # 0 where the condition is of this window
        top, left = jnp.divmod(cond["map"][:, 0, 0, 0], 20)
        wrong = cond["corner"] - jnp.stack([left / 20, top / 12], axis=1)
        return z_window + wrong.sum(1)[:, None, None, None]

    out = tiling.tiled_apply(apply, 8)(z_t, jnp.zeros([2], jnp.int32), cond)
    np.testing.assert_allclose(out, 0, atol=1e-6)
