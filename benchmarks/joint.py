"""python -m benchmarks.joint --out=runs/joint

Should both stages be trained together? The paper's argument for two stages is that the
joint training of its forerunners wants a delicate weighting of reconstruction against
the learned prior. This trains the default preset in two stages and, for each of
--weights, in one (benchmarks/joint_stage.py), and writes reconstruction and sample
quality against the weight to joint.csv and joint.png.

Compute is equal, not steps: all runs take the same number of FLOPs in all, by XLA's
count of a training step. Two stages spend a fifth of it on the first, about as the
default preset does, which encodes the pictures once; a joint step encodes and decodes
as many pictures as it denoises.

--size=small is for 2 CPU cores, debug is a few steps. --config=FILE:PRESET names
another preset, --config.KEY=VALUE changes it. A run is a workdir in OUT, made by the
command that is printed; finished ones are kept, one that was stopped goes on.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import ml_collections

from benchmarks import common, experiment, joint_stage
from ldm_jax import config as config_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError

WEIGHTS = "0,0.01,0.1,1"
FIRST_SHARE = 0.2  # of the compute of two stages that the first takes


class Size(NamedTuple):
    """How large the runs are."""

    flops: float  # of each, all stages together
    samples: int
    sampling_steps: int = 20
    drawn_at_once: int = 64


SIZES = {
    "debug": Size(1e11, 16, sampling_steps=2, drawn_at_once=16),
    "small": Size(2.5e13, 512),
    "medium": Size(1e15, 2048, 50),
}


class Plan(NamedTuple):
    """One run: its weight, None of two stages, its config, and what its steps cost."""

    spec: str
    weight: float | None
    overrides: tuple[str, ...]
    steps: dict[str, int]  # of each stage
    flops: dict[str, float]  # of one step of each stage

    @property
    def name(self) -> str:
        return "two_stages" if self.weight is None else f"joint_{self.weight:g}"

    def config(self) -> ml_collections.ConfigDict:
        """What the workdir of the run holds."""
        if self.weight is None:
            return config_lib.load(self.spec, self.overrides)
        return joint_stage.load_config(self.spec, self.overrides, self.weight)


COLUMNS = {  # name: how the printed table heads it; None leaves it out there
    "run": "Run",
    "encoder_weight": None,
    "autoencoder_steps": "Steps of the first",
    "diffusion_steps": "of the second, or joint",
    "pictures_seen": "Pictures the UNet saw",
    "teraflops": None,
    "training_minutes": "Minutes",  # of one go; of a run that was resumed, unknown
    "psnr": "PSNR",
    "ssim": None,
    "reconstruction_random_net_distance": "Distance of reconstructions",
    "reconstruction_fid": None,
    "sample_random_net_distance": "Distance of samples",
    "sample_fid": None,
    "samples": None,
    "sampling_steps": None,
    "retrieval_top1": "Top-1",  # among experiment.RETRIEVED pictures, or all
    "device": None,
}


# ---- Compute -------------------------------------------------------------------


def joint_flops(config: ml_collections.ConfigDict) -> float:
    """FLOPs of one joint training step."""
    model, section = common.build(config), config.diffusion_stage
    x = experiment.picture_batch(config, section)
    return experiment.loss_flops(
        joint_stage.NAME,
        section,
        joint_stage.make_loss(config, model),
        joint_stage.make_optimizer(config)[0],
        partial(joint_stage.init, config, model),
        {},
        {"image": x} | conditioning.null_rows(model.conditioners, len(x)),
    )


def make_plans(
    spec: str, weights: Sequence[float], size: Size, overrides: Sequence[str]
) -> list[Plan]:
    """Two stages first, then a plan a weight. Finds mistakes before anything runs."""
    words = [f"sample.steps={size.sampling_steps}", *overrides]
    config = common.load(spec, words)
    with config.unlocked():
        config.encoder_weight = 1.0
    flops = experiment.step_flops(config)
    if set(flops) != {"autoencoder", "diffusion"}:
        raise UserError(f"stages: {config.stages}; this compares runs that have both")
    shares = {"autoencoder": FIRST_SHARE, "diffusion": 1 - FIRST_SHARE}
    steps = {}
    for name, share in shares.items():
        steps |= experiment.affordable_steps(size.flops * share, {name: flops[name]})
    changed = [f"{name}_stage.steps={count}" for name, count in steps.items()]
    plans = [Plan(spec, None, (*words, *changed), steps, flops)]
    flops = {"diffusion": joint_flops(config)}
    steps = experiment.affordable_steps(size.flops, flops)
    changed = f"diffusion_stage.steps={steps['diffusion']}"
    words.append(changed)
    joint = [Plan(spec, weight, tuple(words), steps, flops) for weight in weights]
    return plans + joint


def run_of(plan: Plan) -> experiment.Run:
    """The run of a plan."""
    command = ["ldm_jax.train"]
    if plan.weight is not None:
        command = ["benchmarks.joint_stage", f"--encoder_weight={plan.weight:g}"]
    command += [f"--config={plan.spec}"]
    command += [f"--config.{word}" for word in plan.overrides]
    config = plan.config()
    batch = config.diffusion_stage.batch_size or config.batch_size
    facts = {
        "run": plan.name.replace("_", " "),
        "encoder_weight": plan.weight,
        "autoencoder_steps": plan.steps.get("autoencoder"),
        "diffusion_steps": plan.steps["diffusion"],
        "pictures_seen": plan.steps["diffusion"] * batch,
        "teraflops": sum(plan.steps[k] * plan.flops[k] for k in plan.steps) / 1e12,
    }
    return experiment.Run(plan.name, config, tuple(command), plan.steps, facts)


# ---- What comes out ------------------------------------------------------------


def draw(rows: Sequence[experiment.Row], title: str, path: pathlib.Path) -> None:
    """Reconstruction, samples and retrieval against the weight; two stages a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    two = [row for row in rows if row["encoder_weight"] is None]
    joint = sorted(
        (row for row in rows if row["encoder_weight"] is not None),
        key=lambda row: row["encoder_weight"],
    )
    names = [f"{row['encoder_weight']:g}" for row in joint]
    panels = (
        ("psnr", "PSNR of reconstructions in dB (higher is better)"),
        ("sample_random_net_distance", "Fréchet distance of samples (lower is better)"),
        ("retrieval_top1", "top-1 caption retrieval (higher is better)"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        axis.plot(names, [row[key] for row in joint], "o-", label="one stage")
        for row in two:
            axis.axhline(row[key], color="C1", label="two stages")
        axis.set(xlabel="weight of the denoising loss in the encoder", ylabel=label)
        axis.legend()
    axes[1].set_yscale("log")
    experiment.save_figure(figure, title, rows, path)


JOINT = experiment.Experiment("joint", COLUMNS, draw)


# ---- The command ---------------------------------------------------------------


def parse_weights(text: str) -> tuple[float, ...]:
    """ "0,0.1" to (0.0, 0.1), in order and once each."""
    weights = set()
    for word in text.split(","):
        try:
            weight = float(word)
        except ValueError:
            weight = -1.0
        if not 0 <= weight < math.inf:
            raise UserError(
                f"--weights: {word!r}; numbers from 0 on, such as {WEIGHTS}"
            )
        weights.add(weight)
    return tuple(sorted(weights))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.joint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=common.default_config())
    parser.add_argument("--out", default="runs/joint", help="default: runs/joint")
    parser.add_argument("--size", default="small", help=" | ".join(SIZES))
    parser.add_argument("--weights", default=WEIGHTS, help=f"default: {WEIGHTS}")
    args, rest = parser.parse_known_args(argv)
    with config_lib.exit_on_user_error():
        size = experiment.choose_size(args.size, SIZES)
        weights = parse_weights(args.weights)
        overrides = experiment.parse_overrides(rest)
        out = pathlib.Path(args.out)
        plans = experiment.in_child(make_plans, args.config, weights, size, overrides)
        runs = [run_of(plan) for plan in plans]
        rows = experiment.go_through(JOINT, out, runs, size)
    title = f"joint or two stages, size {args.size}: {size.flops / 1e12:g} TFLOP a run"
    experiment.show(JOINT, out, rows, title)


if __name__ == "__main__":
    main()
