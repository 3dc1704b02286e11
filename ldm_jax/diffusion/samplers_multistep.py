"""Samplers that reuse the outputs of earlier steps: one net call a step.

Each adds to the step of DDIM (see samplers.py) a weighted sum of the differences
between older outputs and the new one; the weights are float64 tables.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion import denoiser, grids, stepping

ADAMS_BASHFORTH = (
    np.array([1.0]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)
X0, EPS = 0, 1  # which of (x0_hat, eps_hat) a sampler extrapolates


def _multistep(denoise, z, grid, start, trajectory, *, order, which, weights):
    """z' = alpha' x0_hat + sigma' eps_hat + sum_j weights[j] (older[j] - new)."""

    def step(state, inputs):
        (z_t, *older), (i, (t, (alpha, sigma), by_age)) = state, inputs
        outputs = denoise(z_t, stepping.full(z_t, t))
        new = outputs[which]
        z_next = alpha * outputs[X0] + sigma * outputs[EPS]
        z_next += stepping.correction(by_age[_age(i, start, order)], older, new)
        return (z_next, new, *older[:-1]), outputs[X0]

    rows = (
        stepping.times(z, grid.t[:-1]),
        stepping.table(z, grid.alpha[1:], grid.sigma[1:]),
        _rows_by_age(z, grid.steps, order, weights),
    )
    state = (z, *[jnp.zeros_like(z)] * (order - 1))
    return stepping.scan(step, state, rows, start, trajectory)


def _rows_by_age(z, steps, order, weights):
    """`stepping.by_age`, with the axis of steps first, to be scanned over."""
    return jnp.asarray(stepping.by_age(steps, order, weights).swapaxes(0, 1), z.dtype)


def _age(i, start, order):
    return jnp.minimum(i - start, order - 1)


def _usable(grid: grids.Grid, i: int, n: int) -> int:
    """How many of the last `n` outputs a polynomial may pass through at step `i`.

    Pure noise lies infinitely far from all other points.
    """
    return min(n, max(i, 1)) if grid.alpha[0] == 0 else n


def dpmpp_2m(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); arguments as of `ddim`.

    Order 2. The first step, and the last where it ends clean, are of order 1.
    """
    del key
    with np.errstate(invalid="ignore"):
        h = np.diff(grid.log_snr)

    def weights(i, n):
        if _usable(grid, i, n) == 1 or np.isinf(h[i]):
            return np.zeros(0)
        return np.array([grid.alpha[i + 1] * np.expm1(-h[i]) * h[i] / (2 * h[i - 1])])

    return _multistep(
        denoise, z, grid, start, trajectory, order=2, which=X0, weights=weights
    )


def lms(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    order: int = 4,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Adams-Bashforth with unequal steps in sigma / alpha; arguments as of `ddim`.

    The polynomial through the last `order` eps_hat is integrated exactly.
    """
    del key
    if order < 2:
        raise UserError(f"order: {order}; choose 2 or more, or the sampler euler")

    def weights(i, n):
        n = _usable(grid, i, n)
        if n == 1:
            return np.zeros(0)
        nodes = grid.ratio[i - n + 1 : i + 1][::-1]
        begin, end = grid.ratio[i], grid.ratio[i + 1]
        integrals = []
        for j in range(1, n):
            others = np.delete(nodes, j)
            basis = np.poly(others) / np.prod(nodes[j] - others)
            whole = np.polyint(basis)
            integrals.append(np.polyval(whole, end) - np.polyval(whole, begin))
        return grid.alpha[i + 1] * np.array(integrals)

    return _multistep(
        denoise, z, grid, start, trajectory, order=order, which=EPS, weights=weights
    )


def plms(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    threshold: Callable[[jax.Array], jax.Array] | None = None,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """Pseudo linear multistep (Liu et al. 2022); arguments as of `ddim`.

    The first step calls the net twice (an improved Euler step), so S steps are S + 1
    calls; then come the Adams-Bashforth weights of orders 2, 3 and 4. `threshold` is
    applied to the x0_hat of each combined eps_hat, which itself stays as it is: the
    reference's `dynamic_threshold`.
    """
    del key
    order = len(ADAMS_BASHFORTH)

    def weights(i, n):
        return ADAMS_BASHFORTH[_usable(grid, i, n) - 1][1:]

    def step(state, inputs):
        (z_t, *older), (i, (t, t_next, coefficients, by_age)) = state, inputs
        alpha, sigma, ratio, half = coefficients
        x0_hat, eps_hat = denoise(z_t, stepping.full(z_t, t))

        def moved(change):
            """(x0, end of the step) where eps_hat changes by this."""
            x0 = x0_hat - ratio * change
            x0 = x0 if threshold is None else threshold(x0)
            return x0, alpha * x0 + sigma * (eps_hat + change)

        def improved():
            _, z_next = moved(jnp.zeros_like(z_t))
            _, eps_next = denoise(z_next, stepping.full(z_t, t_next))
            return half * (eps_next - eps_hat)

        def multistep():
            return stepping.correction(by_age[_age(i, start, order)], older, eps_hat)

        x0, z_next = moved(jax.lax.cond(i == start, improved, multistep))
        return (z_next, eps_hat, *older[:-1]), x0

    # In pure noise eps_hat is known anyway, and at a clean end it says nothing.
    finite, noisy = np.isfinite(grid.ratio[:-1]), grid.sigma[1:] > 0
    ratio = np.where(finite, grid.ratio[:-1], 0)
    half = np.where(finite & noisy, 0.5, 0)
    rows = (
        stepping.times(z, grid.t[:-1]),
        stepping.times(z, np.where(noisy, grid.t[1:], grid.t[:-1])),
        stepping.table(z, grid.alpha[1:], grid.sigma[1:], ratio, half),
        _rows_by_age(z, grid.steps, order, weights),
    )
    state = (z, *[jnp.zeros_like(z)] * (order - 1))
    return stepping.scan(step, state, rows, start, trajectory)


def unipc(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    key: jax.Array,
    *,
    order: int = 2,
    start: jax.Array | int = 0,
    trajectory: bool = False,
) -> stepping.Result:
    """UniPC with B(h) = e^h - 1, "bh2" (Zhao et al. 2023); arguments as of `ddim`.

    Each step first corrects the latent with the output just made there, which costs no
    call, then predicts the next. `order` is 2 or 3; towards a clean end it goes down.
    """
    del key
    if order not in (2, 3):
        raise UserError(f"order: {order}; choose 2 or 3")
    predictor = partial(_unipc_weights, grid, order, corrector=False)
    corrector = partial(_unipc_weights, grid, order, corrector=True)

    def corrector_of_last(i, n):
        """Of the step that ended at `i`; the newest weight comes first."""
        return corrector(i - 1, n - 1) if n > 1 else np.zeros(0)

    def step(state, inputs):
        (z_t, base, *older), (i, (t, coefficients, predict, correct)) = state, inputs
        carry, gain = coefficients
        x0_hat, _ = denoise(z_t, stepping.full(z_t, t))
        age = _age(i, start, order + 1)
        # The corrector counts from the output at which the last step began, older[0].
        points = (x0_hat, *older[1:])
        corrected = base + stepping.correction(correct[age], points, older[0])
        z_c = jnp.where(age > 0, corrected, z_t)
        base = carry * z_c + gain * x0_hat
        z_next = base + stepping.correction(
            predict[_age(i, start, order)], older[: order - 1], x0_hat
        )
        return (z_next, base, x0_hat, *older[:-1]), x0_hat

    # alpha' x0_hat + sigma' eps_hat of the corrected latent, at which eps is unknown.
    carry = grid.sigma[1:] / grid.sigma[:-1]
    gain = grid.alpha[1:] - grid.alpha[:-1] * carry
    rows = (
        stepping.times(z, grid.t[:-1]),
        stepping.table(z, carry, gain),
        _rows_by_age(z, grid.steps, order, predictor),
        _rows_by_age(z, grid.steps, order + 1, corrector_of_last),
    )
    state = (z, z, *[jnp.zeros_like(z)] * order)
    return stepping.scan(step, state, rows, start, trajectory)


def _unipc_weights(grid, order, i, n, corrector):
    """Weights for step `i` of the outputs before it, after that of its own end.

    `n` outputs are at hand, the one at `i` among them; eq. 11 of Zhao et al. 2023.
    """
    log_snr = grid.log_snr
    n = min(_usable(grid, i, n), order)
    if grid.sigma[-1] == 0:
        n = min(n, grid.steps - i)
    h = log_snr[i + 1] - log_snr[i]
    if np.isinf(h):
        return np.zeros(0)
    places = (log_snr[i - n + 1 : i][::-1] - log_snr[i]) / h
    if corrector:
        places = np.append(places, 1.0)
    if len(places) == 0:
        return np.zeros(0)
    if len(places) == 1:  # the paper's choice, which leaves B(h) free
        solution = np.array([0.5])
    else:
        powers = np.vander(places, increasing=True).T
        solution = np.linalg.solve(powers, _unipc_moments(-h, len(places)))
    weights = -grid.alpha[i + 1] * np.expm1(-h) * solution / places
    return np.roll(weights, 1) if corrector else weights


def _unipc_moments(h: float, n: int) -> np.ndarray:
    """k! phi_{k+1}(h) h / (e^h - 1) for k = 1 … n."""
    phi, moments = np.expm1(h) / h, []
    for k in range(1, n + 1):
        phi = (phi - 1 / math.factorial(k)) / h
        moments.append(math.factorial(k) * phi * h / np.expm1(h))
    return np.array(moments)
