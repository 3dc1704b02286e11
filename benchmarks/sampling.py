"""python -m benchmarks.sampling

Times guided DDIM from noise to pictures on untrained nets of a preset, and what a step
costs next to two bare UNet calls, which is what guidance cannot do without.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax import draw as draw_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=common.default_config())
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=5)
    args, overrides = parser.parse_known_args()
    b = args.batch_size
    with config_lib.exit_on_user_error():
        config = common.load(args.config, overrides)
        model = common.build(config)
    params = model_lib.init_diffusion(config, model, jax.random.key(0))
    first_stage = common.first_stage(config, model)
    fields = conditioning.null_rows(model.conditioners, b)

    def draw() -> np.ndarray:
        return draw_lib.draw(
            model,
            params,
            first_stage,
            fields,
            count=b,
            settings=draw_lib.Settings(steps=args.steps),
            guidance_scale=args.guidance,
            batch_size=b,
        ).images

    cond = conditioning.encode(model.conditioners, params["conditioners"], fields)
    z_t = jax.random.normal(jax.random.key(1), (b, *model.latent_shape))
    unet = jax.jit(
        lambda params, z_t, t, cond: model_lib.apply_unet(model, params, z_t, t, cond)
    )

    def two_calls() -> list[jax.Array]:
        t = jnp.full([b], 500)
        return [unet(params["unet"], z_t, t, cond) for _ in range(2)]

    first = common.seconds(draw)
    medians = common.interleaved(
        {"draw": draw, "two calls": two_calls}, args.repetitions
    )
    per_step = medians["draw"] / args.steps
    print(common.environment("flax") + "\n")
    print("| Measure | Value |\n| --- | --- |")
    print(f"| pictures, steps, guidance | {b}, {args.steps}, {args.guidance:g} |")
    print(f"| first batch, with compilation | {first:.2f} s |")
    print(f"| a batch | {medians['draw']:.2f} s |")
    print(f"| a picture | {medians['draw'] / b * 1e3:.0f} ms |")
    print(f"| a step, decoding and text shared out | {per_step * 1e3:.1f} ms |")
    print(f"| two bare UNet calls | {medians['two calls'] * 1e3:.1f} ms |")
    print(f"| a step over two bare calls | {per_step / medians['two calls']:.2f} |")


if __name__ == "__main__":
    main()
