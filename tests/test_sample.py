"""Sampling from a workdir: same seed same picture, no training package, good errors."""

import copy
import dataclasses
import subprocess
import sys
import textwrap
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import draw, first_stage, picture, sample
from ldm_jax import model as model_lib
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.data import openmoji_scenes, sources
from ldm_jax.diffusion import samplers, tiling
from ldm_jax.evaluate import run_report
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")
PROMPTS = ["a red circle", "a blue square", "a green cross"]
BLOCKED = ("tensorflow", "tensorflow_datasets", "torch", "clu", "tensorboard")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    runs.untrained(workdir, runs.debug())
    return workdir


@pytest.fixture(scope="module")
def loaded(workdir):
    return ldm_jax.load(workdir)


def _distance(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.fixture(scope="module")
def pictures(loaded):
    return loaded.sample(PROMPTS)


def test_pictures_are_uint8_and_differ(pictures, loaded):
    size = loaded.config.resolution
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, size, size, 3)
    assert _distance(pictures[0], pictures[1]) > 8


def test_picture_i_is_the_same_in_every_batch(pictures, loaded):
    assert _distance(loaded.sample(PROMPTS, batch_size=2), pictures) <= 1
    assert _distance(loaded.sample(PROMPTS[0])[0], pictures[0]) <= 1
    np.testing.assert_array_equal(loaded.sample(PROMPTS), pictures)


def test_every_picture_has_its_own_noise(loaded):
    twins = loaded.sample([PROMPTS[0]] * 3)
    assert _distance(twins[0], twins[1]) > 8


def test_seed_prompt_guidance_and_steps_matter(pictures, loaded):
    assert _distance(loaded.sample(PROMPTS, seed=1), pictures) > 8
    assert _distance(loaded.sample(PROMPTS[::-1])[0], pictures[0]) > 1
    assert _distance(loaded.sample(PROMPTS, guidance_scale=9.0), pictures) > 1
    assert _distance(loaded.sample(PROMPTS, guidance_scale=1.0), pictures) > 1
    assert _distance(loaded.sample(PROMPTS, steps=3), pictures) > 1


def test_the_spacing_is_the_config_s_unless_told(loaded, pictures):
    config = copy.deepcopy(loaded.config)
    config.sample.spacing = "trailing"
    spaced = dataclasses.replace(loaded, config=config)
    trailing = loaded.sample(PROMPTS, spacing="trailing")
    np.testing.assert_array_equal(spaced.sample(PROMPTS), trailing)
    assert (trailing != pictures).any()
    uniform = spaced.sample(PROMPTS, spacing="uniform")
    np.testing.assert_array_equal(uniform, pictures)


def test_eta_adds_noise_of_the_seed(pictures, loaded):
    noisy = loaded.sample(PROMPTS, eta=1.0)
    assert _distance(noisy, pictures) > 1
    np.testing.assert_array_equal(loaded.sample(PROMPTS, eta=1.0), noisy)
    assert _distance(loaded.sample(PROMPTS, eta=1.0, seed=1), noisy) > 8
    assert _distance(loaded.sample(PROMPTS, eta=1.0, batch_size=2), noisy) <= 1


def test_guidance_and_seed_are_traced_not_compiled_in(loaded):
    draw._draw_fn.cache_clear()
    for scale, seed in ((2.0, 0), (5.0, 1), (0.5, 2)):
        loaded.sample(PROMPTS, guidance_scale=scale, seed=seed)
    assert draw._draw_fn.cache_info().misses == 1
    settings = draw.Settings(steps=loaded.config.sample.steps, dropped=(("text",),))
    assert draw._draw_fn(loaded.model, settings)._cache_size() == 1


def test_pil_output_holds_the_same_pictures(pictures, loaded):
    images = loaded.sample(PROMPTS, output="pil")
    assert all(isinstance(image, Image.Image) for image in images)
    np.testing.assert_array_equal(np.stack([np.asarray(x) for x in images]), pictures)


def test_a_long_prompt_warns_with_what_was_cut(loaded):
    length = loaded.config.conditioners.text.length
    words = ["red"] * (length - 2) + ["blue", "square"]
    with pytest.warns(UserWarning, match=f"longer than {length} tokens.*'blue square'"):
        cut = loaded.sample(" ".join(words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(loaded.sample(" ".join(words[:-2])), cut)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sampler="ddimm"), r"--sampler: 'ddimm'; did you mean 'ddim'\?"),
        (dict(steps=0), "--steps: 0; choose from 1 to 1000"),
        (dict(steps=1001), "--steps: 1001; choose from 1 to 1000"),
        (dict(output="jpg"), "output: 'jpg'; choose array or pil"),
        (dict(prompts=[]), "caption: none given"),
    ],
)
def test_wrong_options_are_named(loaded, options, words):
    with pytest.raises(UserError, match=words):
        loaded.sample(**{"prompts": PROMPTS} | options)


# ---- Where pictures begin, and what else may be asked for ----------------------------


@pytest.fixture(scope="module")
def photo(loaded):
    rng = np.random.default_rng(0)
    side = loaded.config.resolution
    return rng.integers(0, 255, (1, side, side, 3), np.uint8)


def test_strength_0_is_the_first_stage_s_copy_and_1_is_drawn_anew(loaded, photo):
    def drawn(prompt, strength):
        inputs = {"caption": [prompt], "init_image": photo}
        return loaded.sample(inputs=inputs, strength=strength, steps=4)

    keys = jax.vmap(jax.random.fold_in, (0, None))(draw.row_keys(0, 1), draw.INIT)
    tools = model_lib.make_tools(loaded.model, loaded.first_stage, keys)
    z = tools.encode_image(jnp.asarray(photo / 127.5 - 1.0, jnp.float32), keys)
    copy = first_stage.decode(loaded.model.autoencoder, loaded.first_stage, z)
    copy = picture.to_uint8(np.asarray(copy))
    for prompt in PROMPTS[:2]:  # which has no say in it
        assert _distance(drawn(prompt, 0.0), copy) <= 1
    anew = loaded.sample(PROMPTS[0], steps=4)
    assert _distance(drawn(PROMPTS[0], 1.0), anew) <= 1
    assert _distance(copy, anew) > 8
    half = drawn(PROMPTS[0], 0.5)
    assert _distance(half, copy) > 1 and _distance(half, anew) > 1


def test_strength_is_traced(loaded, photo):
    draw._draw_fn.cache_clear()
    for strength in (0.1, 0.5, 0.9):
        inputs = {"caption": PROMPTS[:1], "init_image": photo}
        loaded.sample(inputs=inputs, strength=strength)
    settings = draw.Settings(steps=loaded.config.sample.steps, dropped=(("text",),))
    assert draw._draw_fn(loaded.model, settings)._cache_size() == 1


def test_what_a_mask_keeps_is_kept_to_the_pixel(loaded, photo):
    mask = np.zeros(photo.shape[:3], np.uint8)
    mask[:, :7, 3:] = 1
    inputs = {"caption": PROMPTS, "init_image": photo, "mask": mask}
    for name in ("ddim", "dpmpp_2m", "euler_ancestral"):
        drawn = loaded.sample(inputs=inputs, sampler=name, steps=3)
        kept = np.broadcast_to(mask[..., None] == 0, drawn.shape)
        np.testing.assert_array_equal(drawn[kept], np.repeat(photo, 3, 0)[kept])
        assert _distance(drawn[~kept], np.repeat(photo, 3, 0)[~kept]) > 8


def test_a_latent_s_cell_is_kept_where_all_of_its_pixels_are():
    mask = np.zeros((1, 8, 12, 1), np.float32)
    mask[0, 3, 5] = 1
    expected = np.ones((1, 4, 6, 1))
    expected[0, 1, 2] = 0
    np.testing.assert_array_equal(draw._kept(mask, (4, 6, 3)), expected)


def test_inversion_brings_a_picture_back(loaded, photo):
    """Unguided, the same steps there and back, from the same latent."""
    inputs = {"caption": PROMPTS[:1], "init_image": photo}
    copy = loaded.sample(inputs=inputs, strength=0.0)
    noise = loaded.invert(photo, PROMPTS[0], steps=100)
    assert noise.shape == (1, *loaded.model.latent_shape)
    options = dict(guidance_scale=1.0, steps=100)
    back = loaded.sample(PROMPTS[0], noise=noise, **options)
    other = loaded.sample(PROMPTS[0], **options)

    def error(x):
        return np.mean(np.abs(x.astype(float) - copy))

    print(error(back), error(other))
    assert error(back) < error(other) / 4


def test_interpolation_begins_and_ends_with_the_pictures_themselves(loaded, pictures):
    frames = loaded.sample(PROMPTS, interpolate=5)
    assert len(frames) == 5
    for frame, row in ((0, 0), (2, 1), (4, 2)):
        assert _distance(frames[frame], pictures[row]) <= 1
    assert _distance(frames[1], frames[0]) > 1 and _distance(frames[1], frames[2]) > 1
    one = loaded.sample(PROMPTS[0], count=2, interpolate=3, batch_size=2)
    assert _distance(one[0], pictures[0]) <= 1


def test_interpolation_goes_between_noises_that_are_given(loaded):
    noise = np.random.default_rng(0).normal(size=(3, *loaded.model.latent_shape))
    ends = loaded.sample(PROMPTS, noise=noise)
    frames = loaded.sample(PROMPTS, noise=noise, interpolate=5)
    assert _distance(frames[[0, 2, 4]], ends) <= 1


def test_another_size_and_windows_of_the_trained_one(loaded):
    side = loaded.config.resolution
    size = (2 * side, side)
    wide = loaded.sample(PROMPTS, size=size)
    assert wide.shape == (3, *size, 3)
    tiled = loaded.sample(PROMPTS, size=size, tile=True)
    assert tiled.shape == wide.shape and _distance(tiled, wide) > 1
    same = loaded.sample(PROMPTS, size=side, tile=True)
    assert _distance(same, loaded.sample(PROMPTS)) <= 1
    with pytest.raises(UserError, match="--size: 17x16; the nets need multiples of 2"):
        loaded.sample(PROMPTS, size=(17, 16))


def test_a_layout_s_windows_are_told_their_places(tmp_path):
    config = config_lib.load(f"{runs.CONFIGS}/layout2img.py:debug")
    config.conditioners.layout.encode_crop = True
    runs.untrained(tmp_path, config)
    model = ldm_jax.load(tmp_path)
    boxes = np.array([[[0.1, 0.2, 0.6, 0.9], [0.5, 0.0, 1.0, 1.0]]], np.float32)
    inputs = {"boxes": boxes, "categories": np.array([[3, 5]])}
    wide, (h, w) = model.sized((32, 16)), model.model.latent_shape[:2]
    keys = draw.row_keys(0, 1)

    def contexts(crop, window=None):
        columns = inputs | {"crop": np.array([crop], np.float32)}
        fields = conditioning.prepare(wide.conditioners, columns)
        rows = draw.Rows(fields, keys)
        return draw.encode(
            wide, model.params, rows, model.first_stage, None, [["layout"]], window
        )

    whole = (0.0, 0.0, 1.0, 1.0)
    frames = tiling.frames(wide.latent_shape[:2], (h, w))
    assert len(frames) == 3
    _, each = contexts(whole, (h, w))
    for number, (x, y, width, height) in enumerate(frames):
        _, own = contexts((x, y, x + width, y + height))
        context = each.conds.context[:, number]
        np.testing.assert_allclose(context, own.context, atol=5e-5)
    assert np.abs(each.conds.context[:, 0] - each.conds.context[:, 1]).max() > 1e-3

    drawn = model.sample(inputs=inputs, size=(32, 16), tile=True, steps=2)
    assert drawn.shape == (1, 32, 16, 3)
    same = model.sample(inputs=inputs | {"crop": [whole]}, steps=2)
    assert _distance(same, model.sample(inputs=inputs, steps=2)) == 0
    part = model.sample(inputs=inputs | {"crop": [(0, 0, 0.5, 0.5)]}, steps=2)
    assert _distance(part, same) > 1


def test_training_reads_what_part_of_a_scene_is_shown():
    config = config_lib.load(f"{runs.CONFIGS}/layout2img.py:crops")
    source = sources.Source(openmoji_scenes.columns("train", 32, 12, (1, 2), 0.5), "")
    for encode_crop in (True, False):
        config.conditioners.layout.encode_crop = encode_crop
        model = runs.build(config)
        raw = run_report.raw_conditions(model, source, config.data.ops)
        assert ("crop" in raw) == encode_crop
    config.conditioners.layout.encode_crop = True
    tokens = conditioning.prepare(runs.build(config).conditioners, source.fields)
    crops = {tuple(row[-2:]) for row in tokens["layout"]}
    assert len(crops) > 8  # another part in nearly every scene


def test_progress_ends_near_the_picture(loaded):
    drawn, rows = (loaded.sample(PROMPTS, steps=8, progress=x) for x in (False, True))
    assert rows.shape == (3, 8, *drawn.shape[1:])
    away = np.abs(rows.astype(float) - drawn[:, None]).mean((0, 2, 3, 4))
    print(away)
    assert away[-1] < 3 and away[-1] < away[0] / 4


def test_two_conditions_apart_are_added_one_by_one():
    """Each half goes without what the scales to come will guide towards."""
    made = runs.build(runs.debug()).conditioners["text"]
    model = types.SimpleNamespace(
        conditioners={
            "a": made,
            "b": made,
            "fixed": dataclasses.replace(made, guided=False),
        }
    )
    halves, scales = draw.guided_halves(model, {"b": 2.0, "a": [3.0, 1.0]})
    assert halves == (("b", "a"), ("a",))
    assert scales[0] == 2.0 and scales[1].tolist() == [3.0, 1.0]
    assert draw.guided_halves(model, 5.0) == ((("a", "b"),), [5.0])
    assert draw.guided_halves(model, 1.0) == ((), [])


def test_guidance_may_change_over_the_steps_or_be_apart(loaded, pictures):
    same = loaded.sample(PROMPTS, guidance_scale=[3.0, 3.0])
    assert _distance(same, pictures) <= 1
    same = loaded.sample(PROMPTS, guidance_scale={"text": 3.0})
    assert _distance(same, pictures) <= 1
    assert _distance(loaded.sample(PROMPTS, guidance_scale=[9.0, 1.0]), pictures) > 1
    assert _distance(loaded.sample(PROMPTS, guidance_rescale=1.0), pictures) > 1
    with pytest.raises(UserError, match="--guidance: 'txt' guides nothing.*'text'"):
        loaded.sample(PROMPTS, guidance_scale={"txt": 2.0})
    assert sample.parse_guidance("7.5") == 7.5
    assert sample.parse_guidance("7.5,1") == [7.5, 1.0]
    assert sample.parse_guidance("text=2;map=3,1") == {"text": 2.0, "map": [3.0, 1.0]}


@pytest.mark.parametrize("name", sorted(samplers.SAMPLERS.keys() - {"ddim"}))
def test_every_sampler_draws(loaded, pictures, name):
    drawn = loaded.sample(PROMPTS, sampler=name, steps=3)
    assert drawn.shape == pictures.shape and drawn.std() > 8
    assert _distance(drawn[0], drawn[1]) > 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(eta=0.5, sampler="heun"), "--eta: 0.5; only ddim, euler_ancestral have"),
        (dict(eta=1.5), "--eta: 1.5; choose from 0"),
        (dict(spacing="log"), "--spacing: 'log'; choose one of"),
        (dict(strength=0.5), "--strength: 0.5, but there is no --init_image"),
        (dict(interpolate=1), "--interpolate: 1 pictures between 3"),
        (
            dict(
                inputs={"init_image": np.zeros([1, 16, 16, 3], np.uint8)}, interpolate=4
            ),
            "--interpolate: 4, but --init_image is one place",
        ),
        (dict(noise=np.zeros([3, 4, 4, 3])), r"noise: \[4, 4, 3\]; it must be latents"),
        (dict(inputs={"mask": np.zeros([1, 16, 16])}), "--mask: this model needs an"),
        (
            dict(inputs={"init_image": np.zeros([1, 9, 9, 3], np.uint8)}),
            "init_image: pictures of 9x9; those of the model are 16x16, so give 16x16",
        ),
        (
            dict(inputs={"init_image": np.zeros([1, 16, 16, 3])}),
            "init_image: float64.*give 8-bit RGB",
        ),
        (
            dict(
                inputs={
                    "init_image": np.zeros([1, 16, 16, 3], np.uint8),
                    "mask": np.zeros([1, 9, 9]),
                }
            ),
            "mask: 9x9, but the picture is 16x16",
        ),
    ],
)
def test_wrong_requests_are_named(loaded, options, words):
    with pytest.raises(UserError, match=words):
        loaded.sample(PROMPTS, **options)


# ---- Import isolation ----------------------------------------------------------------

ISOLATED = """
import importlib.machinery
import sys
blocked = {blocked!r}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
import ldm_jax
assert "jax" not in sys.modules, "import ldm_jax must stay light"
from ldm_jax import draw, first_stage, picture, sample
from ldm_jax import model as model_lib
sample.main(["--workdir={workdir}", "--prompt={prompt}", "--out={out}"])
images = ldm_jax.load("{workdir}").sample(["{prompt}"], output="array")
import numpy as np
from PIL import Image
np.testing.assert_array_equal(images[0], np.asarray(Image.open("{out}")))
for name in blocked:
    assert name not in sys.modules, name
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " was not blocked")
print("isolated")
"""


@pytest.mark.slow
def test_sampling_needs_no_training_package(workdir, tmp_path):
    length = runs.debug().conditioners.text.length
    prompt, out = "red " * (length - 2) + "blue square", tmp_path / "a.png"
    code = ISOLATED.format(blocked=BLOCKED, workdir=workdir, prompt=prompt, out=out)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("isolated\n")
    # One line a warning, and the same twice is said once.
    line = f"warning: prompt longer than {length} tokens; cut at the end: 'blue square'"
    assert done.stderr.lower().splitlines().count(line) == 1
    assert done.stderr.count("cut at the end") == 1
