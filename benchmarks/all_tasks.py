"""python -m benchmarks.all_tasks --out=runs/all_tasks

Trains the default of every task config to its end and gathers one panel of each: what
the model was given, what it drew, and the true picture, all of held-out examples.
The panels are OUT/panels/TASK.png; a table of minutes and scores is printed.

Tasks on the same data share their first stage: the first of them trains it, the others
take it. --tasks=superres,depth2img chooses some; --config.KEY=VALUE changes all. A
run that was stopped goes on; finished tasks are kept.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_collections

from benchmarks import common
from ldm_jax import config as config_lib
from ldm_jax.config import UserError

TASKS = (
    "txt2img",
    "unconditional",
    "class_conditional",
    "superres",
    "inpainting",
    "upscale",
    "unclip",
    "retrieval",
    "layout2img",
    "semantic",
    "depth2img",
    "pixel",
    "prior",
)
MINUTES = "minutes.json"  # in the workdir of a finished task


def spec(task: str) -> str:
    """The config file of a task, found from wherever this is run."""
    path = pathlib.Path(common.default_config()).with_name(f"{task}.py")
    return os.path.relpath(path)


def first_stage_of(config: ml_collections.ConfigDict) -> str:
    """What says that two tasks have the same first stage; "" where there is none."""
    if "autoencoder" not in config.stages:
        return ""
    data = config.data.to_dict()
    del data["derive"]  # of pictures that are there already
    parts = (data, config.autoencoder, config.autoencoder_stage, config.resolution)
    return repr([getattr(part, "to_dict", lambda part=part: part)() for part in parts])


def train(task: str, workdir: pathlib.Path, overrides: list[str]) -> float:
    """Runs the training command; returns its minutes, also of an earlier run."""
    path = workdir / MINUTES
    if path.is_file():
        print(f"{task}: finished, kept as it is", flush=True)
        return json.loads(path.read_text())
    command = [sys.executable, "-u", "-m", "ldm_jax.train", f"--config={spec(task)}"]
    command += [f"--workdir={workdir}", *overrides]
    print(f"\npython {' '.join(command[2:])}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)  # it has said why
    minutes = (time.monotonic() - began) / 60
    path.write_text(json.dumps(minutes))
    return minutes


def row(task: str, minutes: float, shared: str, report: dict) -> str:
    """A line of the table."""
    names = ("retrieval, held-out captions", "samples, held-out")
    scores = next(report[name] for name in names if name in report)
    shown = [
        f"{scores[name]:{form}}" if name in scores else ""
        for name, form in (("top1", ".1%"), ("top5", ".1%"), ("psnr", ".2f"))
    ]
    return f"| {task} | {minutes:.1f} | {shared} | {' | '.join(shown)} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/all_tasks")
    parser.add_argument("--tasks", default=",".join(TASKS))
    args, overrides = parser.parse_known_args()
    out, trained, lines = pathlib.Path(args.out), {}, []
    with config_lib.exit_on_user_error():
        for task in args.tasks.split(","):
            if task not in TASKS:
                hint = config_lib.nearest(task, TASKS)
                raise UserError(f"--tasks: {task!r}; {hint}")
    for task in args.tasks.split(","):
        workdir = out / task
        same = first_stage_of(config_lib.load(spec(task)))
        source = trained.get(same) if same else None
        taken = [f"--config.autoencoder_from={out / source}"] if source else []
        minutes = train(task, workdir, overrides + taken)
        trained.setdefault(same, task)
        report = json.loads((workdir / "report.json").read_text())
        lines.append(row(task, minutes, source or ("own" if same else "none"), report))
        (out / "panels").mkdir(parents=True, exist_ok=True)
        # Held-out emoji are all people: of classes the others show more.
        split = "training" if task == "class_conditional" else "heldout"
        panel = workdir / "pictures" / f"samples_{split}.png"
        shutil.copyfile(panel, out / "panels" / f"{task}.png")
    print(f"\n{common.environment('flax')}\n")
    print("| Task | Minutes | First stage | Top-1 | Top-5 | PSNR |")
    print("| --- " * 6 + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
