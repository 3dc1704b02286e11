"""Published weights that losses and scores need: found in a file, or fetched once."""

import hashlib
import http.client
import os
import pathlib
import re
import urllib.request
import uuid
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.convert import plans, torch_archive
from ldm_jax.nets import lpips


class Published(NamedTuple):
    """A file of weights, where its authors have it."""

    url: str
    sha256: str
    size: int  # bytes
    file: str  # its name in the cache


PUBLISHED = {
    "vgg16": Published(  # of torchvision, ImageNet
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        "vgg16-397923af.pth",
    ),
    "lpips_heads": Published(  # also in the package lpips 0.1.4
        "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/"
        "v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
        7_289,
        "lpips-v0.1-vgg.pth",
    ),
    "inception": Published(  # of TensorFlow, 2015, for FID
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
        "pt_inception-2015-12-05-6726825d.pth",
    ),
}


def cache_dir() -> pathlib.Path:
    """$LDM_JAX_CACHE, else ldm_jax/weights in the user's folder of caches."""
    if os.environ.get("LDM_JAX_CACHE"):
        return pathlib.Path(os.environ["LDM_JAX_CACHE"]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(caches).expanduser() / "ldm_jax" / "weights"


def is_cached(name: str) -> bool:
    """Whether `fetch(name)` needs no network."""
    return (cache_dir() / PUBLISHED[name].file).is_file()


def fetch(
    name: str, path: str | pathlib.Path | None = None, option: str = "path"
) -> pathlib.Path:
    """The file of the weights `name`: `path` if given, else in the cache.

    What is not in the cache is downloaded and its checksum compared first. `option`
    is what the user sets `path` by: UserErrors name it.
    """
    if path is not None:
        path = pathlib.Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"{option}: no file {str(path)!r}; give one, or None")
        return path
    published = PUBLISHED[name]
    path = cache_dir() / published.file
    if not path.is_file():
        _download(published, path, option)
    return path


def _download(published: Published, path: pathlib.Path, option: str) -> None:
    """To another name first: the file is whole or not there, whoever else is at it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    size = f"{published.size / 1e6:.3g} MB"
    print(f"downloading {published.url} ({size}) to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sha256 = _copy(published.url, partial)
            if sha256 != published.sha256:
                raise UserError(
                    f"{option}: {published.url} has the sha256 {sha256}, not"
                    f" {published.sha256}; set {option} to a file fetched elsewhere"
                )
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{option}: can't download the weights ({reason}); fetch {published.url}"
            f" where there is a network and set {option} to the file, or put it at"
            f" {path}"
        ) from error


def _copy(url: str, path: pathlib.Path) -> str:
    """Writes what is at `url` and returns its sha256."""
    digest = hashlib.sha256()
    request = urllib.request.Request(url, headers={"User-Agent": "ldm_jax"})
    with urllib.request.urlopen(request, timeout=60) as response, path.open("xb") as f:
        while block := response.read(2**20):
            digest.update(block)
            f.write(block)
    return digest.hexdigest()


# --- LPIPS

# Where torchvision's `features` has the convolutions of lpips.VGG16Features.
_CONVOLUTIONS = {
    f"conv_{block}_{i + 1}": first + 2 * i
    for block, (first, depth) in enumerate(
        zip((0, 5, 10, 17, 24), lpips.DEPTHS, strict=True), 1
    )
    for i in range(depth)
}
_HEAD = plans.Layout(lambda a: a[0, :, 0, 0], lambda a: a[None, :, None, None])


def lpips_params(
    vgg_path: str | pathlib.Path, heads_path: str | pathlib.Path | None = None
) -> dict:
    """Params of `lpips.LPIPS` from one file, or the VGG16's and the heads'.

    torchvision's key names are known, and those of lpips and of taming-transformers.
    UserError where something is missing or does not fit.
    """
    paths = [pathlib.Path(path) for path in (vgg_path, heads_path) if path is not None]
    state_dict = {}
    for path in paths:
        state_dict |= {
            plain_lpips_key(key): value for key, value in _read(path).items()
        }
    try:
        return plans.convert(state_dict, lpips_plan())
    except ValueError as error:
        raise UserError(
            f"{' and '.join(map(str, paths))}: not the weights of VGG16 and LPIPS"
            f" ({error!s:.200}); leave the options unset to download them"
        ) from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    state_dict = torch_archive.load(path)
    if not isinstance(state_dict, dict):
        raise UserError(f"{path}: holds no state dict but {type(state_dict).__name__}")
    return state_dict


def published_lpips_key(key: str) -> str:
    """features.0.bias -> net.slice1.0.bias, lin0.weight -> lin0.model.1.weight."""
    convolution = re.match(r"features\.(\d+)\.", key)
    if convolution is None:
        return key.replace(".weight", ".model.1.weight")
    place = int(convolution[1])
    block = max(b for b, first in enumerate((0, 5, 10, 17, 24), 1) if place >= first)
    return key.replace("features.", f"net.slice{block}.")


def plain_lpips_key(key: str) -> str:
    """net.slice1.0.bias -> features.0.bias, lins.0.model.1.weight -> lin0.weight."""
    key = re.sub(r"^net\.slice\d\.", "features.", key)
    return re.sub(r"^lins?\.?(\d)(\.model\.1)?\.weight$", r"lin\1.weight", key)


def lpips_plan() -> plans.Plan:
    """The plan of `lpips.LPIPS`, for plain keys."""
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = plans.abstract_params(lpips.LPIPS(), image, image)
    # VGG16's classifier; what pixels are normalised by, which does not change.
    beside = r"(classifier|scaling_layer)\..*"
    return plans.Plan([_lpips_rule(path) for path in shapes], shapes, beside)


def _lpips_rule(path: str) -> plans.Rule:
    if path.startswith("head_"):
        return plans.Rule(path, f"lin{path[-1]}.weight", _HEAD)
    _, layer, leaf = path.split("/")
    convolution = f"features.{_CONVOLUTIONS[layer]}"
    if leaf == "kernel":
        return plans.Rule(path, f"{convolution}.weight", plans.CONV)
    return plans.Rule(path, f"{convolution}.bias", plans.AS_IS)
