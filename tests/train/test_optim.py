import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.train import optim
from tests import parity

SECTION = dict(
    learning_rate=0.5,
    scale_lr=False,
    schedule="constant",
    cycles={},
    warmup_steps=0,
    final_fraction=0.0,
    b1=0.9,
    b2=0.999,
    eps=1.0,
    weight_decay=0.0,
    clip_norm=0.0,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 9: 2.0, 50: 2.0}),
        ("linear", {0: 0.5, 3: 2.0, 4: 2.0, 7: 1.1, 10: 0.2, 50: 0.2}),
        ("cosine", {0: 0.5, 3: 2.0, 4: 2.0, 7: 1.1, 10: 0.2, 50: 0.2}),
    ],
)
def test_learning_rate_literals(schedule, expected):
    rate = optim.learning_rate(
        peak=2.0, steps=10, schedule=schedule, warmup_steps=4, final=0.1
    )
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, err_msg=str(step))


def test_cosine_is_not_linear():
    rate = optim.learning_rate(
        peak=1.0, steps=12, schedule="cosine", warmup_steps=0, final=0.0
    )
    np.testing.assert_allclose(rate(4), 0.75, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warm_up_the_first_step_is_the_peak(warmup):
    rate = optim.learning_rate(
        peak=3.0, steps=10, schedule="constant", warmup_steps=warmup, final=0.0
    )
    np.testing.assert_allclose([rate(0), rate(1)], [3.0, 3.0])


def test_unknown_schedule_is_named():
    with pytest.raises(UserError, match="optim.schedule: 'step'; choose one of"):
        optim.make_optimizer(ConfigDict(SECTION | dict(schedule="step")), 10, 1)


def _first_update(grad, param=0.0, **options):
    tx, _ = optim.make_optimizer(ConfigDict(SECTION | options), 10, 3)
    params = {"w": jnp.full(len(grad), param)}
    updates, _ = tx.update({"w": jnp.asarray(grad)}, tx.init(params), params)
    return updates["w"]


def test_adamw_literals():
    """The first step: -lr (g / (|g| + eps) + weight_decay · w)."""
    grad = np.array([3.0, -1.0, 0.0], np.float32)
    np.testing.assert_allclose(_first_update(grad), [-0.375, 0.25, 0], rtol=1e-5)
    decayed = _first_update(grad, param=2.0, weight_decay=0.1)
    np.testing.assert_allclose(decayed, [-0.475, 0.15, -0.1], rtol=1e-5)


def test_clipping_is_by_global_norm():
    grad = np.array([30.0, 40.0], np.float32)  # norm 50, clipped to 5: 3 and 4
    clipped = _first_update(grad, clip_norm=5.0)
    np.testing.assert_allclose(clipped, [-0.5 * 3 / 4, -0.5 * 4 / 5], rtol=1e-5)
    np.testing.assert_allclose(
        _first_update(grad), [-0.5 * 30 / 31, -0.5 * 40 / 41], rtol=1e-5
    )


def test_clipping_does_not_change_the_structure_of_the_state():
    """A run whose gradients exploded may go on from its checkpoint with clipping."""
    params = {"w": jnp.zeros(2)}
    with_and_without = [
        optim.make_optimizer(ConfigDict(SECTION | dict(clip_norm=norm)), 10, 1)[0]
        for norm in (0.0, 1.0)
    ]
    one, other = (jax.tree.structure(tx.init(params)) for tx in with_and_without)
    assert one == other


def test_scaled_learning_rate_is_that_of_each_image():
    section = ConfigDict(SECTION | dict(learning_rate=4.5e-6, scale_lr=True))
    _, schedule = optim.make_optimizer(section, 10, 24)
    np.testing.assert_allclose(schedule(5), 1.08e-4, rtol=1e-6)
    section.scale_lr = False
    _, schedule = optim.make_optimizer(section, 10, 24)
    np.testing.assert_allclose(schedule(5), 4.5e-6, rtol=1e-6)


def test_scaled_learning_rate_reaches_the_update():
    grad = np.array([3.0], np.float32)
    np.testing.assert_allclose(
        _first_update(grad, scale_lr=True), [3 * -0.375], rtol=1e-5
    )


# --- latent-diffusion's schedules

TWO_CYCLES = dict(
    warm_up_steps=(4, 2),
    f_start=(0.2, 0.0),
    f_max=(1.0, 0.5),
    f_min=(0.1, 0.3),
    cycle_lengths=(12, 10),
)
ONE_CYCLE = {field: values[:1] for field, values in TWO_CYCLES.items()}


def _fixture_cycles(case):
    """The reference's arguments under our names."""
    names = dict(
        lr_start="f_start",
        lr_max="f_max",
        lr_min="f_min",
        max_decay_steps="cycle_lengths",
    )
    return {
        names.get(name, name): tuple(v) if isinstance(v, list) else (v,)
        for name, v in case.items()
    }


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("warmup_cosine", "warmup_cosine"),
        ("warmup_cosine2", "warmup_cosine2"),
        ("linear", "warmup_linear"),
        ("linear_sd", "warmup_linear"),
    ],
)
def test_reference_schedules(name, schedule):
    """On the host to float64, traced (as the optimizer does it) to float32."""
    meta, _, io = parity.load("lr_schedulers")
    cycles = optim.read_cycles(schedule, _fixture_cycles(meta["cases"][name]))
    factor = optim.cycle_factor(io["n"], schedule=schedule, cycles=cycles)
    np.testing.assert_allclose(factor, io[name], rtol=1e-12)

    rate = optim.learning_rate(
        peak=1.0,
        steps=7,
        schedule=schedule,
        warmup_steps=5,
        final=0.5,
        cycles=_fixture_cycles(meta["cases"][name]),
    )
    traced = jax.jit(jax.vmap(rate))(jnp.asarray(io["n"], jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, io[name], rtol=5e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Steps 12 and 22 are the last of their cycles; after that the value stays.
        (
            "warmup_cosine2",
            {0: 0.2, 2: 0.6, 4: 1.0, 8: 0.55, 12: 0.1}
            | {13: 0.25, 14: 0.5, 18: 0.4, 22: 0.3, 23: 0.3, 99: 0.3},
        ),
        (
            "warmup_linear",
            {0: 0.2, 2: 0.6, 4: 0.7, 8: 0.4, 12: 0.1}
            | {13: 0.25, 14: 0.46, 18: 0.38, 22: 0.3, 23: 0.3, 99: 0.3},
        ),
    ],
)
def test_cycles_literals(schedule, expected):
    cycles = optim.read_cycles(schedule, TWO_CYCLES)
    for step, value in expected.items():
        factor = optim.cycle_factor(step, schedule=schedule, cycles=cycles)
        np.testing.assert_allclose(factor, value, rtol=1e-12, err_msg=str(step))


def test_cycle_without_warm_up_starts_at_its_top():
    cycles = ONE_CYCLE | dict(warm_up_steps=(0,))
    cycles = optim.read_cycles("warmup_cosine", cycles)
    with np.errstate(all="raise"):
        values = [
            optim.cycle_factor(n, schedule="warmup_cosine", cycles=cycles)
            for n in (0, 6)
        ]
    np.testing.assert_allclose(values, [1.0, 0.55], rtol=1e-12)


def test_cycles_scale_the_learning_rate_of_the_update():
    options = dict(schedule="warmup_cosine", cycles=ONE_CYCLE, scale_lr=True)
    update = _first_update(np.array([3.0], np.float32), **options)
    np.testing.assert_allclose(update, [0.2 * 3 * -0.375], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(f_mix=(1.0, 1.0)),
            "optim.cycles.f_mix: no such field; did you mean 'f_m",
        ),
        (dict(f_min=(0.1,)), "optim.cycles.f_min: 1 number(s), but .*_steps has 2"),
        (dict(f_max=1.0), "optim.cycles.f_max: 1.0; give a tuple"),
        (dict(f_max=()), "optim.cycles.f_max: (); give a tuple"),
        (dict(f_max=(1.0, "2")), "optim.cycles.f_max: (1.0, '2'); give a tuple"),
        (dict(f_max=(1.0, float("nan"))), "optim.cycles.f_max: (1.0, nan); give a"),
        (dict(warm_up_steps=(4, 10)), "optim.cycles.warm_up_steps: 10 in cycle 1"),
        (dict(warm_up_steps=(-1, 2)), "optim.cycles.warm_up_steps: -1 in cycle 0"),
        (dict(cycle_lengths=(12, 0)), "optim.cycles.warm_up_steps: 2 in cycle 1"),
    ],
)
def test_bad_cycles_are_named(change, message):
    cycles = TWO_CYCLES | change
    section = ConfigDict(SECTION | dict(schedule="warmup_cosine2", cycles=cycles))
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=pattern) as error:
        optim.make_optimizer(section, 10, 1)
    assert "\n" not in str(error.value)


def test_missing_cycles_are_named():
    section = ConfigDict(SECTION | dict(schedule="warmup_linear"))
    with pytest.raises(UserError, match="optim.cycles.warm_up_steps: missing, and"):
        optim.make_optimizer(section, 10, 1)


def test_warmup_cosine_has_one_cycle():
    section = ConfigDict(SECTION | dict(schedule="warmup_cosine", cycles=TWO_CYCLES))
    with pytest.raises(UserError, match="cycle_lengths: 2 cycles, but .* has one; set"):
        optim.make_optimizer(section, 10, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            dict(learning_rate=4.5e-6, scale_lr=True)
            | dict(schedule="cosine", warmup_steps=1000),
            "learning rate 5.4e-05 = 4.5e-06 x 12 images, cosine after 1000 warm-up"
            " steps",
        ),
        (dict(learning_rate=1e-4), "learning rate 0.0001, constant"),
        (
            dict(learning_rate=2e-3, schedule="linear", final_fraction=0.02),
            "learning rate 0.002, linear to 4e-05",
        ),
        (
            dict(schedule="warmup_cosine2", cycles=TWO_CYCLES, warmup_steps=1000),
            "learning rate 0.5, warmup_cosine2 in cycles of 12, 10 steps",
        ),
        (
            dict(schedule="warmup_cosine", cycles=ONE_CYCLE),
            "learning rate 0.5, warmup_cosine in a cycle of 12 steps",
        ),
    ],
)
def test_describe(options, words):
    assert optim.describe(ConfigDict(SECTION | options), 12) == words
