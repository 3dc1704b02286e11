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
import concurrent.futures
import csv
import importlib.util
import json
import multiprocessing
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import loaded as loaded_lib
from ldm_jax import model as model_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError

CONFIG = pathlib.Path(common.default_config()).with_name("f_sweep.py")
FACTORS = (1, 2, 4, 8, 16, 32)
ROW = "f_sweep_row.json"  # in the workdir of a finished factor
RETRIEVED = 256  # pictures among which a sample's own is looked for


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
    "retrieval_top1": "Top-1",  # among RETRIEVED pictures, or all where fewer
    "device": None,
}


# ---- Compute -------------------------------------------------------------------


def step_flops(config: ml_collections.ConfigDict) -> dict[str, float]:
    """FLOPs of one training step of each stage, XLA's count before it optimizes.

    Nothing is compiled. Stage one is counted before a discriminator joins.
    """
    from benchmarks import train_step
    from ldm_jax.train import optim, step_diffusion
    from ldm_jax.train import stage as stage_lib
    from ldm_jax.train import state as train_state

    key, counted = jax.random.key(0), {}
    model = common.build(config)

    def count(name, step, create, frozen, batch):
        try:
            state = jax.eval_shape(create, key)
            lowered = jax.jit(step).lower(state, frozen, batch)
        except ValueError as error:  # what a net says of its own options
            raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
        counted[name] = lowered.cost_analysis()["flops"]

    def pictures(section):
        b, side = stage_lib.batch_size(section, config), config.resolution
        return jax.ShapeDtypeStruct((b, side, side, 3), np.float32)

    if "autoencoder" in config.stages:
        stage = train_step.autoencoder_stage(config, model.autoencoder)
        batch = {"image": pictures(config.autoencoder_stage)}
        count(stage.name, stage.phases[0].step, stage.create, stage.frozen, batch)
    section = config.diffusion_stage
    tx, _ = optim.make_optimizer(section.optim, section.steps, 1)
    loss = step_diffusion.make_loss(model, section)
    options = dict(micro_batches=section.micro_batches, ema_decay=section.ema_decay)
    step = stage_lib.make_step(loss, tx, seed=config.seed, **options)

    def create(key):
        params = model_lib.init_diffusion(config, model, key)
        return train_state.create(params, tx, section.ema_decay)

    first_stage = jax.eval_shape(partial(common.first_stage, config, model))
    x = pictures(section)
    if section.cache_latents:
        encode = partial(first_stage_lib.encode_moments, model.autoencoder)
        batch = {"moments": jax.eval_shape(encode, first_stage.params, x)}
    else:
        batch = {"image": x}
    batch |= conditioning.null_rows(model.conditioners, len(x))
    count("diffusion", step, create, {"first_stage": first_stage}, batch)
    return counted


def affordable_steps(budget: float, flops: Mapping[str, float]) -> dict[str, int]:
    """The steps of each stage that come nearest to `budget` FLOPs, given those of one.

    Raises UserError where that is none.
    """
    steps = {stage: round(budget / cost) for stage, cost in flops.items()}
    for stage, count in steps.items():
        if count < 1:
            raise UserError(
                f"{stage}_stage.batch_size: one step takes {flops[stage]:.2g} FLOPs,"
                f" the budget of --size is {budget:.2g}; lower it, or take a larger"
                " --size"
            )
    return steps


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
        flops = step_flops(common.load(plan.spec, words))
        steps = affordable_steps(size.flops, flops)
        words += [f"{stage}_stage.steps={count}" for stage, count in steps.items()]
        plans.append(Plan(f, tuple(words), steps, flops))
    return plans


# ---- One factor ----------------------------------------------------------------


def in_child(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a process of its own, so that this one holds no device."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def train(command: Sequence[str]) -> None:
    """Runs the training command; lets it save first where this one is told to stop."""
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        sys.exit(code)  # it has said why


def score(workdir: pathlib.Path, samples: int, drawn_at_once: int) -> dict[str, Any]:
    """What a finished run reaches: columns of its row, and whom to credit for the data.

    Reconstructions are of all held-out pictures. Samples are of captions of training
    pictures, spread over all of them, and are compared with these pictures.
    """
    from ldm_jax.convert import inception, pretrained, torch_archive
    from ldm_jax.data import pipeline, sources
    from ldm_jax.evaluate import metrics, run_report
    from ldm_jax.train import distributed, report

    config_lib.setup_logging()
    distributed.initialize()  # the cache of what training compiled
    loaded = loaded_lib.load(workdir)
    config, net = loaded.config, loaded.model.autoencoder
    source, heldout = sources.load_splits(config.data, config.resolution)
    weights = {}
    if pretrained.is_cached("inception"):
        state_dict = torch_archive.load(pretrained.fetch("inception"))
        weights["inception"] = inception.params(state_dict)

    reconstructed = {}
    if "autoencoder" in config.stages:
        reconstructed = run_report.reconstruction(
            config, net, loaded.first_stage, heldout, len(heldout), weights
        )

    order = np.random.default_rng(0).permutation(len(source))
    chosen = np.resize(order, samples)  # again from the start where there are fewer
    captions = source.fields["caption"][chosen].tolist()
    loaded.sample(captions[:drawn_at_once], batch_size=drawn_at_once)  # compiles
    began = time.perf_counter()
    drawn = loaded.sample(captions, batch_size=drawn_at_once)
    seconds = time.perf_counter() - began
    shown = sources.Source({k: v[order[:samples]] for k, v in source.fields.items()})
    real = pipeline.pictures(shown, config.data.ops)
    distances = run_report.distances(real, drawn, weights)
    ranks = metrics.retrieval_ranks(drawn[:RETRIEVED], real[:RETRIEVED])
    return {
        "latent": "x".join(map(str, loaded.model.latent_shape)),
        "autoencoder_parameters": report.count(loaded.first_stage.params),
        "diffusion_parameters": report.count(loaded.params),
        "psnr": reconstructed.get("psnr"),
        "ssim": reconstructed.get("ssim"),
        "reconstruction_random_net_distance": reconstructed.get("random_net_distance"),
        "reconstruction_fid": reconstructed.get("fid"),
        "sample_random_net_distance": distances["random_net_distance"],
        "sample_fid": distances.get("fid"),
        "samples": samples,
        "sampling_steps": config.sample.steps,
        "samples_per_second": samples / seconds,
        "retrieval_top1": float(np.mean(ranks < 1)),
        "device": jax.devices()[0].device_kind,
        "attribution": source.attribution,
    }


def kept_row(workdir: pathlib.Path, plan: Plan, size: Size) -> dict[str, Any] | None:
    """The row of a factor that is finished; None where its run was another one."""
    path = workdir / ROW
    if not path.is_file():
        return None
    config = config_lib.load(plan.spec, plan.overrides)
    row = json.loads(path.read_text())
    changed = config_lib.differences(workdir_lib.read_config(workdir), config)
    return None if changed or row["samples"] != size.samples else row


def make_row(workdir: pathlib.Path, plan: Plan, size: Size) -> dict[str, Any]:
    """Trains and scores one factor; its row is the last thing to be written."""
    command = [sys.executable, "-u", "-m", "ldm_jax.train", f"--config={plan.spec}"]
    command += [f"--workdir={workdir}"]
    command += [f"--config.{word}" for word in plan.overrides]
    print(f"\npython {' '.join(command[2:])}", flush=True)
    fresh, began = not workdir.exists(), time.monotonic()
    train(command)
    minutes = (time.monotonic() - began) / 60
    if not (workdir / "report.json").is_file():  # it was told to stop, not we
        raise KeyboardInterrupt
    row = {"f": plan.f, "training_minutes": minutes if fresh else None}
    for stage in ("autoencoder", "diffusion"):
        row[f"{stage}_steps"] = plan.steps.get(stage, 0)
        row[f"{stage}_teraflops"] = plan.teraflops(stage)
    row |= in_child(score, workdir, size.samples, size.drawn_at_once)
    workdir_lib.write_text(workdir / ROW, json.dumps(row, indent=2) + "\n")
    return row


# ---- What comes out ------------------------------------------------------------


def write_csv(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """One line a factor; what a factor does not have is left empty."""
    partial_path = path.with_name(f".{path.name}")
    with partial_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _shown(v, ".6g") for k, v in row.items()})
    partial_path.replace(path)


def _shown(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The main columns as Markdown."""
    heads = {name: head for name, head in COLUMNS.items() if head}
    lines = [f"| {' | '.join(heads.values())} |", "| --- " * len(heads) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(_shown(row[name], '.4g') for name in heads)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: pathlib.Path) -> None:
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
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    credit = next((row["attribution"] for row in rows if row["attribution"]), "")
    figure.suptitle(title)
    figure.supxlabel(credit, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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


def parse_overrides(words: Sequence[str]) -> list[str]:
    """ "--config.key=value" to "key=value"; the steps are not the user's to choose."""
    overrides = []
    for word in words:
        if not word.startswith("--config."):
            raise UserError(
                f"{word}: no such flag; config fields are written --config.FIELD=VALUE"
            )
        word = word.removeprefix("--config.")
        if word.partition("=")[0].endswith("_stage.steps"):
            raise UserError(
                f"--config.{word}: steps follow from equal compute; choose a --size"
            )
        overrides.append(word)
    return overrides


def run(
    out: pathlib.Path, factors: Sequence[int], size: Size, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Goes through the factors; the CSV grows by a line with each."""
    plans = in_child(make_plans, factors, size, overrides)
    for plan in plans:
        steps = ", ".join(f"{count} steps of {s}" for s, count in plan.steps.items())
        print(f"f = {plan.f}: {steps}")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for plan in plans:
        workdir = out / f"f{plan.f}"
        row = kept_row(workdir, plan, size)
        if row is not None:
            print(f"f = {plan.f}: finished, kept as it is", flush=True)
        else:
            row = make_row(workdir, plan, size)
        rows.append(row)
        write_csv(rows, out / "f_sweep.csv")
    return rows


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
        if args.size not in SIZES:
            hint = config_lib.nearest(args.size, SIZES)
            raise UserError(f"--size: {args.size!r}; {hint}")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                "matplotlib: not installed, and the plot needs it;"
                " pip install -e '.[plot]'"
            )
        size, out = SIZES[args.size], pathlib.Path(args.out)
        factors, overrides = parse_factors(args.factors), parse_overrides(rest)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            rows = run(out, factors, size, overrides)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on from here")
    title = (
        f"f sweep, size {args.size}: {size.flops / 1e12:g} TFLOP a stage,"
        f" {size.samples} samples, {rows[-1]['device']}"
    )
    draw(rows, title, out / "f_sweep.png")
    print(f"\n{common.environment('flax', 'optax')}\n\n{title}\n\n{table(rows)}")
    print(f"\n{out / 'f_sweep.csv'}, {out / 'f_sweep.png'}")


if __name__ == "__main__":
    main()
