"""Trains in two real processes over loopback and compares with one that has it all."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_jax.train import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("autoencoder", "diffusion")
STEPS, DEVICES = 3, 4
TIMEOUT = 900  # seconds; one process that fails leaves the other waiting
# Adam's usual eps would make a whole step of random sign from a gradient that is only
# rounding, as of a bias before a norm, and hide one that is summed, not averaged.
EPS = {"autoencoder": 1.0, "diffusion": 1e-3}
# Not bit for bit: four partial sums are added in another order between processes.
TOLERANCE = 1e-6
FLAGS = (
    "--config=configs/txt2img.py:debug",
    *(f"--config.{stage}_stage.steps={STEPS}" for stage in STAGES),
    *(f"--config.{stage}_stage.optim.eps={EPS[stage]}" for stage in STAGES),
    "--config.sample.steps=2",
)

pytestmark = pytest.mark.slow


def _run(workdir, cache, count, stop_at=None) -> list[str]:
    """What `count` processes print that train together and leave without an error.

    The last one gets SIGTERM when the first has printed `stop_at`.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a third of the time
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
    }
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    command = [sys.executable, "-m", "ldm_jax.train", *FLAGS, f"--workdir={workdir}"]
    logs = [workdir.with_name(f"{workdir.name}{i}.log") for i in range(count)]
    processes = []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=env | {"JAX_PROCESS_ID": str(i)} if count > 1 else env,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + TIMEOUT
        while None in [p.poll() for p in processes]:
            if stop_at is not None and stop_at in logs[0].read_text():
                processes[-1].terminate()
                stop_at = None
            if any(p.returncode for p in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [log.read_text() for log in logs]
    codes = [p.returncode for p in processes]
    assert codes == [0] * count, f"{codes}\n" + "\n--- next process\n".join(outputs)
    assert stop_at is None, f"{stop_at!r} did not come:\n{outputs[0]}"
    return outputs


def _arrays(workdir, stage) -> dict[str, np.ndarray]:
    """Params and averages of the last checkpoint by path, read by orbax alone."""
    folder, trees = workdir / stage / str(STEPS), {}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        for name in ("params", "ema"):
            saved = reader.metadata(folder / name).item_metadata.tree
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved
            )
            trees[name] = reader.restore(folder / name, abstract)
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def _own_words(output: str) -> list[str]:
    """Where a line begins as ours do; the library of the collectives has its own."""
    return re.findall(r"^(?:plan|data|pictures|autoencoder|diffusion)\b", output, re.M)


def test_two_processes_end_with_the_arrays_of_one(tmp_path):
    """One of the two is told to stop in the second stage; both save, then go on."""
    cache, one, two = (tmp_path / name for name in ("xla", "one", "two"))
    last_of_stage_one = f"autoencoder {STEPS}/{STEPS}  held-out"
    first, second = _run(two, cache, 2, stop_at=last_of_stage_one)
    # The notice takes about a second, and the second stage has to be compiled first.
    stopped = re.search(r"diffusion: stopped at step (\d), all is saved", first)
    assert stopped, first
    step = int(stopped[1])
    assert checkpoint.Checkpoints(two / "diffusion").steps() == [step]
    assert not (two / "report.json").exists()
    assert _own_words(first) and not _own_words(second)

    first, second = _run(two, cache, 2)
    assert f"autoencoder: finished at step {STEPS}, kept as it is" in first
    assert f"diffusion: going on from step {step} of {STEPS}" in first
    assert "top-1" in first
    assert not _own_words(second)

    _run(one, cache, 1)
    reports, pictures = [], []
    for workdir in (one, two):
        reports.append(json.loads((workdir / "report.json").read_text()))
        pictures.append(sorted(path.name for path in (workdir / "pictures").iterdir()))
        for stage in STAGES:
            assert checkpoint.Checkpoints(workdir / stage).finished()
    assert reports[0].keys() == reports[1].keys()
    name = "reconstruction, held out"
    assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-3)
    assert pictures[0] == pictures[1] and len(pictures[0]) == 7

    for stage in STAGES:
        expected, found = _arrays(one, stage), _arrays(two, stage)
        assert expected.keys() == found.keys() and len(expected) > 10
        for path, x in expected.items():
            np.testing.assert_allclose(
                found[path], x, rtol=0, atol=TOLERANCE, err_msg=f"{stage} {path}"
            )
