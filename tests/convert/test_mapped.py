"""Arrays of a file: the same as read whole, put one by one, and let go."""

import mmap

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ldm_jax.convert import files, mapped, plans


def test_views_are_what_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.integers(0, 9, 7).astype(np.uint8),  # an odd offset for what follows
        "c": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "d": np.array(3.5),
        "e": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "f": np.zeros((0, 4), np.int64),
    }
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file(arrays, path, metadata={"format": "pt"})
    read = mapped.read_safetensors(path)
    assert read.keys() == arrays.keys()
    for key, expected in arrays.items():
        assert read[key].dtype == expected.dtype and not read[key].flags.writeable
        np.testing.assert_array_equal(read[key], expected)
        mapped.forget(read[key])
        np.testing.assert_array_equal(read[key], expected)


def _resident(array):
    """Kilobytes of the file's mapping that are in memory (Linux)."""
    address, found = array.__array_interface__["data"][0], False
    for line in open("/proc/self/smaps"):
        first = line.split(" ", 1)[0]
        if "-" in first:
            low, high = (int(x, 16) for x in first.split("-"))
            found = low <= address < high
        elif found and first == "Rss:":
            return int(line.split()[1])
    raise AssertionError("not mapped")


@pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="no madvise here")
def test_what_was_read_is_let_go(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_numpy.save_file({"a": np.ones(2**20, np.float32)}, path)
    array = files.read(path, "x")["a"]
    assert array.sum() == 2**20
    assert _resident(array) > 4000
    mapped.forget(array)
    assert _resident(array) < 100
    assert array.sum() == 2**20
    plan = plans.Plan([plans.Rule("a", "a", plans.AS_IS)], {"a": (2**20,)})
    params = plans.convert({"a": array}, plan, place=lambda path, x: np.array(x))
    assert params["a"].sum() == 2**20 and _resident(array) < 100


def test_arrays_are_placed_one_by_one_as_they_are_here():
    rules = [
        plans.Rule("x/kernel", "x.weight", plans.LINEAR),
        plans.Rule("x/bias", "x.bias", plans.AS_IS),
    ]
    plan = plans.Plan(rules, {"x/kernel": (3, 2), "x/bias": (2,)})
    weight, placed = np.arange(6.0).reshape(2, 3), []

    def place(path, array):
        placed.append((path, array.shape))
        return array + 1

    state = {"x.weight": weight, "x.bias": np.zeros(2)}
    params = plans.convert(state, plan, place=place)
    assert placed == [("x/kernel", (3, 2)), ("x/bias", (2,))]
    np.testing.assert_array_equal(params["x"]["kernel"], weight.T + 1)
    # What does not fit is told before anything is placed.
    with pytest.raises(ValueError, match="missing x.bias"):
        plans.convert({"x.weight": weight}, plan, place=place)
    assert len(placed) == 2


def test_great_numbers_are_numbers_and_others_are_not():
    plan = plans.Plan([plans.Rule("x", "x", plans.AS_IS)], {"x": (2,)})
    great = np.full(2, 3e38, np.float32)  # their sum is infinite
    np.testing.assert_array_equal(plans.convert({"x": great}, plan)["x"], great)
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=r"x \(float16\) has 1 of 2 numbers"):
            plans.convert({"x": np.array([1, wrong], np.float16)}, plan)
