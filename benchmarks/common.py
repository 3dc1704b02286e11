"""What the benchmarks share: the machine in one line, a preset's nets, medians."""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.conditioning import tokenizers

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
LOAD = os.getloadavg()[0]  # what others did when this began


def environment(*packages: str) -> str:
    """Cores, memory, devices, load and versions: what a figure must be read with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in ("jax", *packages)]
    return (
        f"{cores or os.cpu_count()} cores, {memory:.0f} GiB, {len(jax.devices())} x"
        f" {jax.devices()[0].device_kind}, load {LOAD:.1f} before;"
        f" {', '.join(versions)}"
    )


def load(spec: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    """A config whose text nets have their full vocabulary, whatever the tokenizer."""
    config = config_lib.load(
        spec, [word.removeprefix("--config.") for word in overrides]
    )
    texts = [s for s in config.conditioners.values() if "tokenizer" in s]
    for section in texts:
        size = section.tokenizer.train_vocab_size or 49408  # CLIP's
        with section.net.unlocked():
            section.net.vocab_size = size
    return config


def build(config: ml_collections.ConfigDict) -> model_lib.LatentDiffusion:
    """The nets of a config behind a tokenizer of three words; nothing is downloaded."""
    tokenizer = tokenizers.train_wordpiece(["a red circle"], 64)
    return model_lib.build(config, dict.fromkeys(config.conditioners, tokenizer))


def first_stage(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion
) -> first_stage_lib.FirstStage:
    """An untrained first stage with unit statistics."""
    key = jax.random.key(0)
    params, _ = model_lib.init_autoencoder(config, model.autoencoder, key)
    c = model.latent_shape[-1]
    return first_stage_lib.FirstStage(
        params["autoencoder"], jnp.zeros([c]), jnp.ones([c])
    )


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call whose result is waited for."""
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def interleaved(
    calls: dict[str, Callable[[], Any]], repetitions: int
) -> dict[str, float]:
    """Median seconds of each call; turn by turn, so that all see the same machine.

    One round before the first that counts warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions + 1):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def default_config() -> str:
    """The preset that the README trains, found from wherever this is run."""
    path = pathlib.Path(__file__).resolve().parents[1] / "configs" / "txt2img.py"
    return os.path.relpath(path)
