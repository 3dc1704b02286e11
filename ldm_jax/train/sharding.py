"""The mesh, and where each parameter and each batch row lives on it.

Nets know nothing of this. A parameter's path is matched against `RULES`; where none
fits, its largest divisible dimension goes over `fsdp`; what is small or indivisible is
replicated. Optimizer state and EMA have the parameters' paths, and so their places.
"""

import re
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.config import UserError

AXES = ("data", "fsdp", "tensor")

# Megatron's split of a transformer: heads and the hidden layer over `tensor`.
RULES = (
    (r"(to_q|to_k|to_v)/kernel$", P("fsdp", "tensor")),
    (r"to_out/kernel$", P("tensor", "fsdp")),
    (r"(ff_in|proj)/kernel$", P("fsdp", "tensor")),
    (r"ff_out/kernel$", P("tensor", "fsdp")),
    (r"token_emb(edding)?$", P("tensor", "fsdp")),
)

# Below this many elements a gather costs more than the memory that it saves.
MIN_SHARDED_SIZE = 2**16


def make_mesh(section: ml_collections.ConfigDict) -> Mesh:
    """The mesh of `config.mesh`: sizes of data, fsdp, tensor; one may be -1 (the rest).

    With several slices (`dcn_data` > 1) the data axis spans them over the network.
    """
    devices = jax.devices()
    sizes = [section[axis] for axis in AXES]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or known < 1 or len(devices) % known:
        shape = ", ".join(f"{axis}={section[axis]}" for axis in AXES)
        raise UserError(
            f"mesh: {shape} does not fit {len(devices)} devices; their product must be"
            f" {len(devices)}, and one of them may be -1 for the rest"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh: {sizes} uses {int(np.prod(sizes))} of {len(devices)} devices; set"
            " mesh.data=-1 to use all"
        )
    if section.dcn_data > 1:
        inner = [sizes[0] // section.dcn_data, *sizes[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, [section.dcn_data, 1, 1], devices
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp together."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def check_batch_size(field: str, batch_size: int, mesh: Mesh, micro: int = 1) -> None:
    """Raises UserError where a batch can't be cut evenly over the devices."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * micro
    if batch_size % rows:
        near = batch_size // rows * rows or rows
        what = f"{rows // micro} devices" + (f" x {micro} micro-batches" * (micro > 1))
        raise UserError(
            f"{field}: {batch_size} is not divisible by {what}; use {near} or"
            f" {near + rows}, or another mesh.data, mesh.fsdp"
        )


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The places of one parameter: the first rule that fits, else FSDP by shape."""
    if int(np.prod(shape, dtype=np.int64)) < MIN_SHARDED_SIZE:
        return P()
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(shape) == len(spec):
            parts = [
                axis if dim % mesh.shape[axis] == 0 else None
                for axis, dim in zip(spec, shape, strict=True)
            ]
            return P(*parts)
    fsdp = mesh.shape["fsdp"]
    for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
        if shape[dim] % fsdp == 0:
            return P(*("fsdp" if d == dim else None for d in range(len(shape))))
    return P()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of (abstract) arrays, by path and shape."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def unsharded(tree: Any, mesh: Mesh) -> list[str]:
    """Paths of large parameters that ended up replicated although fsdp > 1."""
    if mesh.shape["fsdp"] == 1:
        return []
    shardings = jax.tree_util.tree_leaves(tree_shardings(tree, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), sharding in zip(leaves, shardings, strict=True)
        if leaf.size >= MIN_SHARDED_SIZE and sharding.is_fully_replicated
    ]
