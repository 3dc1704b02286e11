"""Released models without a preset's name: recognised, by their YAML, or read off."""

import copy
import dataclasses
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import model as model_lib
from ldm_jax import preset_of, publish, released
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import compvis, original_yaml, whole
from ldm_jax.nets import autoencoder, unet, unet_variants
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


CONDITIONS = {
    "configs/class_conditional.py:cin256_v2": {"embedding.weight": (1001, 512)},
    "configs/semantic.py:landscapes256": {"channel_mapper.weight": (3, 182, 1, 1)},
}


def _arrays(prefix, plan):
    """What torch would hold of a plan's net: shapes without memory."""
    arrays = {}
    for rule in plan.rules:
        array = np.broadcast_to(np.float32(0), plan.shapes[rule.path])
        shape = list(rule.layout.to_torch(array).shape)
        if rule.part is not None:
            shape[0] *= rule.part[1]
        arrays[prefix + rule.key] = np.broadcast_to(np.float32(0), shape)
    return arrays


def _file_of(spec):
    """The arrays of a released model of a preset, without those of text nets."""
    config = config_lib.load(str(runs.CONFIGS.parent / spec))
    options = model_lib.kwargs_of("unet", config.unet, unet_variants.VARIANTS)
    net = model_lib.build_autoencoder(config)
    schedule, _ = model_lib.build_process(config)
    return whole.Whole(
        _arrays(whole.UNET, compvis.unet_plan(unet.UNet(**options)))
        | _arrays(whole.FIRST_STAGE, compvis.autoencoder_plan(net))
        | {"alphas_cumprod": np.float32(schedule.alphas_cumprod)}
        | {
            f"cond_stage_model.{key}": np.broadcast_to(np.float32(0), shape)
            for key, shape in CONDITIONS.get(spec, {}).items()
        }
    )


@pytest.mark.parametrize(
    "spec",
    [
        "configs/txt2img.py:sd1",
        "configs/txt2img.py:cc256",
        "configs/inpainting.py:inpainting_big",
        "configs/inpainting.py:sd1",
        "configs/upscale.py:x4",
        "configs/semantic.py:landscapes256",
        "configs/class_conditional.py:cin256_v2",
        "configs/unconditional.py:lsun_churches256",
        "configs/layout2img.py:openimages256",
        "configs/retrieval.py:rdm768",
    ],
)
def test_a_preset_is_recognised_by_shapes(spec):
    config = preset_of.config_of(_file_of(spec))
    assert config.preset == spec
    assert preset_of.told(config) == [f"recognised as {spec}"]


def test_what_weights_do_not_tell_is_asked_for():
    source = _file_of("configs/txt2img.py:sd2")
    with pytest.raises(UserError, match=r"give .*:sd2 \(eps\) or .*:sd2_v \(v\)"):
        preset_of.config_of(source)
    said = dict(schedule="linear", linear_start=0.00085, linear_end=0.012)
    source = source._replace(process=said | {"parameterization": "v"})
    assert preset_of.config_of(source).preset == "configs/txt2img.py:sd2_v"


def test_a_condition_of_another_kind_is_another_model():
    """Stable Diffusion's UNet under a class embedder is no Stable Diffusion."""
    source = _file_of("configs/txt2img.py:sd1")
    embedder = {
        "cond_stage_model.embedding.weight": np.broadcast_to(np.float32(0), (10, 768))
    }
    config = preset_of.config_of(source._replace(arrays=source.arrays | embedder))
    assert config.preset == preset_of.READ_OFF
    assert [section.kind for section in config.conditioners.values()] == ["class"]


def test_first_stages_are_told_apart_by_where_they_attend():
    options = dict(ch_mult=(1, 2), resolution=32, z_channels=4)
    nets = [
        autoencoder.AutoencoderKL(**options, attn_resolutions=where)
        for where in ((), (16,), (32,))
    ]
    signs = [
        preset_of._signs(unet.UNet(**unet_variants.VARIANTS["sd1"]), net)
        for net in nets
    ]
    assert len(set(signs)) == 3


def test_context_that_joins_is_told_from_none():
    options = dict(unet_variants.VARIANTS["karlo_decoder"], num_classes="added")
    nets = [
        unet.UNet(**options),
        unet.UNet(**options | dict(context_dim=768)),
        unet.UNet(**options | dict(added_kv=False)),
    ]
    first = autoencoder.Identity()
    assert len({preset_of._signs(net, first) for net in nets}) == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, its file for others, and the YAML that would have come with it."""
    folder = tmp_path_factory.mktemp("made")
    config = runs.debug()
    runs.untrained(folder / "run", config)
    model = ldm_jax.load(folder / "run")
    # A file holds one factor for all channels of the latent.
    c = model.model.latent_shape[-1]
    first = model.first_stage.replace(mean=np.zeros(c), std=np.full(c, 2.0))
    model = dataclasses.replace(model, first_stage=first)
    publish.write_file(model, folder / "released.safetensors")
    tokenizer = folder / "run" / "tokenizers" / "text"
    diffusion = config.diffusion
    tree = {
        "model": {
            "params": {
                "parameterization": diffusion.parameterization,
                "linear_start": diffusion.linear_start,
                "linear_end": diffusion.linear_end,
                "scale_factor": 0.5,
                "image_size": model.model.latent_shape[0],
                "unet_config": {"params": config.unet.to_dict()},
                "first_stage_config": {
                    "params": {
                        "embed_dim": config.autoencoder.embed_dim,
                        "ddconfig": config.autoencoder.to_dict(),
                    }
                },
            }
        }
    }
    return folder, model, tokenizer, tree


def _write(folder, tree, name="released.yaml"):
    plain = yaml.safe_load(yaml.dump(_lists(tree)))
    (folder / name).write_text(yaml.dump(plain))
    return folder / name


def _lists(tree):
    if isinstance(tree, dict):
        return {key: _lists(value) for key, value in tree.items()}
    return [_lists(v) for v in tree] if isinstance(tree, list | tuple) else tree


def _changed(tree, **changes):
    params = tree["model"]["params"]
    return {"model": {"params": params | changes}}


def _drawn(model):
    return model.sample(["a red circle"], steps=2, guidance_scale=2.0, seed=1)


def test_the_original_yaml_is_enough(tmp_path, made, monkeypatch):
    folder, model, tokenizer, tree = made
    monkeypatch.setattr(preset_of, "shipped", lambda *_, **__: iter(()))
    path = _write(tmp_path, tree)
    flag = f"--config.conditioners.text.tokenizer.name={tokenizer}"
    source = str(folder / "released.safetensors")
    convert_main.main([source, str(tmp_path / "run"), f"--config={path}", flag])
    again = ldm_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(_drawn(again), _drawn(model))
    assert again.config.preset == preset_of.READ_OFF
    assert again.config.resolution == model.config.resolution
    assert again.config.diffusion.parameterization == "v"


def test_a_yaml_beside_the_file_is_found(tmp_path, made, capsys, monkeypatch):
    folder, model, tokenizer, tree = made
    monkeypatch.setattr(preset_of, "shipped", lambda *_, **__: iter(()))
    source = tmp_path / "mine.safetensors"
    source.write_bytes((folder / "released.safetensors").read_bytes())
    _write(tmp_path, tree, "mine.yaml")
    flag = f"--config.conditioners.text.tokenizer.name={tokenizer}"
    convert_main.main([str(source), str(tmp_path / "run"), flag])
    said = capsys.readouterr().out
    assert "of no preset; read off its weights" in said
    assert "  unet.model_channels = 32\n" in said
    np.testing.assert_array_equal(_drawn(ldm_jax.load(tmp_path / "run")), _drawn(model))


def test_a_file_is_loaded_without_a_run(tmp_path, made, monkeypatch):
    folder, model, tokenizer, tree = made
    config = copy.deepcopy(model.config)
    section = config.conditioners.text.tokenizer
    with section.ignore_type():
        section.update(dict(name=str(tokenizer), train_vocab_size=None))
    named = [("configs/mine.py:named", config)]
    monkeypatch.setattr(preset_of, "shipped", lambda: iter(named))
    source, path = str(folder / "released.safetensors"), _write(tmp_path, tree)
    np.testing.assert_array_equal(
        _drawn(ldm_jax.load(source, str(path))), _drawn(model)
    )
    assert released.is_source(source) and not released.is_source(folder / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            dict(unet_config={"params": {"model_channels": 64, "num_heads": 1}}),
            "unet_config.params.model_channels 64, but SRC's arrays are of 32",
        ),
        (
            dict(first_stage_config={"params": {"embed_dim": 3}}),
            "first_stage_config.params.embed_dim 3, but SRC's arrays are of",
        ),
        (dict(linear_end=0.5), "alphas_cumprod"),
        (dict(linear_end="abc"), "has linear_end 'abc', which is no number above 0"),
        (dict(timesteps="many"), "has timesteps 'many', which is no number above 0"),
        (dict(scale_factor=0), "has scale_factor 0, which is no number above 0"),
        (dict(scale_factor=0.25), "has scale_factor 0.25, but SRC's is 0.5"),
        (
            dict(unet_config={"params": {"num_heads": "lots"}}),
            "the UNet is not that of --config",
        ),
        (
            dict(first_stage_config={"target": "ldm.models.autoencoder.VQModel"}),
            "of ldm.models.autoencoder.VQModel, but SRC's arrays are of a Autoenc",
        ),
        (
            dict(cond_stage_config={"target": "x.FrozenCLIPEmbedder", "params": {}}),
            "of x.FrozenCLIPEmbedder, but SRC's arrays are of a TextTransformer",
        ),
        (dict(unet_config=None), "UNet is not told by the arrays alone (the number"),
    ],
)
def test_a_yaml_of_another_model_is_a_line(tmp_path, made, capsys, change, words):
    folder, _, tokenizer, tree = made
    path = _write(tmp_path, _changed(tree, **change))
    source, run = folder / "released.safetensors", tmp_path / "run"
    flag = f"--config.conditioners.text.tokenizer.name={tokenizer}"
    with pytest.raises(SystemExit) as stopped:
        convert_main.main([str(source), str(run), f"--config={path}", flag])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and not run.exists()
    assert words in line


@pytest.mark.parametrize("text", ["model: [", "a: 1", "model: {params: {}}"])
def test_what_is_no_yaml_of_a_model_is_a_line(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="--config: .*; give the YAML of"):
        original_yaml.add(whole.Whole({}), path)


def test_a_yaml_tells_of_a_first_stage_that_is_missing(tmp_path, made):
    folder, _, _, tree = made
    source = released.open_source(str(folder / "released.safetensors"))
    arrays = {k: v for k, v in source.arrays.items() if not k.startswith("first_")}
    with pytest.raises(UserError, match="SRC: nothing in it begins with 'first_stage_"):
        original_yaml.add(source._replace(arrays=arrays), _write(tmp_path, tree))


def test_what_arrays_do_not_tell_may_be_set(tmp_path, made, monkeypatch):
    folder, model, tokenizer, _ = made
    monkeypatch.setattr(preset_of, "shipped", lambda *_, **__: iter(()))
    ours = model.model
    convert_main.main(
        [
            str(folder / "released.safetensors"),
            str(tmp_path / "run"),
            f"--config.conditioners.text.tokenizer.name={tokenizer}",
            f"--config.conditioners.text.net.heads={ours.conditioners['text'].net.heads}",
            f"--config.unet.num_head_channels={ours.unet.num_head_channels}",
            f"--config.unet.legacy={ours.unet.legacy}",
            f"--config.autoencoder.norm_groups={ours.autoencoder.norm_groups}",
            f"--config.diffusion.parameterization={ours.parameterization}",
            f"--config.resolution={model.config.resolution}",
        ]
    )
    np.testing.assert_array_equal(_drawn(ldm_jax.load(tmp_path / "run")), _drawn(model))


@pytest.mark.parametrize(
    ("options", "source", "arrays", "kinds"),
    [
        ({}, dict(given="LR_image"), {}, ["low_res"]),
        (
            dict(num_classes=10),
            dict(pipeline=whole.UPSCALE, noise_levels=10),
            {},
            ["noisy_low_res"],
        ),
        ({}, {}, {"cond_stage_model.channel_mapper.weight": (3, 12)}, ["semantic"]),
    ],
)
def test_what_a_yaml_says_is_given(options, source, arrays, kinds):
    net = unet.UNet(6, 32, 3, 1, (), num_heads=1, **options)
    first = autoencoder.VQModel(embed_dim=3)
    arrays = {key: np.zeros((*shape, 1, 1)) for key, shape in arrays.items()}
    found = preset_of._conditions(whole.Whole(arrays, **source), net, first, None)
    assert [section.kind for section in found.values()] == kinds
    if arrays:
        assert found["segmentation"].num_classes == 12


def test_a_layout_is_no_caption():
    net = unet.UNet(3, 32, 3, 1, (1,), num_heads=1, num_classes=None)
    source = whole.Whole({}, given="coordinates_bbox")
    with pytest.raises(UserError, match="it is given layouts, and how many classes"):
        preset_of._conditions(source, net, autoencoder.VQModel(embed_dim=3), None)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_a_table_may_have_been_halved(dtype):
    """Those of released models are told apart still."""
    for spec in (f"{runs.TXT2IMG}:sd1", f"{runs.CONFIGS}/layout2img.py:openimages256"):
        config = config_lib.load(spec)
        schedule, _ = model_lib.build_process(config)
        table = schedule.alphas_cumprod.astype(dtype)
        assert preset_of.is_table_of(schedule, table)
        with warnings.catch_warnings():  # of schedules from what has no digits
            warnings.simplefilter("error")
            found = preset_of._process(whole.Whole({"alphas_cumprod": table}))
        assert found["linear_end"] == config.diffusion.linear_end
        assert found["linear_start"] == config.diffusion.linear_start
    for wrong in (np.zeros(()), np.zeros(0), np.zeros((2, 500))):
        assert not preset_of.is_table_of(schedule, wrong)
        with pytest.raises(UserError, match="alphas_cumprod is of no schedule"):
            preset_of._process(whole.Whole({"alphas_cumprod": wrong}))


def test_a_process_is_read_off_its_table():
    for config in (
        config_lib.load(f"{runs.TXT2IMG}:sd1"),
        config_lib.load(str(runs.CONFIGS / "upscale.py:x4")),
    ):
        schedule, _ = model_lib.build_process(config)
        table = {"alphas_cumprod": np.float32(schedule.alphas_cumprod)}
        found = preset_of._process(whole.Whole(table))
        for name in ("schedule", "timesteps", "linear_start", "linear_end"):
            assert found[name] == config.diffusion[name]
    table["alphas_cumprod"] = np.linspace(0.99, 0.01, 1000)
    with pytest.raises(UserError, match="alphas_cumprod is of no schedule"):
        preset_of._process(whole.Whole(table))


def test_first_stages_are_told_apart():
    nets = [
        autoencoder.KINDS[dict(kwargs).get("kind", "kl")](
            **{k: v for k, v in kwargs.items() if k != "kind"}
        )
        for kwargs in autoencoder.VARIANTS.values()
        if kwargs.get("kind") != "identity"
    ]
    signs = [preset_of._signs_of_first_stage(net) for net in nets]
    same = {"sd", "inpainting_big", "rdm"}  # other names of the same
    assert len(set(signs)) == len(signs) - len(same)


def test_a_yaml_tells_the_scale_of_latents(tmp_path, made):
    folder, _, _, tree = made
    source = released.open_source(str(folder / "released.safetensors"))
    arrays = {k: v for k, v in source.arrays.items() if k != "scale_factor"}
    source = source._replace(arrays=arrays)
    path = _write(tmp_path, tree)
    assert original_yaml.add(source, path).scale_factor == 0.5
    nothing = _write(tmp_path, _changed(tree, timesteps=None, low_scale_config="x"))
    assert original_yaml.add(source, nothing).process["timesteps"] == 1000
    by_std = _write(tmp_path, _changed(tree, scale_by_std=True), "by_std.yaml")
    assert original_yaml.add(source, by_std).scale_factor == 0.5
    whole_file = source._replace(arrays=arrays | {"scale_factor": np.float32(0.3)})
    assert original_yaml.add(whole_file, by_std).scale_factor is None
