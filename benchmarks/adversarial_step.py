"""python -m benchmarks.adversarial_step

What the discriminator adds to a training step of stage one: nothing before it joins,
and then how much of it the adaptive weight is. The steps run turn by turn on arrays
made on the spot; GFLOP are XLA's count of the program that runs.
"""

import argparse
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks import common, train_step
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax.train import adversarial, autoencoder_loss
from ldm_jax.train import stage as stage_lib

# name: (whether the config has a discriminator, the phase, over what it is compared)
CASES = {
    "a. no discriminator": (False, 0, ""),
    "b. before disc_start": (True, 0, "a"),
    "c. after disc_start": (True, 1, "d"),
    "d. c with a constant weight": (True, 1, "a"),
    "e. c, weight by two jax.grad": (True, 1, "c"),
    "f. e, gradients kept whole": (True, 1, "c"),
}
CONFIG = pathlib.Path(common.default_config()).with_name("autoencoder.py")


def fixed_weight(
    apply_last,
    last_params,
    features,
    nll_params,
    nll_of_image,
    g_of_image,
    *,
    disc_weight,
    disc_factor,
) -> adversarial.Balanced:
    """`balanced_cotangents` with `disc_weight` as it is: both losses pulled at once."""

    def total(last_params, features, nll_params):
        x_hat = apply_last(last_params, features)
        nll, nll_aux = nll_of_image(nll_params, x_hat)
        g, g_aux = g_of_image(x_hat)
        loss = nll + disc_weight * disc_factor * g
        return loss, (x_hat, nll, nll_aux, g, g_aux)

    (loss, aux), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(
        last_params, features, nll_params
    )
    x_hat, nll, nll_aux, g, g_aux = aux
    last_grad, cotangent, nll_params_grad = grads
    return adversarial.Balanced(
        loss=loss,
        x_hat=x_hat,
        nll=nll,
        nll_aux=nll_aux,
        g=g,
        g_aux=g_aux,
        d_weight=jnp.asarray(disc_weight, jnp.float32),
        nll_params_grad=nll_params_grad,
        last_params_grad=last_grad,
        features_cotangent=cotangent,
    )


def weight_of_two_passes(keep: bool):
    """`make_gradients` that measures the weight by a `jax.grad` of each loss first.

    Both go back through the whole decoder, of which the last kernel's part is used. One
    program holds it all, so XLA drops the rest, unless told to `keep` it as programs of
    their own would.
    """
    make_plain = autoencoder_loss.make_gradients

    def make_gradients(config, net, disc):
        plain = make_plain(config, net, disc)
        if disc is None:
            return plain
        section = config.autoencoder_stage
        settings, game = section.loss, section.adversarial
        dtype = model_lib.compute_dtype(config.dtype)

        def gradients(params, disc_params, frozen):
            def of_batch(carry, batch, key):
                variables, disc_variables = carry
                x, net_params = batch["image"], params["autoencoder"]

                def x_hat_of(decoder):
                    everything = net_params | {"decoder": decoder}
                    features, *_ = autoencoder_loss.encode_and_decode(
                        net, everything, variables, x, key
                    )
                    last = decoder["conv_out"]
                    return autoencoder_loss.last_layer(net, last, features)

                def nll_loss(decoder):
                    logvar = params.get("logvar", settings.logvar_init)
                    nll, _ = autoencoder_loss.reconstruction(
                        net, settings, frozen, x, x_hat_of(decoder), logvar, dtype
                    )
                    return nll.mean()

                def g_loss(decoder):
                    logits, _ = disc.apply(
                        {"params": disc_params, **disc_variables},
                        x_hat_of(decoder),
                        train=True,
                        mutable=list(disc_variables),
                    )
                    return adversarial.generator_loss(logits)

                decoder = net_params["decoder"]
                grads = [jax.grad(f)(decoder) for f in (nll_loss, g_loss)]
                weight = adversarial.adaptive_weight(
                    *(grad["conv_out"]["kernel"] for grad in grads), game.disc_weight
                )
                if keep:  # by a use of them all that changes no digit
                    weight += 1e-30 * optax.tree.norm(grads)

                def balanced(*args, disc_weight, **kwargs):
                    return fixed_weight(*args, disc_weight=weight, **kwargs)

                with mock.patch.object(adversarial, "balanced_cotangents", balanced):
                    return plain(params, disc_params, frozen)(carry, batch, key)

            return of_batch

        return gradients

    return make_gradients


def make_step(
    config: ml_collections.ConfigDict, name: str, batch: dict[str, jax.Array]
) -> train_step.Step:
    """The step of one of `CASES`, the last three with one function replaced."""
    has_disc, phase, _ = CASES[name]
    config = config.copy_and_resolve_references()
    config.autoencoder_stage.adversarial.disc_start = 1 if has_disc else None
    balanced, gradients = (
        adversarial.balanced_cotangents,
        autoencoder_loss.make_gradients,
    )
    if name[0] == "d":
        balanced = fixed_weight
    elif name[0] in "ef":
        gradients = weight_of_two_passes(keep=name[0] == "f")
    net = model_lib.build_autoencoder(config)
    with (
        mock.patch.object(adversarial, "balanced_cotangents", balanced),
        mock.patch.object(autoencoder_loss, "make_gradients", gradients),
    ):
        stage = train_step.autoencoder_stage(config, net)
        state = jax.jit(stage.create)(jax.random.key(0))
        return train_step.Step(stage.phases[phase].step, state, stage.frozen, batch)


def check_same(steps: dict[str, train_step.Step]) -> None:
    """What is compared with `c` must compute the same; its first step says so."""
    first = {name[0]: jax.device_get(step()) for name, step in steps.items()}
    for other in "ef":
        for field in ("loss", "d_weight", "grad_norm", "disc_loss"):
            np.testing.assert_allclose(
                first[other][field][0], first["c"][field][0], rtol=1e-3, err_msg=field
            )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batch_size", type=int, help="default: the stage's own")
    args, overrides = parser.parse_known_args()
    with config_lib.exit_on_user_error():
        config = common.load(args.config, overrides)
        b = args.batch_size or stage_lib.batch_size(config.autoencoder_stage, config)
        batch = train_step.pictures(config, b)
        steps = {name: make_step(config, name, batch) for name in CASES}
    check_same(steps)
    medians = common.interleaved(steps, args.repetitions)
    flops = {n: step.compiled.cost_analysis()["flops"] for n, step in steps.items()}
    by_letter = {name[0]: name for name in CASES}

    print(common.environment("flax", "optax") + "\n")
    print(f"{config.preset}, {config.resolution} pixels, batch {b}\n")
    head = ("Step", "ms", "GFLOP", "Over", "Time", "GFLOP ratio")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name, (_, _, over) in CASES.items():
        ratios = " | | "
        if over:
            base = by_letter[over]
            time, work = medians[name] / medians[base], flops[name] / flops[base]
            ratios = f" {over} | {time:.2f} | {work:.3f} "
        print(
            f"| {name} | {medians[name] * 1e3:.1f} | {flops[name] / 1e9:.3f} |{ratios}|"
        )


if __name__ == "__main__":
    main()
