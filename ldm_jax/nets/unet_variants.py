"""The published sizes of the UNet, as its arguments: LDM, Stable Diffusion, Karlo.

From the originals' configs; parameter counts are tested in tests/nets/test_unet.py.
"""

_LDM = dict(in_channels=3, out_channels=3, num_res_blocks=2)
_CELEBA = _LDM | dict(
    model_channels=224,
    channel_mult=(1, 2, 3, 4),
    attention_resolutions=(8, 4, 2),
    num_head_channels=32,
)
_CIN_V2 = _LDM | dict(
    model_channels=192,
    channel_mult=(1, 2, 3, 5),
    attention_resolutions=(8, 4, 2),
    num_heads=1,
    use_spatial_transformer=True,
    context_dim=512,
)
_SD1 = dict(
    in_channels=4,
    out_channels=4,
    num_res_blocks=2,
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    attention_resolutions=(4, 2, 1),
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=768,
    legacy=False,
)
_SD2 = _SD1 | dict(
    num_heads=None,
    num_head_channels=64,
    context_dim=1024,
    use_linear_in_transformer=True,
)
_KARLO = dict(
    model_channels=320,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    num_head_channels=64,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
_UNCLIP = _SD2 | dict(num_classes="sequential")

VARIANTS = {
    "celeba256": _CELEBA,  # also ffhq256 and lsun_beds256
    "churches256": dict(
        in_channels=4,
        out_channels=4,
        num_res_blocks=2,
        model_channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        attention_resolutions=(1, 2, 4, 8),
        num_heads=8,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "cin256": dict(
        in_channels=4,
        out_channels=4,
        num_res_blocks=2,
        model_channels=256,
        channel_mult=(1, 2, 4),
        attention_resolutions=(4, 2, 1),
        num_head_channels=32,
        use_spatial_transformer=True,
        context_dim=512,
    ),
    "cin256_v2": _CIN_V2,
    "ldm_1p4b": _SD1 | dict(context_dim=1280),
    "cc256": _CIN_V2 | dict(num_heads=None, num_head_channels=32, context_dim=640),
    "layout2img": _CELEBA
    | dict(
        model_channels=128,
        use_spatial_transformer=True,
        transformer_depth=3,
        context_dim=512,
    ),
    "bsr_sr": _LDM
    | dict(
        in_channels=6,
        model_channels=160,
        channel_mult=(1, 2, 2, 4),
        attention_resolutions=(16, 8),
        num_head_channels=32,
    ),
    "inpainting_big": _LDM
    | dict(
        in_channels=7,
        model_channels=256,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(8, 4, 2),
        num_heads=8,
        resblock_updown=True,
    ),
    "semantic": _LDM
    | dict(
        in_channels=6,
        model_channels=128,
        channel_mult=(1, 4, 8),
        attention_resolutions=(32, 16, 8),
        num_heads=8,
    ),
    "rdm768": dict(
        in_channels=16,
        out_channels=16,
        num_res_blocks=2,
        model_channels=448,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(4, 2, 1),
        num_head_channels=32,
        use_spatial_transformer=True,
        context_dim=768,
    ),
    "sd1": _SD1,
    "sd1_inpaint": _SD1 | dict(in_channels=9),
    "sd2": _SD2,
    "sd2_inpaint": _SD2 | dict(in_channels=9),
    "sd2_depth": _SD2 | dict(in_channels=5),
    "unclip_h": _UNCLIP | dict(adm_in_channels=2048),
    "unclip_l": _UNCLIP | dict(adm_in_channels=1536),
    "karlo_decoder": _KARLO
    | dict(
        in_channels=3,
        out_channels=6,  # the variance too
        attention_resolutions=(2, 4, 8),
        added_kv=True,
        context_dim=1536,
        num_classes="clip",
        adm_in_channels=2 * 768,
    ),
    "karlo_sr": _KARLO
    | dict(
        in_channels=6,
        out_channels=3,
        attention_resolutions=(),
        disable_middle_transformer=True,
    ),
    "x4_upscaler": _SD2
    | dict(
        in_channels=7,
        model_channels=256,
        channel_mult=(1, 2, 2, 4),
        attention_resolutions=(2, 4, 8),
        num_heads=8,
        num_head_channels=None,
        disable_self_attentions=(True, True, True, False),
        num_classes=1000,
    ),
    "sdxl": _SD2
    | dict(
        channel_mult=(1, 2, 4),
        attention_resolutions=(4, 2),
        transformer_depth=(1, 2, 10),
        context_dim=2048,
        num_classes="sequential",
        adm_in_channels=2816,
    ),
}
