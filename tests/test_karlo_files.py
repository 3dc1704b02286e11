"""Karlo's checkpoints as runs: a UNet alone, whose conditions lie elsewhere."""

import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import preset_of, released
from ldm_jax.config import UserError
from ldm_jax.convert import __main__ as convert_main
from ldm_jax.convert import compvis, networks, plans, whole
from ldm_jax.nets import unet, unet_variants
from tests import runs, test_preset_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL = dict(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    num_head_channels=16,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
DECODER = SMALL | dict(
    in_channels=3,
    out_channels=6,
    attention_resolutions=(2,),
    added_kv=True,
    context_dim=24,
    num_classes="clip",
    adm_in_channels=64,
)
UPSCALER = SMALL | dict(
    in_channels=6,
    out_channels=3,
    attention_resolutions=(),
    disable_middle_transformer=True,
)


def _arrays(options):
    """A UNet's arrays under CompVis' names, at random."""
    net = unet.UNet(**options)
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    rng = np.random.default_rng(0)
    flat = {k: 0.1 * rng.normal(size=shape) for k, shape in shapes.items()}
    flat = {k: value.astype(np.float32) for k, value in flat.items()}
    params = traverse_util.unflatten_dict(flat, sep="/")
    return params, networks.export_network(net, {"params": params}, "compvis")


def _config(preset, options):
    config = config_lib.load(f"{runs.CONFIGS / 'unclip.py'}:{preset}")
    config.resolution = 16
    with config.unlocked():
        config.unet = options
    return config


def _clip(folder):
    """A whole CLIP of transformers, small."""
    text = dict(
        vocab_size=len(runs.tokenizer()),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=32
    )
    pytest.importorskip("torch")
    transformers.CLIPModel(config).save_pretrained(folder)
    return str(folder)


def _written(tmp_path, config):
    """The command's spec of a config."""
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    path = tmp_path / "spec.py"
    path.write_text(
        "import pathlib\n"
        "from ldm_jax import config\n"
        "def get_config(arg=None):\n"
        f"    text = pathlib.Path({str(tmp_path / 'config.json')!r}).read_text()\n"
        "    return config.from_json(text)\n"
    )
    return str(path)


def test_a_decoder_takes_its_conditions_from_where_its_config_says(tmp_path):
    params, arrays = _arrays(DECODER)
    source = tmp_path / "decoder.safetensors"
    arrays = {f"model.{key}": value for key, value in arrays.items()}
    safetensors_numpy.save_file(arrays, source)
    config, clip = _config("karlo_decoder", DECODER), _clip(tmp_path / "clip")
    runs.tokenizer().save_pretrained(tmp_path / "tokenizer")
    tower = dict(kind="clip", dim=32, depth=2, heads=2, max_seq_len=20)
    for name in ("text", "pooled"):
        section = config.conditioners[name]
        more = {"projection_dim": 32} if name == "pooled" else {"zero_padding": True}
        with config.unlocked():
            section.net = tower | more
        section.update(dict(length=20, weights=clip))
        section.tokenizer.name = str(tmp_path / "tokenizer")
    picture = config.conditioners.picture
    with config.unlocked():
        picture.net = dict(
            dim=32, depth=2, heads=2, image_size=16, patch_size=8, projection_dim=32
        )
    picture.weights = clip
    spec = _written(tmp_path, config)
    convert_main.main([str(source), str(tmp_path / "run"), f"--config={spec}"])
    model = ldm_jax.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, dict(model.params["unet"]), params)
    encoders = model.first_stage.encoders
    assert encoders.keys() == {"text", "pooled", "picture"}
    state = safetensors_numpy.load_file(pathlib.Path(clip) / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    np.testing.assert_array_equal(encoders["text"]["token_emb"], state[key])
    image = np.zeros((1, 16, 16, 3), np.uint8)
    given = {"caption": ["a red circle"], "image": image}
    assert model.sample(inputs=given, steps=2, sampler="ddpm").shape == (1, 16, 16, 3)
    again = released.load(str(source), spec)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    config.conditioners.pooled.weights = str(tmp_path / "gone")
    with pytest.raises(UserError, match="pooled.weights: no file or folder .*gone"):
        released.load(str(source), _written(tmp_path, config))


def test_an_upscalers_first_net_is_taken(tmp_path):
    params, arrays = _arrays(UPSCALER)
    old = "middle_block.2."
    arrays = {
        (key.replace(old, "middle_block.1.") if key.startswith(old) else key): value
        for key, value in arrays.items()
    }
    both = {f"model_first_steps.{key}": value for key, value in arrays.items()}
    both |= {f"model_last_step.{key}": value + 1 for key, value in arrays.items()}
    source = tmp_path / "sr.safetensors"
    safetensors_numpy.save_file(both, source)
    spec = _written(tmp_path, _config("karlo_sr", UPSCALER))
    model = ldm_jax.load(source, config=spec)
    jax.tree.map(np.testing.assert_array_equal, dict(model.params["unet"]), params)
    small = np.zeros((1, 4, 4, 3), np.uint8)
    assert model.sample(inputs={"low_res": small}, steps=2).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("preset", ["karlo_decoder", "karlo_sr"])
def test_released_ones_are_recognised(preset):
    options = unet_variants.VARIANTS[preset]
    plan = compvis.unet_plan(unet.UNet(**options))
    prefix = {"karlo_decoder": "model.", "karlo_sr": "model_first_steps."}[preset]
    arrays = test_preset_of._arrays(prefix, plan)
    config = preset_of.config_of(whole.Whole(whole.with_prefix(arrays)))
    assert config.preset == f"configs/unclip.py:{preset}"
