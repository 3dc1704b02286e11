"""Runs in the layouts of others, and back: bit for bit, or with the same pictures."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import convert, draw, preset_of, publish, publish_folder
from ldm_jax.conditioning import conditioners as conditioning
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import towers, whole, write_config
from ldm_jax.nets import autoencoder, clip_vision
from tests import runs

ATOL = 5e-5
pytestmark = pytest.mark.usefixtures("fast_compile")


def _config(*overrides, **net):
    """The debug preset with a CLIP tower, which diffusers has too."""
    changed = ("unet.context_dim=64", "diffusion.parameterization=eps", *overrides)
    config = runs.debug(*changed)
    made = dict(kind="clip", dim=64, depth=2, heads=1, max_seq_len=20)
    with config.unlocked():
        config.conditioners.text.net = made | {"activation": "quick_gelu"} | net
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with random params, whose latents have a spread for each channel."""
    folder = tmp_path_factory.mktemp("run") / "run"
    runs.untrained(folder, _config(), spread=0.1)
    return folder


@pytest.fixture(scope="module")
def folder(run):
    """The run as diffusers has it; to be copied, not changed."""
    path = run.parent / "folder"
    publish_folder.write(ldm_jax.load(run), path)
    return path


def _scaled(model, mean, std):
    first_stage = model.first_stage.replace(
        mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32)
    )
    return dataclasses.replace(model, first_stage=first_stage)


def _same(again, model):
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(again.params, model.params)
    same(again.first_stage.params, model.first_stage.params)
    np.testing.assert_array_equal(again.first_stage.mean, model.first_stage.mean)
    np.testing.assert_array_equal(again.first_stage.std, model.first_stage.std)


def _drawn(model, inputs, noise):
    """Pictures in [0, 1], not yet of 8 bits."""
    drawn = draw.draw(
        model.model,
        model.params,
        model.first_stage,
        conditioning.prepare(model.model.conditioners, inputs),
        count=1,
        settings=draw.Settings(steps=4),
        guidance_scale=3.0,
        noise=noise,
    )
    return np.clip(np.asarray(drawn.images) / 2 + 0.5, 0, 1)


def _spec(run, tmp_path, tokenizers="tokenizers"):
    """A config file that has the run's config, and names its tokenizers."""
    path = tmp_path / "same.py"
    path.write_text(
        "import pathlib\n"
        "from ldm_jax import config\n"
        "def get_config(arg=None):\n"
        f"    run = pathlib.Path({str(run)!r})\n"
        "    made = config.from_json((run / 'config.json').read_text())\n"
        "    for name, section in made.conditioners.items():\n"
        "        if 'tokenizer' in section:\n"
        "            section.tokenizer.train_vocab_size = None\n"
        f"            section.tokenizer.name = str(run / {tokenizers!r} / name)\n"
        "    return made\n"
    )
    return str(path)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_there_and_back_is_bit_for_bit(tmp_path, run, name):
    model = ldm_jax.load(run)
    c = model.model.latent_shape[-1]
    model = _scaled(model, [0.0] * c, [1 / 0.18215] * c)
    path = tmp_path / name
    (publish_folder.write if name == "folder" else publish.write_file)(model, path)
    again = ldm_jax.load(path, config=_spec(run, tmp_path))
    _same(again, model)
    if name == "folder":
        told = json.loads((path / "vae" / "config.json").read_text())["scaling_factor"]
    else:
        told = safetensors_numpy.load_file(path)["scale_factor"]
    assert told == 0.18215
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    pictures = (m.sample("a red circle", steps=2) for m in (again, model))
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize(
    "task",
    ["class_conditional", "semantic", "layout2img", "inpainting", "pixel", "upscale"],
)
def test_the_conditions_of_other_tasks_go_there_and_back(tmp_path, task):
    runs.untrained(tmp_path / "run", config_lib.load(f"{runs.CONFIGS / task}.py:debug"))
    model = ldm_jax.load(tmp_path / "run")
    c = model.model.latent_shape[-1]
    model = _scaled(model, [0.0] * c, [1.0] * c)
    publish.write_file(model, tmp_path / "x.safetensors")
    spec = _spec(tmp_path / "run", tmp_path)
    _same(ldm_jax.load(tmp_path / "x.safetensors", config=spec), model)


def test_a_tower_that_stops_early_goes_there_and_back(tmp_path):
    config = _config(
        "diffusion.schedule=cosine", activation="gelu", layer="penultimate"
    )
    runs.untrained(tmp_path / "run", config)
    model, spec = ldm_jax.load(tmp_path / "run"), _spec(tmp_path / "run", tmp_path)
    c = model.model.latent_shape[-1]
    model = _scaled(model, [0.0] * c, [2.0] * c)
    publish.write_file(model, tmp_path / "x.safetensors")
    arrays = safetensors_numpy.load_file(tmp_path / "x.safetensors")
    prefix = "cond_stage_model.model.transformer.resblocks."
    assert {k[len(prefix)] for k in arrays if k.startswith(prefix)} == {"0"}
    _same(ldm_jax.load(tmp_path / "x.safetensors", config=spec), model)
    publish_folder.write(model, tmp_path / "folder")
    _same(ldm_jax.load(tmp_path / "folder", config=spec), model)


def test_a_spread_of_each_channel_goes_into_the_autoencoder(tmp_path, run):
    model = ldm_jax.load(run)
    c = model.model.latent_shape[-1]
    model = _scaled(model, np.linspace(-1, 1, c), np.linspace(0.5, 2, c))
    publish.write_file(model, tmp_path / "x.safetensors")
    arrays = safetensors_numpy.load_file(tmp_path / "x.safetensors")
    assert arrays["scale_factor"] == 1
    again = ldm_jax.load(tmp_path / "x.safetensors", config=_spec(run, tmp_path))
    assert np.all(np.asarray(again.first_stage.std) == 1)
    noise = np.random.default_rng(0).normal(size=(2, *model.model.latent_shape))
    # The latents are the run's own; rounding moves a value of 8 bits here and there.
    drawn = [
        m.sample("a red circle", steps=2, noise=noise.astype(np.float32)).astype(int)
        for m in (again, model)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    x = np.random.default_rng(1).integers(0, 256, (1, *model.size, 3), np.uint8)
    z = [m.invert(x, "a red circle", steps=2) for m in (again, model)]
    np.testing.assert_allclose(*z, atol=2e-4)


def test_a_folder_is_recognised_by_its_parts(tmp_path, run):
    """No config: heads, noise and size are in its json files, the rest in shapes."""
    model = ldm_jax.load(run)
    publish_folder.write(model, tmp_path / "folder")
    again = ldm_jax.load(tmp_path / "folder")
    assert again.config.preset == preset_of.READ_OFF and again.size == model.size
    noise = np.random.default_rng(0).normal(size=(1, *model.model.latent_shape))
    pictures = [_drawn(m, {"caption": ["a red circle"]}, noise) for m in (again, model)]
    np.testing.assert_allclose(*pictures, atol=ATOL)


@pytest.mark.usefixtures("full_compile")
def test_diffusers_draws_the_same(tmp_path, run):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    model = ldm_jax.load(run)
    publish_folder.write(model, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, *model.model.latent_shape))
    noise = noise.astype(np.float32)
    side = model.size[0]
    # Its prompts are as long as the tokenizer says.
    pipeline.tokenizer.model_max_length = model.config.conditioners.text.length
    theirs = pipeline(
        "a red circle",
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        height=side,
        width=side,
        output_type="np",
    ).images
    ours = _drawn(model, {"caption": ["a red circle"]}, noise)
    np.testing.assert_allclose(ours, theirs, atol=ATOL)


@pytest.mark.usefixtures("full_compile")
def test_diffusers_fills_holes_the_same(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    latent = ("autoencoder.z_channels=4", "autoencoder.embed_dim=4")
    config = _config(*latent, "unet.in_channels=9", "unet.out_channels=4")
    with config.unlocked():
        config.conditioners.known = dict(kind="inpainting", convention="sd")
    runs.untrained(tmp_path / "run", config, spread=0.1)
    model = ldm_jax.load(tmp_path / "run")
    # Both draw the latent of what is known; without a variance they draw the same.
    quant = model.first_stage.params["quant_conv"]
    quant["kernel"] = quant["kernel"].at[..., 4:].set(0)
    quant["bias"] = quant["bias"].at[4:].set(-30)
    publish_folder.write(model, tmp_path / "folder")
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(
        tmp_path / "folder"
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.tokenizer.model_max_length = model.config.conditioners.text.length
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, *model.model.latent_shape)).astype(np.float32)
    image = rng.integers(0, 256, (1, *model.size, 3), np.uint8)
    mask = np.zeros((1, *model.size), np.uint8)
    mask[:, 4:11, 6:] = 1
    theirs = pipeline(
        "a red circle",
        image=torch.from_numpy(image.transpose(0, 3, 1, 2) / 255).float(),
        mask_image=torch.from_numpy(mask[:, None]).float(),
        num_inference_steps=4,
        guidance_scale=3.0,
        strength=1.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        height=model.size[0],
        width=model.size[1],
        output_type="np",
    ).images
    inputs = {"caption": ["a red circle"], "image": image, "mask": mask}
    ours = _drawn(model, inputs, noise)
    np.testing.assert_allclose(ours, theirs, atol=ATOL)


def test_the_command_goes_there_and_back(tmp_path, run, capsys):
    convert_main.main([str(run), str(tmp_path / "folder")])
    spec = _spec(run, tmp_path, tokenizers="nowhere")  # the folder has its own
    convert_main.main(
        [str(tmp_path / "folder"), str(tmp_path / "again"), f"--config={spec}"]
    )
    assert f"in {tmp_path / 'again'}" in capsys.readouterr().out
    model, again = ldm_jax.load(run), ldm_jax.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_the_command_goes_from_any_layout_to_any_other(tmp_path, run, capsys):
    """Bit for bit, without a run in between: folder, file, folder."""
    spec = f"--config={_spec(run, tmp_path)}"
    convert_main.main([str(run), str(tmp_path / "folder")])
    file = tmp_path / "model.safetensors"
    convert_main.main([str(tmp_path / "folder"), str(file), spec])
    assert f"folder as debug in {file}\n" in capsys.readouterr().out
    again = tmp_path / "again"
    convert_main.main([str(file), str(again), spec, "--diffusers"])
    model = ldm_jax.load(tmp_path / "folder", config=_spec(run, tmp_path))
    _same(ldm_jax.load(again, config=_spec(run, tmp_path)), model)
    for part in ("unet", "vae", "text_encoder"):
        there = sorted((tmp_path / "folder" / part).glob("*.safetensors"))
        assert len(there) == 1
        told, said = (
            safetensors_numpy.load_file(f)
            for f in (there[0], again / part / there[0].name)
        )
        jax.tree.map(np.testing.assert_array_equal, said, told)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("x.ckpt", [], "x.ckpt would be a pickle, which can run code where it is read"),
        ("x.safetensors", ["--diffusers"], "leave out either the flag or .safetensors"),
    ],
)
def test_a_destination_of_no_layout_is_a_line(
    tmp_path, run, capsys, name, flags, words
):
    with pytest.raises(SystemExit) as stopped:
        convert_main.main([str(run), str(tmp_path / name), *flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def _lacking(name):
    def change(folder):
        path = folder / name
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return change


def _holding(file, text):
    return lambda folder: (folder / file).write_text(text)


def _with(file, **changes):
    def change(folder):
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | changes))

    return change


PROCESS = "scheduler/scheduler_config.json"
UNET, VAE, TEXT = (f"{part}/config.json" for part in ("unet", "vae", "text_encoder"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_lacking("vae"), "vae has no weights in it, though model_index.json lists"),
        (_lacking("scheduler"), f"{PROCESS} is not there, though model_index.json"),
        (_lacking("tokenizer"), "tokenizer is not there, though model_index.json lis"),
        (_lacking(UNET), "unet/config.json is not there, though model_index.json"),
        (_lacking(VAE), "vae/config.json is not there, though model_index.json lists"),
        (_lacking(TEXT), "text_encoder/config.json is not there, though model_index"),
        (_with(PROCESS, beta_end=0.02), "diffusion: alphas_cumprod has 1000 values"),
        (_with(PROCESS, prediction_type="v_prediction"), "but SRC's net predicts v;"),
        (_with(PROCESS, beta_schedule="sigmoid"), "beta_schedule 'sigmoid'"),
        (_with(PROCESS, prediction_type="flow"), "prediction_type 'flow'"),
        (_with(PROCESS, beta_schedule=["linear"]), "beta_schedule ['linear']; only"),
        (_with(PROCESS, timestep_spacing=["x"]), "timestep_spacing ['x']; choose one"),
        (_with(PROCESS, beta_start="x"), "beta_start 'x'; give a number above 0 and"),
        (_with(PROCESS, beta_end=20), "beta_end 20; give a number above 0 and at most"),
        (_with(PROCESS, num_train_timesteps="ten"), "'ten'; give a whole number"),
        (_with(PROCESS, num_train_timesteps=9.5), "9.5; give a whole number above 0"),
        (_with(PROCESS, trained_betas="x"), "trained_betas 'x'; give numbers above 0"),
        (_with(PROCESS, trained_betas=[0.1, "x"]), "trained_betas [0.1, 'x']; give"),
        (_with(VAE, scaling_factor=None), "vae/config.json has scaling_factor None;"),
        (_with(VAE, scaling_factor=0), "scaling_factor 0; give a number above 0"),
        (_with(VAE, scaling_factor=-1.0), "scaling_factor -1.0; give a number"),
        (_with(VAE, scaling_factor=np.nan), "scaling_factor nan; give a number"),
        (_with(VAE, scaling_factor=np.inf), "scaling_factor inf; give a number"),
        (_with(VAE, scaling_factor="x"), "scaling_factor 'x'; give a number above 0"),
        (_with(VAE, scaling_factor=True), "scaling_factor True; give a number above"),
        (_with(VAE, shift_factor=0.1), "shift_factor 0.1; only null is computed here"),
        (_with(VAE, latents_mean=[1, 2]), "latents_mean [1, 2]; only null is computed"),
        (_with(VAE, latents_std=[1, 2]), "latents_std [1, 2]; only null is computed"),
        (_with(VAE, block_out_channels=[64, 64]), "block_out_channels [64, 64]; its"),
        (_with(UNET, block_out_channels=[64]), "block_out_channels [64]; its arrays"),
        (_with(TEXT, num_hidden_layers=5), "num_hidden_layers 5; its arrays say 2, so"),
        (_with(UNET, sample_size="8"), "unet/config.json has sample_size '8'; give"),
        (_with(UNET, sample_size=[8, 16]), "sample_size [8, 16]; give one whole"),
        (_with(UNET, sample_size=[]), "sample_size []; give one whole number"),
        (_with(whole.INDEX, max_noise_level="x"), "max_noise_level 'x'; give a whole"),
        (_holding(whole.INDEX, "{"), "model_index.json can't be read"),
        (_holding(whole.INDEX, "[]"), "model_index.json holds [], which is no object"),
        (_holding(whole.INDEX, "3"), "model_index.json holds 3, which is no object"),
        (_holding(PROCESS, "[]"), f"{PROCESS} holds [], which is no object of"),
        (_holding(UNET, "null"), "unet/config.json holds None, which is no object"),
    ],
)
def test_a_folder_that_does_not_fit_is_a_line(
    tmp_path, run, folder, capsys, change, words
):
    shutil.copytree(folder, tmp_path / "folder")
    change(tmp_path / "folder")
    spec = _spec(run, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        convert_main.main(
            [str(tmp_path / "folder"), str(tmp_path / "new"), f"--config={spec}"]
        )
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_others_can_not_hold_is_a_line(tmp_path, run, capsys):
    runs.untrained(tmp_path / "words", runs.debug())
    with pytest.raises(UserError, match="length: 20, with a first stage of f = 2"):
        publish_folder.write(ldm_jax.load(tmp_path / "words"), tmp_path / "x")
    publish.write_file(ldm_jax.load(tmp_path / "words"), tmp_path / "x.safetensors")
    with pytest.raises(SystemExit):
        convert_main.main(
            [str(run / "tokenizers"), str(tmp_path / "y"), "--config=z.py"]
        )
    assert "error: --config: no file 'z.py'" in capsys.readouterr().err
    for words, said in (
        ([str(run), str(tmp_path / "words")], "is there already; name another"),
        ([str(run), "x", "--config=y.py"], "is a run, which has a config"),
        ([str(tmp_path / "x.safetensors"), str(tmp_path / "y")], "name a preset with"),
    ):
        with pytest.raises(SystemExit):
            convert_main.main(words)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_a_file_has_no_place_for_is_a_line(tmp_path, run):
    model = ldm_jax.load(run)
    remembering = model.first_stage.replace(memory={"near": np.zeros((3, 2))})
    config = runs.debug("unet.context_dim=32")
    with config.unlocked():
        label = dict(kind="class", num_classes=24, dim=32)
        config.conditioners.label = label
    runs.untrained(tmp_path / "two", config)
    vq = dataclasses.replace(
        model.model, autoencoder=autoencoder.VQModel(ch=32, n_embed=8)
    )
    for wrong, words in (
        (
            dataclasses.replace(model, first_stage=remembering),
            "conditioners.near: looks",
        ),
        (ldm_jax.load(tmp_path / "two"), "has one place for such nets"),
        (dataclasses.replace(model, model=vq), "a VQModel without 1x1 convolutions"),
    ):
        with pytest.raises(UserError, match=words):
            publish.write_file(wrong, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_towers_of_a_folder_are_found(tmp_path):
    """Of unCLIP: its picture tower and the statistics of embeddings."""
    tower = clip_vision.CLIPVisionTransformer(8, 4, 64, 1, 1, 16, "gelu")
    net = clip_vision.ImageVector(tower)
    init = functools.partial(tower.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, 8, 8, 3)))["params"]
    params = {
        "tower": runs.random_like(shapes),
        "mean": np.arange(16, dtype=np.float32),
        "std": np.full(16, 2, np.float32),
    }
    of_tower = {"params": params["tower"]}
    parts = {
        "image_encoder": convert.export_network(tower, of_tower, "huggingface"),
        "image_normalizer": {
            key: np.asarray(params[key])[None] for key in ("mean", "std")
        },
    }
    (tmp_path / "x").mkdir()
    for name, state in parts.items():
        (tmp_path / "x" / name).mkdir()
        safetensors_numpy.save_file(state, tmp_path / "x" / name / "model.safetensors")
    config = tmp_path / "x" / "image_encoder" / "config.json"
    config.write_text(json.dumps(write_config.clip_vision_of(tower)))
    index = dict.fromkeys(parts, ["library", "Class"]) | {"_class_name": "Some"}
    index |= {"feature_extractor": ["library", "Class"], "safety_checker": [None, None]}
    (tmp_path / "x" / whole.INDEX).write_text(json.dumps(index))
    found = whole.read_folder(tmp_path / "x", "SRC")
    assert found.process is None and found.scale_factor is None
    read = towers.params_of(net, found.arrays)
    jax.tree.map(np.testing.assert_array_equal, read, params)

    # Shards are put together, and a part that nobody knows is no part of a model.
    folder = tmp_path / "x" / "image_encoder"
    keys = sorted(parts["image_encoder"])
    (folder / "model.safetensors").unlink()
    for i, half in enumerate((keys[::2], keys[1::2])):
        state = {key: parts["image_encoder"][key] for key in half}
        safetensors_numpy.save_file(state, folder / f"{i}.safetensors")
    listed = folder / "model.safetensors.index.json"
    listed.write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(UserError, match="weight_map {'a': 1}; give a file's name for"):
        whole.read_folder(tmp_path / "x", "SRC")
    of_keys = {key: f"{i % 2}.safetensors" for i, key in enumerate(keys)}
    listed.write_text(json.dumps({"weight_map": of_keys}))
    again = whole.read_folder(tmp_path / "x", "SRC").arrays
    assert again.keys() == found.arrays.keys()
    (tmp_path / "x" / "image_encoder").rename(tmp_path / "x" / "prior")
    index = {"prior": ["library", "Class"]}
    (tmp_path / "x" / whole.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="prior is a part that is not known here"):
        whole.read_folder(tmp_path / "x", "SRC")
