"""python -m benchmarks.f_sweep --out=runs/f_sweep

How much should the first stage compress? For each factor f this trains a first stage
and a diffusion model behind it, then writes reconstruction and sample quality against f
to f_sweep.csv and f_sweep.png: the paper's figures 6 and 7, on emoji of 64 pixels.

Compute is equal, not steps: every first stage takes the same number of FLOPs, every
diffusion model too, by XLA's count of a training step. f = 1 is diffusion on pixels and
has no first stage. Encoding, evaluating and drawing are not counted.

--size=small is for 2 CPU cores (256 samples a factor); medium and large are for an
accelerator (2,048 and 10,000), with wider nets and larger batches; debug is a few
steps. --config.KEY=VALUE changes the presets of configs/f_sweep.py, of all factors
alike, but that f = 1 takes nothing of --config.autoencoder.

Each factor is a run of its own in OUT/fN, made by the training command, which is
printed. A sweep that was stopped goes on where it was; finished factors are kept.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from benchmarks import common, experiment
from ldm_jax import config as config_lib
from ldm_jax.config import UserError

CONFIG = pathlib.Path(common.default_config()).with_name("f_sweep.py")
FACTORS = (1, 2, 4, 8, 16, 32)


class Size(NamedTuple):
    """How large a sweep is; width and batch are times those of the presets."""

    flops: float  # of each stage of each factor
    samples: int  # of each factor
    width: int = 1
    batch: int = 1
    sampling_steps: int = 20
    drawn_at_once: int = 16


SIZES = {
    "debug": Size(5e10, 16, sampling_steps=2),
    "small": Size(3e12, 256),
    "medium": Size(1e15, 2048, 2, 8, sampling_steps=50, drawn_at_once=128),
    "large": Size(2e16, 10_000, 4, 16, sampling_steps=50, drawn_at_once=250),
}


class Plan(NamedTuple):
    """One factor: its preset with "key=value" overrides, and what a step costs."""

    f: int
    overrides: tuple[str, ...]
    steps: dict[str, int]  # of each stage
    flops: dict[str, float]  # of one step of each stage

    @property
    def spec(self) -> str:
        return f"{CONFIG}:f{self.f}"

    def teraflops(self, stage: str) -> float:
        """What the stage takes in all; 0 where there is none."""
        return self.steps.get(stage, 0) * self.flops.get(stage, 0) / 1e12


COLUMNS = {  # name: how the printed table heads it; None leaves it out there
    "f": "f",
    "latent": "Latent",
    "autoencoder_parameters": None,
    "diffusion_parameters": None,
    "autoencoder_steps": None,
    "diffusion_steps": "UNet steps",
    "autoencoder_teraflops": None,
    "diffusion_teraflops": None,
    "training_minutes": "Minutes",  # of one go; of a run that was resumed, unknown
    "psnr": "PSNR",
    "ssim": "SSIM",
    "reconstruction_random_net_distance": "Distance of reconstructions",
    "reconstruction_fid": None,
    "sample_random_net_distance": "Distance of samples",
    "sample_fid": None,
    "samples": None,
    "sampling_steps": None,
    "samples_per_second": "Samples/s",
    "retrieval_top1": "Top-1",  # among experiment.RETRIEVED pictures, or all
    "device": None,
}


# ---- Compute -------------------------------------------------------------------


def size_overrides(config: ml_collections.ConfigDict, size: Size) -> list[str]:
    """What a size changes in a preset; wider nets learn at lower rates."""
    words = [
        f"sample.steps={size.sampling_steps}",
        f"unet.model_channels={size.width * config.unet.model_channels}",
    ]
    if "autoencoder" in config.stages:
        words.append(f"autoencoder.ch={size.width * config.autoencoder.ch}")
    for stage in config.stages:
        section = config[f"{stage}_stage"]
        rate = section.optim.learning_rate / size.width
        words += [
            f"{stage}_stage.batch_size={size.batch * section.batch_size}",
            f"{stage}_stage.optim.learning_rate={rate}",
        ]
    return words


def make_plans(
    factors: Sequence[int], size: Size, overrides: Sequence[str]
) -> list[Plan]:
    """One plan a factor. Finds the user's mistakes before anything is trained."""
    plans = []
    for f in factors:
        plan = Plan(f, (), {}, {})
        words = size_overrides(config_lib.load(plan.spec), size)
        words += [w for w in overrides if f > 1 or not w.startswith("autoencoder.")]
        flops = experiment.step_flops(common.load(plan.spec, words))
        steps = experiment.affordable_steps(size.flops, flops)
        words += [f"{stage}_stage.steps={count}" for stage, count in steps.items()]
        plans.append(Plan(f, tuple(words), steps, flops))
    return plans


def run_of(plan: Plan) -> experiment.Run:
    """The run of a plan."""
    command = ["ldm_jax.train", f"--config={plan.spec}"]
    command += [f"--config.{word}" for word in plan.overrides]
    facts = {"f": plan.f}
    for stage in ("autoencoder", "diffusion"):
        facts[f"{stage}_steps"] = plan.steps.get(stage, 0)
        facts[f"{stage}_teraflops"] = plan.teraflops(stage)
    config = config_lib.load(plan.spec, plan.overrides)
    return experiment.Run(f"f{plan.f}", config, tuple(command), plan.steps, facts)


# ---- What comes out ------------------------------------------------------------


def draw(rows: Sequence[experiment.Row], title: str, path: pathlib.Path) -> None:
    """Reconstruction against f above; below, samples against f and against speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 8), layout="constrained")
    factors, speed = [row["f"] for row in rows], axes[1, 1]
    distance = "random-net Fréchet distance (lower is better)"
    exact = " (f = 1 is exact)" if 1 in factors else ""
    panels = (
        (f"Reconstruction{exact}", "psnr", "PSNR in dB (higher is better)"),
        (f"Reconstruction{exact}", "reconstruction_random_net_distance", distance),
        ("Samples", "sample_random_net_distance", distance),
    )
    for index, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        title_of_axis, key, label = panel
        points = [(row["f"], row[key]) for row in rows if row[key] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(factors, map(str, factors))
        axis.set_xlim(min(factors) / 1.4, max(factors) * 1.4)
        axis.set(title=title_of_axis, xlabel="downsampling factor f", ylabel=label)
    for row in rows:
        point = row["samples_per_second"], row["sample_random_net_distance"]
        speed.plot(*point, "o", color="C2")
        offset = dict(xytext=(6, 5), textcoords="offset points")
        speed.annotate(f"LDM-{row['f']}", point, **offset)
    speed.set_xscale("log")
    speed.margins(0.2)
    speed.set(title="Samples by speed", xlabel="samples per second", ylabel=distance)
    experiment.save_figure(figure, title, rows, path)


F_SWEEP = experiment.Experiment("f_sweep", COLUMNS, draw)


# ---- The command ---------------------------------------------------------------


def parse_factors(text: str) -> tuple[int, ...]:
    """ "1,4" to (1, 4), in order and once each."""
    known = [str(f) for f in FACTORS]
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UserError(f"--factors: no {word!r}; choose from {','.join(known)}")
    if not words:
        raise UserError(f"--factors: none given; choose from {','.join(known)}")
    return tuple(sorted({int(word) for word in words}))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.f_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/f_sweep", help="default: runs/f_sweep")
    parser.add_argument("--size", default="small", help=" | ".join(SIZES))
    parser.add_argument(
        "--factors",
        default=",".join(map(str, FACTORS)),
        help="some of 1,2,4,8,16,32; the CSV and the plot have those named",
    )
    args, rest = parser.parse_known_args(argv)
    with config_lib.exit_on_user_error():
        size = experiment.choose_size(args.size, SIZES)
        factors = parse_factors(args.factors)
        overrides = experiment.parse_overrides(rest)
        out = pathlib.Path(args.out)
        plans = experiment.in_child(make_plans, factors, size, overrides)
        runs = [run_of(plan) for plan in plans]
        rows = experiment.go_through(F_SWEEP, out, runs, size)
    title = f"f sweep, size {args.size}: {size.flops / 1e12:g} TFLOP a stage"
    experiment.show(F_SWEEP, out, rows, title)


if __name__ == "__main__":
    main()
