"""Around any sampler: inversion, inpainting by blending, mixtures of two noises.

Where to begin from a given latent is `grids.begin`.
"""

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import denoiser, grids, samplers, stepping


def invert(
    denoise: denoiser.Denoise,
    z: jax.Array,
    grid: grids.Grid,
    *,
    trajectory: bool = False,
) -> stepping.Result:
    """The noise that DDIM (eta 0) on `grid` turns into about `z` [b, …], float32.

    Walks the grid from its end to its beginning (Song et al. 2021, eq. 14), and comes
    back the closer the more steps there are. A clean end is left out, for a clean
    latent has no eps_hat: `z` is taken to lie at the point before. Other than the
    reference's `encode`, which tells the net the number of the step, this tells it the
    timestep.
    """
    if grid.sigma[-1] == 0:
        grid = grid.without_end()
    return samplers.ddim(
        denoise, z, grid.reversed(), jax.random.key(0), trajectory=trajectory
    )


def inpainter(
    denoise: denoiser.Denoise,
    schedule: denoiser.Schedule,
    known: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    noise: jax.Array | None = None,
) -> denoiser.Denoise:
    """A denoiser that sees `known` [b, …], noised to t, wherever `mask` is 1.

    For a model that was not trained to inpaint (`DDIMSampler`'s mask and x0): whatever
    the sampler, what it makes fits what is kept. `mask` [b, …, 1 or c] may be soft.
    Noise is drawn anew for each t from `key`, one or [b], unless `noise` [T, b, …]
    holds that of every timestep. The last step is taken after the last look at `known`,
    so `paste` has to follow.
    """
    keys = stepping.per_example_keys(key, known)

    def draw(t):
        if noise is not None:
            return noise[t, jnp.arange(len(known))]
        bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
        fold = jax.vmap(jax.random.fold_in)(keys, bits)
        return jax.vmap(lambda k: jax.random.normal(k, known.shape[1:]))(fold)

    def blended(z_t, t):
        t = jnp.broadcast_to(jnp.asarray(t), z_t.shape[:1])
        return paste(z_t, denoiser.q_sample(schedule, known, t, draw(t)), mask)

    return denoiser.seeing(denoise, blended)


def paste(z: jax.Array, known: jax.Array, mask: jax.Array) -> jax.Array:
    """`known` where `mask` is 1, `z` where it is 0; exact at both."""
    return mask * known + (1 - mask) * z


def slerp(begin: jax.Array, end: jax.Array, weight: jax.Array | float) -> jax.Array:
    """Each example on the arc from `begin` (weight 0) to `end` (1), both [b, …].

    Between two normal noises it stays as long as they are, as the straight line doesn't
    (Shoemake 1985). `weight` is [] or [b]. Parallel ones are mixed linearly.
    """
    axes = tuple(range(1, begin.ndim))
    weight = denoiser.per_example(jnp.asarray(weight, begin.dtype), begin)

    def unit(x):
        length = jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
        return x / jnp.maximum(length, jnp.finfo(x.dtype).tiny)

    cosine = jnp.sum(unit(begin) * unit(end), axes, keepdims=True)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    sine = jnp.sin(angle)
    flat = sine < 1e-4
    safe = jnp.where(flat, 1, sine)
    arc = jnp.sin((1 - weight) * angle) * begin + jnp.sin(weight * angle) * end
    return jnp.where(flat, (1 - weight) * begin + weight * end, arc / safe)
