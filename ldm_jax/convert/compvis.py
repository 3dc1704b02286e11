"""CompVis and Stability state dicts (and CLIP's) to this package's parameters.

For every parameter of a net a rule names its torch key and how the array is laid out
there, so that the same rules, read the other way, export. State dicts hold numpy arrays
under unprefixed torch keys (no `model.diffusion_model.` etc.).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import mapped
from ldm_jax.nets import autoencoder, text_encoder, unet


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


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


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


def abstract_params(net: nn.Module, *args, **kwargs) -> dict[str, tuple[int, ...]]:
    """{"path/of/param": shape} of a net, without computing anything."""
    shapes = jax.eval_shape(
        lambda a, k: net.init(jax.random.key(0), *a, **k), args, kwargs
    )
    flat = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def convert(
    state_dict: Mapping[str, np.ndarray],
    plan: Plan,
    *,
    place: Callable[[str, np.ndarray], Any] | None = None,
    missing: list[str] | None = None,
) -> dict[str, Any]:
    """Reads a state dict by a plan; returns nested float32 params.

    One array after the other is read, given to `place(path, array)`, which may put it
    on devices, and let go. A list of `missing` is given the paths that the state dict
    has no arrays for; without one they are an error.

    Raises ValueError that lists, in three groups, the keys which are missing, have
    another shape than the net, or are left over and not `plan.beside`; and says what
    the likely cause is. It is raised before anything is read. So is, later, what is
    not a number.
    """
    unused, absent, misshaped, found = set(state_dict), [], [], []
    for rule in plan.rules:
        if rule.key not in state_dict:
            absent.append(rule)
            continue
        unused.discard(rule.key)
        shape, wanted = np.shape(state_dict[rule.key]), plan.shapes[rule.path]
        if _shape_here(rule, shape) != wanted:
            misshaped.append(
                f"{rule.key} of shape {shape} does not fit {rule.path} of shape"
                f" {wanted}"
            )
        found.append(rule)
    if missing is not None:
        missing += [rule.path for rule in absent]
        absent = []
    lacking = [f"{rule.key} (for {rule.path})" for rule in absent]
    unknown = [key for key in sorted(unused) if not re.fullmatch(plan.beside, key)]
    if lacking or misshaped or unknown:
        raise ValueError(_misfit(len(found), lacking, misshaped, unknown))
    params = {}
    for rule in found:
        value = _array_here(rule, state_dict[rule.key])
        _check_finite(rule.key, state_dict[rule.key], value)
        params[rule.path] = value if place is None else place(rule.path, value)
        mapped.forget(state_dict[rule.key])
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


def _check_finite(key: str, given: np.ndarray, value: np.ndarray) -> None:
    """Raises ValueError for what is not a number, which half precision may hold."""
    # A sum is quick, and finite numbers whose sum is not are looked at again.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(value)) or np.all(np.isfinite(value)):
            return
    count = np.count_nonzero(~np.isfinite(value))
    raise ValueError(
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
        key: np.ascontiguousarray(
            group[0]
            if len(group) == 1
            else np.concatenate([group[i] for i in sorted(group)])
        )
        for key, group in parts.items()
    }


# --- UNet


def _unet_blocks(net: unet.UNet, shapes: Mapping[str, Any]) -> dict[str, str]:
    """{our block: torch's}, e.g. {"down_1_attn_0": "input_blocks.4.1"}."""
    present = {path.split("/")[0] for path in shapes}
    depths, last = net.res_blocks_of_levels(), len(net.channel_mult) - 1
    blocks, n = {"conv_in": "input_blocks.0.0"}, 1
    for level, depth in enumerate(depths):
        for i in range(depth):
            blocks[f"down_{level}_res_{i}"] = f"input_blocks.{n}.0"
            blocks[f"down_{level}_attn_{i}"] = f"input_blocks.{n}.1"
            n += 1
        if level < last:
            conv = "" if net.resblock_updown else ".op"
            blocks[f"down_{level}_downsample"] = f"input_blocks.{n}.0{conv}"
            n += 1
    blocks["mid_res_0"] = "middle_block.0"
    blocks["mid_attn"] = "middle_block.1"
    blocks["mid_res_1"] = "middle_block.2"
    n = 0
    for level in range(last, -1, -1):
        for i in range(depths[level] + 1):
            blocks[f"up_{level}_res_{i}"] = f"output_blocks.{n}.0"
            blocks[f"up_{level}_attn_{i}"] = f"output_blocks.{n}.1"
            n += 1
        # Upsampling comes last in the block: after attention where there is any.
        place = 2 if f"up_{level}_attn_{depths[level]}" in present else 1
        conv = "" if net.resblock_updown else ".conv"
        blocks[f"up_{level}_upsample"] = f"output_blocks.{n - 1}.{place}{conv}"
    return blocks


def unet_rules(net: unet.UNet, shapes: Mapping[str, tuple]) -> Iterator[Rule]:
    """Rules of every parameter of a UNet whose `abstract_params` are `shapes`."""
    label = "label_emb.1" if net.num_classes == "timestep" else "label_emb.0"
    table = _LEAVES | _unet_blocks(net, shapes)
    table |= {
        "time_embed_0": "time_embed.0",
        "time_embed_1": "time_embed.2",
        "label_embed": "label_emb",
        "label_embed_0": f"{label}.0",
        "label_embed_1": f"{label}.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "id_norm": "id_predictor.0",
        "id_out": "id_predictor.1",
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
        "to_out": "to_out.0",
        "ff/ff_in": "ff.net.0.proj",
        "ff/ff_out": "ff.net.2",
    }
    for path, shape in shapes.items():
        names = dict(table)
        inner = re.search(r"/block_(\d+)/", path)
        if inner:  # inside a transformer block norm1, norm2 keep their names
            names |= {f"block_{inner[1]}": f"transformer_blocks.{inner[1]}"}
            names |= {"norm1": "norm1", "norm2": "norm2"}
        if path == "label_embed":
            yield Rule(path, "label_emb.weight", AS_IS)
            continue
        layout = plain_layout(path, len(shape))
        if re.search(r"(proj_in|proj_out|qkv)/kernel$", path):
            if not net.use_spatial_transformer:
                layout = POINTWISE_1D
            elif not net.use_linear_in_transformer:
                layout = POINTWISE_2D
        yield Rule(path, rename(path, names), layout)


def unet_plan(net: unet.UNet) -> Plan:
    """The plan of a UNet."""
    shapes = abstract_params(net, **net.abstract_inputs())
    # A net that predicts codebook ids does not use its noise output.
    beside = r"out\..*" if net.n_embed is not None else ""
    return Plan(list(unet_rules(net, shapes)), shapes, beside)


def unet_params(state_dict: Mapping[str, np.ndarray], net: unet.UNet) -> dict:
    """Params of `net` from a UNet's state dict (`model.diffusion_model.` removed)."""
    return convert(state_dict, unet_plan(net))


# --- autoencoder


def autoencoder_rules(shapes: Mapping[str, tuple]) -> Iterator[Rule]:
    """Rules of every parameter of an autoencoder."""
    table = {
        **_LEAVES,
        "mid_res_0": "mid.block_1",
        "mid_attn": "mid.attn_1",
        "mid_res_1": "mid.block_2",
        "skip": "nin_shortcut",
        "embedding": "embedding.weight",
    }
    for path, shape in shapes.items():
        names = dict(table)
        for word in path.split("/"):
            block = re.fullmatch(r"(down|up)_(\d+)_(res|attn)_(\d+)", word)
            if block:
                way, level, kind, i = block.groups()
                kind = {"res": "block", "attn": "attn"}[kind]
                names[word] = f"{way}.{level}.{kind}.{i}"
            resample = re.fullmatch(r"(down|up)_(\d+)_(downsample|upsample)", word)
            if resample:
                way, level, kind = resample.groups()
                names[word] = f"{way}.{level}.{kind}.conv"
        layout = plain_layout(path, len(shape))
        if layout is LINEAR:  # the attention's 1x1 convolutions
            layout = POINTWISE_2D
        yield Rule(path, rename(path, names), layout)


def autoencoder_plan(net: autoencoder.Autoencoder) -> Plan:
    """The plan of an autoencoder.

    The training loss (`loss.…`: discriminator, LPIPS, logvar) and the EMA copy that a
    checkpoint may carry are left out, and so is the list of a remapped codebook.
    """
    size = 2 ** (len(net.ch_mult) - 1)
    x = jax.ShapeDtypeStruct((1, size, size, net.in_channels), jnp.float32)
    shapes = abstract_params(net, x)
    beside = r"(loss|model_ema)\..*|quantize\.used"
    return Plan(list(autoencoder_rules(shapes)), shapes, beside)


def autoencoder_params(
    state_dict: Mapping[str, np.ndarray], net: autoencoder.Autoencoder
) -> dict:
    """Params of `net` from an autoencoder, `first_stage_model.` removed."""
    return convert(state_dict, autoencoder_plan(net))


# --- text encoders

_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def _text_rules(
    shapes: Mapping[str, tuple], table_of_layer: Callable[[int], Mapping[str, str]]
) -> Iterator[Rule]:
    for path, shape in shapes.items():
        layer = re.match(r"layer_(\d+)/", path)
        table = _LEAVES | table_of_layer(int(layer[1]) if layer else -1)
        yield Rule(path, rename(path, table), plain_layout(path, len(shape)))


def text_transformer_rules(shapes: Mapping[str, tuple]) -> Iterator[Rule]:
    """Rules of LDM's BERT-style encoder, where a block here is two layers."""

    def table(i):
        prefix = "transformer.attn_layers.layers"
        return {
            "token_emb": "transformer.token_emb.weight",
            "pos_emb": "transformer.pos_emb.emb.weight",
            "norm_out": "transformer.norm",
            f"layer_{i}/norm1": f"{prefix}.{2 * i}.0",
            f"layer_{i}/attn": f"{prefix}.{2 * i}.1",
            f"layer_{i}/norm2": f"{prefix}.{2 * i + 1}.0",
            f"layer_{i}/ff_in": f"{prefix}.{2 * i + 1}.1.net.0.0",
            f"layer_{i}/ff_out": f"{prefix}.{2 * i + 1}.1.net.2",
        }

    return _text_rules(shapes, table)


def text_transformer_plan(net: text_encoder.TextTransformer) -> Plan:
    """The plan of LDM's text encoder; to_logits is left out."""
    shapes = abstract_params(net, _TOKENS)
    beside = r"transformer\.to_logits\..*"
    return Plan(list(text_transformer_rules(shapes)), shapes, beside)


def text_transformer_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.TextTransformer
) -> dict:
    """Params of LDM's text encoder (`cond_stage_model.` removed)."""
    return convert(state_dict, text_transformer_plan(net))


_CLIP_TEXT = {
    "token_emb": "text_model.embeddings.token_embedding.weight",
    "pos_emb": "text_model.embeddings.position_embedding.weight",
    "norm_out": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}


def clip_rules(
    shapes: Mapping[str, tuple],
    names: Mapping[str, str] = _CLIP_TEXT,
    layers: str = "text_model.encoder.layers",
) -> Iterator[Rule]:
    """Rules of a CLIP tower in the layout of Hugging Face, by default that of text."""

    def table(i):
        return {
            **names,
            f"layer_{i}": f"{layers}.{i}",
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn": "self_attn",
            "to_q": "q_proj",
            "to_k": "k_proj",
            "to_v": "v_proj",
            "to_out": "out_proj",
            "ff_in": "mlp.fc1",
            "ff_out": "mlp.fc2",
        }

    return _text_rules(shapes, table)


def clip_plan(net: text_encoder.CLIPTextTransformer) -> Plan:
    """The plan of a CLIP text tower in Hugging Face's layout (`text_model.…`)."""
    shapes = abstract_params(net, _TOKENS)
    beside = (
        r"text_model\.embeddings\.position_ids|text_projection\.weight|logit_scale"
        r"|vis(ion|ual)_.*"
        + _unused_norm(r"text_model\.final_layer_norm", net)
        + _unused_block(r"text_model\.encoder\.layers", net)
    )
    return Plan(list(clip_rules(shapes)), shapes, beside)


def clip_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.CLIPTextTransformer
) -> dict:
    """Params of a CLIP text tower from Hugging Face's keys."""
    return convert(state_dict, clip_plan(net))


_OPENCLIP_TEXT = {
    "token_emb": "token_embedding.weight",
    "pos_emb": "positional_embedding",
    "norm_out": "ln_final",
    "text_projection/kernel": "text_projection",
}


def openclip_rules(
    shapes: Mapping[str, tuple],
    names: Mapping[str, str] = _OPENCLIP_TEXT,
    layers: str = "transformer.resblocks",
) -> Iterator[Rule]:
    """Rules of a CLIP tower in the layout of OpenCLIP: q, k, v are one array.

    Its projections are stored as they are here, [in, out].
    """

    def table(i):
        return {
            **names,
            f"layer_{i}": f"{layers}.{i}",
            "norm1": "ln_1",
            "norm2": "ln_2",
            "to_out": "out_proj",
            "ff_in": "mlp.c_fc",
            "ff_out": "mlp.c_proj",
        }

    for rule in _text_rules(shapes, table):
        packed = re.fullmatch(r"(.*)\.to_([qkv])\.(weight|bias)", rule.key)
        if packed:
            key = f"{packed[1]}.in_proj_{packed[3]}"
            rule = rule._replace(key=key, part=("qkv".index(packed[2]), 3))
        if rule.path.endswith("projection/kernel"):
            rule = rule._replace(layout=AS_IS)
        yield rule


def openclip_plan(net: text_encoder.CLIPTextTransformer) -> Plan:
    """The plan of a CLIP text tower in OpenCLIP's layout."""
    shapes = abstract_params(net, _TOKENS)
    beside = (
        r"text_projection|logit_scale|logit_bias|attn_mask|visual\..*"
        + _unused_norm("ln_final", net)
        + _unused_block(r"transformer\.resblocks", net)
    )
    return Plan(list(openclip_rules(shapes)), shapes, beside)


def openclip_params(
    state_dict: Mapping[str, np.ndarray], net: text_encoder.CLIPTextTransformer
) -> dict:
    """Params of a CLIP text tower from OpenCLIP's keys."""
    return convert(state_dict, openclip_plan(net))


def _unused_block(prefix: str, net: text_encoder.CLIPTextTransformer) -> str:
    """Pattern for the last block where the net stops before it."""
    unused = range(net.blocks, net.depth)
    return "".join(rf"|{prefix}\.{i}\..*" for i in unused)


def _unused_norm(prefix: str, net: text_encoder.CLIPTextTransformer) -> str:
    """Pattern for the last norm where the net leaves it out."""
    return "" if net.final_norm else rf"|{prefix}\..*"
