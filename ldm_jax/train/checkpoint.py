"""Checkpoints: the only module that knows orbax. Imports no TensorFlow.

One checkpoint is a step folder with the trees of a `TrainState`, each an item, and
`meta` (JSON: counters, statistics, versions, and a fingerprint of every array). Orbax
writes to a temporary folder and renames it when all is there, so a half-written one
never counts; the fingerprints find one that was damaged later.
"""

import contextlib
import errno
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from ldm_jax.config import UserError
from ldm_jax.train.state import TrainState, create

log = logging.getLogger(__name__)

TREES = ("params", "opt_state", "ema", "variables", "adversary")

# What the system says when no more can be written: disk, quota, limit on file size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DamagedError(Exception):
    """A checkpoint whose files are there but don't hold what was saved."""


class DiskFullError(UserError):
    """A disk without room for a checkpoint."""


def _leaf_fingerprint(x: jax.Array) -> jax.Array:
    bits = (
        jax.lax.bitcast_convert_type(
            x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        )
        .reshape(-1)
        .astype(jnp.uint32)
    )
    # Mixed first, so that two flips of one bit don't cancel; weighted by position, so
    # that swapped values show.
    bits = bits * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA6B)
    place = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum((bits ^ (bits >> 13)) * place, dtype=jnp.uint32)


@jax.jit
def _fingerprints(tree: Any) -> list[jax.Array]:
    return [_leaf_fingerprint(leaf) for leaf in jax.tree.leaves(tree)]


def fingerprint(tree: Any) -> list[int]:
    """One number per array that changes when any bit of it does; computed in place."""
    return [int(x) for x in jax.device_get(_fingerprints(tree))]


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {name: getattr(state, name) for name in TREES}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


class Checkpoints:
    """The checkpoints of one stage, in one folder."""

    def __init__(self, folder: pathlib.Path, max_to_keep: int | None = None):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            cleanup_tmp_directories=True,
            create=False,
        )
        self._manager = None
        self._options = options

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Made on first use: a run that only reads must not write."""
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        names = [entry.name for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing `state`; returns once the arrays may change."""
        step, trees = int(state.step), _trees(state)
        self._check_space(trees)
        prints = {name: fingerprint(tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        facts = {"skipped": int(state.skipped), "fingerprints": prints}
        items["meta"] = ocp.args.JsonSave({**meta, **facts})
        with _disk_errors(self.folder):
            if step in self.steps():  # damaged: a sound one would have been restored
                self.manager.wait_until_finished()
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _check_space(self, trees: Any) -> None:
        need = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise DiskFullError(
                f"--workdir: {self.folder} has {free / 1e6:.0f} MB free and a"
                f" checkpoint needs {need / 1e6:.0f} MB; free some space or lower"
                " report.max_to_keep, then run the same command to go on"
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        if self._manager is not None:
            with _disk_errors(self.folder):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writes under way and lets the folder go."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with `step`."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def finished(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        steps = self.steps()
        try:
            return bool(steps) and self.read_meta(steps[0])["complete"]
        except DamagedError:
            return False

    def restore_tree(self, step: int, name: str, abstract: Any, prints: list[int]):
        """One tree of `step` onto the shardings of `abstract`; checks every array."""
        args = {name: ocp.args.StandardRestore(abstract)}
        tree = self._restore(step, args)[name]
        if fingerprint(tree) != prints:
            raise DamagedError(f"{name} is not what was saved")
        return tree

    def _restore(self, step: int, args: dict[str, Any]) -> dict[str, Any]:
        try:
            # It sets the last two by itself, but then says so every time.
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0
            )
            with ocp.CheckpointManager(self.folder, options=options) as manager:
                restored = manager.restore(step, args=ocp.args.Composite(**args))
                return dict(restored.items())
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        # What a damaged file raises depends on which one it is and on the storage;
        # orbax makes some of it a bare Exception.
        except Exception as error:
            lines = str(error.__cause__ or error).splitlines()
            raise DamagedError(lines[0] if lines else repr(error)) from error

    def restore_newest(
        self, abstract: TrainState
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest sound checkpoint as (state, meta); None where there is none yet.

        A damaged one is skipped, with a warning that says so. Raises UserError where
        every checkpoint is damaged: training from scratch over it would hide the loss.
        """
        steps = self.steps()
        for step in steps:
            try:
                meta = self.read_meta(step)
                prints = meta["fingerprints"]
                if "opt_state" not in prints:  # of `save_params`
                    raise UserError(
                        f"--workdir: {self.folder} holds params without an optimizer's"
                        " state; choose another --workdir, and finetune them there with"
                        f" --config.init_from={self.folder.parent}"
                    )
                trees = {
                    name: self.restore_tree(step, name, tree, prints[name])
                    for name, tree in _trees(abstract).items()
                }
            except DamagedError as error:
                log.warning(
                    "checkpoint %s is damaged (%s); going back to the one before it",
                    self.folder / str(step),
                    error,
                )
                continue
            counters = {"step": step, "skipped": meta["skipped"]}
            counters = {k: jnp.asarray(v, jnp.int32) for k, v in counters.items()}
            return abstract.replace(**counters, **trees), meta
        if steps:
            raise UserError(
                f"--workdir: all checkpoints in {self.folder} are damaged (steps"
                f" {', '.join(map(str, steps))}); restore one from a copy, or delete"
                " the folder to train this stage again"
            )
        return None

    def load_averaged(self, abstract_params: Any) -> tuple[Any, dict[str, Any]]:
        """EMA (or, without one, raw) params of the newest sound checkpoint, and meta.

        Reads nothing else, so it needs no optimizer's memory.
        """
        for step in self.steps():
            try:
                meta = self.read_meta(step)
                prints = meta["fingerprints"]
                name = "ema" if "ema" in prints else "params"
                return self.restore_tree(
                    step, name, abstract_params, prints[name]
                ), meta
            except DamagedError as error:
                log.warning(
                    "checkpoint %s is damaged (%s); going back to the one before it",
                    self.folder / str(step),
                    error,
                )
        raise UserError(
            f"--workdir: no sound checkpoint in {self.folder}; train this stage first:"
            " python -m ldm_jax.train --config=… --workdir=…"
        )


def save_params(folder: pathlib.Path, params: Any, step: int, **facts: Any) -> None:
    """Writes params that have no optimizer as the last checkpoint of a stage."""
    state = create(params, optax.identity(), ema_decay=0.0)
    state = state.replace(step=jnp.asarray(step, jnp.int32))
    saved = Checkpoints(folder)
    saved.save(state, {"step": step, "complete": True} | facts)
    saved.close()


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path):
    """Turns a full disk, also where orbax wraps it, into one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            full = isinstance(cause, OSError) and cause.errno in _FULL
            # TensorStore raises a ValueError with the system's words in it.
            if full or any(os.strerror(n) in str(cause) for n in _FULL):
                raise DiskFullError(
                    f"--workdir: the disk of {folder} is full; what was saved before"
                    " is intact: free some space, then run the same command to go on"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def single_device(tree: Any) -> Any:
    """`tree` of abstract arrays placed on one device of this process."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return placed(tree, jax.tree.map(lambda _: device, tree))


def placed(tree: Any, shardings: Any) -> Any:
    """`tree` of abstract arrays placed as a tree of `shardings` says."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
