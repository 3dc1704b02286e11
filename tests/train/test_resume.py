"""Kills real training processes and compares what comes out, bit for bit."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_jax.train import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
FLAGS = (
    "--config=configs/txt2img.py:debug",
    f"--config.autoencoder_stage.steps={STEPS}",
    f"--config.diffusion_stage.steps={STEPS}",
    "--config.diffusion_stage.micro_batches=2",
    "--config.report.checkpoint_steps=2",
    "--config.report.eval_steps=100",
    "--config.report.image_steps=100",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A compilation cache of its own, so that only the first process compiles."""
    return tmp_path_factory.mktemp("xla")


def _run(
    workdir, cache, *more, flags=FLAGS, stop_at=None, with_signal=None, devices=1
) -> tuple[int, str]:
    """Trains in a process; sends `with_signal` when a line holds `stop_at`."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in a third of the time
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm_jax.train", *flags, *more, f"--workdir={workdir}"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if stop_at is not None and stop_at in line:
            process.send_signal(with_signal)
            stop_at = None
    return process.wait(), "".join(lines)


def _arrays(workdir, stage) -> list[np.ndarray]:
    """Every array of the last checkpoint, read by orbax alone."""
    folder = pathlib.Path(workdir, stage).absolute()
    there = {path.name for path in (folder / str(STEPS)).iterdir()}
    items = {
        name: ocp.args.StandardRestore() for name in checkpoint.TREES if name in there
    }
    with ocp.CheckpointManager(folder) as manager:
        restored = manager.restore(STEPS, args=ocp.args.Composite(**items))
    return [np.asarray(x) for x in jax.tree.leaves(dict(restored.items()))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, output = _run(workdir, cache)
    assert code == 0, output
    return {stage: _arrays(workdir, stage) for stage in ("autoencoder", "diffusion")}


def _assert_same_bits(workdir, uninterrupted):
    for stage, expected in uninterrupted.items():
        found = _arrays(workdir, stage)
        assert len(found) == len(expected) > 10
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=stage)


def test_killed_at_every_turn_ends_with_the_same_bits(tmp_path, cache, uninterrupted):
    points = (
        "autoencoder 1/6",  # before any checkpoint
        "autoencoder 5/6",  # after two
        "autoencoder 6/6  held-out",  # as the stage ends, while it is being saved
        "diffusion: compiled",  # between the stages
        "diffusion 3/6",
        "diffusion 6/6  held-out",
    )
    for point in points:
        code, output = _run(tmp_path, cache, stop_at=point, with_signal=signal.SIGKILL)
        assert code == -signal.SIGKILL, f"{point} did not come:\n{output}"
    code, output = _run(tmp_path, cache)
    assert code == 0, output
    assert "autoencoder: finished at step 6, kept as it is" in output
    _assert_same_bits(tmp_path, uninterrupted)


def test_sigterm_saves_and_leaves(tmp_path, cache, uninterrupted):
    code, output = _run(
        tmp_path, cache, stop_at="autoencoder 3/6", with_signal=signal.SIGTERM
    )
    assert code == 0, output
    assert "the same command goes on from here" in output.replace("\n", " ")
    saved = checkpoint.Checkpoints(tmp_path / "autoencoder").steps()[0]
    assert saved >= 3, "nothing was saved on the signal"
    code, output = _run(tmp_path, cache)
    assert code == 0, output
    assert f"going on from step {saved}" in output or saved == STEPS
    _assert_same_bits(tmp_path, uninterrupted)


def test_interrupted_on_two_devices_ends_with_the_same_bits(tmp_path, cache):
    """Parameters cut over fsdp, no checkpoint but those of the signals."""
    flags = (
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.report.checkpoint_steps=100",
    )
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    code, output = _run(whole, cache, *flags, devices=2)
    assert code == 0, output
    for stage in ("autoencoder", "diffusion"):
        code, output = _run(
            halved,
            cache,
            *flags,
            stop_at=f"{stage} 2/6",
            with_signal=signal.SIGINT,
            devices=2,
        )
        assert code == 0, output
        assert checkpoint.Checkpoints(halved / stage).steps()[0] in range(2, STEPS)
    code, output = _run(halved, cache, *flags, devices=2)
    assert code == 0, output
    stages = ("autoencoder", "diffusion")
    _assert_same_bits(halved, {stage: _arrays(whole, stage) for stage in stages})


def test_adversarial_training_ends_with_the_same_bits(tmp_path, cache):
    """Codebook, discriminator and its running statistics are part of the state."""
    flags = (
        "--config=configs/autoencoder.py:debug_vq",
        f"--config.autoencoder_stage.steps={STEPS}",
        "--config.autoencoder_stage.adversarial.disc_start=3",
        "--config.report.checkpoint_steps=2",
        "--config.report.eval_steps=100",
        "--config.report.image_steps=100",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = _run(whole, cache, flags=flags)
    assert code == 0, output
    for point in ("autoencoder 3/6", "autoencoder 6/6  held-out"):
        code, output = _run(
            killed, cache, flags=flags, stop_at=point, with_signal=signal.SIGKILL
        )
        assert code == -signal.SIGKILL, output
    code, output = _run(killed, cache, flags=flags)
    assert code == 0, output
    # The save of step 4 may still have been under way when the signal came.
    assert re.search(r"going on from step [24] ", output), output
    names = {path.name for path in (killed / "autoencoder" / str(STEPS)).iterdir()}
    assert {"variables", "adversary"} <= names
    _assert_same_bits(killed, {"autoencoder": _arrays(whole, "autoencoder")})
