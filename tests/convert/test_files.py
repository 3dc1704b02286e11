"""State dicts of any file: what trainers put around them, and what is cut short."""

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.convert import files
from tests.convert.test_torch_archive import SIX, SIXES, WRITERS, mapping, name, six


@pytest.mark.parametrize("write", WRITERS)
def test_a_trainer_s_file_that_is_cut_short_says_so(tmp_path, write):
    """Not that there is a trainer's class in it, which in a whole file is no fault."""
    callback = name("pytorch_lightning.callbacks", "ModelCheckpoint")
    program = mapping(callbacks=callback, state_dict=mapping(a=SIXES))
    path = six(write, tmp_path / "last.ckpt", program)
    np.testing.assert_array_equal(files.read(path, "SRC")["a"], SIX)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"^SRC: {path}: damaged, cut short or not of"):
        files.read(path, "SRC")


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("wrapper", ["", *files.WRAPPERS])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_what_trainers_put_around_a_state_dict_is_taken_off(
    tmp_path, write, wrapper, prefix
):
    program = mapping(**{f"{prefix}a": SIXES, f"{prefix}model.b": SIXES})
    if wrapper:
        beside = name("argparse", "Namespace") + b")\x81" + mapping(lr=b"N") + b"b"
        program = mapping(**{"args": beside, wrapper: program, "model_ema": mapping()})
    found = files.read(six(write, tmp_path / "x.pt", program), "SRC")
    assert list(found) == ["a", "model.b"]
    np.testing.assert_array_equal(found["a"], SIX)


@pytest.mark.parametrize(
    "tree",
    [
        {"module.a": SIX, "b": SIX},  # a part of its own
        {"model": {"lr": 1.0}, "a": SIX},
        {"model": SIX, "a": SIX},
        {},
    ],
)
def test_what_is_no_wrapping_stays(tree):
    assert files.unwrapped(tree) == tree


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("model", [SIXES, mapping()])
def test_an_array_may_have_a_wrapping_s_name(tmp_path, write, model):
    program = mapping(a=SIXES, model=model)
    found = files.read(six(write, tmp_path / "x.pt", program), "SRC")
    np.testing.assert_array_equal(found["a"], SIX)


def test_a_wrapping_that_holds_itself_ends():
    tree = {"a": SIX}
    tree["model"] = tree
    assert files.unwrapped(tree).keys() == tree.keys()
