"""CLIP's towers and DPT of transformers, and classifiers, by the converter alone."""

import jax
import numpy as np
import pytest

from ldm_jax import convert
from ldm_jax.config import UserError
from ldm_jax.convert import towers
from ldm_jax.nets import clip_vision, dpt, encoder_unet

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
ATOL = 5e-5
SMALL = dict(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    projection_dim=24,
)


def _random(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.1)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def _state(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def _same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_a_picture_tower_matches_transformers(activation):
    config = transformers.CLIPVisionConfig(
        **SMALL, image_size=32, patch_size=8, hidden_act=activation
    )
    model = _random(transformers.CLIPVisionModelWithProjection(config))
    net, variables = convert.import_network(_state(model), config.to_dict())
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    wanted = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).image_embeds
    out = net.apply(variables, x)
    np.testing.assert_allclose(out.embedding, wanted, atol=ATOL)
    exported = convert.export_network(net, variables, "openclip")
    _, again = convert.import_network(exported, config.to_dict())
    _same(variables, again)
    alone = {k.removeprefix("visual."): v for k, v in exported.items()}
    _same(variables, convert.import_network(alone, config.to_dict())[1])


@torch.no_grad()
def test_a_text_tower_without_projection_matches_transformers():
    config = transformers.CLIPTextConfig(
        **SMALL, vocab_size=50, max_position_embeddings=9, eos_token_id=49
    )
    model = _random(transformers.CLIPTextModel(config))
    tokens = np.array([[3, 4, 5, 49], [1, 49, 49, 49]])
    wanted = model(torch.from_numpy(tokens)).last_hidden_state
    net, variables = convert.import_network(_state(model), config.to_dict())
    out = net.apply(variables, tokens.astype(np.int32))
    np.testing.assert_allclose(out, wanted, atol=ATOL)


def test_a_whole_clip_is_a_text_tower_unless_the_config_is_of_pictures():
    config = transformers.CLIPConfig(
        text_config=SMALL | dict(vocab_size=50, max_position_embeddings=9),
        vision_config=SMALL | dict(image_size=16, patch_size=8),
        projection_dim=24,
    )
    state = _state(transformers.CLIPModel(config))
    net, _ = convert.import_network(state, {"heads": 4})
    assert net.vocab_size == 50
    net, _ = convert.import_network(state, config.vision_config.to_dict())
    assert isinstance(net, clip_vision.CLIPVisionTransformer)


@pytest.mark.parametrize("quick", [True, False])
def test_openclip_has_the_activation_beside_its_towers(quick):
    config = transformers.CLIPTextConfig(**SMALL)
    net, variables = convert.import_network(
        _state(transformers.CLIPTextModel(config)), config.to_dict()
    )
    state = convert.export_network(net, variables, "openclip")
    given = {"embed_dim": 24, "quick_gelu": quick, "text_cfg": {"heads": 4}}
    again, _ = convert.import_network(state, given)
    assert again.activation == ("quick_gelu" if quick else "gelu") and again.heads == 4


def test_the_heads_of_an_odd_tower_are_asked_for():
    config = transformers.CLIPTextConfig(**SMALL | dict(hidden_size=48))
    with pytest.raises(UserError, match="number of heads"):
        convert.import_network(_state(transformers.CLIPTextModel(config)))


def _dpt():
    backbone = transformers.BitConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96],
        depths=[2, 1, 2],
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
        num_groups=4,
    )
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 1, 3],
        backbone_featmap_shape=[1, 96, 4, 4],
        reassemble_factors=[1, 1, 1, 0.5],
        neck_hidden_sizes=[32, 64, 24, 40],
        fusion_hidden_size=16,
    )
    return _random(transformers.DPTForDepthEstimation(config))


def _midas(state):
    """The same under MiDaS's own names."""
    import re

    names = [
        (r"dpt\.embeddings\.backbone\.bit\.embedder\.convolution", "P.stem.conv"),
        (r"dpt\.embeddings\.backbone\.bit\.embedder\.norm", "P.stem.norm"),
        (
            r"dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d)\.layers",
            r"P.stages.\1.blocks",
        ),
        (r"dpt\.embeddings\.projection", "M.patch_embed.proj"),
        (r"dpt\.embeddings\.cls_token", "M.cls_token"),
        (r"dpt\.embeddings\.position_embeddings", "M.pos_embed"),
        (r"dpt\.layernorm", "M.norm"),
        (
            r"dpt\.encoder\.layer\.(\d)\.attention\.output\.dense",
            r"M.blocks.\1.attn.proj",
        ),
        (r"dpt\.encoder\.layer\.(\d)\.attention\.attention", r"M.blocks.\1.attn"),
        (r"dpt\.encoder\.layer\.(\d)\.layernorm_before", r"M.blocks.\1.norm1"),
        (r"dpt\.encoder\.layer\.(\d)\.layernorm_after", r"M.blocks.\1.norm2"),
        (r"dpt\.encoder\.layer\.(\d)\.intermediate\.dense", r"M.blocks.\1.mlp.fc1"),
        (r"dpt\.encoder\.layer\.(\d)\.output\.dense", r"M.blocks.\1.mlp.fc2"),
        (r"neck\.reassemble_stage\.readout_projects\.2\.0", "A3.0.project.0"),
        (r"neck\.reassemble_stage\.readout_projects\.3\.0", "A4.0.project.0"),
        (r"neck\.reassemble_stage\.layers\.2\.projection", "A3.3"),
        (r"neck\.reassemble_stage\.layers\.3\.projection", "A4.3"),
        (r"neck\.reassemble_stage\.layers\.3\.resize", "A4.4"),
        (r"head\.head", "scratch.output_conv"),
        (r"residual_layer(\d)\.convolution(\d)", r"resConfUnit\1.conv\2"),
        (r"(fusion_stage\.layers\.\d)\.projection", r"\1.out_conv"),
        *((rf"neck\.convs\.{i}", f"scratch.layer{i + 1}_rn") for i in range(4)),
        *(
            (rf"neck\.fusion_stage\.layers\.{i}", f"scratch.refinenet{4 - i}")
            for i in range(4)
        ),
        (r"^P\.", "M.patch_embed.backbone."),
        (r"^M\.", "pretrained.model."),
        (r"^A(\d)\.", r"pretrained.act_postprocess\1."),
    ]
    found = {}
    for key, value in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        found[key] = value
    for key in [k for k in found if ".attn.query." in k]:
        parts = [found.pop(key.replace("query", x)) for x in ("query", "key", "value")]
        found[key.replace("query", "qkv")] = np.concatenate(parts)
    return found


@torch.no_grad()
def test_a_dpt_matches_transformers_and_round_trips():
    model = _dpt()
    state, config = _state(model), model.config.to_dict()
    net, variables = convert.import_network(state, config)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    wanted = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).predicted_depth
    out, scale = jax.jit(net.apply)(variables, x), float(wanted.abs().max())
    assert scale > 0
    np.testing.assert_allclose(out / scale, wanted / scale, atol=ATOL)
    exported = convert.export_network(net, variables, "huggingface")
    _same(exported, {key: state[key] for key in exported})
    midas = {f"depth_model.model.{k}": v for k, v in _midas(state).items()}
    _same(variables, convert.import_network(midas, config)[1])
    frozen = towers.params_of(dpt.DepthMap(net, (4, 4), 32), midas)
    _same(variables["params"], frozen["tower"])


@pytest.mark.parametrize("pool", encoder_unet.POOLS)
@pytest.mark.parametrize("updown", [False, True])
def test_the_head_of_a_classifier_is_read_off_its_weights(pool, updown):
    net = encoder_unet.EncoderUNet(
        4,
        32,
        7,
        2,
        (2,),
        channel_mult=(1, 2),
        num_head_channels=16,
        resblock_updown=updown,
        pool=pool,
        image_size=8 if pool == "attention" else None,
    )
    variables = jax.jit(net.init)(
        jax.random.key(0), np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32)
    )
    state = convert.export_network(net, variables, "compvis")
    again, same = convert.import_network(state, {"num_head_channels": 16})
    assert again == net
    _same(variables, same)
