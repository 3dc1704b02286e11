"""How a net's parameters lie in a state dict of torch, as rules that go both ways.

For every parameter of a net a rule names its torch key and how the array is laid out
there, so that the same rules, read the other way, export. State dicts hold numpy arrays
under unprefixed torch keys (no `model.diffusion_model.` etc.).
"""

import concurrent.futures
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import numpy as np

from ldm_jax.convert import mapped

# (path of a parameter, its array, which may lie in a file) -> what is kept of it
Place = Callable[[str, np.ndarray], Any]


class UnsoundError(ValueError):
    """An array that holds what is no number."""


class Layout(NamedTuple):
    """How torch stores an array: both directions, inverse to each other."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


AS_IS = Layout(lambda a: a, lambda a: a)
LINEAR = Layout(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Layout(  # [out, in, *spatial] <-> [*spatial, in, out]
    lambda a: np.moveaxis(a, (0, 1), (-1, -2)),
    lambda a: np.moveaxis(a, (-1, -2), (0, 1)),
)
# A 1-wide convolution over tokens or pixels that is a dense layer here.
POINTWISE_1D = Layout(lambda a: a[..., 0].T, lambda a: a.T[..., None])
POINTWISE_2D = Layout(lambda a: a[..., 0, 0].T, lambda a: a.T[..., None, None])


class Rule(NamedTuple):
    """One parameter: its path here, its torch key, its layout there.

    Where torch packs several parameters in one array, each is `part` (index, count) of
    its first axis.
    """

    path: str
    key: str
    layout: Layout
    part: tuple[int, int] | None = None


class Plan(NamedTuple):
    """How a net's parameters lie in a state dict; `shapes` are `abstract_params`."""

    rules: list[Rule]
    shapes: Mapping[str, tuple[int, ...]]
    beside: str = ""  # pattern of keys that are nothing to the net


_AT_ONCE = 2  # arrays; more would be in memory besides what stays
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def rename(path: str, table: Mapping[str, str]) -> str:
    """Translates the dotted parts of `path`, the longest runs that `table` knows."""
    words, parts = path.split("/"), []
    while words:
        for length in range(len(words), 0, -1):
            known = table.get("/".join(words[:length]))
            if known is not None:
                break
        else:
            length, known = 1, words[0]
        parts.append(known)
        words = words[length:]
    return ".".join(part for part in parts if part)


def plain_layout(path: str, ndim: int) -> Layout:
    if not path.endswith("/kernel"):
        return AS_IS
    return LINEAR if ndim == 2 else CONV


def plain_rules(
    shapes: Mapping[str, tuple[int, ...]], table: Mapping[str, str]
) -> Iterator[Rule]:
    """A rule of every param, in torch's usual layout, under what `table` calls it."""
    for path, shape in shapes.items():
        key = rename(path, LEAVES | table)
        yield Rule(path, key, plain_layout(path, len(shape)))


def abstract_params(net: nn.Module, *args, **kwargs) -> dict[str, tuple[int, ...]]:
    """{"path/of/param": shape} of a net, without computing anything.

    `args` are arrays or their shapes. A net is traced once: of a real UNet that takes a
    second, and one import asks several times.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    given = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    try:
        hash(net)
    except TypeError:  # of lists among its options
        return _abstract_params.__wrapped__(net, tree, given)
    return dict(_abstract_params(net, tree, given))


@functools.lru_cache(maxsize=64)
def _abstract_params(net, tree, given) -> dict[str, tuple[int, ...]]:
    leaves = [jax.ShapeDtypeStruct(*shape) for shape in given]
    args, kwargs = jax.tree.unflatten(tree, leaves)
    shapes = jax.eval_shape(
        lambda a, k: net.init(jax.random.key(0), *a, **k), args, kwargs
    )
    flat = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def convert(
    state_dict: Mapping[str, np.ndarray],
    plan: Plan,
    *,
    place: Place = lambda path, x: x,
) -> dict[str, Any]:
    """Reads a state dict by a plan; returns nested float32 params.

    Array after array is read, given to `place` with its path, and let go; two at a
    time, so that one is read while the other is laid out.

    Raises ValueError that lists, in three groups, the keys which are missing, have
    another shape than the net, or are left over and not `plan.beside`; and says what
    the likely cause is. That is before anything is read; after that, UnsoundError for
    what is infinite or NaN.
    """
    unused, missing, misshaped, found = set(state_dict), [], [], []
    for rule in plan.rules:
        if rule.key not in state_dict:
            missing.append(f"{rule.key} (for {rule.path})")
            continue
        unused.discard(rule.key)
        shape, wanted = np.shape(state_dict[rule.key]), plan.shapes[rule.path]
        if _shape_here(rule, shape) != wanted:
            misshaped.append(
                f"{rule.key} of shape {shape} does not fit {rule.path} of shape"
                f" {wanted}"
            )
        found.append(rule)
    unknown = [key for key in sorted(unused) if not re.fullmatch(plan.beside, key)]
    if missing or misshaped or unknown:
        raise ValueError(_misfit(len(found), missing, misshaped, unknown))

    def read(rule):
        value = _array_here(rule, state_dict[rule.key])
        check_finite(rule.key, state_dict[rule.key], value)
        placed = place(rule.path, value)
        mapped.forget(state_dict[rule.key])
        return placed

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        values = pool.map(read, found)
        params = {rule.path: v for rule, v in zip(found, values, strict=True)}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _array_here(rule: Rule, array: np.ndarray) -> np.ndarray:
    """What a rule makes of torch's array, in float32; a view where it can be."""
    array = np.asarray(array, np.float32)
    if rule.part is not None:
        index, count = rule.part
        array = np.split(array, count)[index]
    return rule.layout.to_flax(array)


def _shape_here(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a rule makes of torch's; None where it can make nothing of it."""
    try:
        return _array_here(rule, np.broadcast_to(np.float32(0), shape)).shape
    except (IndexError, ValueError):  # too few axes, or not to be split
        return None


def check_finite(key: str, given: np.ndarray, value: np.ndarray) -> None:
    """Raises UnsoundError for what is no number, which half precision may hold."""
    # A sum is quick, and finite numbers whose sum is not are looked at again.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(value)) or np.all(np.isfinite(value)):
            return
    count = np.count_nonzero(~np.isfinite(value))
    raise UnsoundError(
        f"{key} ({given.dtype}) has {count} of {value.size} numbers that are infinite"
        " or NaN; take a sound file, in float32 if this was made by halving one"
    )


_LISTED = 8  # keys of a group; hundreds would hide the cause


def _misfit(found: int, missing: list, misshaped: list, unknown: list) -> str:
    """One line: the three groups, and what they have most likely come of."""
    if missing and not found:
        cause = "another network, key layout or prefix"
    elif misshaped:
        cause = "other widths than the config's"
    elif missing and unknown:
        cause = "other options than the config's, or other names of the same"
    elif missing:
        cause = "a part of the network alone, or fewer blocks than the config's"
    else:
        cause = "more blocks than the config's, or what a trainer added"
    groups = (("missing ", missing), ("", misshaped), ("unknown ", unknown))
    listed = [
        f"{word}{', '.join(group[:_LISTED])}"
        + (f" and {len(group) - _LISTED} more" if len(group) > _LISTED else "")
        for word, group in groups
        if group
    ]
    return (
        f"state dict does not fit the net: {'; '.join(listed)} (likely cause: {cause})"
    )


def revert(params: Mapping[str, Any], rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """The inverse of `convert`: nested params to a state dict of float32 arrays."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for rule in rules:
        if rule.path not in flat:
            raise ValueError(f"the variables have no {rule.path} for {rule.key}")
        value = np.asarray(flat[rule.path])
        if np.issubdtype(value.dtype, np.floating) or value.dtype.kind == "V":
            value = value.astype(np.float32)
        index = rule.part[0] if rule.part else 0
        parts.setdefault(rule.key, {})[index] = rule.layout.to_torch(value)
    return {
        key: np.asarray(  # contiguous; ascontiguousarray would give numbers an axis
            group[0]
            if len(group) == 1
            else np.concatenate([group[i] for i in sorted(group)]),
            order="C",
        )
        for key, group in parts.items()
    }
