"""python -m benchmarks.train_step

Times one training step of both stages of a preset on arrays made on the spot, without
data, logging or checkpoints. Where torch and diffusers are installed, nets of the same
size run turn by turn with it, and the fastest of torch's rows counts. GFLOP/s are XLA's
count of our step before it is optimized, over the median.
"""

import argparse
import importlib.util
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.data import sources
from ldm_jax.train import optim, report, sharding, step_autoencoder, step_diffusion
from ldm_jax.train import stage as stage_lib
from ldm_jax.train import state as train_state


class Step:
    """A compiled training step that goes on from its own last state."""

    def __init__(
        self,
        step: stage_lib.Step,
        state: train_state.TrainState,
        frozen: Any,
        batch: dict[str, Any],
    ):
        self.parameters = report.count(state.params)
        self._state = state
        self._inputs = jax.device_put((frozen, batch))
        lowered = jax.jit(step, donate_argnums=0).lower(state, *self._inputs)
        self.flops = lowered.cost_analysis()["flops"]
        began = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began

    def __call__(self):
        self._state, metrics = self.compiled(self._state, *self._inputs)
        return metrics


def autoencoder_stage(
    config: ml_collections.ConfigDict, net: nn.Module
) -> stage_lib.Stage:
    """Stage one as the loop gets it, behind a data set of one black picture."""
    side = config.resolution
    source = sources.Source({"image": np.zeros((1, side, side, 3), np.uint8)})
    mesh, frozen = sharding.make_mesh(config.mesh), step_autoencoder.load_frozen(config)
    return step_autoencoder.make_stage(config, net, source, source, mesh, frozen)


def pictures(config: ml_collections.ConfigDict, b: int) -> dict[str, jax.Array]:
    """A batch of noise."""
    shape = (b, config.resolution, config.resolution, 3)
    return {"image": jax.random.uniform(jax.random.key(1), shape, minval=-1.0)}


def autoencoder(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, b: int
) -> Step:
    """The step of stage one, before a discriminator joins."""
    stage = autoencoder_stage(config, model.autoencoder)
    state = stage.create(jax.random.key(0))
    return Step(stage.phases[0].step, state, stage.frozen, pictures(config, b))


def diffusion(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, b: int
) -> Step:
    """The step of stage two, on latents that were encoded before."""
    section, (h, w, c) = config.diffusion_stage, model.latent_shape
    params = model_lib.init_diffusion(config, model, jax.random.key(0))
    frozen = {"first_stage": common.first_stage(config, model)}
    mean = jax.random.normal(jax.random.key(1), (b, h, w, c))
    moments = jnp.concatenate([mean, jnp.full_like(mean, -6)], axis=-1)
    batch = {"moments": moments, **conditioning.null_rows(model.conditioners, b)}
    tx, _ = optim.make_optimizer(section.optim, section.steps, b)
    step = stage_lib.make_step(
        step_diffusion.make_loss(model, section),
        tx,
        seed=0,
        micro_batches=section.micro_batches,
        ema_decay=section.ema_decay,
    )
    state = train_state.create(params, tx, section.ema_decay)
    return Step(step, state, frozen, batch)


def references(name: str, model: model_lib.LatentDiffusion, side: int, b: int):
    """torch's steps of the stage by name, and its parameters; none without torch."""
    if not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        return {}, 0
    from benchmarks import torch_steps

    if name == "autoencoder":
        return torch_steps.autoencoder(model, side, b)
    rows = conditioning.null_rows(model.conditioners, 1)
    tokens = sum(x.shape[1] for x in rows.values())
    return torch_steps.unet(model, tokens, b)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=common.default_config())
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batch_size", type=int, help="default: the stage's own")
    parser.add_argument("--no_torch", action="store_true")
    args, overrides = parser.parse_known_args()
    with config_lib.exit_on_user_error():
        config = common.load(args.config, overrides)
        model = common.build(config)
    print(common.environment("flax", "optax") + "\n")
    head = ("Net", "Parameters", "Batch", "Compile s", "Step ms", "Images/s", "GFLOP/s")
    print(f"| {' | '.join(head)} | Over torch |\n|{' --- |' * (len(head) + 1)}")
    for name, make in (("autoencoder", autoencoder), ("diffusion", diffusion)):
        b = args.batch_size or stage_lib.batch_size(config[f"{name}_stage"], config)
        step = make(config, model, b)
        others, torch_parameters = {}, 0
        if not args.no_torch:
            others, torch_parameters = references(name, model, config.resolution, b)
        medians = common.interleaved({"ldm_jax": step, **others}, args.repetitions)
        own = medians["ldm_jax"]
        ratio = f"{own / min(medians[other] for other in others):.2f}" if others else ""
        for net, t in medians.items():
            mine = net == "ldm_jax"
            count = step.parameters if mine else torch_parameters
            compiled = f"{step.compile_seconds:.1f}" if mine else ""
            print(
                f"| {name}, {net} | {count / 1e6:.2f}M | {b} |"
                f" {compiled} | {t * 1e3:.1f} | {b / t:.1f} |"
                f" {step.flops / t / 1e9:.1f} | {ratio if mine else ''} |",
                flush=True,
            )
        if not all(np.all(np.isfinite(np.asarray(v[0]))) for v in step().values()):
            raise SystemExit(f"{name}: the step gave a number that is not finite")


if __name__ == "__main__":
    main()
