"""Files on the Hugging Face hub, or in its cache on this machine."""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence

from ldm_jax.config import UserError
from ldm_jax.convert import whole

_REPO = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")
# Parts without weights, then weights of full precision; nothing of other frameworks.
_SETTINGS = (whole.INDEX, "*/*.json", "tokenizer/*")
_WEIGHTS = ("*.safetensors", "*.bin")  # the second where there is none of the first
_OF_DIFFUSERS = tuple(f"diffusion_pytorch_model{p[1:]}" for p in _WEIGHTS)
_ASIDE = ("safety_checker/*", "*.fp16.*", "*non_ema*", "*/flax*", "*/openvino*")


def is_id(source: str) -> bool:
    """Whether a name could be that of a repo, OWNER/NAME, or of a part :SUBFOLDER."""
    return _REPO.fullmatch(source) is not None


def weights(source: str, names: Sequence[str], option: str) -> pathlib.Path:
    """The first of the files `names` that REPO or REPO:SUBFOLDER has, fetched.

    UserError, which names `option`, where there is none or no network.
    """
    repo, _, subfolder = source.partition(":")
    for name in names:
        path = _fetched(source, repo, name, option, subfolder=subfolder or None)
        if path is not None:
            return path
    raise UserError(f"{option}: {source!r} has no {' or '.join(names)}")


def pipeline(source: str, option: str) -> pathlib.Path | None:
    """The folder of the pipeline REPO, fetched; None where it is a repo of no pipeline.

    UserError, which names `option`, where there is no such repo or no network.
    """
    if not is_id(source) or ":" in source:
        return None
    if _fetched(source, source, whole.INDEX, option) is None:
        return None
    import huggingface_hub

    for pattern in _WEIGHTS:
        with _reachable(source, option):
            folder = huggingface_hub.snapshot_download(
                source,
                allow_patterns=[*_SETTINGS, f"*/{pattern}"],
                ignore_patterns=_ASIDE,
            )
        folder = pathlib.Path(folder)
        if any(folder.glob(f"unet/{pattern}")):
            break
    return folder


def first_stage(source: str, option: str) -> pathlib.Path | None:
    """The folder of diffusers' autoencoder in REPO or REPO:SUBFOLDER, fetched.

    None where there is none of it, such as a repo of something else. UserError, which
    names `option`, where there is no such repo or no network.
    """
    if not is_id(source):
        return None
    repo, _, subfolder = source.partition(":")

    def fetched(name):
        return _fetched(source, repo, name, option, subfolder=subfolder or None)

    config = fetched("config.json")
    if config is None or not whole.is_folder(config.parent):
        return None
    if not any(map(fetched, _OF_DIFFUSERS)):
        raise UserError(f"{option}: {source!r} has no {' or '.join(_OF_DIFFUSERS)}")
    return config.parent


def _fetched(source, repo, name, option, **place) -> pathlib.Path | None:
    """One file; None where the repo has none of that name."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        with _reachable(source, option):
            return pathlib.Path(huggingface_hub.hf_hub_download(repo, name, **place))
    except errors.EntryNotFoundError:
        return None


@contextlib.contextmanager
def _reachable(source: str, option: str) -> Iterator[None]:
    """Turns what says that a repo can't be had into a UserError."""
    from huggingface_hub import errors

    try:
        yield
    except (
        errors.LocalEntryNotFoundError,  # no network
        errors.RepositoryNotFoundError,
        errors.HFValidationError,
    ) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{option}: {source!r} is not here and can't be fetched ({reason});"
            " give the path of its weights"
        ) from error
