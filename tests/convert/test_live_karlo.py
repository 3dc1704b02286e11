"""Karlo's nets as diffusers has them: the same outputs, there and back."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.convert import networks, plans
from ldm_jax.nets import clip_projections, prior, unet, unet_variants

torch = pytest.importorskip("torch", reason="pip install -e '.[test,parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install -e '.[test,parity]'")

ATOL = 5e-5


def randomized(module, seed=0):
    """Weights of about the size that trained ones have, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def state_of(module):
    return {k: v.numpy() for k, v in module.state_dict().items()}


@pytest.fixture(scope="module")
def decoder():
    """Karlo's decoder, small: attention at the two lower levels of three."""
    return randomized(
        diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            down_block_types=(
                "ResnetDownsampleBlock2D",
                "SimpleCrossAttnDownBlock2D",
                "SimpleCrossAttnDownBlock2D",
            ),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(
                "SimpleCrossAttnUpBlock2D",
                "SimpleCrossAttnUpBlock2D",
                "ResnetUpsampleBlock2D",
            ),
            block_out_channels=(32, 64, 96),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=16,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
            only_cross_attention=False,
        )
    )


def test_decoder_is_diffusers_s(decoder):
    state = state_of(decoder)
    net, variables = networks.import_network(state, dict(decoder.config))
    assert net.added_kv and net.num_classes == "added" and net.resblock_updown
    assert (net.attention_resolutions, net.context_dim) == ((2, 4), 24)
    assert (net.in_channels, net.out_channels, net.num_head_channels) == (3, 6, 16)
    rng = np.random.default_rng(0)
    x, context, y = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 16, 16, 3), (2, 7, 24), (2, 128))
    )
    t, there = np.array([3, 700]), np.ones((2, 7), bool)
    there[1, 4:] = False
    with torch.no_grad():
        expected = decoder(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            torch.from_numpy(t),
            torch.from_numpy(context),
            class_labels=torch.from_numpy(y),
            attention_mask=torch.from_numpy(there),
        ).sample
    expected = np.moveaxis(expected.numpy(), 1, -1)
    context[~there] = 0  # no token: to diffusers the mask says so
    out = jax.jit(net.apply)(variables, x, jnp.asarray(t), context, y)
    np.testing.assert_allclose(out, expected, atol=ATOL)
    assert expected.std() > 0.1
    back = networks.export_network(net, variables, "diffusers")
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)
    # As GLIDE has it: one array for keys and values, q k v within a head.
    compvis = networks.export_network(net, variables, "compvis")
    assert compvis["middle_block.1.encoder_kv.weight"].shape == (192, 24, 1)
    again, same = networks.import_network(
        compvis,
        dict(num_head_channels=16, num_classes="added", use_new_attention_order=True),
    )
    assert again == net.clone(legacy=again.legacy)
    jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_projections_are_diffusers_s():
    """Of CLIP's embeddings; a picture of zeros is the learned one."""
    from diffusers.pipelines.deprecated.unclip import text_proj

    module = randomized(
        text_proj.UnCLIPTextProjModel(
            clip_embeddings_dim=12, time_embed_dim=20, cross_attention_dim=24
        )
    )
    names = {
        "text_vector": "embedding_proj",
        "picture_vector": "clip_image_embeddings_project_to_time_embeddings",
        "picture_tokens": "clip_extra_context_tokens_proj",
        "text_tokens": "encoder_hidden_states_proj",
    }
    state = state_of(module)
    params = {
        ours: {"kernel": state[f"{theirs}.weight"].T, "bias": state[f"{theirs}.bias"]}
        for ours, theirs in names.items()
    }
    params["null"] = state["learned_classifier_free_guidance_embeddings"]
    norm = "text_encoder_hidden_states_norm"
    params["norm"] = {"scale": state[f"{norm}.weight"], "bias": state[f"{norm}.bias"]}
    rng = np.random.default_rng(0)
    text, picture = rng.normal(size=(2, 1, 12)).astype(np.float32)
    tokens = rng.normal(size=(1, 5, 12)).astype(np.float32)
    with torch.no_grad():
        expected = module(
            image_embeddings=torch.from_numpy(picture),
            prompt_embeds=torch.from_numpy(np.concatenate([text, text])),
            text_encoder_hidden_states=torch.from_numpy(
                np.concatenate([tokens, tokens])
            ),
            do_classifier_free_guidance=True,
        )
    pictures = np.concatenate([np.zeros_like(picture), picture])
    y = np.concatenate([pictures, np.concatenate([text, text])], axis=-1)
    net = clip_projections.ClipProjections(context_dim=24, width=20)
    ours = net.apply({"params": params}, np.concatenate([tokens, tokens]), y)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=ATOL)


def test_upscaler_is_diffusers_s():
    """Karlo's second model has no attention at all."""
    module = randomized(
        diffusers.UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=1,
            add_attention=False,
            resnet_time_scale_shift="scale_shift",
            norm_eps=1e-5,
            freq_shift=0,
            flip_sin_to_cos=True,
        )
    )
    net, variables = networks.import_network(state_of(module), dict(module.config))
    assert net.disable_middle_transformer and net.resblock_updown
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 6)).astype(np.float32)
    t = np.array([3, 700])
    with torch.no_grad():
        x_torch = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        expected = module(x_torch, torch.from_numpy(t)).sample
    out = jax.jit(net.apply)(variables, x, jnp.asarray(t))
    np.testing.assert_allclose(out, np.moveaxis(expected.numpy(), 1, -1), atol=ATOL)


@pytest.mark.parametrize("masked", [False, True])
def test_prior_is_diffusers_s(masked):
    """With the mask of the text it is causal too, which Karlo always gives."""
    module = randomized(
        diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=12,
            num_embeddings=7,
        )
    )
    state = state_of(module)
    net, variables = networks.import_network(state, dict(module.config))
    assert (net.heads, net.dim_head, net.depth, net.positions) == (2, 16, 2, 1)
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(2, 2, 12)).astype(np.float32)
    context = rng.normal(size=(2, 7, 12)).astype(np.float32)
    t, there = np.array([3, 700]), np.ones((2, 7), bool)
    if masked:
        there[1, 4:] = False
    with torch.no_grad():
        expected = module(
            *map(torch.from_numpy, (z, t, y, context)),
            attention_mask=torch.from_numpy(there),
        ).predicted_image_embedding
    context[~there] = 0
    out = jax.jit(net.apply)(variables, z[:, None, None], t, context, y)
    np.testing.assert_allclose(out[:, 0, 0], expected.numpy(), atol=ATOL)
    assert expected.std() > 0.1
    back = networks.export_network(net, variables, "diffusers")
    assert back.keys() == state.keys() - {"clip_mean", "clip_std"}
    for key, value in back.items():
        np.testing.assert_array_equal(value, state[key])


def test_a_prior_of_several_positions_is_diffusers_s():
    """Shap-E's: no query, every position predicts itself."""
    module = randomized(
        diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            embedding_dim=12,
            num_embeddings=7,
            additional_embeddings=2 + 4,
            added_emb_type=None,
        )
    )
    net, variables = networks.import_network(state_of(module), dict(module.config))
    assert (net.positions, net.context_length, net.query) == (4, 7, False)
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 4, 12)).astype(np.float32)
    y, context = rng.normal(size=(2, 12)), rng.normal(size=(2, 7, 12))
    y, context = y.astype(np.float32), context.astype(np.float32)
    t = np.array([3, 700])
    with torch.no_grad():
        given = map(torch.from_numpy, (z, t, y, context))
        expected = module(*given).predicted_image_embedding
    out = jax.jit(net.apply)(variables, z.reshape(2, 2, 2, 12), t, context, y)
    np.testing.assert_allclose(out.reshape(z.shape), expected[:, :4], atol=ATOL)


def test_nets_are_of_karlo_s_size():
    """Its upscaler is two of the last (1.4B); the prior's mean and std are apart."""
    nets = [
        (prior.PriorTransformer(**prior.VARIANTS["karlo"]), 1022.03),
        (unet.UNet(**unet_variants.VARIANTS["karlo_decoder"]), 893.32),
        (unet.UNet(**unet_variants.VARIANTS["karlo_sr"]), 729.70),
    ]
    for net, millions in nets:
        shapes = plans.abstract_params(net, **net.abstract_inputs())
        assert sum(map(np.prod, shapes.values())) / 1e6 == pytest.approx(millions, 1e-5)


def _renamed(state, pairs, prefix):
    """A state dict under other names: `pairs` (theirs, Karlo's) of starts of keys."""
    found = {}
    for key, value in state.items():
        for theirs, karlos in pairs:
            if key.startswith(theirs):
                key = karlos + key.removeprefix(theirs)
                break
        found[prefix + key] = value
    return found


def test_a_prior_under_karlos_names_is_the_same():
    """Its checkpoint has q, k and v in one array, side by side within each head."""
    module = randomized(
        diffusers.PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            embedding_dim=12,
            num_embeddings=7,
        )
    )
    state = state_of(module)
    wanted = networks.import_network(state, dict(module.config))
    own = {k: v for k, v in state.items() if k not in ("clip_mean", "clip_std")}
    pairs = [
        ("prd_embedding", "prd_emb"),
        ("proj_in.", "clip_img_proj."),
        ("embedding_proj.", "text_emb_proj."),
        ("encoder_hidden_states_proj.", "text_enc_proj."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("norm_out.", "final_ln."),
        ("proj_to_clip_embeddings.", "out_proj."),
    ]
    for i in range(2):
        theirs, karlos = f"transformer_blocks.{i}", f"transformer.resblocks.{i}"
        pairs += [
            (f"{theirs}.norm1.", f"{karlos}.ln_1."),
            (f"{theirs}.norm3.", f"{karlos}.ln_2."),
            (f"{theirs}.attn1.to_out.0.", f"{karlos}.attn.c_proj."),
            (f"{theirs}.ff.net.0.proj.", f"{karlos}.mlp.c_fc."),
            (f"{theirs}.ff.net.2.", f"{karlos}.mlp.c_proj."),
        ]
        for leaf in ("weight", "bias"):
            three = [own.pop(f"{theirs}.attn1.to_{x}.{leaf}") for x in "qkv"]
            rows = [x[16 * h : 16 * h + 16] for h in range(2) for x in three]
            own[f"{karlos}.attn.c_qkv.{leaf}"] = np.concatenate(rows)
    renamed = _renamed(own, pairs, "model.")
    net, variables = networks.import_network(renamed, dict(module.config))
    assert net == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, variables, wanted[1])
    again = networks.params_of(net, renamed)
    jax.tree.map(np.testing.assert_array_equal, again, wanted[1]["params"])


def test_a_decoder_under_karlos_names_has_its_projections():
    from diffusers.pipelines.deprecated.unclip import text_proj

    net = unet.UNet(
        in_channels=3,
        out_channels=6,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=16,
        added_kv=True,
        context_dim=24,
        num_classes="clip",
        adm_in_channels=24,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    shapes = plans.abstract_params(net, **net.abstract_inputs())
    rng = np.random.default_rng(0)
    flat = {k: rng.normal(size=x).astype(np.float32) for k, x in shapes.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    module = randomized(
        text_proj.UnCLIPTextProjModel(
            clip_embeddings_dim=12, time_embed_dim=128, cross_attention_dim=24
        )
    )
    pairs = [
        ("encoder_hidden_states_proj.", "text_seq_proj.0."),
        ("text_encoder_hidden_states_norm.", "text_seq_proj.1."),
        ("clip_extra_context_tokens_proj.", "clip_tok_proj."),
        ("embedding_proj.", "text_feat_proj."),
        ("learned_classifier_free_guidance_embeddings", "cf_param"),
        ("clip_image_embeddings_project_to_time_embeddings.", "clip_emb."),
    ]
    projections = _renamed(state_of(module), pairs, "")
    state = networks.export_network(net, {"params": params}, "compvis")
    assert projections.keys() <= state.keys()
    state = {f"model.{key}": value for key, value in (state | projections).items()}
    again, variables = networks.import_network(state, {"num_head_channels": 16})
    assert again == net
    clip = variables["params"].pop("clip")
    params.pop("clip")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    # They compute what diffusers' do.
    shapes = (1, 5, 12), (1, 12), (1, 12)
    tokens, text, picture = (rng.normal(size=s).astype(np.float32) for s in shapes)
    with torch.no_grad():
        expected = module(
            image_embeddings=torch.from_numpy(picture),
            prompt_embeds=torch.from_numpy(text),
            text_encoder_hidden_states=torch.from_numpy(tokens),
            do_classifier_free_guidance=False,
        )
    projecting = clip_projections.ClipProjections(context_dim=24, width=128)
    y = np.concatenate([picture, text], axis=-1)
    ours = projecting.apply({"params": clip}, tokens, y)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=ATOL)


@pytest.mark.parametrize("prefix", ["model_first_steps.", "model_last_step.", ""])
def test_an_upscaler_under_karlos_names_counts_its_middle_on(prefix):
    net = unet.UNet(
        in_channels=6,
        out_channels=3,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        use_scale_shift_norm=True,
        resblock_updown=True,
        disable_middle_transformer=True,
    )
    x = jnp.zeros((1, 8, 8, 6))
    params = net.init(jax.random.key(0), x, jnp.zeros(1))["params"]
    state = networks.export_network(net, {"params": params}, "compvis")
    state = _renamed(state, [("middle_block.2.", "middle_block.1.")], prefix)
    again, variables = networks.import_network(state, {"num_head_channels": 32})
    assert again.disable_middle_transformer and again.attention_resolutions == ()
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
