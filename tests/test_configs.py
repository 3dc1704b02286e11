"""Every preset of every file in configs/: it builds, and its `debug` runs whole."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import first_stage
from ldm_jax import model as model_lib
from ldm_jax.conditioning import tokenizers
from ldm_jax.data import sources
from ldm_jax.evaluate import __main__ as evaluate_main
from ldm_jax.evaluate import run_report
from ldm_jax.train import checkpoint, loop, optim, sharding

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def _module(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PRESETS = [
    pytest.param(path, preset, id=f"{path.stem}:{preset}")
    for path in FILES
    for preset in _module(path).PRESETS
]


@pytest.fixture(scope="module")
def small_tokenizer():
    """In place of those that would be downloaded: variants know their own size."""
    return tokenizers.train_wordpiece(["a red circle", "a blue square"], 64)


def _first_stage(config):
    """(net, params) of a config's autoencoder, unbuilt."""
    net = model_lib.build_autoencoder(config)
    init = functools.partial(model_lib.init_autoencoder, config, net)
    return net, jax.eval_shape(init, jax.random.key(0))[0]


def _shapes(config, tokenizer):
    """(autoencoder, diffusion params and conditioners' params) of a config, unbuilt."""
    if "diffusion" not in config.stages:
        return None, _first_stage(config)[1:]
    model = model_lib.build(config, dict.fromkeys(config.conditioners, tokenizer))
    key = jax.random.key(0)

    def init(key):
        first, _ = model_lib.init_autoencoder(config, model.autoencoder, key)
        frozen = model_lib.conditioning.init(
            model.conditioners, key, lambda: model_lib.untrained_tools(config, model)
        )
        return first, model_lib.init_diffusion(config, model, key), frozen

    return model, jax.eval_shape(init, key)


_ONCE = {}


def _shapes_of(path, preset, tokenizer):
    """`_shapes` of a preset, once; two tests look, and large ones take seconds."""
    if (path, preset) not in _ONCE:
        config = _module(path).get_config(preset)
        _ONCE[path, preset] = _shapes(config, tokenizer)
    return _ONCE[path, preset]


def _millions(tree):
    return round(sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6, 2)


@pytest.mark.parametrize(("path", "preset"), PRESETS)
def test_every_preset_builds(path, preset, small_tokenizer):
    config = _module(path).get_config(preset)
    assert config.preset == preset
    net, first = _first_stage(config)
    h, w, c = first_stage.latent_shape(net, (config.resolution,) * 2)
    assert h == w <= config.resolution
    if first["autoencoder"]:  # diffusion on pixels has none
        assert first["autoencoder"]["decoder"]["conv_out"]["kernel"].shape[-1] == 3
    if "diffusion" not in config.stages:
        return
    model, (_, second, _) = _shapes_of(path, preset, small_tokenizer)
    assert set(second["conditioners"]) == {
        name for name, c in model.conditioners.items() if c.trainable and c.has_params
    }
    channels = second["unet"]["conv_out"]["kernel"].shape[-1]
    assert channels == (2 * c if model.learned_variance else c)


@pytest.mark.parametrize(
    ("preset", "autoencoder", "unet", "text", "to_logits"),
    [
        ("ldm_1p4b", 83.65, 872.30, 581.99, 30522 * 1281),
        ("cc256", 55.32, 403.62, 186.15, 30522 * 641),
        ("sd1", 83.65, 859.52, 123.06, 0),
        ("sd2", 83.65, 865.91, 340.39, 0),
        ("sd2_v", 83.65, 865.91, 340.39, 0),
    ],
)
def test_txt2img_presets_have_the_published_sizes(
    preset, autoencoder, unet, text, to_logits, small_tokenizer
):
    """As published; the text transformer lacks the reference's unused to_logits."""
    path = next(path for path in FILES if path.stem == "txt2img")
    config = _module(path).get_config(preset)
    _, (first, second, text_params) = _shapes(config, small_tokenizer)
    assert _millions(first["autoencoder"]) == autoencoder
    assert _millions(second["unet"]) == unet
    counted = sum(x.size for x in jax.tree.leaves(text_params["text"])) + to_logits
    assert round(counted / 1e6, 2) == text


@pytest.mark.parametrize(
    ("task", "preset", "unet"),
    [
        ("unconditional", "celeba256", 274.06),
        ("unconditional", "lsun_churches256", 294.97),
        ("class_conditional", "cin256", 394.98),
        ("class_conditional", "cin256_v2", 400.92),
        ("layout2img", "openimages256", 246.28),
        ("semantic", "landscapes256", 215.23),
        ("superres", "bsr_sr", 113.62),
        ("inpainting", "inpainting_big", 387.25),
        ("inpainting", "sd1", 859.54),
        ("inpainting", "sd2", 865.93),
        ("upscale", "x4", 473.4),
        ("retrieval", "rdm768", 1335.48),
        ("unclip", "unclip_h", 870.17),
        ("unclip", "unclip_l", 869.52),
        ("unclip", "karlo_decoder", 893.32),
        ("unclip", "karlo_sr", 729.7),
    ],
)
def test_task_presets_have_the_published_sizes(task, preset, unet, small_tokenizer):
    path = FILES[0].with_name(f"{task}.py")
    _, (_, second, _) = _shapes_of(path, preset, small_tokenizer)
    assert _millions(second["unet"]) == pytest.approx(
        unet, abs=0.01 + 0.05 * (task == "upscale")
    )
    if task == "layout2img":  # as published, with the reference's unused to_logits
        count = sum(x.size for x in jax.tree.leaves(second["conditioners"]))
        assert round((count + 8192 * 513) / 1e6, 2) == 58.86


@pytest.mark.parametrize(
    ("preset", "millions", "batch_size", "disc_start"),
    [
        ("kl_f4", 55.31, 80, 50_001),
        ("kl_f8", 83.65, 32, 50_001),
        ("kl_f16", 69.61, 48, 50_001),
        ("kl_f32", 103.88, 48, 50_001),
        ("kl_64x64x3", 55.31, 192, 50_001),
        ("kl_32x32x4", 83.65, 192, 50_001),
        ("kl_16x16x16", 69.61, 192, 50_001),
        ("kl_8x8x64", 103.88, 192, 50_001),
        ("vq_f4", 55.30 + 0.0246, 64, 250_001),
        ("vq_f4_noattn", 53.19 + 0.0246, 64, 250_001),
        ("vq_f8", 67.65 + 0.0655, 80, 250_001),
        ("vq_f8_n256", 67.65 + 0.001, 80, 250_001),
        ("vq_f16", 69.46 + 0.131, 112, 250_001),
        ("sd", 83.65, 32, 50_001),
        ("inpainting_big", 53.19 + 0.0246, 64, 250_001),
    ],
)
def test_first_stages_have_the_published_sizes(
    preset, millions, batch_size, disc_start
):
    """Codebooks, which the published counts leave apart, are added."""
    path = next(path for path in FILES if path.stem == "autoencoder")
    config = _module(path).get_config(preset)
    _, first = _first_stage(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(first)) / 1e6
    assert abs(count - millions) < 0.011
    section = config.autoencoder_stage
    assert config.batch_size == batch_size
    assert section.adversarial.disc_start == disc_start
    rate = optim.peak_learning_rate(section.optim, batch_size)
    assert rate == pytest.approx(4.5e-6 * batch_size)


@pytest.mark.parametrize(("path", "preset"), PRESETS)
def test_no_large_parameter_is_left_replicated(path, preset, small_tokenizer):
    config = _module(path).get_config(preset)
    config.mesh.update(dict(data=-1, fsdp=8, tensor=1))
    mesh = sharding.make_mesh(config.mesh)
    _, trees = _shapes_of(path, preset, small_tokenizer)
    assert sharding.unsharded(trees, mesh) == []


def _snapshot(workdir):
    return {
        path.relative_to(workdir): path.stat().st_mtime_ns
        for stage in ("autoencoder", "diffusion")
        for path in (workdir / stage).rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_debug_preset_trains_samples_and_is_scored(path, tmp_path, capsys):
    workdir = tmp_path / "run"
    config = _module(path).get_config("debug")
    assert loop.train(config, workdir)
    out = capsys.readouterr().out
    for stage in config.stages:
        assert f"{stage} 2/2" in out
        steps = checkpoint.Checkpoints(workdir / stage).steps()
        assert steps[0] == config[f"{stage}_stage"].steps

    draws = "diffusion" in config.stages
    if draws:
        loaded = ldm_jax.load(workdir)
        _, heldout = sources.load_splits(config.data, config.resolution)
        n = config.report.retrieval_captions  # as the report drew: compiled already
        rows = run_report.raw_conditions(loaded.model, heldout.take(n), config.data.ops)
        images = loaded.sample(inputs=rows, count=None if rows else n)
        assert images.dtype == np.uint8
        assert images.shape == (n, config.resolution, config.resolution, 3)
        assert not np.array_equal(images[0], images[1])

    if path.stem not in ("autoencoder", "txt2img"):
        return  # the rest is the same for every task
    before = _snapshot(workdir)
    assert loop.train(config, workdir)
    out = capsys.readouterr().out
    for stage in config.stages:
        assert f"{stage}: finished at step 2, kept as it is" in out
    assert "1/2" not in out
    assert _snapshot(workdir) == before

    (workdir / "report.json").unlink()
    evaluate_main.main([f"--workdir={workdir}"])
    out = capsys.readouterr().out
    scores = json.loads((workdir / "report.json").read_text())
    if "autoencoder" in config.stages:
        assert "PSNR" in out
        held_out = scores["reconstruction, held out"]
        assert held_out["images"] == config.report.eval_images
        assert np.isfinite(held_out["psnr"])
    name = "samples_training" if draws else "autoencoder_reconstruction"
    assert (workdir / "pictures" / f"{name}.png").stat().st_size > 0
