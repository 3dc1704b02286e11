"""The adversarial losses against latent-diffusion's data, and the balanced gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.convert import discriminator as convert
from ldm_jax.convert import plans
from ldm_jax.nets import autoencoder, discriminator, layers, quantize
from ldm_jax.train import adversarial
from tests import parity

DEFAULTS = dict(
    disc_weight=1.0,
    disc_factor=1.0,
    disc_loss="hinge",
    perceptual_weight=1.0,
    kl_weight=1.0,
    codebook_weight=1.0,
    logvar_init=0.0,
    pixel_loss="l1",
)
RUNS = {
    "kl_hinge": "gen_before gen_at gen_after gen_after_weights disc_before disc_after",
    "kl_vanilla": "gen_before gen_at gen_after disc_before disc_after",
    "kl_noperc": "gen_after",
    "kl_discfactor0": "gen_after disc_after",
    "kl_cond": "gen_after disc_after",
    "kl_eval": "gen_after disc_after",
    "vq_hinge": "gen_before gen_at gen_after gen_after_indices disc_before disc_after",
    "vq_vanilla_l2": "gen_before gen_at gen_after disc_before disc_after",
    "vq_noperc": "gen_after",
}
CASES = [f"{tag}/{run}" for tag, runs in RUNS.items() for run in runs.split()]


@functools.cache
def fixture():
    return parity.load("autoencoder_losses")


def image_of(name):
    return jnp.asarray(parity.nhwc(fixture()[2][name]))


def last_layer(params, features):
    return layers.Conv(3).apply({"params": params}, features)


def perceptual_of(x, x_hat):
    """The stub that the fixture describes, [b]."""
    weights, distance = fixture()[1], 0.0
    for name in ("perceptual.k1", "perceptual.k2"):
        kernel = jnp.asarray(plans.CONV.to_flax(weights[name]))
        conv = layers.Conv(8, strides=2, use_bias=False)
        x, x_hat = (
            jax.nn.relu(conv.apply({"params": {"kernel": kernel}}, a))
            for a in (x, x_hat)
        )
        distance += jnp.square(x - x_hat).mean((1, 2, 3))
    return distance


class Case:
    """One call of the reference's loss, made with this package's parts."""

    def __init__(self, name):
        meta, weights, self.io = fixture()
        case = meta["cases"][name]
        self.name, self.kind, self.call = name, case["kind"], case["call"]
        self.options = DEFAULTS | case["kwargs"]
        cond = self.call.get("use_cond", False)
        prefix = "disc_cond." if cond else "disc."
        self.net = discriminator.PatchDiscriminator(
            in_channels=5 if cond else 3, ndf=16
        )
        self.variables = convert.discriminator_variables(
            {
                key.removeprefix(prefix): value
                for key, value in weights.items()
                if key.startswith(prefix)
            },
            self.net,
        )
        self.disc_factor = adversarial.disc_factor_at(
            self.call["step"], self.options["disc_start"], self.options["disc_factor"]
        )
        self.x, self.cond = image_of("inputs"), image_of("cond") if cond else None

    def discriminate(self, params, batch_stats, x):
        """(logits, batch_stats after the call)."""
        if self.cond is not None:
            x = jnp.concatenate([x, self.cond], axis=-1)
        logits, moved = self.net.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=self.call.get("train", True),
            mutable=["batch_stats"],
        )
        return logits, moved["batch_stats"]

    def g_of_image(self, x_hat):
        logits, moved = self.discriminate(
            self.variables["params"], self.variables["batch_stats"], x_hat
        )
        return adversarial.generator_loss(logits), moved

    def nll_of_image(self, nll_params, x_hat, weighted=True):
        p, weight = perceptual_of(self.x, x_hat), self.options["perceptual_weight"]
        perceptual = weight * p if weight else None
        logs = {"p_loss": jnp.mean(p) if weight else jnp.float32(0)}
        if self.kind == "vq":
            pixel_loss = self.options["pixel_loss"]
            nll, rec = adversarial.vq_reconstruction(
                self.x, x_hat, perceptual, pixel_loss
            )
            trained = nll
        else:
            weights = image_of("pixel_weights") if "weights" in self.call else None
            trained, nll, rec = adversarial.kl_reconstruction(
                self.x, x_hat, nll_params["logvar"], perceptual, weights
            )
        logs |= {"nll_loss": jnp.mean(nll), "rec_loss": jnp.mean(rec)}
        return jnp.mean(trained if weighted else nll), logs

    def check(self, got):
        """Every value of the fixture's case, and no other, is in `got` and agrees."""
        prefix = f"{self.name}/"
        want = {k.removeprefix(prefix) for k in self.io if k.startswith(prefix)}
        assert set(got) == want
        for key, value in got.items():
            expected = self.io[prefix + key]
            # An entry of a gradient is a sum of terms as large as the largest entry.
            atol = 2e-6 * np.abs(expected).max()
            np.testing.assert_allclose(
                value, expected, rtol=2e-5, atol=atol, err_msg=key
            )

    def statistics(self, moved):
        return {
            "after_main.3.running_mean": moved["norm_1"]["mean"],
            "after_main.3.running_var": moved["norm_1"]["var"],
        }


@pytest.mark.parametrize("name", [name for name in CASES if "/gen" in name])
def test_generator_losses_match_the_reference(name):
    case = Case(name)
    options, io = case.options, case.io
    logvar = jnp.float32(options["logvar_init"])
    nll_params = {"logvar": logvar} if case.kind == "kl" else {}
    last_params = {
        "kernel": jnp.asarray(plans.CONV.to_flax(fixture()[1]["last.weight"])),
        "bias": jnp.asarray(fixture()[1]["last.bias"]),
    }
    unweighted = functools.partial(case.nll_of_image, nll_params, weighted=False)
    measured = (lambda x: unweighted(x)[0]) if "weights" in case.call else None
    out = adversarial.balanced_cotangents(
        last_layer,
        last_params,
        image_of("feat"),
        nll_params,
        case.nll_of_image,
        case.g_of_image if options["disc_factor"] else None,
        disc_weight=options["disc_weight"],
        disc_factor=case.disc_factor,
        measured_nll_of_image=measured,
    )
    np.testing.assert_allclose(out.x_hat, image_of("reconstructions"), atol=5e-5)
    g, moved = out.g, out.g_aux
    if not options["disc_factor"]:
        # The reference computes the term and multiplies it by zero.
        assert g == 0 and moved is None
        g, moved = case.g_of_image(out.x_hat)

    got = case.statistics(moved) | {
        "log_nll_loss": out.nll_aux["nll_loss"],
        "log_rec_loss": out.nll_aux["rec_loss"],
        "log_d_weight": out.d_weight,
        "log_disc_factor": case.disc_factor,
        "log_g_loss": g,
        "grad_last_layer": plans.CONV.to_torch(out.last_params_grad["kernel"]),
    }
    if case.kind == "kl":
        posterior = autoencoder.Posterior.from_moments(image_of("moments"))
        kl = jnp.mean(posterior.kl())
        loss = out.loss + options["kl_weight"] * kl
        got |= {"log_kl_loss": kl, "log_logvar": logvar}
        got |= {"grad_logvar": out.nll_params_grad["logvar"]}
    else:
        quant_loss = jnp.mean(io["codebook_loss"])
        loss = out.loss + options["codebook_weight"] * quant_loss
        got |= {"log_quant_loss": quant_loss, "log_p_loss": out.nll_aux["p_loss"]}
    if "predicted_indices" in case.call:
        n = options["n_classes"]
        histogram = jnp.bincount(jnp.asarray(io["indices"], jnp.int32), length=n)
        got |= {"log_perplexity": quantize.perplexity(histogram)}
        got |= {"log_cluster_usage": n * quantize.usage(histogram)}
    case.check(got | {"loss": loss, "log_total_loss": loss})


@pytest.mark.parametrize("name", [name for name in CASES if "/disc" in name])
def test_discriminator_losses_match_the_reference(name):
    case = Case(name)
    disc_loss = adversarial.DISC_LOSSES[case.options["disc_loss"]]

    def loss_of(params):
        moved = case.variables["batch_stats"]
        real, moved = case.discriminate(params, moved, case.x)
        fake, moved = case.discriminate(params, moved, image_of("reconstructions"))
        return case.disc_factor * disc_loss(real, fake), (real, fake, moved)

    (loss, (real, fake, moved)), grads = jax.value_and_grad(loss_of, has_aux=True)(
        case.variables["params"]
    )
    first, last = grads["conv_0"]["kernel"], grads["conv_out"]["kernel"]
    case.check(
        case.statistics(moved)
        | {
            "loss": loss,
            "log_disc_loss": loss,
            "log_logits_real": real.mean(),
            "log_logits_fake": fake.mean(),
            "grad_disc_main.0.weight": plans.CONV.to_torch(first),
            "grad_disc_last_weight": plans.CONV.to_torch(last),
        }
    )


def test_every_case_of_the_fixture_is_tested():
    meta, _, io = fixture()
    assert set(CASES) == set(meta["cases"])
    assert set(CASES) == {k.rpartition("/")[0] for k in io if re.match("kl_|vq_", k)}


def test_discriminator_losses_of_given_logits_match_the_reference():
    io = fixture()[2]
    real, fake = image_of("exemplar/logits_real"), image_of("exemplar/logits_fake")
    weights = jnp.asarray(io["exemplar/weights"])
    weighted = adversarial.hinge_with_exemplar_weights
    np.testing.assert_allclose(weighted(real, fake, weights), io["exemplar/loss"], 1e-6)
    plain = weighted(real, fake, jnp.ones(3))
    np.testing.assert_allclose(plain, adversarial.hinge(real, fake), 1e-6)
    for name, loss in adversarial.DISC_LOSSES.items():
        np.testing.assert_allclose(loss(real, fake), io[f"exemplar/{name}"], 1e-6)


# --- the parts


def test_adaptive_weight_is_a_bounded_constant():
    ones, zeros = jnp.ones((3, 3, 1, 1)), jnp.zeros((3, 3, 1, 1))
    weight = adversarial.adaptive_weight(ones, 2 * ones, 0.75)
    np.testing.assert_allclose(weight, 0.75 * 3 / (6 + 1e-4), 1e-6)
    assert adversarial.adaptive_weight(ones, zeros, 0.5) == 5000
    assert adversarial.adaptive_weight(zeros, ones, 0.5) == 0
    gradient = jax.grad(adversarial.adaptive_weight)(ones, ones, 1.0)
    np.testing.assert_array_equal(gradient, zeros)
    # In bfloat16 the sum of 2^16 ones would stop at 256.
    many = jnp.ones(2**16, jnp.bfloat16)
    weight = adversarial.adaptive_weight(many, many[:1], 1.0)
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, 256, 1e-3)


def test_disc_factor_is_active_from_disc_start_on():
    at = functools.partial(adversarial.disc_factor_at, disc_start=5, disc_factor=0.5)
    assert [float(at(jnp.int32(step))) for step in (0, 4, 5, 6)] == [0, 0, 0.5, 0.5]


def test_unknown_pixel_loss_is_named():
    x = jnp.zeros((1, 2, 2, 3))
    with pytest.raises(UserError, match="pixel_loss: 'l3' .* l1, l2"):
        adversarial.vq_reconstruction(x, x, pixel_loss="l3")


# --- a whole step: decoder, last layer, losses


class Step:
    """A decoder in front of the losses, as the training step has it."""

    def __init__(self, dtype=jnp.float32):
        sizes = dict(ch=8, ch_mult=(1,), num_res_blocks=1, resolution=8)
        options = dict(attn_type="none", norm_groups=4, dtype=dtype)
        self.net = autoencoder.AutoencoderKL(**sizes, **options)
        self.disc = discriminator.PatchDiscriminator(ndf=16, n_layers=1, dtype=dtype)
        keys = jax.random.split(jax.random.key(0), 4)
        self.x = jax.random.normal(keys[0], (8, 8, 8, 3))
        self.z = jax.random.normal(keys[1], (8, 8, 8, 4))
        params = jax.jit(self.net.init)(keys[2], self.x)["params"]
        init = functools.partial(self.disc.init, train=False)
        self.variables = jax.jit(init)(keys[3], self.x)
        params = {name: params[name] for name in ("decoder", "post_quant_conv")}
        last = params["decoder"].pop("conv_out")
        self.params = {"rest": params, "last": last, "nll": {"logvar": jnp.float32(0)}}

    def features(self, rest):
        return self.net.apply({"params": rest}, self.z, method="decode_features")

    def apply_last(self, last, features):
        variables = {"params": {"decoder": {"conv_out": last}}}
        return self.net.apply(variables, features, method="conv_out")

    def nll_of_image(self, nll_params, x_hat):
        trained, _, rec = adversarial.kl_reconstruction(
            self.x, x_hat, nll_params["logvar"]
        )
        return jnp.mean(trained), rec

    def g_of_image(self, variables, x_hat):
        logits, moved = self.disc.apply(
            variables, x_hat, train=True, mutable=["batch_stats"]
        )
        return adversarial.generator_loss(logits), moved

    def balanced(self, params, variables, with_g=True):
        """(gradients like params, all else)."""
        features, pull = jax.vjp(self.features, params["rest"])
        out = adversarial.balanced_cotangents(
            self.apply_last,
            params["last"],
            features,
            params["nll"],
            self.nll_of_image,
            functools.partial(self.g_of_image, variables) if with_g else None,
            disc_weight=0.5,
            disc_factor=jnp.float32(0.8),
        )
        (rest,) = pull(out.features_cotangent)
        grads = {"rest": rest, "last": out.last_params_grad, "nll": out.nll_params_grad}
        return grads, out

    def plain(self, params, variables, gain):
        """The gradient of nll + gain · g, and its value."""

        def loss_of(params):
            x_hat = self.apply_last(params["last"], self.features(params["rest"]))
            x_hat = x_hat.astype(jnp.float32)
            nll, _ = self.nll_of_image(params["nll"], x_hat)
            return nll + gain * self.g_of_image(variables, x_hat)[0]

        return jax.grad(loss_of)(params), loss_of(params)


@functools.cache
def compiled():
    """(step, its compiled `balanced` and `plain`)."""
    step = Step()
    arguments = step.params, step.variables
    balanced = jax.jit(step.balanced).lower(*arguments).compile()
    plain = jax.jit(step.plain).lower(*arguments, jnp.float32(0)).compile()
    return step, balanced, plain


def test_step_gives_the_gradient_of_the_weighted_sum():
    step, balanced, plain = compiled()
    grads, out = balanced(step.params, step.variables)
    assert 0.01 < out.d_weight < 5000
    gain = 0.8 * out.d_weight
    expected, loss = plain(step.params, step.variables, gain)
    nll_alone, nll = plain(step.params, step.variables, jnp.float32(0))
    np.testing.assert_allclose(out.loss, loss, 1e-6)
    np.testing.assert_allclose(out.nll, nll, 1e-6)
    np.testing.assert_allclose(out.nll + gain * out.g, loss, 1e-6)

    def assert_close(got, want, without_g):
        # g must show, or this would pass without it.
        assert jnp.abs(want - without_g).max() > 1e-3 * jnp.abs(want).max()
        np.testing.assert_allclose(
            got, want, rtol=1e-4, atol=1e-4 * jnp.abs(want).max()
        )

    for part in ("rest", "last"):
        jax.tree.map(assert_close, grads[part], expected[part], nll_alone[part])
    np.testing.assert_allclose(grads["nll"]["logvar"], expected["nll"]["logvar"], 1e-5)


def test_without_the_adversarial_term_the_gradient_is_that_of_the_nll():
    step, _, plain = compiled()
    alone = jax.jit(functools.partial(step.balanced, with_g=False))
    grads, out = alone(step.params, step.variables)
    assert out.g == 0 and out.d_weight == 0 and out.g_aux is None
    expected, loss = plain(step.params, step.variables, jnp.float32(0))
    np.testing.assert_allclose([out.loss, out.nll], [loss, loss], 1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3),
        grads,
        expected,
    )


def test_half_precision_gives_nearly_the_same_weight_and_gradient():
    step, balanced, _ = compiled()
    grads, out = balanced(step.params, step.variables)
    half = jax.jit(Step(jnp.bfloat16).balanced)
    half_grads, half_out = half(step.params, step.variables)
    np.testing.assert_allclose(half_out.d_weight, out.d_weight, rtol=0.05)
    for value in (half_out.x_hat, half_out.d_weight, half_out.loss):
        assert value.dtype == jnp.float32
    assert half_out.features_cotangent.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(half_grads)} == {jnp.dtype("f4")}
    for name in ("kernel", "bias"):
        a, b = half_grads["last"][name], grads["last"][name]
        assert 0 < jnp.linalg.norm((a - b).ravel()) < 0.05 * jnp.linalg.norm(b.ravel())


def test_balance_costs_one_convolution():
    """Counted in the compiled programs: the decoder is pulled back once."""
    _, balanced, plain = compiled()

    def convolutions(program):
        return len(re.findall(r"convolution\(|__onednn\$conv", program.as_text()))

    assert convolutions(plain) > 25
    assert convolutions(balanced) - convolutions(plain) == 1
