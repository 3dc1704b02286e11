"""The keys of diffusers' UNets and autoencoders, named by those of CompVis.

Both have the same blocks in the same order; `Names` translates between them. Where
diffusers has q, k and v apart and CompVis together (attention without context), `pack`
joins them and `unpack` takes them apart.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import compvis, plans
from ldm_jax.nets import autoencoder, unet

_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AUTOENCODER_RES = {"nin_shortcut": "conv_shortcut"}
_AUTOENCODER_ATTN = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
# As diffusers named them before 0.13.
_OLD = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
# Widths of the vectors that SDXL and its refiner take: pooled text and sizes.
SDXL_WIDTHS = (2816, 2560)
# What attention without a transformer around it has in one array in CompVis' layout.
_JOINED = {
    "qkv": ("to_q", "to_k", "to_v"),
    "encoder_kv": ("add_k_proj", "add_v_proj"),
}


class Names:
    """Translates keys by their blocks: [(CompVis's, diffusers', table inside)]."""

    def __init__(self, blocks: list[tuple[str, str, dict[str, str]]]):
        self._there = {b: (a, {v: k for k, v in t.items()}) for a, b, t in blocks}
        self._back = {a: (b, dict(t)) for a, b, t in blocks}

    def to_compvis(self, key: str) -> str:
        """CompVis's name of diffusers' `key`; the same where it has none."""
        return _translate(key, self._there)

    def to_diffusers(self, key: str) -> str:
        """diffusers' name of CompVis's `key`; the same where it has none."""
        return _translate(key, self._back)


def _translate(key, blocks):
    words = key.split(".")
    for length in range(len(words) - 1, 0, -1):
        block = blocks.get(".".join(words[:length]))
        if block is None:
            continue
        name, inside = block
        rest = ".".join(words[length:])
        for end in range(len(words), length, -1):
            inner = ".".join(words[length:end])
            if inner in inside:
                rest = ".".join([inside[inner], *words[end:]])
                break
        return f"{name}.{rest}"
    return key


def unet_names(keys: Mapping[str, tuple[int, ...]]) -> Names:
    """Names of a UNet that has these keys of diffusers, and these shapes."""
    depths = _depths(keys, "down_blocks", "resnets")
    attended = {
        up
        for up, depth in enumerate(reversed(depths))
        if f"up_blocks.{up}.attentions.{depth}.proj_out.weight" in keys
        or f"up_blocks.{up}.attentions.{depth}.to_out.0.weight" in keys
    }
    label, embedding = "class", "class_embedding"
    for name in ("add_embedding", "class_embedding"):
        if f"{name}.linear_1.weight" in keys:
            # A sinusoid of the width of the timestep's is no vector of a condition.
            width = keys[f"{name}.linear_1.weight"][1]
            same = width == keys["time_embedding.linear_1.weight"][1]
            label = "timestep" if same else "sequential"
            embedding = name
    context = any(".transformer_blocks." in key for key in keys)
    updown = any(re.search(r"samplers\.0\.norm1\.", key) for key in keys)
    return _unet_names(depths, attended, updown, context, label, embedding)


def unet_names_of(net: unet.UNet, shapes: Mapping[str, tuple]) -> Names:
    """Names of the keys of `net`, whose `abstract_params` are `shapes`."""
    depths = net.res_blocks_of_levels()
    top = len(depths) - 1
    attended = {
        top - level
        for level, depth in enumerate(depths)
        if any(path.startswith(f"up_{level}_attn_{depth}/") for path in shapes)
    }
    label = net.num_classes if isinstance(net.num_classes, str) else "class"
    sdxl = label == "sequential" and net.adm_in_channels in SDXL_WIDTHS
    return _unet_names(
        depths,
        attended,
        net.resblock_updown,
        net.use_spatial_transformer,
        label,
        "add_embedding" if sdxl else "class_embedding",
    )


def _unet_names(depths, attended, updown, context, label, embedding) -> Names:
    attn = {} if context else {"norm": "group_norm", "proj_out": "to_out.0"}
    blocks = [
        (here, there, _UNET_RES if ".resnets" in there else {})
        for here, there in _UNET.items()
    ]
    blocks.append(("middle_block.1", "mid_block.attentions.0", attn))

    def resample(here, there, conv):
        if updown:
            blocks.append((here, there, _UNET_RES))
        else:
            blocks.append((f"{here}.{conv}", f"{there}.conv", {}))

    n, last = 1, len(depths) - 1
    for level, depth in enumerate(depths):
        there = f"down_blocks.{level}"
        for i in range(depth):
            blocks.append((f"input_blocks.{n}.0", f"{there}.resnets.{i}", _UNET_RES))
            blocks.append((f"input_blocks.{n}.1", f"{there}.attentions.{i}", attn))
            n += 1
        if level < last:
            resample(f"input_blocks.{n}.0", f"{there}.downsamplers.0", "op")
            n += 1
    n = 0
    for up, depth in enumerate(reversed(depths)):
        there = f"up_blocks.{up}"
        for i in range(depth + 1):
            here = f"output_blocks.{n}"
            blocks.append((f"{here}.0", f"{there}.resnets.{i}", _UNET_RES))
            if i < depth or up in attended:
                blocks.append((f"{here}.1", f"{there}.attentions.{i}", attn))
            n += 1
        if up < last:
            place = 2 if up in attended else 1
            resample(f"output_blocks.{n - 1}.{place}", f"{there}.upsamplers.0", "conv")
    if label in ("sequential", "timestep"):
        place = "label_emb.1" if label == "timestep" else "label_emb.0"
        blocks.append((f"{place}.0", f"{embedding}.linear_1", {}))
        blocks.append((f"{place}.2", f"{embedding}.linear_2", {}))
    else:
        blocks.append(("label_emb", embedding, {}))
    return Names(blocks)


def autoencoder_names(keys: Mapping[str, Any]) -> Names:
    """Names of an autoencoder that has these keys of diffusers."""
    return _autoencoder_names(
        len(_depths(keys, "encoder.down_blocks", "resnets")),
        _depths(keys, "encoder.down_blocks", "resnets")[0],
    )


def autoencoder_names_of(net: autoencoder.Autoencoder) -> Names:
    """Names of the keys of `net`."""
    return _autoencoder_names(len(net.ch_mult), net.num_res_blocks)


def _autoencoder_names(levels: int, depth: int) -> Names:
    blocks = []
    for part, way, more in (("encoder", "down", 0), ("decoder", "up", 1)):
        for level in range(levels):
            # diffusers counts the decoder's levels from the coarsest.
            there = levels - 1 - level if way == "up" else level
            there = f"{part}.{way}_blocks.{there}"
            here = f"{part}.{way}.{level}"
            for i in range(depth + more):
                res = (f"{here}.block.{i}", f"{there}.resnets.{i}", _AUTOENCODER_RES)
                attn = (f"{here}.attn.{i}", f"{there}.attentions.{i}")
                blocks += [res, (*attn, _AUTOENCODER_ATTN)]
            sampler = f"{way}sample"
            blocks.append((f"{here}.{sampler}", f"{there}.{sampler}rs.0", {}))
        mid = f"{part}.mid_block"
        for i in range(2):
            blocks.append((f"{part}.mid.block_{i + 1}", f"{mid}.resnets.{i}", {}))
        attn = (f"{part}.mid.attn_1", f"{mid}.attentions.0", _AUTOENCODER_ATTN)
        blocks += [attn, (f"{part}.norm_out", f"{part}.conv_norm_out", {})]
    return Names(blocks)


def _depths(keys, blocks, inside) -> list[int]:
    """How many `inside` each of `blocks` has."""
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.{inside}\.(\d+)\.")
    found = {m.groups() for m in map(pattern.match, keys) if m}
    levels = sorted({int(level) for level, _ in found})
    if levels != list(range(len(levels))) or not levels:
        raise UserError(f"{blocks}: levels {levels} are not all there; give all keys")
    return [sum(int(at) == level for at, _ in found) for level in levels]


def modern(state: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's state dict under today's names of diffusers."""

    def name(key):
        return re.sub(
            r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}.{_OLD[m[2]]}.",
            key,
        )

    return {name(key): value for key, value in state.items()}


def pack(state: Mapping[str, Any]) -> dict[str, Any]:
    """Joins what CompVis has in one array, such as `qkv` [3c, c, 1] (see _JOINED)."""
    packed = dict(state)
    for key in state:
        match = re.fullmatch(r"(.*\battentions\.\d+)\.(to_q|add_k_proj)\.(\w+)", key)
        if match is None:
            continue
        block, first, leaf = match.groups()
        name, parts = next((n, p) for n, p in _JOINED.items() if p[0] == first)
        keys = [f"{block}.{part}.{leaf}" for part in parts]
        if not all(k in state for k in keys):
            continue
        joined = np.concatenate([packed.pop(k) for k in keys])
        packed[f"{block}.{name}.{leaf}"] = (
            joined[..., None] if joined.ndim == 2 else joined
        )
    return packed


def unpack(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `pack`."""
    apart = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\battentions\.\d+)\.(\w+)\.(weight|bias)", key)
        if match is None or match[2] not in _JOINED:
            apart[key] = value
            continue
        value, parts = value[..., 0] if value.ndim == 3 else value, _JOINED[match[2]]
        for name, part in zip(parts, np.split(value, len(parts)), strict=True):
            apart[f"{match[1]}.{name}.{match[3]}"] = part
    return apart


def unet_rules(
    net: unet.UNet, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[plans.Rule]:
    """Rules of a UNet's parameters for diffusers' keys, after `pack`."""
    names = unet_names_of(net, shapes)
    for rule in compvis.unet_rules(net, shapes):
        layout = rule.layout
        joined = re.search(r"/(qkv|encoder_kv)/", rule.path)
        if joined and not net.use_new_attention_order:
            parts = len(_JOINED[joined[1]])
            width, upward = shapes[rule.path][-1] // parts, rule.path.startswith("up")
            layout = _by_heads(layout, net.heads_of(width, upward)[0], parts)
        if re.search(r"to_out\.0\.weight$", names.to_diffusers(rule.key)):
            layout = plans.LINEAR
        yield rule._replace(key=names.to_diffusers(rule.key), layout=layout)


def _by_heads(layout: plans.Layout, heads: int, parts: int) -> plans.Layout:
    """(q k v, head, dim) there, (head, q k v, dim) here, on the last axis here.

    `parts` are 3, or 2 of keys and values alone.
    """

    def swap(a, first, second):
        split = a.reshape(*a.shape[:-1], first, second, -1)
        return np.swapaxes(split, -2, -3).reshape(a.shape)

    return plans.Layout(
        lambda a: swap(layout.to_flax(a), parts, heads),
        lambda a: layout.to_torch(swap(a, heads, parts)),
    )


def autoencoder_rules(
    net: autoencoder.Autoencoder, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[plans.Rule]:
    """Rules of an autoencoder's parameters for diffusers' keys."""
    names = autoencoder_names_of(net)
    for rule in compvis.autoencoder_rules(shapes):
        layout = rule.layout
        if layout is plans.POINTWISE_2D:
            layout = plans.LINEAR
        yield rule._replace(key=names.to_diffusers(rule.key), layout=layout)
