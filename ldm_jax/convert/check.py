"""Our nets beside those of diffusers and transformers, block by block, on equal inputs.

Weights go there by `networks.export_network`, options by `write_config`. A block's
counterpart is the module under which all of its parameters are, by the rules of the
export. Needs torch, here alone in the package, and only while it runs.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import depth, networks, plans, text_encoders, write_config
from ldm_jax.convert import diffusers as names
from ldm_jax.nets import autoencoder, clip_vision, dpt, layers, t5, text_encoder, unet

Variables = Mapping[str, Any]
State = Mapping[str, np.ndarray]


class Row(NamedTuple):
    """A block's output, ours less theirs; `std` is the spread of theirs."""

    block: str
    max_difference: float
    mean_difference: float
    std: float


def compare_unet(
    net: unet.UNet,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of a UNet, in the order in which it computes.

    Theirs takes `state_dict`, in diffusers' keys, such as the file that `variables`
    came from; else their export. Latents and conditions are random.
    UserError where torch or diffusers is missing, or diffusers has no such net.
    """
    torch, diffusers, _ = libraries()
    size = max(8, 2 ** (len(net.channel_mult) - 1))
    config = write_config.unet_of(net, size)
    rng = np.random.default_rng(seed)
    x = _normal(rng, 2, size, size, net.in_channels)
    t = np.array([801, 7], np.int32)
    y, given = _labels(net, rng)
    context = None
    if net.use_spatial_transformer:
        context = given["encoder_hidden_states"] = _normal(rng, 2, 5, net.context_dim)
    given = jax.tree.map(torch.from_numpy, given | {"timestep": t})
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    _load(theirs, state_dict or networks.export_network(net, variables, "diffusers"))
    run = partial(theirs, _nchw(x), **given)
    return _called(net, variables, "diffusers", (x, t, context, y), theirs, run)


def compare_autoencoder(
    net: autoencoder.Autoencoder,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of the encoder and then of the decoder; as `compare_unet`.

    The picture is random; both decoders see our encoder's latent.
    """
    _, diffusers, _ = libraries()
    size = 8 * 2 ** (len(getattr(net, "ch_mult", ())) - 1)
    config = write_config.autoencoder_of(net, 1.0, size)
    x = _normal(np.random.default_rng(seed), 2, size, size, net.in_channels)
    plan = networks.plan_of(net, "diffusers", variables["params"])
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    state = state_dict or networks.export_network(net, variables, "diffusers")
    _load(theirs, names.modern(state))
    z = net.apply({}, net.apply(variables, x, method="encode"), method="latent")
    z = np.asarray(z, np.float32)
    encoded = _rows(
        plan.rules,
        lambda keep: _ours(net, variables, keep, "encode", x),
        theirs,
        lambda: theirs.encode(_nchw(x)),
    )
    return encoded + _rows(
        plan.rules,
        lambda keep: _ours(net, variables, keep, "decode", z),
        theirs,
        lambda: theirs.decode(_nchw(z)),
    )


def compare_clip_text(
    net: text_encoder.CLIPTextTransformer,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block that `net` runs of CLIP's text tower; as `compare_unet`.

    `state_dict` is in the keys of transformers, and may have more in it.
    """
    torch, _, transformers = libraries()
    whole = net.clone(depth=net.blocks, layer="last", final_norm=True, normalize=False)
    config = write_config.clip_text_of(whole)
    tokens = np.random.default_rng(seed).integers(
        0, net.vocab_size - 1, (2, net.max_seq_len), np.int32
    )
    tokens[:, -1] = net.vocab_size - 1  # the text's end
    norm = {"scale": np.ones(net.dim), "bias": np.zeros(net.dim)}
    params = {"norm_out": norm} | dict(variables["params"])
    plan = networks.plan_of(whole, "huggingface", params)
    cls = getattr(transformers, config["architectures"][0])
    theirs = cls(cls.config_class(**config))
    state = state_dict or networks.export_network(
        whole, {"params": params}, "huggingface"
    )
    _load(theirs, state)
    return _rows(
        plan.rules,
        lambda keep: _ours(net, variables, keep, "__call__", tokens),
        theirs,
        lambda: theirs(torch.from_numpy(tokens).long()),
    )


def compare_clip_vision(
    net: clip_vision.CLIPVisionTransformer,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of CLIP's picture tower; as `compare_clip_text`."""
    *_, transformers = libraries()
    config = write_config.clip_vision_of(net)
    side = net.image_size
    x = _normal(np.random.default_rng(seed), 2, side, side, 3)
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**config)
    )
    _load(theirs, state_dict or networks.export_network(net, variables, "huggingface"))
    run = partial(theirs, _nchw(x))
    return _called(net, variables, "huggingface", (x,), theirs, run)


def compare_dpt(
    net: dpt.DPTHybrid,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of MiDaS's DPT-hybrid; as `compare_clip_text`."""
    *_, transformers = libraries()
    side = max(64, 16 * net.grid // 32 * 32)
    x = _normal(np.random.default_rng(seed), 2, side, side, 3)
    config = transformers.DPTConfig(**write_config.dpt_of(net))
    theirs = transformers.DPTForDepthEstimation(config)
    state = state_dict or networks.export_network(net, variables, "huggingface")
    _load(theirs, state, spare=depth.UNUSED)
    run = partial(theirs, _nchw(x))
    rows = _called(net, variables, "huggingface", (x,), theirs, run)
    # Their norm of the stem is one with the activation behind it.
    return [row for row in rows if row.block != "stem_norm"]


def compare_t5(
    net: t5.T5Encoder,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of T5's encoder; as `compare_clip_text`."""
    torch, _, transformers = libraries()
    tokens = _tokens(net.vocab_size, 12, seed)
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(**write_config.t5_of(net))
    )
    state = state_dict or networks.export_network(net, variables, "huggingface")
    _load(theirs, text_encoders.with_shared(state))
    run = partial(theirs, torch.from_numpy(tokens).long())
    return _called(net, variables, "huggingface", (tokens,), theirs, run)


def compare_bert(
    net: text_encoder.TextTransformer,
    variables: Variables,
    *,
    state_dict: State | None = None,
    seed: int = 0,
) -> list[Row]:
    """A row for each block of LDM's text encoder; as `compare_unet`."""
    torch, *_ = libraries()
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as ldm

    tokens = _tokens(net.vocab_size, net.max_seq_len, seed)
    theirs = ldm.LDMBertModel(ldm.LDMBertConfig(**write_config.ldm_bert_of(net)))
    state = state_dict or networks.export_network(net, variables, "diffusers")
    # The head is of its training, which predicted the text, and is not computed.
    _load(theirs, state, spare=r"to_logits\..*")
    run = partial(theirs.model, torch.from_numpy(tokens).long())
    return _called(net, variables, "diffusers", (tokens,), theirs, run)


def libraries() -> tuple[Any, Any, Any]:
    """torch, diffusers and transformers; UserError where one is missing."""
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--check: {error.name} is not installed; pip install 'ldm_jax[parity]'"
        ) from error
    return torch, diffusers, transformers


# --- inputs


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def _tokens(vocabulary: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (2, length), np.int32)


def _nchw(x: np.ndarray):
    import torch

    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def _labels(net: unet.UNet, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """(y, what diffusers is given for it)."""
    if net.num_classes is None:
        return None, {}
    if net.adm_in_channels in names.SDXL_WIDTHS:
        text = _normal(rng, 2, 1280)
        sizes = _normal(rng, 2, (net.adm_in_channels - 1280) // 256)
        waves = np.asarray(layers.timestep_embedding(sizes.ravel(), 256))
        y = np.concatenate([text, waves.reshape(2, -1)], axis=-1)
        return y, {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}
    if isinstance(net.num_classes, int):
        y = np.array([0, net.num_classes - 1], np.int32)
    elif net.num_classes == "timestep":
        y = np.array([3, 250], np.float32)
    else:
        y = _normal(rng, 2, net.adm_in_channels or 1)
    return y, {"class_labels": y}


# --- both sides


def _called(
    net: nn.Module,
    variables: Variables,
    layout: str,
    args: tuple,
    theirs: Any,
    run_theirs: Callable[[], Any],
) -> list[Row]:
    """Rows of a net that is called with `args`, by its export's rules."""
    return _rows(
        networks.plan_of(net, layout, variables["params"]).rules,
        lambda keep: _ours(net, variables, keep, "__call__", *args),
        theirs,
        run_theirs,
    )


def _rows(
    rules: Iterable[plans.Rule],
    ours: Callable[[Iterable[str]], dict[str, np.ndarray]],
    theirs: Any,
    run_theirs: Callable[[], Any],
) -> list[Row]:
    """Rows of all blocks that both compute; theirs sets the order."""
    modules = _modules(rules)
    here = ours(modules.keys())
    there = _theirs(theirs, {module: b for b, module in modules.items()}, run_theirs)
    rows = []
    for block, theirs_out in there.items():
        if block not in here:
            continue
        difference = np.abs(np.asarray(here[block], np.float32) - theirs_out)
        numbers = difference.max(), difference.mean(), theirs_out.std()
        rows.append(Row(block, *map(float, numbers)))
    return rows


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


def _load(model: Any, state: State, spare: str = "") -> None:
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
