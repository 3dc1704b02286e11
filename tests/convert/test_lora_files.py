"""LoRA's files: diffusers, PEFT and kohya, there and back, against diffusers itself."""

import json
import re
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ldm_jax import convert, lora
from ldm_jax.config import UserError
from ldm_jax.convert import compvis, lora_files
from ldm_jax.nets import text_encoder
from ldm_jax.nets import unet as unet_lib
from tests import parity

ATOL = 5e-5
SMALL = dict(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=4,
)
SPATIAL = SMALL | dict(use_spatial_transformer=True, context_dim=12)
WIDE = r"attn[12]/to_|qkv|proj_|conv[12]|skip|sample|emb_proj|conv_(in|out)|ff_"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _unet(**options):
    return unet_lib.UNet(**SPATIAL | options)


def _plain(**options):
    return unet_lib.UNet(**SMALL | options)


def _factors(net, rank, targets=WIDE, seed=0):
    """Random factors of all kernels whose path has `targets`."""
    rng, flat = np.random.default_rng(seed), {}
    for path, shape in compvis.unet_plan(net).shapes.items():
        if path.endswith("/kernel") and re.search(targets, path):
            flat[f"{path}/a"] = rng.normal(size=(*shape[:-1], rank))
            flat[f"{path}/b"] = rng.normal(size=(rank, shape[-1]))
    flat = {path: value.astype(np.float32) for path, value in flat.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _change(factors, scale):
    """{kernel's path: what factors add}."""
    flat = flax.traverse_util.flatten_dict(factors, sep="/")
    return {
        path[:-2]: scale * np.matmul(a, flat[f"{path[:-2]}/b"])
        for path, a in flat.items()
        if path.endswith("/a")
    }


@pytest.mark.parametrize(
    "net",
    [
        _unet(),
        _unet(use_linear_in_transformer=True),
        _unet(resblock_updown=True),
        _plain(use_new_attention_order=True),
        _plain(use_new_attention_order=False),
    ],
    ids=["conv", "linear", "updown", "new_order", "old_order"],
)
def test_factors_come_back_to_the_bit(net):
    factors = _factors(net, 3)
    state = convert.export_lora(net, factors, 3, 3)
    again, rank, alpha = convert.import_lora(net, state)
    _same(factors, again)
    assert (rank, alpha) == (3, 3.0)
    # Metadata that a reader may not see are not needed: the scale is in the arrays.
    scaled, _, alpha = convert.import_lora(net, convert.export_lora(net, factors, 3, 6))
    assert alpha == 3.0
    doubled = _change(factors, 2.0)
    _same(_change(scaled, 1.0), doubled)


@pytest.mark.parametrize("new_order", [True, False])
def test_what_is_added_is_what_whole_kernels_would_have(new_order):
    """The rows of exported arrays are those that `export_network` gives the kernels."""
    net = _plain(use_new_attention_order=new_order)
    factors = _factors(net, 2)
    shapes = compvis.unet_plan(net).shapes
    flat = {p: np.zeros(s, np.float32) for p, s in shapes.items()}
    flat |= _change(factors, 1.0)
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    whole = convert.export_network(net, {"params": params}, "diffusers")
    state = convert.export_lora(net, factors, 2, 2)
    assert any(".to_k." in key for key in state)
    for key, a in state.items():
        if ".lora_A." not in key:
            continue
        b = state[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("unet.").replace(".lora_A", "")
        product = np.tensordot(b.reshape(b.shape[:2]), a, 1)
        np.testing.assert_allclose(product, whole[name], atol=1e-5, err_msg=name)


def test_names_and_shapes_are_those_of_diffusers():
    net = _unet()
    state = convert.export_lora(net, _factors(net, 3), 3, 3)
    shapes = {key: value.shape for key, value in state.items()}
    assert shapes[f"unet.{Q}.lora_A.weight"] == (3, 32)
    assert shapes[f"unet.{Q}.lora_B.weight"] == (32, 3)
    res = "unet.down_blocks.1.resnets.0"
    assert shapes[f"{res}.conv1.lora_A.weight"] == (3, 32, 3, 3)
    assert shapes[f"{res}.conv1.lora_B.weight"] == (64, 3, 1, 1)
    assert shapes[f"{res}.conv_shortcut.lora_A.weight"] == (3, 32, 1, 1)


def _processor(key):
    name = key.replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")
    name = re.sub(r"(attn[12])\.", r"\1.processor.", name)
    return name.replace("to_out.0_lora", "to_out_lora")


def _down_up(key):
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def _kohya(key):
    name, part = re.fullmatch(r"unet\.(.+)\.(lora_[AB])\.weight", key).groups()
    part = {"lora_A": "lora_down", "lora_B": "lora_up"}[part]
    return f"lora_unet_{name.replace('.', '_')}.{part}.weight"


@pytest.mark.parametrize(
    ("rename", "targets"),
    [
        (lambda key: key.removeprefix("unet."), WIDE),
        (_down_up, WIDE),
        (_processor, "attn[12]/to_"),
        (_kohya, WIDE),
    ],
    ids=["bare", "down_up", "processor", "kohya"],
)
def test_older_layouts_are_read(rename, targets):
    net = _unet()
    factors = _factors(net, 2, targets)
    state = convert.export_lora(net, factors, 2, 2)
    again, *_ = convert.import_lora(net, {rename(k): v for k, v in state.items()})
    _same(factors, again)


def test_kohya_may_name_blocks_as_compvis_does_and_has_an_alpha():
    net = _unet()
    factors = _factors(net, 4, "down_0_attn_0/block_0/attn1/to_q")
    a, b = convert.export_lora(net, factors, 4, 4).values()
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    state = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    again, rank, alpha = convert.import_lora(
        net, state | {f"{name}.alpha": np.array(0.3)}
    )
    _same(factors, again)
    assert (rank, alpha) == (4, pytest.approx(0.3, abs=0))


def test_modules_of_other_ranks_and_alphas_become_alike():
    net = _unet()
    state, wanted = {}, {}
    for targets, rank, alpha in (("attn1/to_q", 2, 3.0), ("attn2/to_k", 5, 1.0)):
        factors = _factors(net, rank, targets)
        wanted |= _change(factors, alpha / rank)
        for key, value in convert.export_lora(net, factors, rank, rank).items():
            state[_kohya(key)] = value
            state[re.sub(r"\..*", ".alpha", _kohya(key))] = np.float32(alpha)
    factors, rank, alpha = convert.import_lora(net, state)
    assert rank == 5
    found = _change(factors, alpha / rank)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(found[path], value, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("new_order", [True, False])
def test_q_k_and_v_of_their_own_become_one_kernel(new_order):
    """Others' q, k and v have each their own first factor, or are not all there."""
    net = _plain(use_new_attention_order=new_order)
    wanted, state = 0, {}
    for seed, part in enumerate("qv"):
        factors = _factors(net, 2, "mid_attn/qkv", seed)
        kept = convert.export_lora(net, factors, 2, 2)
        kept = {k: v for k, v in kept.items() if f"to_{part}." in k}
        assert len(kept) == 2
        state |= kept
        alone, *_ = convert.import_lora(net, kept)
        wanted = wanted + _change(alone, 1.0)["mid_attn/qkv/kernel"]
    factors, rank, alpha = convert.import_lora(net, state)
    assert (rank, alpha) == (4, 4.0)
    found = _change(factors, 1.0)["mid_attn/qkv/kernel"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_metadata_of_a_file_tell_alpha(tmp_path):
    net = _unet()
    factors = _factors(net, 4, "attn1/to_(q|k)")
    state = convert.export_lora(net, factors, 4, 4)
    said = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {}}
    path = tmp_path / "lora.safetensors"

    def read():
        metadata = {"lora_adapter_metadata": json.dumps(said)}
        safetensors_numpy.save_file(state, path, metadata)
        return convert.import_lora(net, path)

    again, rank, alpha = read()
    _same(factors, again)
    assert (rank, alpha) == (4, 2.0)
    said["unet.alpha_pattern"] = {"attn1.to_q": 8}
    found = _change(read()[0], 1.0)
    for name, change in _change(factors, 1.0).items():
        scale = 2.0 if "to_q" in name else 0.5
        np.testing.assert_allclose(found[name], scale * change, atol=1e-5)
    said |= {"unet.use_rslora": True, "unet.alpha_pattern": {}}
    assert read()[2] == 4.0


def _tower(**options):
    made = dict(vocab_size=20, max_seq_len=9, dim=32, depth=2, heads=2) | options
    return text_encoder.CLIPTextTransformer(**made)


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_factors_of_a_text_tower_come_back_beside_those_of_a_unet(layer):
    net, tower = _unet(), _tower(layer=layer)
    factors = _factors(net, 2, "attn1/to_q")
    rng, flat = np.random.default_rng(0), {}
    for kernel, out in (("attn/to_q", 32), ("attn/to_out", 32), ("ff_in", 128)):
        flat[f"layer_0/{kernel}/kernel/a"] = rng.normal(size=(32, 4))
        flat[f"layer_0/{kernel}/kernel/b"] = rng.normal(size=(4, out))
    flat = {path: value.astype(np.float32) for path, value in flat.items()}
    of_text = flax.traverse_util.unflatten_dict(flat, sep="/")
    state = convert.export_lora(net, factors, 2, 2)
    written = convert.export_lora(tower, of_text, 4, 4)
    layers = "text_encoder.text_model.encoder.layers.0"
    assert {key.removeprefix(layers).rpartition(".lora")[0] for key in written} == {
        ".self_attn.q_proj",
        ".self_attn.out_proj",
        ".mlp.fc1",
    }
    assert lora_files.read(written, "x").nets == {"text_encoder"}
    both = state | written
    assert lora_files.read(both, "x").nets == {"unet", "text_encoder"}
    _same(factors, convert.import_lora(net, both)[0])
    layers = {"A": "down", "B": "up"}

    for rename in (
        lambda key: key,
        lambda key: key.replace("text_model.", ""),  # of transformers 5
        lambda key: re.sub(
            r"lora_([AB])", lambda m: f"lora_linear_layer.{layers[m[1]]}", key
        ),
        lambda key: re.sub(
            r"\.(q|out)_proj\.lora_([AB])",
            lambda m: f".to_{m[1]}_lora.{layers[m[2]]}",
            key,
        ),
        lambda key: "base_model.model." + key.removeprefix("text_encoder."),
        lambda key: _kohya(f"unet.{key}").replace("unet_text_encoder", "te"),
    ):
        named = {rename(key): value for key, value in written.items()}
        again, rank, alpha = convert.import_lora(tower, named)
        assert (rank, alpha) == (4, 4)
        _same(of_text, again)
    with pytest.raises(
        UserError, match="^state_dict_or_path: .* of a text encoder; gi"
    ):
        convert.import_lora(tower, state)
    wrong = {key.replace("layers.0", "layers.9"): x for key, x in written.items()}
    with pytest.raises(
        UserError, match="^state.*: text_.*layers.9.* text encoder has no such m"
    ):
        convert.import_lora(tower, wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {f"unet.{Q}.lora_B.weight": np.full((32, 2), np.nan)},
            r"lora_B.weight \(float64\) has 64 of 64 numbers that are infinite or NaN",
        ),
        (
            {f"unet.{Q}.lora_A.weight": np.full((2, 32), np.inf, np.float16)},
            r"lora_A.weight \(float16\) has 64 of 64 numbers that are infinite or NaN",
        ),
        ({f"{Q}.lora_mid.weight": np.ones((2, 2))}, "lora_mid.weight: it is of LoCon"),
        ({f"{Q}.lora_magnitude_vector": np.ones(2)}, "it is of DoRA, .* merge it into"),
        ({f"lora_unet_{Q}.dora_scale": np.ones(2)}, "it is of DoRA"),
        ({f"lora_unet_{Q}.hada_w1_a": np.ones(2)}, "it is of LoHa"),
        ({f"lora_unet_{Q}.lokr_w1": np.ones(2)}, "it is of LoKr"),
        ({f"{Q}.lora_C.weight": np.ones((2, 2))}, f"{Q}.lora_C.weight: no key of"),
        ({"nowhere.lora_A.weight": np.ones((2, 2))}, "nowhere.lora_A.weight: of shape"),
        ({f"unet.{Q}.lora_A.weight": np.ones((2, 9))}, r"first .*\(2, 9\).*\(2, 32\)"),
        ({f"unet.{Q}.lora_B.weight": np.ones((32, 3))}, r"second .*\(32, 3\)"),
        ({f"unet.{Q}.lora_A.weight": np.ones(())}, "first factor is of shape"),
        ({f"unet.{Q}.lora_B.weight": np.ones((32, 2), int)}, "of int64; give floats"),
        ({f"unet.{Q}.alpha": np.ones(2)}, r"alpha: of shape \(2,\); give one number"),
        ({f"unet.{Q}.alpha": np.array(np.nan)}, "its alpha is nan"),
        ({"mid_block.resnets.0.conv1.lora_A.weight": np.ones(2)}, "second .* missing"),
        ({f"{_kohya(f'unet.{Q}.lora_A.weight')}": np.ones((2, 32))}, "is missing"),
    ],
)
def test_bad_files_are_told_in_one_line(change, words):
    net = _unet()
    factors = _factors(net, 2, "down_0_attn_0/block_0/attn1/to_q")
    state = convert.export_lora(net, factors, 2, 2)
    with pytest.raises(UserError, match=f"^state_dict_or_path: .*{words}") as error:
        convert.import_lora(net, state | change)
    assert "\n" not in str(error.value)


def _peft(folder, state, config):
    """A folder as PEFT saves it; `config` is the text of its config, or None."""
    folder.mkdir()
    named = {"base_model.model." + k.removeprefix("unet."): x for k, x in state.items()}
    safetensors_numpy.save_file(named, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "adapter_model.safetensors has no adapter_config.json beside it, which"),
        ("{", "adapter_config.json says of its config is no JSON"),
        ("[]", r"adapter_config.json says '\[\]' of its config, which is no dict"),
        ('{"lora_alpha": "x"}', "its config has lora_alpha 'x'; give a number"),
        ('{"alpha_pattern": [1]}', r"its config has alpha_pattern \[1\]; give a dict"),
        ('{"alpha_pattern": {"to_q": null}}', "has alpha_pattern.to_q None; give a nu"),
        ('{"alpha_pattern": {"to_(q": 2}}', r"alpha_pattern 'to_\(q', which is no"),
        ('{"alpha_pattern": {"(?i)q": 2}}', r"alpha_pattern '\(\?i\)q', which is no"),
    ],
)
@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
def test_a_folder_that_does_not_tell_its_scale_is_a_line(tmp_path, name, config, words):
    net = _unet()
    state = convert.export_lora(net, _factors(net, 2, "attn1/to_q"), 2, 2)
    folder = _peft(tmp_path / "peft", state, config)
    said = f"^state_dict_or_path: .*{folder}.*{words}"
    with pytest.raises(UserError, match=said) as error:
        convert.import_lora(net, folder / name)
    assert "\n" not in str(error.value)


def test_a_config_may_leave_alpha_to_the_rank(tmp_path):
    net = _unet()
    factors = _factors(net, 2, "attn1/to_q")
    state = convert.export_lora(net, factors, 2, 2)
    folder = _peft(tmp_path / "peft", state, '{"lora_alpha": null}')
    again, rank, alpha = convert.import_lora(net, folder)
    _same(factors, again)
    assert (rank, alpha) == (2, 2.0)


def test_bfloat16_and_what_trainers_put_around_are_read():
    net = _unet()
    state = convert.export_lora(net, _factors(net, 2, "attn1/to_q"), 2, 2)
    half = {key: value.astype("bfloat16") for key, value in state.items()}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in half.items()}}
    wanted = {key: value.astype(np.float32) for key, value in half.items()}
    found, *_ = convert.import_lora(net, wrapped)
    _same(found, convert.import_lora(net, wanted)[0])


def test_a_file_of_nothing_and_factors_of_another_net():
    net = _unet()
    with pytest.raises(UserError, match="no factors of a UNet"):
        convert.import_lora(net, {})
    factors = _factors(net, 2, "attn1/to_q")
    with pytest.raises(UserError, match="^rank: 3, but .*to_q/kernel has factors"):
        convert.export_lora(net, factors, 3, 3)
    with pytest.raises(UserError, match="^factors: the UNet has no .*attn1/to_q"):
        convert.export_lora(_plain(), factors, 2, 2)


def _live(options, targets):
    """A UNet of diffusers with a random adapter of PEFT."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from peft import LoraConfig

    from tests.convert import test_live_diffusers as live

    model = live._random(diffusers.UNet2DConditionModel(**live.UNET | options))
    state = live._state(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    model.add_adapter(config)
    with live.torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    return live, model, state


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({}, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in"]),
        (dict(use_linear_projection=True), ["to_q", "proj_in", "conv2", "conv_in"]),
    ],
    ids=["conv", "linear"],
)
def test_an_adapter_of_peft_draws_the_same_and_goes_back(tmp_path, options, targets):
    live, model, state = _live(options, targets)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(2, 5, 12)).astype(np.float32)
    t = np.array([7.0, 801.0], np.float32)

    def theirs():
        tensors = (live._tensor(x), *map(live.torch.from_numpy, (t, context)))
        with live.torch.no_grad():
            return parity.nhwc(model(*tensors).sample.numpy())

    wanted = theirs()
    model.save_lora_adapter(tmp_path, weight_name="their.safetensors")
    net, variables = convert.import_network(state, dict(model.config))
    apply = jax.jit(net.apply)
    factors, rank, alpha = convert.import_lora(net, tmp_path / "their.safetensors")
    assert (rank, alpha) == (4, 6.0)
    merged = lora.add(variables["params"], factors, alpha / rank)
    merged = jax.tree.map(jnp.asarray, merged)
    ours = apply({"params": merged}, x, t, context)
    np.testing.assert_allclose(ours, wanted, atol=ATOL)
    assert np.abs(apply(variables, x, t, context) - wanted).max() > 0.1

    exported = convert.export_lora(net, factors, rank, alpha)
    safetensors_numpy.save_file(exported, tmp_path / "our.safetensors")
    model.delete_adapters("default")
    assert np.abs(theirs() - wanted).max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(
            tmp_path, weight_name="our.safetensors", prefix="unet", adapter_name="ours"
        )
    np.testing.assert_allclose(theirs(), wanted, atol=ATOL)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_folder_that_peft_saves_is_read(tmp_path, use_dora):
    """Its alphas are in the folder's config, its keys below base_model.model."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from tests.convert import test_live_diffusers as live

    model = live._random(diffusers.UNet2DConditionModel(**live.UNET))
    net, _ = convert.import_network(live._state(model), dict(model.config))
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "conv1"],
        alpha_pattern={"conv1": 12},
        use_dora=use_dora,
    )
    adapted = peft.get_peft_model(model, settings)
    with live.torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "peft")
    if use_dora:
        with pytest.raises(UserError, match="it is of DoRA"):
            convert.import_lora(net, tmp_path / "peft")
        return
    factors, rank, alpha = convert.import_lora(net, tmp_path / "peft")
    merged = live._state(adapted.merge_and_unload())
    _, wanted = convert.import_network(merged, dict(model.config))
    model = live._random(diffusers.UNet2DConditionModel(**live.UNET))
    _, variables = convert.import_network(live._state(model), dict(model.config))
    found = lora.add(variables["params"], factors, alpha / rank)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=ATOL),
        found,
        wanted["params"],
    )
    file = tmp_path / "peft" / "adapter_model.safetensors"
    _same(convert.import_lora(net, file)[0], factors)
    file.unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors or"):
        convert.import_lora(net, tmp_path / "peft")
