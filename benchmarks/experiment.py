"""What the paper's experiments share: equal compute, runs in processes, scores, tables.

A run is a workdir that the training command made; when it is finished its row of scores
lies in it too, and an experiment that was stopped keeps what is finished.
"""

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

Row = Mapping[str, Any]


class Run(NamedTuple):
    """One run: how it is made, and the columns of its row that are known before."""

    name: str  # of its folder
    config: ml_collections.ConfigDict  # what its workdir then holds
    command: tuple[str, ...]  # module and flags, all but the workdir
    steps: Mapping[str, int]  # of each stage
    facts: Row


class Experiment(NamedTuple):
    """What is written of its runs: NAME.csv and NAME.png."""

    name: str
    # {column: its head in the printed table, or None where it is not in it}
    columns: Mapping[str, str | None]
    draw: Callable[[Sequence[Row], str, pathlib.Path], None]

    @property
    def row_file(self) -> str:
        """What a finished run has its row in."""
        return f"{self.name}_row.json"


RETRIEVED = 256  # pictures among which a sample's own is looked for


# ---- Compute -------------------------------------------------------------------


def picture_batch(
    config: ml_collections.ConfigDict, section: ml_collections.ConfigDict
) -> jax.ShapeDtypeStruct:
    """The images of one step of a stage."""
    from ldm_jax.train import stage as stage_lib

    b, side = stage_lib.batch_size(section, config), config.resolution
    return jax.ShapeDtypeStruct((b, side, side, 3), np.float32)


def step_flops_of(
    name: str, step: Callable, create: Callable, frozen: Any, batch: Any
) -> float:
    """FLOPs of one training step, XLA's count before it optimizes; nothing compiles."""
    try:
        state = jax.eval_shape(create, jax.random.key(0))
        lowered = jax.jit(step).lower(state, frozen, batch)
    except ValueError as error:  # what a net says of its own options
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    return lowered.cost_analysis()["flops"]


def loss_flops(
    name: str,
    section: ml_collections.ConfigDict,
    loss: Callable,
    tx: Any,
    init: Callable,
    frozen: Any,
    batch: Any,
) -> float:
    """FLOPs of one step of a stage that is one loss and one optimizer."""
    from ldm_jax.train import stage as stage_lib
    from ldm_jax.train import state as train_state

    options = dict(micro_batches=section.micro_batches, ema_decay=section.ema_decay)
    step = stage_lib.make_step(loss, tx, seed=0, **options)

    def create(key):
        return train_state.create(init(key), tx, section.ema_decay)

    return step_flops_of(name, step, create, frozen, batch)


def step_flops(config: ml_collections.ConfigDict) -> dict[str, float]:
    """FLOPs of one training step of each stage; stage one without a discriminator."""
    from benchmarks import train_step
    from ldm_jax.train import optim, step_diffusion

    counted = {}
    model = common.build(config)
    if "autoencoder" in config.stages:
        stage = train_step.autoencoder_stage(config, model.autoencoder)
        batch = {"image": picture_batch(config, config.autoencoder_stage)}
        counted[stage.name] = step_flops_of(
            stage.name, stage.phases[0].step, stage.create, stage.frozen, batch
        )
    section = config.diffusion_stage
    tx, _ = optim.make_optimizer(section.optim, section.steps, 1)
    first_stage = jax.eval_shape(partial(common.first_stage, config, model))
    x = picture_batch(config, section)
    if section.cache_latents:
        encode = partial(first_stage_lib.encode_moments, model.autoencoder)
        batch = {"moments": jax.eval_shape(encode, first_stage.params, x)}
    else:
        batch = {"image": x}
    counted["diffusion"] = loss_flops(
        "diffusion",
        section,
        step_diffusion.make_loss(model, section),
        tx,
        partial(model_lib.init_diffusion, config, model),
        {"first_stage": first_stage},
        batch | conditioning.null_rows(model.conditioners, len(x)),
    )
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


# ---- Runs ----------------------------------------------------------------------


def in_child(function: Callable, *args: Any) -> Any:
    """`function(*args)` in a process of its own, so that this one holds no device."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def run_command(module: str, *flags: str) -> None:
    """Runs `python -m module`; lets it save first where this one is told to stop."""
    print(f"\npython -m {' '.join([module, *flags])}", flush=True)
    process = subprocess.Popen([sys.executable, "-u", "-m", module, *flags])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        sys.exit(code)  # it has said why


def kept_row(
    path: pathlib.Path, config: ml_collections.ConfigDict, samples: int
) -> dict[str, Any] | None:
    """The row of a run that is finished; None where its run was another one."""
    if not path.is_file():
        return None
    row = json.loads(path.read_text())
    changed = config_lib.differences(workdir_lib.read_config(path.parent), config)
    return None if changed or row["samples"] != samples else row


def make_row(path: pathlib.Path, run: Run, size: Any) -> dict[str, Any]:
    """Trains and scores a run; the row is the last thing to be written."""
    workdir = path.parent
    fresh, began = not workdir.exists(), time.monotonic()
    run_command(*run.command, f"--workdir={workdir}")
    minutes = (time.monotonic() - began) / 60
    if not (workdir / "report.json").is_file():  # it was told to stop, not we
        raise KeyboardInterrupt
    row = dict(run.facts) | {"training_minutes": minutes if fresh else None}
    row |= in_child(score, workdir, size.samples, size.drawn_at_once)
    workdir_lib.write_text(path, json.dumps(row, indent=2) + "\n")
    return row


def go_through(
    experiment: Experiment, out: pathlib.Path, runs: Sequence[Run], size: Any
) -> list[dict[str, Any]]:
    """The rows of all runs, those that are finished kept; the CSV grows with each.

    `size` says how many `samples` are drawn, and how many of them at once. Told to
    stop, it ends the program with a line; what is finished or saved is kept.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for run in runs:
        steps = ", ".join(f"{count} steps of {s}" for s, count in run.steps.items())
        print(f"{run.name}: {steps}")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for run in runs:
            path = out / run.name / experiment.row_file
            row = kept_row(path, run.config, size.samples)
            if row is not None:
                print(f"{run.name}: finished, kept as it is", flush=True)
            else:
                row = make_row(path, run, size)
            rows.append(row)
            write_csv(rows, experiment.columns, out / f"{experiment.name}.csv")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    return rows


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


# ---- What comes out ------------------------------------------------------------


def write_csv(
    rows: Sequence[Row], columns: Mapping[str, str | None], path: pathlib.Path
) -> None:
    """One line a row; what a row does not have is left empty."""
    partial_path = path.with_name(f".{path.name}")
    with partial_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _shown(v, ".6g") for k, v in row.items()})
    partial_path.replace(path)


def table(rows: Sequence[Row], columns: Mapping[str, str | None]) -> str:
    """The columns that have a head, as Markdown."""
    heads = {name: head for name, head in columns.items() if head}
    lines = [f"| {' | '.join(heads.values())} |", "| --- " * len(heads) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(_shown(row[name], '.4g') for name in heads)} |")
    return "\n".join(lines)


def _shown(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, float) else str(value)


def save_figure(figure: Any, title: str, rows: Sequence[Row], path: pathlib.Path):
    """Writes a plot under its title, with whom to credit for the pictures behind it."""
    from matplotlib import pyplot

    for axis in figure.axes:
        axis.grid(alpha=0.3)
    credit = next((row["attribution"] for row in rows if row["attribution"]), "")
    figure.suptitle(title)
    figure.supxlabel(credit, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(
    experiment: Experiment, out: pathlib.Path, rows: Sequence[Row], title: str
) -> None:
    """Draws the plot and prints the table, under the machine's line."""
    plot = out / f"{experiment.name}.png"
    title = f"{title}, {rows[-1]['samples']} samples, {rows[-1]['device']}"
    experiment.draw(rows, title, plot)
    print(f"\n{common.environment('flax', 'optax')}\n\n{title}\n")
    print(table(rows, experiment.columns))
    print(f"\n{plot.with_suffix('.csv')}, {plot}")


# ---- The command ---------------------------------------------------------------


def choose_size(name: str, sizes: Mapping[str, Any]) -> Any:
    """The size of that name; UserErrors also where the plot could not be drawn."""
    if name not in sizes:
        hint = config_lib.nearest(name, sizes)
        raise UserError(f"--size: {name!r}; {hint}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib: not installed, and the plot needs it; pip install -e '.[plot]'"
        )
    return sizes[name]


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
