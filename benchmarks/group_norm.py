"""python -m benchmarks.group_norm

Our GroupNorm beside flax's, with the variance in one pass and in two: how exact each is
where a group's mean is far from 0, and how long it takes, forward and with a gradient.
Prints the Markdown of benchmarks/README.md.
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from ldm_jax.nets import layers

GROUPS, EPS = 32, 1e-5
NORMS = {
    "ours": layers.GroupNorm(GROUPS, EPS),
    "flax, one pass": nn.GroupNorm(GROUPS, epsilon=EPS),
    "flax, two passes": nn.GroupNorm(GROUPS, epsilon=EPS, use_fast_variance=False),
}
RIVAL = "flax, one pass"  # flax's own default; times are ratios to its
WAYS = ("forward", "gradient")
OFFSETS = (0, 30, 300)  # mean of a group, in its standard deviations


def error(norm: nn.Module, offset: float) -> float:
    """Greatest difference from float64 for values of unit spread around `offset`."""
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 64))
    x = np.float32(noise + offset)
    groups = np.float64(x).reshape(2, 16 * 16, GROUPS, -1)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    exact = ((groups - mean) / np.sqrt(var + EPS)).reshape(x.shape)
    variables = norm.init(jax.random.key(0), x)
    return float(np.abs(jax.jit(norm.apply)(variables, x) - exact).max())


def times(shape: tuple[int, ...], repetitions: int) -> dict[str, float]:
    """{"NORM forward", "NORM gradient": median seconds}, measured in turns."""
    x = jax.random.normal(jax.random.key(0), shape)
    calls = {}
    for name, norm in NORMS.items():
        variables = norm.init(jax.random.key(0), x)
        forward = functools.partial(norm.apply, variables)

        def loss(x, forward=forward):
            return jnp.tanh(forward(x)).sum()

        calls[f"{name} forward"] = functools.partial(jax.jit(forward), x)
        calls[f"{name} gradient"] = functools.partial(jax.jit(jax.grad(loss)), x)
    return common.interleaved(calls, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(8, 64, 64, 128))
    parser.add_argument("--repetitions", type=int, default=30)
    args = parser.parse_args()
    taken = times(tuple(args.shape), args.repetitions)
    print(common.environment("flax"))
    print()
    heads = [f"error, mean {offset}" for offset in OFFSETS]
    print("| GroupNorm | " + " | ".join([*heads, *WAYS]) + " |")
    print("| --- " * (1 + len(OFFSETS) + len(WAYS)) + "|")
    for name, norm in NORMS.items():
        cells = [f"{error(norm, offset):.1e}" for offset in OFFSETS]
        for way in WAYS:
            cells.append(f"{taken[f'{name} {way}'] / taken[f'{RIVAL} {way}']:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
