"""Pipelines of diffusers on the Hugging Face hub, or in its cache on this machine."""

import pathlib
import re

from ldm_jax.config import UserError
from ldm_jax.convert import whole

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
# Parts without weights, then weights of full precision; nothing of other frameworks.
_SETTINGS = (whole.INDEX, "*/*.json", "tokenizer/*")
_WEIGHTS = ("*.safetensors", "*.bin")  # the second where there is none of the first
_ASIDE = ("safety_checker/*", "*.fp16.*", "*non_ema*", "*/flax*", "*/openvino*")


def pipeline(source: str, option: str) -> pathlib.Path | None:
    """The folder of the pipeline REPO, fetched; None where it is a repo of no pipeline.

    UserError, which names `option`, where there is no such repo or no network.
    """
    if not _REPO.fullmatch(source):
        return None
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(patterns):
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=patterns, ignore_patterns=_ASIDE
            )
        )

    try:
        try:
            huggingface_hub.hf_hub_download(source, whole.INDEX)
        except errors.LocalEntryNotFoundError:  # an EntryNotFoundError by its class
            raise
        except errors.EntryNotFoundError:
            return None
        for weights in _WEIGHTS:
            folder = fetch([*_SETTINGS, f"*/{weights}"])
            if any(folder.glob(f"unet/{weights}")):
                break
    except (
        errors.LocalEntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.HFValidationError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{option}: {source!r} is no file here and can't be fetched ({reason});"
            " give the path of a file or a folder"
        ) from error
    return folder
