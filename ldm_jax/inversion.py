"""Textual inversion: the embeddings of a new token are trained, and nothing else.

`diffusion_stage.inversion.placeholder_token` ("<toy>") stands in the captions for what
the pictures show (Gal et al. 2022). Its `num_vectors` embeddings follow those of the
text net as the param `added_emb`, see `layers.look_up`; the tokenizer of the run stays
what it was, and `conditioners.NAME.placeholder_tokens` says what it has besides.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ldm_jax import first_stage as first_stage_lib
from ldm_jax import model as model_lib
from ldm_jax.config import UserError

OPTION = "diffusion_stage.inversion"
PARAM = "added_emb"  # [k, d]


def is_on(section: ml_collections.ConfigDict) -> bool:
    """Whether the `diffusion_stage` trains embeddings instead of the nets."""
    return section.get("inversion", {}).get("placeholder_token") is not None


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where there is no text net to add to, or by a wrong number."""
    settings = config.diffusion_stage.get("inversion", {})
    if not is_on(config.diffusion_stage):
        for name, value in settings.items():
            if value is not None:
                raise UserError(
                    f"{OPTION}.{name}: {value!r}, but no token is trained; set"
                    f" {OPTION}.placeholder_token, such as <toy>"
                )
        return
    option = f"{OPTION}.placeholder_token: {settings.placeholder_token!r}"
    if not config.get("init_from"):
        raise UserError(
            f"{option}, but there is no model that draws it; set init_from to the"
            " workdir of a run that has trained a diffusion model"
        )
    for other in ("lora.rank", "preserve.prompt"):
        section, _, field = other.partition(".")
        if config.diffusion_stage.get(section, {}).get(field) is not None:
            raise UserError(
                f"{option} together with diffusion_stage.{other}; of these choose one"
            )
    count = settings.num_vectors
    if count is not None and (not isinstance(count, int) or count < 1):
        raise UserError(f"{OPTION}.num_vectors: {count!r}; choose 1 or more, or None")
    for name in ("placeholder_token", "initializer_token"):
        if not isinstance(settings[name], str | None):
            raise UserError(
                f"{OPTION}.{name}: {settings[name]!r} is no word; write it as one, such"
                f" as \"'{settings[name]}'\""
            )
    condition(config)


def condition(config: ml_collections.ConfigDict) -> str:
    """The name of the one text condition; UserError where there is none or more."""
    texts = [name for name, c in config.conditioners.items() if c.kind == "text"]
    if len(texts) != 1:
        said = f"{len(texts)} text conditions" if texts else "no text condition"
        raise UserError(
            f"conditioners: {said}, but a token of textual inversion belongs to one;"
            " use it with a model of one text"
        )
    return texts[0]


def names(token: str, count: int) -> tuple[str, ...]:
    """The tokens of one with `count` embeddings, as diffusers names them."""
    return (token, *(f"{token}_{i}" for i in range(1, count)))


def adopt(config: ml_collections.ConfigDict) -> None:
    """Tells the text condition of `config` of the token that is to be trained."""
    if not is_on(config.diffusion_stage):
        return
    settings = config.diffusion_stage.inversion
    tokens = names(settings.placeholder_token, settings.num_vectors or 1)
    config.conditioners[condition(config)].update(dict(placeholder_tokens=tokens))


def init(
    config: ml_collections.ConfigDict, model: model_lib.LatentDiffusion, key: jax.Array
) -> dict[str, Any]:
    """Zeros in the places of what is trained; `start` has what it starts from."""
    del key
    name = condition(config)
    count = config.diffusion_stage.inversion.num_vectors or 1
    rows = jnp.zeros((count, model.conditioners[name].net.dim))
    return {"conditioners": {name: {PARAM: rows}}}


def start(
    config: ml_collections.ConfigDict,
    tokenizer_of: Mapping[str, Any],
    params: Mapping[str, Any],
) -> Callable[[Any], Any]:
    """What gives the embeddings to start from, of text nets' `params` {name: …}.

    They are those of `initializer_token`: one for each of its pieces, or of its only
    one for all. Without it they are the mean of the vocabulary's. Raises UserError for
    a text of another number of pieces, or of unknown ones.
    """
    settings, name = config.diffusion_stage.inversion, condition(config)
    table, count = np.asarray(params[name]["token_emb"]), settings.num_vectors or 1
    text = settings.initializer_token
    if text is None:
        rows = table.mean(axis=0, keepdims=True)
    else:
        tokenizer, option = tokenizer_of[name], f"{OPTION}.initializer_token: {text!r}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id in ids and text != tokenizer.unk_token:
            raise UserError(
                f"{option} is not in the vocabulary, nor are its parts; choose another"
            )
        if len(ids) not in (1, count):
            pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
            raise UserError(
                f"{option} is {len(ids)} tokens ({pieces}) for {count} embeddings;"
                f" choose a word of one, or set {OPTION}.num_vectors to {len(ids)}"
            )
        rows = table[ids]
    rows = np.array(np.broadcast_to(rows, (count, table.shape[1])), np.float32)

    def started(fresh: Any) -> Any:
        del fresh
        return {"conditioners": {name: {PARAM: rows}}}

    return started


def merge(
    base: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    trained: Mapping[str, Any],
) -> tuple[dict[str, Any], first_stage_lib.FirstStage]:
    """The params of nets and of frozen nets with the embeddings in their places."""
    nets, encoders = dict(base["conditioners"]), dict(first_stage.encoders)
    for name, rows in trained["conditioners"].items():
        place = encoders if name in encoders else nets
        place[name] = {**place[name], **rows}
    return {**base, "conditioners": nets}, first_stage.replace(encoders=encoders)


def add(
    config: ml_collections.ConfigDict,
    params: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
    token: str,
    rows: np.ndarray,
) -> tuple[ml_collections.ConfigDict, dict[str, Any], first_stage_lib.FirstStage]:
    """A model's config and params with the embeddings [k, d] of one token more."""
    name, config = condition(config), copy.deepcopy(config)
    section = config.conditioners[name]
    tokens = section.get("placeholder_tokens", ())
    section.update(dict(placeholder_tokens=(*tokens, *names(token, len(rows)))))
    nets = {**params["conditioners"], **first_stage.encoders}
    before = [nets[name][PARAM]] if PARAM in nets[name] else []
    together = jnp.concatenate([*before, jnp.asarray(rows)])
    added = {"conditioners": {name: {PARAM: together}}}
    return config, *merge(params, first_stage, added)


def embeddings(
    config: ml_collections.ConfigDict,
    params: Mapping[str, Any],
    first_stage: first_stage_lib.FirstStage,
) -> dict[str, np.ndarray]:
    """{token: [k, d]} of a model's own placeholder tokens."""
    texts = [c for c in config.conditioners.values() if c.get("placeholder_tokens")]
    if not texts:
        return {}
    tokens, name = texts[0].placeholder_tokens, condition(config)
    rows = np.asarray({**params["conditioners"], **first_stage.encoders}[name][PARAM])
    found = {}
    for i, token in enumerate(tokens):
        head, _, number = token.rpartition("_")
        if head in found and number == str(len(found[head])):
            found[head] = np.concatenate([found[head], rows[i : i + 1]])
        else:
            found[token] = rows[i : i + 1]
    return found
