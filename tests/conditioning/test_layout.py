"""Layout tokens against the reference's, and what is said of wrong layouts."""

import numpy as np
import pytest

from ldm_jax.conditioning import layout
from ldm_jax.config import UserError
from tests import parity

BITS = {"is_group_of": 1, "is_occluded": 2, "is_depiction": 4, "is_inside": 8}


def _rows(example, case):
    """(boxes, categories, modifiers) of one example of the fixture, as one row."""
    known = set()
    known |= {"is_group_of"} if case["use_group_parameter"] else set()
    known |= set(BITS) - {"is_group_of"} if case["use_additional_parameters"] else set()
    boxes, categories, bits = [], [], []
    for entry in example:
        boxes.append(entry["bbox"])
        categories.append(entry["category_no"])
        bits.append(sum(BITS[name] for name in known if entry[name]))
    return np.array([boxes]), np.array([categories]), np.array([bits])


@pytest.mark.parametrize("name", ["coco_ldm", "openimages_small", "tokens1024_crop"])
def test_tokens_are_the_references(name):
    meta, _, io = parity.load("layout_tokens")
    case = meta["cases"][f"bbox/{name}"]
    crop = meta["crop_case"]["crop_coordinates"]
    seen = 0
    for example, entries in meta["examples"].items():
        boxes, categories, bits = _rows(entries, case)
        for way in ("full", "crop", "flip", "crop_flip"):
            tokens = layout.encode(
                boxes,
                categories,
                num_classes=case["no_object_classes"],
                max_objects=case["no_max_objects"],
                num_tokens=case["no_tokens"],
                modifiers=bits,
                crop=crop if "crop" in way else None,
                encode_crop=case["encode_crop"],
                flip="flip" in way,
            )
            expected = io[f"bbox/{name}/{example}/{way}"]
            np.testing.assert_array_equal(
                tokens[0], expected, err_msg=f"{example} {way}"
            )
            seen += 1
    assert seen == 8


def test_tokens_tell_the_boxes_again():
    boxes = np.array([[[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.125, 0.25], [0, 0, 0, 0]]])
    categories = np.array([[3, 20, -1]])
    sizes = layout.from_corners(boxes)
    tokens = layout.encode(sizes, categories, num_classes=21, max_objects=5)
    assert tokens.shape == (1, 15) and (tokens[0, 6:] == 8191).all()
    (found,) = layout.decode(tokens, max_objects=5)
    assert [c for c, _ in found] == [3, 20]
    np.testing.assert_allclose([b for _, b in found], boxes[0, :2], atol=0.5 / 89)


@pytest.mark.parametrize(
    ("box", "category", "error"),
    [
        ((0.0, 0.0, 1.2, 1.0), 1, r"boxes: \[0.0, 0.0, 1.2, 1.0\] is out of range"),
        ((0.5, 0.0, 0.5, 1.0), 1, "is out of range"),
        ((0.0, 0.0, 1.0, 1.0), 21, "categories: 21 is unknown; choose from 0 to 20"),
    ],
)
def test_wrong_layouts(box, category, error):
    with pytest.raises(UserError, match=error):
        layout.check([[box]], [[category]], 21)


def test_a_part_of_a_crop_has_the_tokens_of_that_part():
    """What is told of a window is what would have been told of such a crop."""
    crops = np.array([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 0.5]])
    boxes, none = np.zeros((2, 1, 4)), np.full((2, 1), -1)

    def tokens(crops):
        made = layout.encode(
            boxes, none, num_classes=21, max_objects=3, crop=crops, encode_crop=True
        )
        return made[:, -2:]

    frame = np.array([0.5, 0.25, 0.5, 0.75])
    x, y, w, h = crops.T
    parts = [x + frame[0] * w, y + frame[1] * h, frame[2] * w, frame[3] * h]
    inside = layout.within_crops(tokens(crops), frame)
    # Corners are known to a cell of the grid, so their parts are too.
    wanted, sections = tokens(np.stack(parts, axis=1)), 90
    for axis in (lambda t: t % sections, lambda t: t // sections):
        assert np.abs(axis(np.asarray(inside)) - axis(wanted)).max() <= 1
    np.testing.assert_array_equal(inside[0], wanted[0])
    whole = layout.within_crops(tokens(crops), np.array([0.0, 0.0, 1.0, 1.0]))
    np.testing.assert_array_equal(whole, tokens(crops))
    assert whole.dtype == np.int32


def test_a_crop_out_of_range_is_said():
    layout.check_crops([[0.0, 0.0, 1.0, 1.0]])
    with pytest.raises(UserError, match=r"crop: \[0.5, 0.0, 0.25, 1.0\] is out of"):
        layout.check_crops([[0.5, 0.0, 0.25, 1.0]])
