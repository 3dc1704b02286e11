"""Stage one: the autoencoder, its perceptual loss and its discriminator.

One step trains the generator and, from `adversarial.disc_start` on, the discriminator;
autoencoder_loss.py has what they minimise.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ldm_jax import first_stage
from ldm_jax import frozen as frozen_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError, construct, nearest
from ldm_jax.convert import pretrained
from ldm_jax.data import pipeline, sources
from ldm_jax.nets import clip_autoencoder, discriminator, quantize
from ldm_jax.train import adversarial, autoencoder_loss, optim
from ldm_jax.train import stage as stage_lib
from ldm_jax.train import state as train_state

NAME = "autoencoder"


def make_discriminator(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> nn.Module | None:
    """The PatchGAN of `config.autoencoder_stage.adversarial`; None where none joins."""
    settings = config.autoencoder_stage.adversarial
    if settings.disc_loss not in adversarial.DISC_LOSSES:
        hint = nearest(settings.disc_loss, adversarial.DISC_LOSSES)
        raise UserError(
            f"autoencoder_stage.adversarial.disc_loss: {settings.disc_loss!r}; {hint}"
        )
    if settings.disc_start is None or not settings.disc_factor:
        return None
    kwargs = settings.net.to_dict() | {
        "dtype": model_lib.compute_dtype(config.dtype),
        "statistic_groups": mesh.shape["data"] * mesh.shape["fsdp"],
    }
    return construct(
        "autoencoder_stage.adversarial.net", discriminator.PatchDiscriminator, kwargs
    )


def check(
    config: ml_collections.ConfigDict, net: nn.Module, mesh: jax.sharding.Mesh
) -> None:
    """Raises UserError for what would fail later, when a folder is already there."""
    section = config.autoencoder_stage
    if not hasattr(net, "ch"):
        raise UserError(
            "stages: 'autoencoder' has nothing to train where autoencoder.kind is"
            " identity; set stages=('diffusion',)"
        )
    if section.loss.pixel_loss not in adversarial.PIXEL_LOSSES:
        hint = nearest(section.loss.pixel_loss, adversarial.PIXEL_LOSSES)
        raise UserError(
            f"autoencoder_stage.loss.pixel_loss: {section.loss.pixel_loss!r}; {hint}"
        )
    if isinstance(net, clip_autoencoder.ClipAutoencoder):
        _check_tower(config, net)
    disc = make_discriminator(config, mesh)
    if disc is None:
        return
    x = jax.ShapeDtypeStruct(
        (disc.statistic_groups, config.resolution, config.resolution, 3), jnp.float32
    )
    try:
        jax.eval_shape(partial(disc.init, train=True), jax.random.key(0), x)
    except ValueError as error:
        raise UserError(
            f"autoencoder_stage.adversarial.net: {str(error).splitlines()[0]}"
        ) from error


def load_frozen(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The perceptual net's params where the loss wants them; it may download them."""
    settings = config.autoencoder_stage.loss
    if not settings.perceptual_weight:
        return {}
    prefix = "autoencoder_stage.loss"
    vgg = pretrained.fetch("vgg16", settings.vgg, option=f"{prefix}.vgg")
    heads = pretrained.fetch(
        "lpips_heads", settings.lpips_heads, option=f"{prefix}.lpips_heads"
    )
    return {"lpips": pretrained.lpips_params(vgg, heads)}


def load_tower(config: ml_collections.ConfigDict, net: nn.Module) -> Any:
    """The params of the net's frozen tower; None where it has none."""
    if not isinstance(net, clip_autoencoder.ClipAutoencoder):
        return None
    return frozen_lib.load_tower(config, net)


def _with_tower(tower: Any, fresh: Any) -> Any:
    return {**fresh, "autoencoder": {**fresh["autoencoder"], "tower": tower}}


def _check_tower(config: ml_collections.ConfigDict, net: nn.Module) -> None:
    """Raises UserError for a tower of another width, or one that would be trained."""
    pattern = config.autoencoder_stage.optim.get("train_only")
    init = partial(model_lib.init_autoencoder, config, net)
    try:
        params, _ = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:  # what a net says of its own options
        raise UserError(f"autoencoder: {str(error).splitlines()[0]}") from error
    kinds = optim.labels(pattern or "", params)
    if "train" in jax.tree.leaves(kinds["autoencoder"]["tower"]):
        raise UserError(
            f"autoencoder_stage.optim.train_only: {pattern!r} trains the tower, whose"
            " embeddings are to stay CLIP's; set it to"
            " 'decoder|post_quant_conv|logvar'"
        )


def make_step(
    config: ml_collections.ConfigDict,
    net: nn.Module,
    tx: optax.GradientTransformation,
    disc: nn.Module | None = None,
    disc_tx: optax.GradientTransformation | None = None,
) -> stage_lib.Step:
    """The step of the phase before the discriminator joins or, with `disc`, after."""
    section = config.autoencoder_stage
    gradients = autoencoder_loss.make_gradients(config, net, disc)

    def started(adversary, params, x):
        x_hat = net.apply({"params": params["autoencoder"]}, x).astype(jnp.float32)
        _, moved = disc.apply(
            {"params": adversary.params, **adversary.variables},
            x_hat,
            train=True,
            initialize=True,
            mutable=["params", *adversary.variables],
        )
        moved = dict(moved)
        return adversary.replace(params=moved.pop("params"), variables=moved)

    def move_codebook(variables):
        def move(params):
            ae = params["autoencoder"]
            embedding, moved = quantize.move_codebook(
                net.make_quantizer(),
                ae["quantize"]["embedding"],
                variables["codebook"]["quantize"],
            )
            variables["codebook"] = {"quantize": moved}
            ae = ae | {"quantize": {"embedding": embedding}}
            return params | {"autoencoder": ae}

        return move

    def step(state, frozen, batch):
        adversary = state.adversary
        if disc is not None and disc.norm == "actnorm":
            # Its statistics are those of the first reconstructions that it sees.
            adversary = jax.lax.cond(
                jax.tree.leaves(adversary.variables)[0],
                lambda adversary, *_: adversary,
                started,
                *(adversary, state.params, batch["image"]),
            )
        has_disc = disc is not None
        (variables, disc_variables), (grads, disc_grads), metrics = (
            train_state.accumulate(
                gradients(state.params, adversary.params if has_disc else None, frozen),
                (state.variables, adversary.variables if has_disc else None),
                batch,
                train_state.step_key(config.seed, state.step),
                section.micro_batches,
            )
        )
        move = None
        if variables:
            variables = dict(variables)
            move = move_codebook(variables)
        new, more = train_state.update(state, grads, tx, section.ema_decay, move)
        new = new.replace(variables=variables)
        metrics |= more
        if has_disc:
            adversary, more = train_state.update_adversary(
                adversary, disc_grads, disc_tx, disc_variables
            )
            new = new.replace(adversary=adversary)
            metrics |= more
        return train_state.keep_finite(state, new, metrics)

    return step


def prior_samples(net: nn.Module, params: Any, shape: tuple[int, ...]) -> jax.Array:
    """What the decoder makes of latents [n, h, w, c] that no picture gave.

    They are standard normal (KL), or codes drawn evenly (VQ).
    """
    key = jax.random.key(0)
    if autoencoder_loss.is_vq(net):
        indices = jax.random.randint(key, shape[:3], 0, net.num_indices)
        return net.apply({"params": params}, indices, method="decode_code")
    return net.apply({"params": params}, jax.random.normal(key, shape), method="decode")


def latent_statistics(
    net: nn.Module, params: Any, source: sources.Source, ops: Any, batch: int
) -> dict[str, Any]:
    """Mean and std of every latent channel over a whole source, in float64."""
    encode = jax.jit(partial(first_stage.encode_moments, net))
    total, square, count, images = 0.0, 0.0, 0, 0
    for x in pipeline.eval_batches(
        source, batch_size=batch, ops=ops, fields=("image",)
    ):
        mean, variance = first_stage.mean_and_variance(net, encode(params, x["image"]))
        keep = x["_mask"] > 0
        mean = np.asarray(mean, np.float64)[keep]
        variance = np.asarray(variance, np.float64)[keep]
        total = total + mean.sum(axis=(0, 1, 2))
        square = square + (np.square(mean) + variance).sum(axis=(0, 1, 2))
        count, images = count + mean[..., 0].size, images + len(mean)
    mean = total / count
    std = np.sqrt(square / count - np.square(mean))
    return {"mean": mean.tolist(), "std": std.tolist(), "images": images}


def make_stage(
    config: ml_collections.ConfigDict,
    net: nn.Module,
    train_source: sources.Source,
    heldout_source: sources.Source,
    mesh: jax.sharding.Mesh,
    frozen: Any,
    tower: Any = None,
) -> stage_lib.Stage:
    """The stage of `config.autoencoder_stage`; `frozen` is `load_frozen(config)`.

    `tower` are the params that a fresh net's tower is given, see `load_tower`.
    """
    section = config.autoencoder_stage
    batch_size = stage_lib.batch_size(section, config)
    tx, schedule = optim.make_optimizer(section.optim, section.steps, batch_size)
    disc, disc_start = make_discriminator(config, mesh), section.adversarial.disc_start
    phases = []
    if disc is None or disc_start > 0:
        phases.append(stage_lib.Phase(0, make_step(config, net, tx)))
    if disc is not None:
        left = max(section.steps - disc_start, 1)
        disc_tx, _ = optim.make_optimizer(section.adversarial.optim, left, batch_size)
        joined = make_step(config, net, tx, disc, disc_tx)
        phases.append(stage_lib.Phase(disc_start, joined))

    def create(key):
        net_key, disc_key = jax.random.split(key)
        params, variables = model_lib.init_autoencoder(config, net, net_key)
        adversary = None
        if disc is not None:
            x = jnp.zeros((disc.statistic_groups, *[config.resolution] * 2, 3))
            made = disc.init(disc_key, x, train=True)
            disc_params = made.pop("params")
            adversary = train_state.Adversary(
                disc_params, disc_tx.init(disc_params), made
            )
        return train_state.create(params, tx, section.ema_decay, variables, adversary)

    looked_at = next(
        iter(
            pipeline.eval_batches(
                heldout_source, batch_size=8, ops=config.data.ops, limit=8
            )
        )
    )["image"]
    size = config.resolution, config.resolution
    latent = (len(looked_at), *first_stage.latent_shape(net, size))
    reconstruct = jax.jit(net.apply)
    draw = jax.jit(partial(prior_samples, net, shape=latent))

    def panels(params, frozen):
        del frozen
        x_hat = reconstruct({"params": params["autoencoder"]}, looked_at)
        return {
            "input": looked_at,
            "reconstruction": np.asarray(x_hat, np.float32),
            "prior": np.asarray(draw(params["autoencoder"]), np.float32),
        }

    def finish(params):
        return {
            "latent": latent_statistics(
                net, params["autoencoder"], train_source, config.data.ops, 64
            )
        }

    return stage_lib.Stage(
        name=NAME,
        section=section,
        create=create,
        phases=tuple(phases),
        evaluate=autoencoder_loss.make_evaluate(config, net),
        schedule=schedule,
        frozen=frozen,
        train_source=train_source,
        heldout_source=heldout_source,
        ops=config.data.ops,
        fields=("image",),
        panels=panels,
        summarize=autoencoder_loss.summarize,
        finish=finish,
        start=None if tower is None else partial(_with_tower, tower),
    )
