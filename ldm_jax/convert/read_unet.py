"""Options of UNets and classifiers from the keys and shapes of CompVis' layout.

What shapes can't say comes from the original's arguments where they are given. Where
they are not, heads are guessed: those of a known model of these widths
(`unet_variants.py`); else, for spatial transformers, as Stable Diffusion has them: 8
heads where projections are convolutions, 64 channels a head where they are linear. For
attention without context there is no such habit, and it is an error. Its qkv are taken
to be in the old order.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.nets import encoder_unet, unet, unet_variants

Shapes = Mapping[str, tuple[int, ...]]


def unet_of(shapes: Shapes, config: Mapping[str, Any]) -> unet.UNet:
    """The UNet whose arrays have these shapes; `config` says what they can't."""
    options = _trunk(shapes) | _transformers(shapes) | _label(shapes)
    options["out_channels"] = shapes.get(
        "out.2.weight", shapes["input_blocks.0.0.weight"][1:]
    )[0]
    if "id_predictor.1.weight" in shapes:
        options["n_embed"] = shapes["id_predictor.1.weight"][0]
    options |= _given(config, unet.UNet)
    dims = options.get("context_dim")
    if isinstance(dims, tuple) and "sequential_crossattn" not in config:
        # The original's list of equal widths takes one context for all blocks.
        options["context_dim"] = _one_if_same(dims)
    if options.get("num_heads") is None and options.get("num_head_channels") is None:
        options |= _guessed_heads(options, shapes)
    return unet.UNet(**options)


def classifier_of(
    shapes: Shapes, config: Mapping[str, Any]
) -> encoder_unet.EncoderUNet:
    """The classifier whose arrays have these shapes; `config` says what they can't."""
    given = _given(config, encoder_unet.EncoderUNet)
    options = _trunk(shapes, given)
    options.pop("num_attention_blocks", None)
    options.pop("disable_middle_transformer", None)
    options.pop("dims", None)
    if "out.2.positional_embedding" in shapes:
        options |= {
            "pool": "attention",
            "out_channels": shapes["out.2.c_proj.weight"][0],
            "image_size": math.isqrt(shapes["out.2.positional_embedding"][1])
            * 2 ** (len(options["channel_mult"]) - 1),
        }
    elif len(shapes.get("out.0.weight", ())) == 2:
        last = "out.3.weight" if "out.3.weight" in shapes else "out.2.weight"
        pool = "spatial_v2" if "out.3.weight" in shapes else "spatial"
        options |= {"pool": pool, "out_channels": _shape(shapes, last)[0]}
    else:
        options |= {
            "pool": "adaptive",
            "out_channels": _shape(shapes, "out.3.weight")[0],
        }
    if options["pool"] != "attention":
        given.pop("image_size", None)
    options |= given
    if not {"num_heads", "num_head_channels"} & given.keys():
        if "model_channels" not in given:
            raise UserError(_NO_HEADS)
        options["num_heads"] = 1  # the original's default, where its arguments are all
    return encoder_unet.EncoderUNet(**options)


_NO_HEADS = (
    "the number of heads is not in the weights; give num_heads or num_head_channels, as"
    " in config={'num_heads': 8} or --config.unet.num_heads=8"
)


def frozen(value: Any) -> Any:
    """A list as the tuple that a module's field can be; OmegaConf's lists too."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(frozen(entry) for entry in value) if is_list else value


def _given(config: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The fields of `cls` that `config` has; -1 means not given, as in the original."""
    fields = cls.__dataclass_fields__.keys() - {"name", "parent", "dtype"}
    given = {key: frozen(config[key]) for key in config if key in fields}
    for key in ("num_heads", "num_head_channels", "num_heads_upsample"):
        if given.get(key) == -1:
            del given[key]
    return given


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UserError(f"missing {key}; give the whole state dict of the network")
    return shapes[key]


def _trunk(shapes: Shapes, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Options that show in the blocks; `given` are those that the config has."""
    first = _shape(shapes, "input_blocks.0.0.weight")
    blocks = _numbered(shapes, "input_blocks")
    updown = _resamples_in_blocks(shapes, blocks)
    ends = _ends_of_levels(shapes, blocks, updown, given)
    levels = _split(range(1, max(blocks) + 1), ends)
    mults, depths, attended = [], [], []
    for level in levels:
        res = [n for n in level if n not in ends]
        if not res:
            raise UserError("a level of input_blocks has no res block; give all keys")
        width = _shape(shapes, f"input_blocks.{res[0]}.0.in_layers.2.weight")[0]
        mult = width / first[0]
        mults.append(int(mult) if mult == int(mult) else mult)
        depths.append(len(res))
        attended.append(sum(f"input_blocks.{n}.1.norm.weight" in shapes for n in res))
    embedded = _shape(shapes, "input_blocks.1.0.emb_layers.1.weight")[0]
    width = _shape(shapes, "input_blocks.1.0.in_layers.2.weight")[0]
    options = {
        "in_channels": first[1],
        "model_channels": first[0],
        "dims": len(first) - 2,
        "channel_mult": tuple(mults),
        "num_res_blocks": _one_if_same(depths),
        "attention_resolutions": tuple(2**i for i, k in enumerate(attended) if k),
        "use_scale_shift_norm": embedded == 2 * width,
        "resblock_updown": updown,
        "conv_resample": updown or not ends or any(n in blocks for n in ends),
    }
    in_part = any(k not in (0, d) for k, d in zip(attended, depths, strict=True))
    if in_part or _counts_up(shapes, depths, attended):
        options["num_attention_blocks"] = tuple(attended)
    if "middle_block.1.norm.weight" not in shapes:
        options["disable_middle_transformer"] = True
    return options


def _counts_up(shapes: Shapes, depths: list[int], attended: list[int]) -> bool:
    """Whether a level's last block on the way up has no attention, one before it has.

    So it is where the number of attended blocks was given, even if that is all of them.
    """
    last = -1
    for depth, count in zip(reversed(depths), reversed(attended), strict=True):
        last += depth + 1
        there = f"output_blocks.{last}.0.in_layers.0.weight" in shapes
        if count and there and f"output_blocks.{last}.1.norm.weight" not in shapes:
            return True
    return False


def _numbered(shapes: Shapes, start: str) -> set[int]:
    found = (re.match(rf"{start}\.(\d+)\.", key) for key in shapes)
    return {int(match[1]) for match in found if match}


def _split(blocks: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
    levels = [[]]
    for n in blocks:
        levels[-1].append(n)
        if n in ends:
            levels.append([])
    return levels


def _resamples_in_blocks(shapes: Shapes, blocks: set[int]) -> bool:
    """Whether res blocks do what convolutions or nothing do elsewhere."""
    if any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", key) for key in shapes):
        return True
    if _numbered(shapes, "output_blocks"):
        return False
    plain = any(f"input_blocks.{n}.0.op.weight" in shapes for n in blocks)
    return not plain and blocks == set(range(max(blocks) + 1)) and max(blocks) > 1


def _ends_of_levels(
    shapes: Shapes, blocks: set[int], updown: bool, given: Mapping[str, Any]
) -> list[int]:
    """Which input blocks halve the size."""
    if not updown:
        return [
            n
            for n in range(1, max(blocks) + 1)
            if n not in blocks or f"input_blocks.{n}.0.op.weight" in shapes
        ]
    outputs = sorted(_numbered(shapes, "output_blocks"))
    if not outputs and {"channel_mult", "num_res_blocks"} <= given.keys():
        step = given["num_res_blocks"] + 1
        return list(range(step, step * len(given["channel_mult"]), step))
    if not outputs:
        return _ends_of_equal_levels(shapes, len(blocks))
    doubles = [
        n
        for n in outputs
        if any(f"output_blocks.{n}.{i}.in_layers.0.weight" in shapes for i in (1, 2))
    ]
    ends, n = [], 0
    # A level has one block more on the way up: as many as with its halving block.
    for level in reversed(_split(outputs, doubles)):
        n += len(level)
        ends.append(n)
    return ends[:-1]


def _ends_of_equal_levels(shapes: Shapes, count: int) -> list[int]:
    """Of a classifier, where only widths tell: those of a level are equal."""

    def shape(n):
        return _shape(shapes, f"input_blocks.{n}.0.in_layers.2.weight")[:2]

    fits = []
    for levels in range(1, count):
        if count % levels or count // levels < 2:
            continue
        step = count // levels
        ends = list(range(step, count, step))
        keeps = all(
            shape(n)[0] == shape(n)[1]
            and f"input_blocks.{n}.1.norm.weight" not in shapes
            for n in ends
        )
        changes = {n for n in range(2, count) if shape(n)[0] != shape(n - 1)[0]}
        if keeps and changes <= {n + 1 for n in ends}:
            fits.append(ends)
    if len(fits) != 1:
        raise UserError(
            "the widths don't tell where a level of the classifier ends; give config"
            " with channel_mult and num_res_blocks"
        )
    return fits[0]


def _transformers(shapes: Shapes) -> dict[str, Any]:
    """Options of spatial transformers; none where attention has no context."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for key, shape in shapes.items():
        match = re.match(r"(.*)\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight", key)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = shape
    if not found:
        return _added_kv(shapes)
    trunk = _trunk(shapes)
    depths = trunk["num_res_blocks"]
    count = len(trunk["channel_mult"])
    depths = [depths] * count if isinstance(depths, int) else list(depths)
    middle = found.get("middle_block.1", {})
    longest = max(found.values(), key=len)
    per_level, disabled, n = [], [], 1
    for depth in depths:
        name = f"input_blocks.{n}.1"
        per_level.append(len(found.get(name, {})))
        disabled.append(_sees_context_only(shapes, name))
        n += depth + 1
    last = len(middle) or per_level[-1]
    # The middle has the last level's depth, attended or not.
    known = [d for d in per_level if d] or [last]
    per_level = [d or known[0] for d in per_level[:-1]] + [per_level[-1] or last]
    dims = [longest[i][1] for i in sorted(longest)]
    proj = _shape(shapes, f"{next(iter(found))}.proj_in.weight")
    options = {
        "use_spatial_transformer": True,
        "transformer_depth": _one_if_same(per_level),
        "context_dim": _one_if_same(dims),
        "sequential_crossattn": len(set(dims)) > 1,
        "use_linear_in_transformer": len(proj) == 2,
    }
    if per_level[-1] != last:
        options["transformer_depth_middle"] = last
    if any(disabled):
        options["disable_self_attentions"] = tuple(disabled)
    if _sees_context_only(shapes, "middle_block.1"):
        options["disable_middle_self_attn"] = True
    return options


def _added_kv(shapes: Shapes) -> dict[str, Any]:
    """Options of attention whose keys and values the context joins, if it is such."""
    for key, shape in shapes.items():
        if key.endswith(".encoder_kv.weight"):
            return {"added_kv": True, "context_dim": shape[1]}
    return {}


def _sees_context_only(shapes: Shapes, name: str) -> bool:
    """Whether the first attention is to the context; unseen where widths are equal."""
    first = f"{name}.transformer_blocks.0.attn1"
    key, query = (shapes.get(f"{first}.to_{x}.weight") for x in "kq")
    return key is not None and query is not None and key[1] != query[1]


def _label(shapes: Shapes) -> dict[str, Any]:
    if "cf_param" in shapes:  # Karlo's, of two vectors
        return {"num_classes": "clip", "adm_in_channels": 2 * shapes["cf_param"][-1]}
    if "label_emb.weight" in shapes:
        if "label_emb.bias" in shapes:
            return {"num_classes": "continuous"}
        return {"num_classes": shapes["label_emb.weight"][0]}
    if "label_emb.1.0.weight" in shapes:
        return {"num_classes": "timestep"}
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        return {"num_classes": "sequential", "adm_in_channels": width}
    return {}


def _one_if_same(values: Sequence[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


_SHOWN = ("model_channels", "channel_mult", "use_spatial_transformer", "context_dim")


def _guessed_heads(options: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Heads of a model of this size, else by habit, of which a warning tells."""
    shown = {key: options.get(key) for key in _SHOWN}
    shown["use_spatial_transformer"] = bool(shown["use_spatial_transformer"])
    for variant in unet_variants.VARIANTS.values():
        of_variant = {"use_spatial_transformer": False, "context_dim": None} | variant
        if all(of_variant[key] == value for key, value in shown.items()):
            keys = ("num_heads", "num_head_channels")
            return {key: variant.get(key) for key in keys}
    if not any(key.endswith("norm.weight") for key in shapes):
        return {"num_heads": 1}  # no attention
    widths = [options["model_channels"] * m for m in options["channel_mult"]]
    if not options.get("use_spatial_transformer"):
        raise UserError(_NO_HEADS)
    guess = {"num_heads": 8}
    if options["use_linear_in_transformer"]:
        guess = {"num_head_channels": 64}
    ((name, value),) = guess.items()
    if any(width % value for width in widths):
        raise UserError(_NO_HEADS)
    warnings.warn(
        f"{_NO_HEADS}; taken as Stable Diffusion's: {name}={value}", stacklevel=2
    )
    return guess
