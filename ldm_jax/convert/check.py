"""Our nets beside those of torch, block by block, on equal inputs.

Weights go there by `networks.export_network`. A block's counterpart is the module under
which all of its parameters are, by the rules of the export. Needs torch, only while it
runs.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import networks, plans, references

Variables = Mapping[str, Any]


class Row(NamedTuple):
    """A block's output, ours less theirs; `std` is the spread of theirs."""

    block: str
    max_difference: float
    mean_difference: float
    std: float


def compare(
    net: nn.Module,
    variables: Variables,
    *,
    state_dict: references.State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of a net, in the order in which it computes.

    UNets, autoencoders (encoder, then decoder), text encoders, picture and depth
    towers, the prior, class embedders, rescalers. Theirs takes `state_dict`, in its own
    keys, such as the file that `variables` came from; else their export. Inputs are
    random. UserError where torch, diffusers or transformers is missing, or has no such
    net.
    """
    reference = references.of(net, variables["params"], seed)
    layout, params = reference.layout, reference.params
    state = state_dict or networks.export_network(
        reference.net, {"params": params}, layout
    )
    _load(reference.theirs, reference.complete(state), reference.spare)
    modules = _modules(networks.plan_of(reference.net, layout, params).rules)
    blocks = {module: b for b, module in modules.items() if b not in reference.unlike}
    rows = []
    for call in reference.calls:
        here = _ours(net, variables, modules, call.method, *call.args)
        there = _theirs(reference.theirs, blocks, call.theirs)
        rows += [
            _row(block, here[block], out)  # theirs sets the order
            for block, out in there.items()
            if block in here
        ]
    return rows


def _row(block: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    """`theirs` may lack an axis of length 1."""
    difference = np.abs(np.asarray(ours, np.float32) - theirs.reshape(ours.shape))
    numbers = difference.max(), difference.mean(), theirs.std()
    return Row(block, *map(float, numbers))


def _modules(rules: Iterable[plans.Rule]) -> dict[str, str]:
    """{our block: their module}; blocks of an autoencoder are those of its halves."""
    keys: dict[str, list[list[str]]] = {}
    for rule in rules:
        words = rule.path.split("/")
        length = 2 if words[0] in ("encoder", "decoder") else 1
        if len(words) > length:  # else a parameter that is in no block
            block = "/".join(words[:length])
            keys.setdefault(block, []).append(rule.key.split(".")[:-1])
    return {block: ".".join(os.path.commonprefix(k)) for block, k in keys.items()}


def _ours(
    net: nn.Module, variables: Variables, blocks: Iterable[str], method: str, *args: Any
) -> dict[str, np.ndarray]:
    """{block: its output}, in float32."""
    blocks = set(blocks)
    if hasattr(net, "dtype"):
        net = net.clone(dtype=jnp.float32)

    def keep(module, name):
        return name == "__call__" and "/".join(module.path) in blocks

    @jax.jit
    def run(variables, *args):
        _, state = net.apply(
            variables,
            *args,
            method=method,
            capture_intermediates=keep,
            mutable=["intermediates"],
        )
        return state["intermediates"]

    kept = flax.traverse_util.flatten_dict(run(variables, *args), sep="/")
    outs = {k.removesuffix("/__call__"): out for k, (out,) in kept.items()}
    return {k: np.asarray(out) for k, out in outs.items() if hasattr(out, "shape")}


def _theirs(model: Any, blocks: Mapping[str, str], run: Callable[[], Any]):
    """{block: its output} of the modules {name: block}, channels last."""
    import torch

    found: dict[str, np.ndarray] = {}

    def hook(block):
        def keep(module, args, out):
            out = out if torch.is_tensor(out) else out[0]
            found[block] = np.moveaxis(out.numpy(), 1, -1 if out.ndim == 4 else 1)

        return keep

    bare = _is_bare(model)
    handles = []
    for name, block in blocks.items():
        name = _bare(name) if bare else name
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.ModuleList):  # which is never called itself
            module = model.get_submodule(name.rpartition(".")[0])
        handles.append(module.register_forward_hook(hook(block)))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def _load(model: Any, state: references.State, spare: str = "") -> None:
    """Gives `model` its arrays out of `state`, which may hold more.

    Those whose whole key has the pattern `spare` keep their values where it has none.
    """
    import torch

    own = model.state_dict()
    kept = {k: v.numpy() for k, v in own.items() if re.fullmatch(spare, k)}
    state = {**kept, **state}
    if _is_bare(model):
        state = {_bare(key): value for key, value in state.items()}
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise UserError(
            f"state_dict: {len(missing)} arrays of a {type(model).__name__} are not in"
            f" it, such as {missing[0]}; give the whole file"
        )
    tensors = {key: torch.from_numpy(np.require(state[key], None, "CW")) for key in own}
    model.load_state_dict(tensors, assign=True)
    model.eval()


def _is_bare(model: Any) -> bool:
    """Whether a text tower's keys are without the name that others have them under."""
    return "embeddings.token_embedding.weight" in model.state_dict()


def _bare(key: str) -> str:
    return key.removeprefix("text_model.")
