"""Factors of low rank in the layouts of diffusers (PEFT) and kohya, and back.

Here a kernel [..., in, out] has the factors a [..., in, rank] and b [rank, out] that
`ldm_jax.lora` trains; there its module has two small layers, which lie in torch as the
module's own kernel does. So their names and layouts come from the rules of the nets: a
UNet, or CLIP's text tower, which a file may have factors of too. Where q, k and v are
one kernel here and three modules there, b is their three side by side.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import flax
import jax.numpy as jnp
import numpy as np
import safetensors

from ldm_jax.config import UserError
from ldm_jax.convert import files, networks, plans
from ldm_jax.nets import text_encoder
from ldm_jax.nets import unet as unet_lib

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config, as JSON
_KEYS = (
    re.compile(r"(.+)\.(lora_A|lora_B)(?:\.default\w*)?\.weight"),  # PEFT
    re.compile(r"(.+)\.lora(?:_linear_layer)?[._](down|up)\.weight"),  # …0.20; kohya
    re.compile(r"(.+)_lora\.(down|up)\.weight"),  # processors, diffusers to 0.17
    re.compile(r"(.+)\.(alpha)"),
)
# What is no product of two factors: how its keys show, what it is.
_OTHER_KINDS = {
    r"lora_magnitude_vector|dora_scale": "DoRA, which scales the kernel's columns too",
    r"hada_w\d": "LoHa, a product of two products",
    r"lokr_w\d": "LoKr, a Kronecker product",
    r"lora_mid": "LoCon with a third factor (Tucker)",
    r"oft_|boft_": "OFT, which turns the kernel",
    r"on_input|ia3_": "IA3, which scales activations",
}
# As PEFT's `save_pretrained` writes a folder.
_FOLDER = ("adapter_model.safetensors", "adapter_model.bin")
_FOLDER_CONFIG = "adapter_config.json"
_PART = {"lora_A": "a", "down": "a", "lora_B": "b", "up": "b", "alpha": "alpha"}
# Of a text tower; those of a second one, which Stable Diffusion has not.
_TEXT = re.compile(
    r"(base_model\.model\.)?(text_encoder\.|lora_te1?_|text_model\.|encoder\.layers)"
)
_SECOND = ("text_encoder_2.", "lora_te2_")

Net = unet_lib.UNet | text_encoder.CLIPTextTransformer


class Lora(NamedTuple):
    """What a LoRA's file or state dict holds: arrays, and PEFT's config as written."""

    state: Mapping[str, Any]
    told: Mapping[str, Any] = {}
    path: pathlib.Path | None = None

    @property
    def nets(self) -> set[str]:
        """Which of "unet", "text_encoder" and "text_encoder_2" it has factors of."""

        def net_of(key):
            if key.startswith(_SECOND):
                return "text_encoder_2"
            return "text_encoder" if _TEXT.match(key) else "unet"

        return {net_of(key) for key in self.state}


class _Module(NamedTuple):
    """A module of torch: its kernel here, and how its two layers lie there."""

    key: str
    path: str
    a: plans.Layout
    b: plans.Layout
    third: int | None = None  # which of q, k and v, where one kernel is all three


def export_lora(
    net: Net, factors: Mapping[str, Any], rank: int, alpha: float
) -> dict[str, np.ndarray]:
    """Factors of a net under diffusers' keys, `unet.….lora_A.weight` and `lora_B`.

    Those of CLIP's text tower begin with `text_encoder.`. `factors` are nested like the
    net's params, each kernel {"a", "b"}. Readers take a file's rank for its alpha
    unless metadata say otherwise, so alpha / rank goes into lora_B (exactly where it is
    a power of two). UserError in one line where diffusers has no such net, or a kernel
    is not the net's.
    """
    modules: dict[str, list[_Module]] = {}
    for module in _modules(*_plans(net)[-1][:2]):
        modules.setdefault(module.path, []).append(module)
    state = {}
    for path, (a, b) in sorted(_pairs(factors).items()):
        if path not in modules:
            raise UserError(
                f"factors: {_called(net)} has no {path}; give those of this net"
            )
        if a.shape[-1] != rank or b.shape[0] != rank:
            raise UserError(
                f"rank: {rank}, but {path} has factors {a.shape} and {b.shape}; give"
                " their rank"
            )
        b = b if alpha == rank else b * np.float32(alpha / rank)
        for module in modules[path]:
            there = module.b.to_torch(b)
            if module.third is not None:
                there = np.split(there[..., 0], 3)[module.third]
            name = f"{'text_encoder' if _is_text(net) else 'unet'}.{module.key}"
            state[f"{name}.lora_A.weight"] = np.ascontiguousarray(module.a.to_torch(a))
            state[f"{name}.lora_B.weight"] = np.ascontiguousarray(there)
    return state


def import_lora(
    net: Net, state_dict_or_path: Mapping[str, Any] | str | os.PathLike
) -> tuple[dict[str, Any], int, float]:
    """(factors, rank, alpha) of a net from a LoRA's state dict or a file of one.

    Takes diffusers' keys (today's, `.lora.down.weight`, `.processor.to_q_lora.…`) with
    or without `unet.`, kohya's (`lora_unet_…`, `lora_te_…`, of either naming of
    blocks), and the folder that PEFT's `save_pretrained` makes of a net
    (`base_model.model.…`). What it has of the other kind of net is left alone, see
    `Lora.nets`. An alpha that is neither among the keys nor in a file's metadata is the
    rank. Modules that differ get zeros up to the highest rank and, if their scales do,
    these go into b; else every number is kept. UserError in one line for other keys and
    wrong shapes, what is no number, and for DoRA, LoHa and others that are not the
    product of two factors.
    """
    option = "state_dict_or_path"
    return factors_of(net, read(state_dict_or_path, option), option)


def factors_of(net: Net, lora: Lora, option: str) -> tuple[dict[str, Any], int, float]:
    """`import_lora` of what was read; UserErrors name `option`."""
    try:
        return _factors_of(net, lora)
    except UserError as error:
        where = f"{option}: {lora.path}" if lora.path else option
        raise UserError(f"{where}: {error}") from error


def _factors_of(net: Net, lora: Lora) -> tuple[dict[str, Any], int, float]:
    metadata = _config_of(net, lora.told)
    modules = _known(net)
    found: dict[str, dict[str, np.ndarray]] = {}
    named: dict[str, _Module] = {}
    for key, value in lora.state.items():
        if key.startswith(_SECOND) or bool(_TEXT.match(key)) != _is_text(net):
            continue
        name, part = _parsed(key)
        module = modules.get(name)
        if module is None:
            raise UserError(
                f"{key}: of shape {np.shape(value)}, but {_called(net)} has no such"
                " module; give a LoRA of this net's kind"
            )
        named[name] = module
        value = networks.as_array(value)
        value = value if part == "alpha" else _factor(key, value)
        found.setdefault(name, {})[part] = value
    if not found:
        what = _called(net).replace("the ", "a ")
        raise UserError(f"it has no factors of {what}; give a LoRA")
    kernels: dict[str, list[tuple]] = {}
    shapes = _plans(net)[0].shapes
    for name, parts in found.items():
        module = named[name]
        entry = _entry(net, name, module, parts, metadata, shapes)
        group = kernels.setdefault(module.path, [])
        if any(module.third == other.third for other, *_ in group):
            raise UserError(
                f"{name}: factors of {module.path} are there twice; keep one"
            )
        group.append(entry)
    joined = {path: _joined(group) for path, group in kernels.items()}
    return _uniform(joined)


# --- modules


def _modules(
    rules: Iterable[plans.Rule], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[_Module]:
    for rule in rules:
        if not rule.path.endswith("/kernel"):
            continue
        key, layout = rule.key.removesuffix(".weight"), rule.layout
        if "attentions." in key and key.endswith(".qkv"):
            for i, x in enumerate("qkv"):
                name = f"{key.removesuffix('qkv')}to_{x}"
                yield _Module(name, rule.path, plans.LINEAR, layout, i)
            continue
        # The second layer of a convolution is one of a single pixel.
        second = plans.POINTWISE_2D if layout is plans.CONV else layout
        yield _Module(key, rule.path, layout, second)


def _is_text(net: Net) -> bool:
    return isinstance(net, text_encoder.CLIPTextTransformer)


def _called(net: Net) -> str:
    return "the text encoder" if _is_text(net) else "the UNet"


def _plans(net: Net) -> list[plans.Plan]:
    """Of all layouts whose names a file may have; the last is that of diffusers."""
    if _is_text(net):  # which has as many layers there as are run
        net = net.clone(depth=net.blocks, layer="last", final_norm=True)
        return [networks.plan_of(net, "huggingface", {})]
    return [networks.unet_plan(net, layout) for layout in ("compvis", "diffusers")]


def _known(net: Net) -> dict[str, _Module]:
    """Modules by diffusers' names and by CompVis's, with dots and as kohya has them."""
    known = {}
    for plan in _plans(net):
        for module in _modules(plan.rules, plan.shapes):
            key = module.key
            for name in (key, key.removeprefix("text_model.")):
                known[name] = known[name.replace(".", "_")] = module
    return known


def _parsed(key: str) -> tuple[str, str]:
    """(module, which of its arrays) of a key; UserError if it is none of a LoRA."""
    for sign, kind in _OTHER_KINDS.items():
        if re.search(rf"\.({sign})", key):
            raise UserError(
                f"{key}: it is of {kind}; only LoRA's two factors are read here, so"
                " merge it into a checkpoint and convert that"
            )
    for pattern in _KEYS:
        match = pattern.fullmatch(key)
        if match:
            break
    else:
        raise UserError(
            f"{key}: no key of a LoRA that is known here (lora_A and lora_B, lora.down"
            " and lora.up, lora_down and lora_up, alpha); leave it out"
        )
    name = match[1].removeprefix("base_model.model.")
    name = re.sub(r"^(unet\.|text_encoder\.|lora_unet_|lora_te1?_)", "", name)
    if ".self_attn.to_" in name:  # a text tower's, in diffusers to 0.17
        name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    if ".processor." in name:
        name = re.sub(r"\.processor\.", ".", name)
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    return name, _PART[match[2]]


def _pairs(factors: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    flat = flax.traverse_util.flatten_dict(dict(factors), sep="/")
    flat = {path: np.asarray(value, np.float32) for path, value in flat.items()}
    paths = {path.rpartition("/")[0] for path in flat}
    return {path: (flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths}


def _factor(key: str, value: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(value.dtype, jnp.floating):  # knows bfloat16 too
        raise UserError(f"{key}: of {value.dtype}; give floats")
    factor = value.astype(np.float32)
    try:
        plans.check_finite(key, value, factor)
    except ValueError as error:
        raise UserError(str(error)) from error
    return factor


# --- what a file has


def read(source: Mapping[str, Any] | str | os.PathLike, option: str) -> Lora:
    """A LoRA's file, the folder of PEFT or a state dict; UserErrors name `option`."""
    if not isinstance(source, str | os.PathLike):
        return Lora(files.unwrapped(source))
    path = _file(pathlib.Path(source).expanduser(), option)
    state = files.read(path, option)
    beside, told, where = path.with_name(_FOLDER_CONFIG), None, path
    try:
        if path.name in _FOLDER and beside.is_file():
            told, where = beside.read_text(), beside
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, "np") as file:
                told = (file.metadata() or {}).get(METADATA)
        config = json.loads(told or "{}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option}: what {where} says of its config is no JSON ({error}); save it"
            " anew"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{option}: {where} says {told!r:.60} of its config, which is no dict; save"
            " it anew"
        )
    scaled = told is not None or any(key.endswith(".alpha") for key in state)
    if path.name in _FOLDER and not scaled:
        raise UserError(
            f"{option}: {path} has no {_FOLDER_CONFIG} beside it, which says how"
            " strongly its factors are added; give the whole folder of PEFT's"
            " save_pretrained"
        )
    return Lora(state, config, path)


def _file(path: pathlib.Path, option: str) -> pathlib.Path:
    """The file of factors in a folder of PEFT, or the path as it is."""
    if not path.is_dir():
        return path
    found = [path / name for name in _FOLDER if (path / name).is_file()]
    if not found:
        raise UserError(
            f"{option}: {path} has no {' or '.join(_FOLDER)}; give a LoRA's file, or"
            " the folder of PEFT's save_pretrained"
        )
    return found[0]


def _config_of(net: Net, told: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's config of a net, in which the numbers are numbers."""
    own = "text_encoder." if _is_text(net) else "unet."
    config = {key.removeprefix(own): value for key, value in told.items()}
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"its config has alpha_pattern {patterns!r:.60}; give a dict")
    alphas = {f"alpha_pattern.{key}": value for key, value in patterns.items()}
    if config.get("lora_alpha") is not None:
        alphas["lora_alpha"] = config["lora_alpha"]
    for field, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"its config has {field} {value!r:.60}; give a number")
    for pattern in patterns:
        try:
            _of_modules(pattern)
        except re.error as error:
            raise UserError(
                f"its config has alpha_pattern {pattern!r:.60}, which is no regular"
                f" expression ({error}); mend it"
            ) from error
    return config | {"alpha_pattern": patterns}


def _entry(
    net: Net,
    name: str,
    module: _Module,
    parts: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[_Module, np.ndarray, np.ndarray, Fraction]:
    """(module, a, b, alpha / rank), a as it is here and b too unless it is a third."""
    for part in "ab":
        if part not in parts:
            other = "first" if part == "a" else "second"
            raise UserError(f"{name}: its {other} factor is missing; give a whole file")
    *inner, out = shapes[module.path]
    a, b = parts["a"], parts["b"]
    if module.third is None:
        wide, b_layout = out, module.b
    else:
        wide, b_layout = out // 3, plans.LINEAR
    rank = a.shape[0] if a.ndim else 0
    wanted = {
        "a": module.a.to_torch(np.zeros((*inner, rank), bool)).shape,
        "b": b_layout.to_torch(np.zeros((rank, wide), bool)).shape,
    }
    for part, shape in wanted.items():
        if parts[part].shape != shape or not rank:
            which = "first" if part == "a" else "second"
            raise UserError(
                f"{name}: its {which} factor is of shape {parts[part].shape}, the"
                f" kernel of {_called(net)} takes {shape}; give a LoRA of such widths"
            )
    if "alpha" in parts:
        if parts["alpha"].size != 1:
            raise UserError(
                f"{name}.alpha: of shape {parts['alpha'].shape}; give one number"
            )
        alpha = float(parts["alpha"].reshape(()))
    else:
        alpha = _alpha(module.key, rank, metadata)
    if not math.isfinite(alpha):
        raise UserError(f"{name}: its alpha is {alpha}; give a number")
    return module, module.a.to_flax(a), b_layout.to_flax(b), Fraction(alpha) / rank


def _alpha(key: str, rank: int, metadata: Mapping[str, Any]) -> float:
    """PEFT's alpha of a module; a file without metadata has the rank."""
    alpha = metadata.get("lora_alpha")
    alpha = rank if alpha is None else alpha
    for pattern, value in metadata["alpha_pattern"].items():
        if _of_modules(pattern).match(key):
            alpha = value
            break
    if metadata.get("use_rslora"):  # divides by the root of the rank
        alpha = alpha * math.sqrt(rank)
    return float(alpha)


def _of_modules(pattern: str) -> re.Pattern:
    """What PEFT looks a module up by."""
    return re.compile(rf"(.*\.)?({pattern})$")


# --- one rank, one alpha


def _joined(group: list) -> tuple[np.ndarray, np.ndarray, Fraction]:
    """(a, b, scale) of one kernel, from one module or from q, k and v."""
    module, first, b, scale = group[0]
    if module.third is None:
        return first, b, scale
    if len({own for *_, own in group}) > 1:
        group = [(m, a, _times(b, own), Fraction(1)) for m, a, b, own in group]
        scale = Fraction(1)
    # Ours share one a; those of others are three, each with its own rows of the rank.
    shared = all(np.array_equal(a, first) for _, a, _, _ in group)
    a = first if shared else np.concatenate([a for _, a, _, _ in group], -1)
    wide = b.shape[-1]
    packed, at = np.zeros((3 * wide, a.shape[-1]), np.float32), 0
    for part, own, b, _ in group:
        rank = own.shape[-1]
        packed[part.third * wide : (part.third + 1) * wide, at : at + rank] = b.T
        at += 0 if shared else rank
    return a, module.b.to_flax(packed[..., None]), scale


def _uniform(joined: Mapping[str, tuple]) -> tuple[dict[str, Any], int, float]:
    rank = max(a.shape[-1] for a, _, _ in joined.values())
    scales = {scale for _, _, scale in joined.values()}
    one = scales.pop() if len(scales) == 1 else None
    flat = {}
    for path, (a, b, scale) in joined.items():
        more = rank - a.shape[-1]
        b = b if one is not None else _times(b, scale)
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
        flat[f"{path}/a"] = np.ascontiguousarray(a)
        flat[f"{path}/b"] = np.ascontiguousarray(np.pad(b, [(0, more), (0, 0)]))
    alpha = float(rank * (Fraction(1) if one is None else one))
    return flax.traverse_util.unflatten_dict(flat, sep="/"), rank, alpha


def _times(b: np.ndarray, scale: Fraction) -> np.ndarray:
    return b if scale == 1 else b * np.float32(float(scale))
