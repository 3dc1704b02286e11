"""The `openmoji_scenes` data set: several emoji on one canvas, seeded and endless.

Every scene comes with all that a condition may want, exactly: a caption with counts,
the ground's colour and a relation ("a teapot left of two strawberries on a blue
background"), boxes with categories, a map of classes, depth by layer, and a mask.
Scene i of a split is the same on every machine at a given resolution, whichever scenes
were made before it.

A tenth of the combinations (two nouns with their relation, or one noun with its count
and ground) is held out: `train` never shows one, `compositional` nothing else. A
relation and its mirror ("left of", "right of") are one combination. Every word occurs
in both.

The drawings are OpenMoji's (CC BY-SA 4.0); see data/openmoji.py.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data import openmoji

SPLITS = openmoji.SPLITS
CLASS_NAMES = ("background", *openmoji.CLASS_NAMES)  # of the segmentation
MAX_OBJECTS = 6
_HELD_OUT = 10  # one combination in so many

BACKGROUNDS = {
    "blue": (150, 190, 240),
    "green": (165, 220, 165),
    "grey": (200, 200, 205),
    "orange": (250, 200, 140),
    "pink": (250, 195, 215),
    "purple": (205, 180, 235),
    "white": (255, 255, 255),
    "yellow": (250, 240, 160),
}
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")
_MIRRORED = {"right of": "left of", "below": "above", "behind": "in front of"}
COUNTS = ("", "a", "two", "three")

# Names of emoji, which are their nouns, unless another one stands after a colon.
_NOUNS = """
    cow face:cow, tiger face:tiger, rabbit face:rabbit, cat face:cat, dog face:dog,
    pig face:pig, frog, bear, panda, lion, fox, owl, penguin, turtle, octopus, crab,
    lady beetle:ladybird, butterfly, elephant, tropical fish, whale,
    strawberry, banana, red apple:apple, lemon, watermelon, pineapple, carrot, broccoli,
    tomato, eggplant, mushroom, cheese wedge:piece of cheese, doughnut, cupcake,
    hamburger, pizza, pretzel, teapot, hot beverage:cup of coffee, egg,
    sunflower, rose, tulip, cactus, evergreen tree:fir tree, palm tree, maple leaf,
    four leaf clover, house, castle, tent, ferris wheel, fountain,
    bus, taxi, fire engine, bicycle, tractor, rocket, sailboat, helicopter, anchor,
    umbrella, snowman, rainbow, sun, cloud, glowing star:star, snowflake,
    crown, top hat, necktie, t-shirt, dress, backpack, running shoe,
    guitar, trumpet, drum, violin, balloon, teddy bear, soccer ball:football, kite,
    basketball, trophy, jack-o-lantern:pumpkin, wrapped gift:present,
    hammer, key, candle, light bulb, telescope, red heart:heart,
    alarm clock, envelope, magnet, bell, ladder, bucket, chair, television, gem stone
"""
_PLURALS = {
    "cactus": "cacti",
    "butterfly": "butterflies",
    "strawberry": "strawberries",
    "cow": "cows",
    "fox": "foxes",
    "bus": "buses",
    "octopus": "octopuses",
    "maple leaf": "maple leaves",
    "tomato": "tomatoes",
    "piece of cheese": "pieces of cheese",
    "cup of coffee": "cups of coffee",
    "dress": "dresses",
    "trophy": "trophies",
    "tropical fish": "tropical fish",
    "snowman": "snowmen",
}


class Noun(NamedTuple):
    """One kind of thing: how it is called, its drawing, its group's number."""

    name: str
    plural: str
    code: str
    label: int


class Placed(NamedTuple):
    """One thing on the canvas: its drawing's upper left corner and side, in pixels."""

    noun: Noun
    left: int
    top: int
    side: int


@functools.cache
def nouns() -> tuple[Noun, ...]:
    """All kinds of things, in the table's order."""
    by_caption = {entry.caption: entry for entry in openmoji.entries()}
    found = {}
    for words in _NOUNS.replace("\n", " ").split(","):
        caption, _, name = words.strip().partition(":")
        name = name or caption
        entry = by_caption[caption]
        plural = _PLURALS.get(name, f"{name}s")
        found[name] = Noun(name, plural, entry.code, entry.label)
    return tuple(found.values())


def held_out(*combination: str) -> bool:
    """Whether `train` must not show (noun, relation, noun) or (count, noun, ground)."""
    if len(combination) == 3 and combination[1] in _MIRRORED:
        first, relation, second = combination
        combination = (second, _MIRRORED[relation], first)
    return zlib.crc32("|".join(combination).encode()) % _HELD_OUT == 0


def scene(
    split: str,
    index: int,
    resolution: int,
    objects: tuple[int, int] = (1, 4),
    crop: float | None = None,
) -> dict[str, Any]:
    """Scene `index` of a split, of `objects` from the first to the second number.

    With `crop` a part of a larger scene is shown: so much of its side, or more.

    image uint8 [H, W, 3]; caption; boxes float32 [6, 4] as (x0, y0, x1, y1) in parts of
    the picture, around what the drawing would show uncovered, rows of zeros after the
    last; categories int32 [6], places in openmoji.CLASS_NAMES, -1 after the last;
    segmentation uint8 [H, W], places in CLASS_NAMES; depth float32 [H, W], 0 for the
    ground, to 1 for the nearest; crop float32 [4], (x0, y0, x1, y1) of what is shown.
    Caption and boxes are those of the whole scene.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: openmoji_scenes has {' and '.join(SPLITS)}")
    key = (zlib.crc32(split.encode()), index)
    rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
    shown = resolution
    if crop is not None:  # drawn before the rest, which depends on the canvas
        resolution = round(shown / rng.uniform(crop, 1.0))
        x, y = rng.integers(resolution - shown + 1, size=2)
    else:
        x = y = 0
    caption, ground, placed = _compose(rng, split == SPLITS[1], resolution, objects)

    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = BACKGROUNDS[ground]
    segmentation = np.zeros((resolution, resolution), np.uint8)
    depth = np.zeros((resolution, resolution), np.float32)
    boxes = np.zeros((MAX_OBJECTS, 4), np.float32)
    categories = np.full(MAX_OBJECTS, -1, np.int32)
    for layer, (noun, left, top, side) in enumerate(placed, 1):
        colour, alpha, box = _sprite(noun.code, side)
        part = slice(top, top + side), slice(left, left + side)
        image[part] = _over(colour, alpha, image[part])
        solid = alpha[..., 0] > 127
        segmentation[part][solid] = 1 + noun.label
        depth[part][solid] = layer / len(placed)
        boxes[layer - 1] = (box + (left, top, left, top)) / resolution
        categories[layer - 1] = noun.label
    part = slice(y, y + shown), slice(x, x + shown)
    frame = np.array([x, y, x + shown, y + shown], np.float32) / resolution
    return {
        "image": image[part],
        "caption": caption,
        "boxes": boxes,
        "categories": categories,
        "segmentation": segmentation[part],
        "depth": depth[part],
        "crop": frame,
    }


def _compose(
    rng: np.random.Generator, hold_out: bool, resolution: int, objects: tuple[int, int]
) -> tuple[str, str, list[Placed]]:
    """(caption, ground, what lies on it from the farthest to the nearest)."""
    kinds, grounds = nouns(), tuple(BACKGROUNDS)
    low, high = objects
    relations = RELATIONS if low <= 2 else RELATIONS[:4]  # the others are of two things
    grain = max(resolution // 32, 1)  # few sizes, so that the drawings fit in memory
    while True:
        first, second = (kinds[i] for i in rng.choice(len(kinds), 2, replace=False))
        ground = grounds[rng.integers(len(grounds))]
        total = int(rng.integers(low, high + 1))
        pair = total > 3 or (total > 1 and rng.random() < 0.75)
        if not pair:
            if held_out(COUNTS[total], first.name, ground) == hold_out:
                parts = [_amount(total, first)]
                boxes = [(_whole(total), [first] * total)]
                break
            continue
        relation = relations[rng.integers(len(relations))]
        a = int(rng.integers(max(total - 3, 1), min(total - 1, 3) + 1))
        b = total - a
        if relation in RELATIONS[4:]:  # one hides a part of another
            a = b = 1
        stray = not hold_out and (
            held_out(COUNTS[a], first.name, ground)
            or held_out(COUNTS[b], second.name, ground)
        )
        if held_out(first.name, relation, second.name) == hold_out and not stray:
            parts = [_amount(a, first), relation, _amount(b, second)]
            boxes = _halves(relation, a, b, [first] * a, [second] * b)
            break
    caption = f"{' '.join(parts)} on {_article(ground)} {ground} background"
    placed = []
    for cells, things in boxes:
        for (x0, y0, x1, y1), noun in zip(cells, things, strict=True):
            room = min(x1 - x0, y1 - y0) * resolution
            side = int(room * rng.uniform(0.8, 1.0)) // grain * grain
            side = min(max(side, 4), resolution)
            spare_x = (x1 - x0) * resolution - side
            spare_y = (y1 - y0) * resolution - side
            left = int(x0 * resolution + rng.uniform(0.0, max(spare_x, 0.0)))
            top = int(y0 * resolution + rng.uniform(0.0, max(spare_y, 0.0)))
            edge = resolution - side
            placed.append(Placed(noun, min(left, edge), min(top, edge), side))
    return caption, ground, placed


def _whole(count: int) -> list[tuple[float, ...]]:
    """Cells (x0, y0, x1, y1) of one, two or three things in the whole canvas."""
    if count == 1:
        return [(0.1, 0.1, 0.9, 0.9)]
    if count == 2:
        return [(0.0, 0.2, 0.5, 0.8), (0.5, 0.2, 1.0, 0.8)]
    return [(0.25, 0.0, 0.75, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]


def _halves(relation: str, a: int, b: int, first: list, second: list) -> list:
    """The cells of both sides of a relation, the farther first."""
    if relation in ("in front of", "behind"):
        near, far = [(0.3, 0.35, 0.95, 1.0)], [(0.05, 0.0, 0.7, 0.65)]
        if relation == "in front of":
            return [(far, second), (near, first)]
        return [(far, first), (near, second)]
    low, high = _row(a), _row(b)
    if relation in ("right of", "below"):
        low, high = high, low
    start = [(0.0, y0, 0.5, y1) for y0, y1 in low]
    end = [(0.5, y0, 1.0, y1) for y0, y1 in high]
    if relation in ("above", "below"):
        start = [(y0, x0, y1, x1) for x0, y0, x1, y1 in start]
        end = [(y0, x0, y1, x1) for x0, y0, x1, y1 in end]
    if relation in ("right of", "below"):
        return [(end, first), (start, second)]
    return [(start, first), (end, second)]


def _row(count: int) -> list[tuple[float, float]]:
    """From where to where each of so many things goes along one side."""
    return [(i / count, (i + 1) / count) for i in range(count)]


def _amount(count: int, noun: Noun) -> str:
    if count == 1:
        return f"{_article(noun.name)} {noun.name}"
    return f"{COUNTS[count]} {noun.plural}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@functools.lru_cache(maxsize=20_000)
def _sprite(code: str, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(colour [s, s, 3], alpha [s, s, 1], box around what shows) of a drawing."""
    rgba = openmoji.rasterise(code, side)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    shown = np.argwhere(alpha[..., 0] > 0)
    top, left = shown.min(axis=0)
    bottom, right = shown.max(axis=0) + 1
    return colour, alpha, np.array([left, top, right, bottom])


def _over(colour: np.ndarray, alpha: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Lays a drawing on uint8 [s, s, 3]."""
    part = alpha.astype(np.uint16)
    return ((colour * part + ground * (255 - part) + 127) // 255).astype(np.uint8)


def check_objects(objects: Sequence[int]) -> None:
    """UserError unless it is (fewest, most) of what a scene can hold."""
    if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= MAX_OBJECTS:
        raise UserError(
            f"data.options.objects: {tuple(objects)}; give (fewest, most) from 1 to"
            f" {MAX_OBJECTS}"
        )


def columns(
    split: str,
    resolution: int,
    count: int,
    objects: Sequence[int] = (1, 4),
    crop: float | None = None,
) -> dict[str, np.ndarray]:
    """The first `count` scenes of a split, one column a field."""
    check_objects(objects)
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"data.options.crop: {crop}; choose above 0, and 1 at most")
    low, high = objects
    rows = [scene(split, i, resolution, (low, high), crop) for i in range(count)]
    captions = np.array([row.pop("caption") for row in rows], object)
    made = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {"caption": captions} | made
