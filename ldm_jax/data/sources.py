"""Sources: where examples come from, as columns that can be read in any order.

`load(name, split, **kwargs)` gives a `Source`; the names are the keys of `SOURCES` at
the foot of this file, the keyword arguments those of the function behind the name.
"""

import dataclasses
import difflib
import hashlib
import inspect
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.config import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class Source:
    """Named columns of equal length, and whom to credit for them.

    The column `image` is one of three things, told apart by its dtype: pixels (uint8
    [n, h, w, c]), encoded files (object, bytes), or paths of files (str), to be read
    when an example is needed. Other columns are arrays [n, ...], texts object arrays of
    str (one long caption would widen a whole array of fixed width).

    An endless source makes example i of any number by `example(i)`, a value for each
    column; the columns hold the first n of them, for all that looks at the data whole.
    """

    fields: dict[str, np.ndarray]
    attribution: str = ""
    example: Callable[[int], dict[str, Any]] | None = None

    def __post_init__(self):
        sizes = {name: len(column) for name, column in self.fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of a source must be equally long, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def with_fields(self, **columns: np.ndarray) -> "Source":
        """The same examples, as many as there are, with columns added or replaced."""
        return Source({**self.fields, **columns}, self.attribution)

    def take(self, count: int) -> "Source":
        """The first `count` examples, or all where there are fewer."""
        return Source({k: v[:count] for k, v in self.fields.items()}, self.attribution)


def load(name: str, split: str, **kwargs) -> Source:
    """Loads a source by name; UserError on an unknown name, split or argument."""
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "no such source."
        raise UserError(f"source={name!r}: {hint} Sources: {', '.join(SOURCES)}")
    try:
        inspect.signature(SOURCES[name]).bind(split, **kwargs)
    except TypeError as error:
        raise UserError(
            f"source={name!r}: {error}; it takes {inspect.signature(SOURCES[name])}"
        ) from error
    return SOURCES[name](split, **kwargs)


def load_splits(data: Mapping, resolution: int) -> tuple[Source, Source]:
    """The training and held-out sources of a config's `data` section."""
    from ldm_jax.data import derive

    options = dict(data["options"])
    if data["source"] in SOURCES:
        takes = inspect.signature(SOURCES[data["source"]]).parameters
        if "resolution" in takes:
            options["resolution"] = resolution
    splits = []
    for split in (data["train_split"], data["heldout_split"]):
        source = load(data["source"], split, **options)
        splits.append(derive.add(source, data.get("derive", {}), split, data["ops"]))
    return splits[0], splits[1]


def openmoji(split: str, *, resolution: int = 64, data_dir: str | None = None):
    """Emoji drawn on white: image, caption, label, group, code; in order of the codes.

    Splits `train` and `compositional`; see `ldm_jax.data.openmoji`.
    """
    from ldm_jax.data import openmoji as dataset

    if split not in dataset.SPLITS:
        raise UserError(f"split={split!r}: openmoji has {', '.join(dataset.SPLITS)}")
    builder = dataset.prepare(resolution, data_dir)
    columns = _columns(builder.as_dataset(split=split))
    order = np.argsort(columns["code"])
    return Source(
        {name: column[order] for name, column in columns.items()}, dataset.ATTRIBUTION
    )


def openmoji_scenes(
    split: str,
    *,
    resolution: int = 64,
    count: int = 4096,
    objects=(1, 4),
    crop: float | None = None,
    endless: bool = False,
) -> Source:
    """Several emoji on one canvas, with captions, boxes, maps of classes and depth.

    Splits `train` and `compositional`; see `ldm_jax.data.openmoji_scenes`. `objects`
    are the fewest and the most of a scene; `crop` is the least side of the part of it
    that is shown, None all of it. The held-out split has an eighth of `count`.
    `endless` goes on composing new ones in training, behind the first `count`.
    """
    from ldm_jax.data import openmoji_scenes as dataset

    if split == dataset.SPLITS[1]:
        count = max(count // 8, 1)
    columns = dataset.columns(split, resolution, count, objects, crop)

    def example(index):
        return dataset.scene(split, index, resolution, tuple(objects), crop)

    training = split == dataset.SPLITS[0]
    return Source(
        columns, dataset.openmoji.ATTRIBUTION, example if endless and training else None
    )


def folder(
    split: str,
    *,
    path: str,
    heldout_percent: int = 5,
    caption: str | Sequence[str] | None = None,
) -> Source:
    """Pictures (png, jpg, webp) under a directory, at any depth.

    Captions come from `metadata.jsonl` in the directory, one line a picture,
    {"file_name": ..., "text": ...}, which then also says what belongs to the set; else
    from a .txt beside each picture; else from the file's name. Where every picture lies
    in a subdirectory, `label` numbers the first-level ones in alphabetical order. A
    `caption` is that of all pictures instead: of one thing, which it gives a name. Of
    several, every picture is there with each.

    Splits `train` and `heldout`, by a hash of the file name, so a picture stays on its
    side when others come or go; `all` is both.
    """
    if not path:
        raise UserError("data.options.path: empty; give the directory of the pictures")
    root = pathlib.Path(path).expanduser()
    if split not in ("train", "heldout", "all"):
        raise UserError(f"split={split!r}: a folder has train, heldout and all")
    if not root.is_dir():
        raise UserError(f"path={path!r}: no such directory; give one with pictures")
    metadata = root / "metadata.jsonl"
    if metadata.exists():
        captions = _captions_from_metadata(metadata)
    else:
        files = [f for f in root.rglob("*") if f.suffix.lower() in _SUFFIXES]
        captions = {f.relative_to(root).as_posix(): _caption_beside(f) for f in files}
    names = sorted(captions)
    first_level = sorted({name.partition("/")[0] for name in names})
    has_labels = all("/" in name for name in names)
    if split != "all":
        want = split == "heldout"
        names = [n for n in names if (_percentile(n) < heldout_percent) == want]
    if not names:
        raise UserError(
            f"path={path!r}: no pictures ({', '.join(_SUFFIXES)}) in split {split!r}"
        )
    if caption:
        given = [caption] if isinstance(caption, str) else list(caption)
        captions = given * len(names)
        names = [name for name in names for _ in given]
    else:
        captions = [captions[name] for name in names]
    fields = {
        "image": np.array([str(root / name) for name in names]),
        "caption": np.array(captions, object),
    }
    if has_labels:
        labels = [first_level.index(name.partition("/")[0]) for name in names]
        fields["label"] = np.array(labels, np.int32)
    return Source(fields)


def tfds(
    split: str,
    *,
    dataset: str,
    image: str = "image",
    caption: str | None = None,
    label: str | None = None,
    data_dir: str | None = None,
) -> Source:
    """Any TFDS data set with pictures, held in memory as encoded files.

    `dataset` is its name ("cifar10", "openmoji/64"); `image`, `caption` and `label` are
    the keys of its features to read.
    """
    import tensorflow_datasets

    from ldm_jax.data import tf_cpu  # noqa: F401  before TFDS starts TensorFlow

    try:
        builder = tensorflow_datasets.builder(dataset, data_dir=data_dir)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"dataset={dataset!r}: unknown to TFDS: {message}") from error
    keys = {"image": image, "caption": caption, "label": label}
    keys = {name: key for name, key in keys.items() if key}
    for name, key in keys.items():
        if key not in builder.info.features:
            have = ", ".join(builder.info.features)
            raise UserError(f"{name}={key!r}: {dataset} has the features {have}")
    builder.download_and_prepare()
    if split not in builder.info.splits:
        have = ", ".join(builder.info.splits)
        raise UserError(f"split={split!r}: {dataset} has the splits {have}")
    as_stored = {image: tensorflow_datasets.decode.SkipDecoding()}
    rows = builder.as_dataset(split=split, decoders=as_stored)
    rows = rows.map(lambda row: {name: row[key] for name, key in keys.items()})
    return Source(_columns(rows), builder.info.citation)


def synthetic(split: str, *, resolution: int = 32, count: int = 256) -> Source:
    """Coloured shapes on coloured ground with captions; needs no package and no disk.

    The same split, resolution and count give the same pictures; any name is a split.
    `label` numbers the shape and its colour together.
    """
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(split.encode())))
    colours = {
        "black": (20, 20, 20),
        "blue": (40, 80, 220),
        "green": (40, 170, 70),
        "red": (220, 50, 40),
        "white": (245, 245, 245),
        "yellow": (240, 210, 40),
    }
    shapes = ("circle", "square", "diamond", "cross")
    names, palette = list(colours), np.array(list(colours.values()), np.uint8)
    shape = rng.integers(len(shapes), size=count)
    colour = rng.integers(len(names), size=count)
    ground = (colour + rng.integers(1, len(names), size=count)) % len(names)
    radius = rng.uniform(0.2, 0.35, size=(count, 1, 1))
    middle = rng.uniform(0.35, 0.65, size=(2, count, 1, 1))
    grid = (np.arange(resolution) + 0.5) / resolution
    dy = np.abs(grid[None, :, None] - middle[0])
    dx = np.abs(grid[None, None, :] - middle[1])
    inside = np.select(
        [shape[:, None, None] == i for i in range(len(shapes))],
        [
            dx**2 + dy**2 < radius**2,
            np.maximum(dx, dy) < 0.85 * radius,
            dx + dy < 1.2 * radius,
            (np.minimum(dx, dy) < 0.35 * radius) & (np.maximum(dx, dy) < radius),
        ],
    )
    image = np.where(
        inside[..., None],
        palette[colour][:, None, None, :],
        palette[ground][:, None, None, :],
    )
    captions = [
        f"a {names[c]} {shapes[s]} on {names[g]}"
        for s, c, g in zip(shape, colour, ground, strict=True)
    ]
    return Source(
        {
            "image": image,
            "caption": np.array(captions, object),
            "label": (shape * len(names) + colour).astype(np.int32),
        }
    )


def _columns(rows) -> dict[str, np.ndarray]:
    """Reads a tf.data.Dataset of dicts into columns; strings decode, files do not."""
    examples = list(rows.as_numpy_iterator())
    columns = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if isinstance(values[0], bytes) and name == "image":
            columns[name] = np.array(values, object)
        elif isinstance(values[0], bytes):
            columns[name] = np.array([value.decode() for value in values], object)
        else:
            column = np.stack(values)
            wide = column.dtype == np.int64  # which JAX does not have by default
            columns[name] = column.astype(np.int32) if wide else column
    return columns


def _captions_from_metadata(path: pathlib.Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[row["file_name"]] = row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: want "
                f'{{"file_name": ..., "text": ...}}, got {line[:80]!r}'
            ) from error
    for name in captions:
        if not (path.parent / name).is_file():
            raise UserError(f"{path}: file_name={name!r} is not there; mend the line")
    return captions


def _caption_beside(file: pathlib.Path) -> str:
    text = file.with_suffix(".txt")
    if text.exists():
        return text.read_text(encoding="utf-8").strip()
    return file.stem.replace("_", " ").replace("-", " ")


def _percentile(name: str) -> float:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 * 100


SOURCES = {
    "openmoji": openmoji,
    "openmoji_scenes": openmoji_scenes,
    "folder": folder,
    "tfds": tfds,
    "synthetic": synthetic,
}
