"""Operations on one example: values, shapes, seeds, errors."""

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data import preprocess
from ldm_jax.data.tf_cpu import tf


def run(ops, seed=(0, 0), **example):
    example = {name: tf.constant(value) for name, value in example.items()}
    result = preprocess.chain(ops)(example, tf.constant(seed, tf.int64))
    return {name: tensor.numpy() for name, tensor in result.items()}


def picture(h, w):
    return np.arange(h * w * 3, dtype=np.uint8).reshape(h, w, 3)


def test_to_float_spans_minus_one_to_one():
    image = np.array([[[0, 51, 255]]], np.uint8)
    result = run([("to_float", {})], image=image)["image"]
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[[-1.0, -0.6, 1.0]]], atol=1e-6)


@pytest.mark.parametrize(
    "size, expected", [(4, (4, 8, 3)), ((5, 7), (5, 7, 3)), (16, (16, 32, 3))]
)
def test_resize_shapes(size, expected):
    result = run([("resize", {"size": size})], image=picture(8, 16))["image"]
    assert result.shape == expected and result.dtype == np.uint8


def test_resize_is_antialiased_and_nearest_keeps_classes():
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::4] = 240
    smooth = run([("resize", {"size": 4})], image=stripes)["image"]
    assert abs(smooth[:, 1:-1].astype(int) - 60).max() < 12
    nearest = {"size": 4, "method": "nearest", "keys": ["image"]}
    classes = run([("resize", nearest)], image=stripes)["image"]
    assert set(np.unique(classes)) <= {0, 240}


def test_center_crop_takes_the_middle():
    image = picture(6, 8)
    result = run([("center_crop", {"size": 4})], image=image)["image"]
    np.testing.assert_array_equal(result, image[1:5, 2:6])


def test_random_crop_reaches_every_place_and_keeps_keys_together():
    image = picture(3, 4)
    ops = [("random_crop", {"size": 2, "keys": ["image", "mask"]})]
    seen = set()
    for position in range(60):
        result = run(ops, seed=(1, position), image=image, mask=image + 1)
        np.testing.assert_array_equal(result["image"] + 1, result["mask"])
        seen.add(int(result["image"][0, 0, 0]))
    assert seen == {int(image[y, x, 0]) for y in range(2) for x in range(3)}


def test_crop_larger_than_the_picture_says_so():
    for op in ("center_crop", "random_crop"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="put resize or pad"):
            run([(op, {"size": 9})], image=picture(12, 8))


def test_flip_lr():
    image = picture(2, 3)
    flips = [
        (run([("flip_lr", {})], seed=(0, i), image=image)["image"] != image).any()
        for i in range(60)
    ]
    assert 15 < sum(flips) < 45
    always = run([("flip_lr", {"p": 1.0})], image=image)["image"]
    np.testing.assert_array_equal(always, image[:, ::-1])
    never = run([("flip_lr", {"p": 0.0})], image=image)["image"]
    np.testing.assert_array_equal(never, image)


def test_pad_makes_square():
    image = np.zeros((2, 5, 3), np.uint8)
    result = run([("pad", {"value": 7})], image=image)["image"]
    assert result.shape == (5, 5, 3)
    np.testing.assert_array_equal(result[:, 0, 0], [7, 0, 0, 7, 7])


def test_random_ops_follow_the_seed_and_their_place():
    ops = [("random_crop", {"size": 8})]
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    first = run(ops, seed=(3, 5), image=image)["image"]
    np.testing.assert_array_equal(first, run(ops, seed=(3, 5), image=image)["image"])
    assert (first != run(ops, seed=(3, 6), image=image)["image"]).any()
    assert (first != run(ops, seed=(4, 5), image=image)["image"]).any()
    later = run([("flip_lr", {"p": 0.0}), *ops], seed=(3, 5), image=image)["image"]
    assert (first != later).any()


def test_wrong_entries():
    with pytest.raises(UserError, match="did you mean 'center_crop'"):
        preprocess.chain([("centre_crop", {"size": 4})])
    with pytest.raises(UserError, match="resize.*size"):
        preprocess.chain([("resize", {})])
    with pytest.raises(UserError, match="no such op.*resize, center_crop"):
        preprocess.chain([("tf", {})])
