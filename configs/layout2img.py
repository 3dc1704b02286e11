"""Pictures from boxes: a layout's tokens through a transformer, as context.

    python -m ldm_jax.train --config=configs/layout2img.py --workdir=runs/layout

trains on composed OpenMoji scenes in minutes on 2 CPU cores. `openimages256` is the
paper's model; it has not been trained here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import config as ldm_config
from ldm_jax import defaults


def layout(
    num_classes: int, max_objects: int, dim: int, depth: int, num_tokens: int = 8192
) -> ConfigDict:
    """Three tokens an object: class, upper left and lower right corner."""
    return ConfigDict(
        dict(
            kind="layout",
            num_classes=num_classes,
            max_objects=max_objects,
            num_tokens=num_tokens,
            net=dict(dim=dim, depth=depth),
        )
    )


def openmoji() -> ConfigDict:
    """Scenes of one or two emoji at 32 pixels, by group and box.

    Corners lie on a grid of 17 x 17: on the original's 90 x 90 a short run sees most of
    them too seldom to learn where they are.
    """
    config = defaults.scenes()
    config.data.options.objects = (1, 2)
    config.conditioners.layout = layout(21, 6, dim=128, depth=2, num_tokens=290)
    config.unet = defaults.emoji_unet(context_dim=128)
    config.diffusion_stage.steps = 2500
    return config


def crops() -> ConfigDict:
    """As `openmoji`, parts of scenes; for pictures of any size by windows (--tile).

    The layout says where in the whole the part lies, so each window can be told its own
    place.
    """
    config = openmoji()
    config.data.options.crop = 0.5
    config.conditioners.layout.encode_crop = True
    return config


def debug() -> ConfigDict:
    """Two steps of everything, tiny, in under a minute."""
    return defaults.debug(openmoji())


def openimages256() -> ConfigDict:
    """OpenImages, vq-f4, 246.28M UNet, 30 objects through 16 layers, l1."""
    config = defaults.both_stages()
    config.autoencoder = ConfigDict(dict(variant="vq_f4"))
    # 601 classes can have boxes; the crop's two tokens make 92.
    config.conditioners.layout = layout(601, max_objects=30, dim=512, depth=16)
    config.conditioners.layout.encode_crop = True
    config.unet = ConfigDict(dict(variant="layout2img"))
    config.diffusion.update(dict(linear_start=0.0015, linear_end=0.0205))
    config.diffusion_stage.batch_size = 24
    config.diffusion_stage.loss.loss_type = "l1"
    config.diffusion_stage.optim.learning_rate = 4.8e-5
    return config


PRESETS = {
    "openmoji": openmoji,
    "debug": debug,
    "crops": crops,
    "openimages256": openimages256,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Resolves "preset,key=value,…"; the first preset is the default."""
    return ldm_config.get_preset(PRESETS, arg)
