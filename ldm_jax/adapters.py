"""What stage two trains: its nets, or little beside them while they stay.

Little are the factors of lora.py and the embeddings of inversion.py. What stays is the
`base`, of the run that `init_from` names; the workdir has a copy of it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import ml_collections

from ldm_jax import first_stage as first_stage_lib
from ldm_jax import inversion, lora
from ldm_jax import model as model_lib


def is_on(config: ml_collections.ConfigDict) -> bool:
    """Whether the nets stay."""
    return lora.is_on(config) or inversion.is_on(config.diffusion_stage)


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for options of either that can't be."""
    lora.check(config)
    inversion.check(config)


def initializer(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion
) -> Callable[[jax.Array], Any]:
    """What draws the params to train of a key."""
    if inversion.is_on(config.diffusion_stage):
        return partial(inversion.init, config, model)
    return lora.initializer(config, partial(model_lib.init_diffusion, config, model))


def start(
    config: ml_collections.ConfigDict,
    model: model_lib.LatentDiffusion,
    params: Mapping[str, Any],
    tokenizer_of: Mapping[str, Any],
) -> Callable[[Any], Any] | None:
    """What makes of fresh params to train those to start from; None leaves them.

    `params` {name: …} are those of the conditions. Raises UserError for a LoRA or a
    word that doesn't fit.
    """
    if inversion.is_on(config.diffusion_stage):
        return inversion.start(config, tokenizer_of, params)
    settings = config.diffusion_stage.lora
    if not settings.get("init_from"):
        return None
    starting = partial(lora.start, settings, model)
    starting(jax.eval_shape(initializer(config, model), jax.random.key(0)))
    return starting


def merge(
    section: ml_collections.ConfigDict,
    base: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    trained: Mapping[str, Any],
) -> tuple[dict[str, Any], first_stage_lib.FirstStage]:
    """The params of all nets: what stays, and what `section` has trained beside it."""
    if inversion.is_on(section):
        return inversion.merge(base, first_stage, trained)
    return lora.merge(section.lora, base, trained), first_stage
