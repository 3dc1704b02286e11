import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import config as config_lib
from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError
from ldm_jax.data import sources
from ldm_jax.nets import lpips
from ldm_jax.train import adversarial, autoencoder_loss, sharding, step_autoencoder
from ldm_jax.train import state as train_state
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")

KINDS = ("kl", "vq")


def _config(kind="kl", *overrides):
    preset = {"kl": "debug", "vq": "debug_vq"}[kind]
    return config_lib.load(f"{runs.AUTOENCODER}:{preset}", overrides)


def _images(n=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32)


def _stage(config, frozen=None):
    net = model_lib.build_autoencoder(config)
    source = sources.load("synthetic", "train", resolution=16, count=8)
    mesh = sharding.make_mesh(config.mesh)
    return step_autoencoder.make_stage(config, net, source, source, mesh, frozen or {})


def _params(config, net):
    abstract = jax.eval_shape(
        lambda: model_lib.init_autoencoder(config, net, jax.random.key(0))
    )
    return runs.random_like(abstract[0]), abstract[1]


def _evaluate(config, params, batch, frozen=None):
    net = model_lib.build_autoencoder(config)
    evaluate = jax.jit(autoencoder_loss.make_evaluate(config, net))
    metrics = evaluate(params, frozen or {}, batch, jax.random.key(0))
    return {name: np.asarray(s / n) for name, (s, n) in metrics.items()}


# ---- Losses --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_nll_plus_weighted_penalty(kind):
    weight = {"kl": "kl_weight", "vq": "codebook_weight"}[kind]
    config = _config(kind, f"autoencoder_stage.loss.{weight}=0.25")
    params, _ = _params(config, model_lib.build_autoencoder(config))
    mean = _evaluate(config, params, {"image": _images()})
    penalty = mean[{"kl": "kl", "vq": "codebook_loss"}[kind]]
    np.testing.assert_allclose(mean["loss"], mean["nll"] + 0.25 * penalty, rtol=1e-5)
    # KL sums the error over a picture, VQ takes its mean.
    pixels = {"kl": 16 * 16 * 3, "vq": 1}[kind]
    np.testing.assert_allclose(mean["nll"], mean["l1"] * pixels, rtol=1e-5)
    assert penalty > 1e-3
    if kind == "kl":
        np.testing.assert_allclose(mean["kl_per_dim"] * 8 * 8 * 4, penalty, rtol=1e-5)


def test_padding_counts_for_nothing():
    config = _config("vq")
    params, _ = _params(config, model_lib.build_autoencoder(config))
    x = _images()
    whole = _evaluate(config, params, {"image": x[:3]})
    mask = np.array([1, 1, 1, 0], np.float32)
    padded = _evaluate(config, params, {"image": x, "_mask": mask})
    for name, value in padded.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-5)


def _direct_loss(config, net, params, variables, adversary, disc, frozen, x, key):
    """The whole loss written down once more, to be differentiated by jax.grad alone."""
    settings, game = config.autoencoder_stage.loss, config.autoencoder_stage.adversarial

    def parts(params):
        features, bottleneck, _, _ = autoencoder_loss.encode_and_decode(
            net, params["autoencoder"], variables, x, key
        )
        last = params["autoencoder"]["decoder"]["conv_out"]
        return features, bottleneck, last

    def nll_of(params, last, features):
        x_hat = autoencoder_loss.last_layer(net, last, features)
        logvar = params.get("logvar", jnp.float32(settings.logvar_init))
        nll, _ = autoencoder_loss.reconstruction(
            net, settings, frozen, x, x_hat, logvar, jnp.float32
        )
        return jnp.mean(nll)

    def g_of(last, features):
        x_hat = autoencoder_loss.last_layer(net, last, features)
        logits, _ = disc.apply(
            {"params": adversary.params, **adversary.variables},
            x_hat,
            train=True,
            mutable=list(adversary.variables),
        )
        return -jnp.mean(logits)

    features, _, last = parts(params)
    d_weight = 0.0
    if disc is not None:
        a = jax.grad(lambda k: nll_of(params, last | {"kernel": k}, features))
        b = jax.grad(lambda k: g_of(last | {"kernel": k}, features))
        norms = [jnp.linalg.norm(f(last["kernel"]).ravel()) for f in (a, b)]
        d_weight = jnp.clip(norms[0] / (norms[1] + 1e-4), 0, 1e4) * game.disc_weight

    def loss(params):
        features, bottleneck, last = parts(params)
        weight = autoencoder_loss.penalty_weight(net, settings)
        total = nll_of(params, last, features) + weight * jnp.mean(bottleneck.penalty)
        if disc is not None:
            total = total + d_weight * game.disc_factor * g_of(last, features)
        return total

    return jax.value_and_grad(loss)(params), d_weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "adversarial"])
def test_gradients_are_those_of_the_whole_loss(kind, joined):
    config = _config(
        kind,
        "autoencoder_stage.loss.kl_weight=0.1",
        "autoencoder_stage.loss.learn_logvar=True",
        "autoencoder_stage.loss.logvar_init=0.3",
        "autoencoder_stage.adversarial.disc_factor=0.8",
    )
    stage = _stage(config)
    state = jax.jit(stage.create)(jax.random.key(0))
    net = model_lib.build_autoencoder(config)
    params, x, key = runs.random_like(state.params), _images(8), jax.random.key(3)
    mesh = sharding.make_mesh(config.mesh)
    disc = step_autoencoder.make_discriminator(config, mesh) if joined else None
    adversary = state.adversary

    @jax.jit
    def ours(params):
        of_batch = autoencoder_loss.make_gradients(config, net, disc)(
            params, adversary.params, {}
        )
        carry = state.variables, adversary.variables
        return of_batch(carry, {"image": x}, key)

    @jax.jit
    def direct(params):
        return _direct_loss(
            config, net, params, state.variables, adversary, disc, {}, x, key
        )

    _, (grads, disc_grads), metrics = ours(params)
    (loss, expected), d_weight = direct(params)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    scale = optax.tree.norm(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / scale, b / scale, atol=2e-6),
        grads,
        expected,
    )
    assert joined == (disc_grads is not None)
    if joined:
        np.testing.assert_allclose(metrics["d_weight"][0], d_weight, rtol=1e-4)
        assert optax.tree.norm(disc_grads) > 1e-3


def test_perceptual_distance_counts_for_every_pixel():
    config = _config("kl", "autoencoder_stage.loss.perceptual_weight=0.5")
    net = model_lib.build_autoencoder(config)
    params, _ = _params(config, net)
    x = jnp.asarray(_images())
    made = jax.eval_shape(lambda: lpips.LPIPS().init(jax.random.key(0), x, x))
    frozen = {"lpips": jax.tree.map(jnp.abs, runs.random_like(made["params"]))}
    mean = _evaluate(config, params, {"image": x}, frozen)
    assert mean["lpips"] > 1e-3
    pixels = 16 * 16 * 3
    expected = pixels * (mean["l1"] + 0.5 * mean["lpips"])
    np.testing.assert_allclose(mean["nll"], expected, rtol=1e-5)


# ---- Steps ---------------------------------------------------------------------------


def test_nothing_of_the_discriminator_is_computed_before_it_joins():
    config = _config("kl", "autoencoder_stage.adversarial.disc_start=5")
    stage = _stage(config)
    assert [phase.first for phase in stage.phases] == [0, 5]
    state = jax.eval_shape(stage.create, jax.random.key(0))
    batch = {"image": _images(8)}
    # A 4x4 kernel is the discriminator's and nobody else's.
    alone, joined = (
        str(jax.make_jaxpr(phase.step)(state, {}, batch)) for phase in stage.phases
    )
    assert "f32[4,4,3,8]" in joined
    flops = [
        jax.jit(phase.step).lower(state, {}, batch).cost_analysis()["flops"]
        for phase in stage.phases
    ]
    config.autoencoder_stage.adversarial.disc_start = None
    never = _stage(config)
    (phase,) = never.phases
    state = jax.eval_shape(never.create, jax.random.key(0))
    assert state.adversary is None
    lone = jax.jit(phase.step).lower(state, {}, batch).cost_analysis()["flops"]
    # What a skipped step keeps is all that it adds.
    assert lone <= flops[0] < 1.001 * lone < 0.95 * flops[1]
    assert "conv" in alone


def test_phases_follow_disc_start():
    starts = {None: [0], 0: [0], 3: [0, 3]}
    for disc_start, firsts in starts.items():
        config = _config("kl", f"autoencoder_stage.adversarial.disc_start={disc_start}")
        assert [phase.first for phase in _stage(config).phases] == firsts


@pytest.mark.parametrize("kind", KINDS)
def test_both_players_move_once_the_game_is_on(kind):
    config = _config(kind)
    stage = _stage(config)
    states = [jax.jit(stage.create)(jax.random.key(0))]
    for phase in stage.phases:
        state, metrics = jax.jit(phase.step)(states[-1], {}, {"image": _images(8)})
        states.append(state)
        assert not metrics["skipped"][0]
    before, alone, joined = states

    def moved(a, b):
        return optax.tree.norm(optax.tree.sub(a, b)) > 1e-6

    assert moved(before.params, alone.params) and moved(alone.params, joined.params)
    assert not moved(before.adversary.params, alone.adversary.params)
    assert moved(alone.adversary.params, joined.adversary.params)
    assert moved(alone.adversary.variables, joined.adversary.variables)
    assert joined.step == 2
    if kind == "vq":
        assert moved(before.variables, alone.variables)


def test_micro_batches_keep_the_gradient_and_pass_statistics_on():
    config = _config("kl", "autoencoder_stage.adversarial.disc_factor=1e-9")
    state = jax.jit(_stage(config).create)(jax.random.key(0))
    results = []
    for count in (1, 2):
        config.autoencoder_stage.micro_batches = count
        step = _stage(config).phases[-1].step
        results.append(jax.jit(step)(state, {}, {"image": _images(8)}))
    (whole, a), (parts, b) = results
    norm = "norm_1"
    stats = [s.adversary.variables["batch_stats"][norm]["mean"] for s in (whole, parts)]
    start = state.adversary.variables["batch_stats"][norm]["mean"]
    # Three passes of a tenth each, or six.
    ratio = optax.tree.norm(stats[1] - start) / optax.tree.norm(stats[0] - start)
    np.testing.assert_allclose(ratio, (1 - 0.9**6) / (1 - 0.9**3), rtol=0.1)
    np.testing.assert_allclose(b["l1"][0], a["l1"][0], rtol=0.05)
    assert a["l1"][1] == b["l1"][1] == 8


def test_actnorm_starts_from_the_first_reconstructions():
    config = _config("kl", "autoencoder_stage.adversarial.net.norm=actnorm")
    stage = _stage(config)
    state = jax.jit(stage.create)(jax.random.key(0))
    leaves = jax.tree.leaves(state.adversary.variables)
    assert leaves and not any(leaves)
    step = jax.jit(stage.phases[-1].step)
    state, _ = step(state, {}, {"image": _images(8)})
    assert all(jax.tree.leaves(state.adversary.variables))
    scale = state.adversary.params["norm_1"]["scale"]
    assert np.abs(scale - 1).max() > 0.1
    again, _ = step(state, {}, {"image": _images(8, seed=1)})
    # Nothing but Adam moves it now.
    assert np.abs(again.adversary.params["norm_1"]["scale"] - scale).max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_changes_nothing(kind):
    config = _config(kind)
    stage = _stage(config)
    step = jax.jit(stage.phases[-1].step)
    state = jax.jit(stage.create)(jax.random.key(0))
    state, _ = step(state, {}, {"image": _images(8)})
    bad = _images(8)
    bad[3, 2, 1] = np.nan
    for count in (1, 2):
        new, metrics = step(state, {}, {"image": bad})
        assert new.step == state.step + 1 and new.skipped == count
        same = new.replace(step=state.step, skipped=state.skipped)
        jax.tree.map(np.testing.assert_array_equal, same, state)
        assert metrics["skipped"][0] == 1
        assert metrics["loss"] == (0, 0) and np.all(np.isfinite(metrics["l1"]))
        state = new
    state, metrics = step(state, {}, {"image": _images(8)})
    assert state.skipped == 0 and metrics["loss"][1] == 1


def test_mixed_precision_keeps_float32_where_it_matters():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        stage = _stage(_config("kl", f"dtype={dtype}"))
        state = jax.jit(stage.create)(jax.random.key(0))
        state, metrics = jax.jit(stage.phases[-1].step)(
            state, {}, {"image": _images(8)}
        )
        losses[dtype] = metrics["loss"][0]
        for leaf in jax.tree.leaves((state.params, state.opt_state, state.adversary)):
            assert leaf.dtype in (jnp.float32, jnp.int32)
    np.testing.assert_allclose(*losses.values(), rtol=0.02)


def test_codes_are_counted():
    values = {
        "latent_mean": np.array([1.0, 3.0]),
        "latent_square": np.array([1.25, 9.0]),
        "code_uses": np.array([0.0, 2.0, 2.0, 0.0]),
        "loss": np.float64(5),
    }
    shown = autoencoder_loss.summarize(values, steps=10)
    assert shown["loss"] == 5 and shown["latent_mean"] == 2
    assert shown["latent_std/0"] == 0.5 and shown["latent_std/1"] == 0
    assert shown["dead_codes"] == 0.5 and shown["code_tokens"] == 40
    np.testing.assert_allclose(shown["perplexity"], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_panels_show_input_reconstruction_and_prior(kind):
    stage = _stage(_config(kind))
    state = jax.jit(stage.create)(jax.random.key(0))
    panels = stage.panels(train_state.averaged(state), {})
    assert list(panels) == ["input", "reconstruction", "prior"]
    for x in panels.values():
        assert x.shape == (8, 16, 16, 3) and np.all(np.isfinite(x))
    assert np.std(panels["prior"], axis=0).max() > 1e-3


# ---- Latents -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_latents_have_unit_variance_under_their_statistics(kind):
    config = _config(kind)
    net = model_lib.build_autoencoder(config)
    params = _params(config, net)[0]["autoencoder"]
    source = sources.load("synthetic", "train", resolution=16, count=70)
    facts = step_autoencoder.latent_statistics(net, params, source, config.data.ops, 32)
    assert facts["images"] == 70
    first_stage = first_stage_lib.FirstStage(
        params, jnp.float32(facts["mean"]), jnp.float32(facts["std"])
    )
    x = source.fields["image"].astype(np.float32) / 127.5 - 1
    moments = first_stage_lib.encode_moments(net, params, x)

    @jax.jit
    @jax.vmap
    def draw(key):
        return first_stage_lib.sample_moments(net, first_stage, moments, key)

    z = draw(jax.random.split(jax.random.key(0), 64))
    np.testing.assert_allclose(z.mean((0, 1, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(z.std((0, 1, 2, 3)), 1, atol=0.1)
    # Without the noise of drawing: the variance of a mixture of Gaussians.
    means, variances = first_stage_lib.mean_and_variance(net, moments)
    means, variances = np.float64(means), np.float64(variances)
    variance = means.var((0, 1, 2)) + variances.mean((0, 1, 2))
    np.testing.assert_allclose(np.sqrt(variance), facts["std"], rtol=1e-4)
    np.testing.assert_allclose(means.mean((0, 1, 2)), facts["mean"], atol=1e-4)
    # And decoding undoes the change of scale.
    mode = jnp.float32(means)
    raw = net.apply({"params": params}, mode, method="decode")
    scaled = (mode - first_stage.mean[None, None, None]) / first_stage.std[
        None, None, None
    ]
    decoded = first_stage_lib.decode(net, first_stage, scaled)
    np.testing.assert_allclose(decoded, raw, atol=1e-3)


# ---- Mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("autoencoder_stage.adversarial.disc_loss=hing", r"disc_loss: 'hing'; did you"),
        ("autoencoder_stage.adversarial.net.norm=batches", r"net: norm 'batches'"),
        ("autoencoder_stage.adversarial.net.n_layers=5", r"net: images of 16x16"),
        ("autoencoder_stage.loss.pixel_loss=l3", r"pixel_loss: 'l3'"),
    ],
)
def test_a_wrong_setting_is_named(override, message):
    config = _config("kl", override)
    net, mesh = model_lib.build_autoencoder(config), sharding.make_mesh(config.mesh)
    with pytest.raises(UserError, match=f"^autoencoder_stage.*{message}"):
        step_autoencoder.check(config, net, mesh)


def test_disc_losses_are_the_ones_by_name():
    assert set(adversarial.DISC_LOSSES) == {"hinge", "vanilla"}
