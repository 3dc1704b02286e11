"""Pictures and words of conditions, for panels and sheets."""

import numpy as np
import pytest

from ldm_jax import shown


def test_words():
    assert shown.words({"caption": ["a", "b"]}, 2) == ["a", "b"]
    assert shown.words({"label": np.array([3, 0])}, 2) == ["class 3", "class 0"]
    assert shown.words({}, 2) == ["", ""]


def test_a_hole_is_grey():
    x = np.full((1, 2, 2, 3), 7, np.uint8)
    out = shown.picture({"image": x, "mask": np.array([[[0, 1], [0, 0]]])}, 2)
    assert (out[0, 0, 1] == 128).all() and (out[0, 1] == 7).all()
    np.testing.assert_array_equal(shown.picture({"image": x}, 2), x)


def test_small_pictures_are_enlarged_and_depth_is_grey():
    small = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    out = shown.picture({"low_res": small}, 4)
    np.testing.assert_array_equal(out, small.repeat(2, 1).repeat(2, 2))
    out = shown.picture({"depth": np.array([[[1.0, 3.0], [2.0, 1.0]]])}, 2)
    np.testing.assert_array_equal(out[0, ..., 0], [[0, 255], [127, 0]])
    constant = shown.picture({"depth": np.ones((1, 2, 2))}, 2)
    assert not constant.any()


def test_classes_have_colours_of_their_own():
    colours = shown.colour(np.arange(40))
    assert len(np.unique(colours, axis=0)) == 40
    out = shown.picture({"segmentation": np.array([[[0, 5], [5, 255]]])}, 2)
    np.testing.assert_array_equal(out[0, 0, 1], shown.colour(np.array(5)))


def test_boxes_are_drawn_where_they_are():
    boxes = np.float32([[[0.0, 0.0, 0.5, 0.5], [0, 0, 0, 0]]])
    out = shown.picture({"boxes": boxes, "categories": np.array([[4, -1]])}, 64)
    inked = np.argwhere((out[0] != 255).any(axis=-1))
    assert inked.min() == 0 and inked.max() == pytest.approx(31, abs=1)
    empty = shown.picture({"boxes": boxes, "categories": np.array([[-1, -1]])}, 64)
    assert (empty == 255).all()


def test_words_alone_make_no_picture():
    assert shown.picture({"caption": ["a"], "label": [1]}, 8) is None


def test_boxes_of_a_part_are_drawn_where_that_shows_them():
    boxes, numbers = np.float32([[[0.5, 0.25, 0.75, 0.5]]]), np.array([[2]])
    crop = np.float32([[0.5, 0.0, 1.0, 0.5]])
    part = shown.picture({"boxes": boxes, "categories": numbers, "crop": crop}, 32)
    there = np.float32([[[0.0, 0.5, 0.5, 1.0]]])
    whole = shown.picture({"boxes": there, "categories": numbers}, 32)
    np.testing.assert_array_equal(part, whole)
