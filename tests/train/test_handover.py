import shutil

import jax
import numpy as np
import pytest

from ldm_jax import loaded as loaded_lib
from ldm_jax import workdir as workdir_lib
from ldm_jax.config import UserError
from ldm_jax.train import checkpoint, handover, loop
from tests import runs

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture
def other(tmp_path):
    """A finished run whose autoencoder is not the one of the debug preset."""
    workdir = tmp_path / "other"
    runs.untrained(workdir, runs.debug("autoencoder.ch=16"))
    return workdir


def _heir(other):
    return runs.debug(f"autoencoder_from={other}")


def test_the_new_run_has_that_first_stage(other, tmp_path):
    workdir = tmp_path / "heir"
    config = _heir(other)
    loop.check(config, workdir)
    assert config.autoencoder.ch == 16
    assert not workdir.exists()
    tokenizers = {"text": runs.tokenizer()}
    loop.open_workdir(workdir, config, tokenizers)
    expected = loaded_lib.load_first_stage(other, workdir_lib.read_config(other))
    found = loaded_lib.load_first_stage(workdir, workdir_lib.read_config(workdir))
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    # And keeps it when the other one is gone.
    shutil.rmtree(other)
    again = _heir(other)
    loop.check(again, workdir)
    loop.open_workdir(workdir, again, tokenizers)
    assert again.autoencoder.ch == 16
    steps = checkpoint.Checkpoints(workdir / "autoencoder").steps()
    assert steps == [config.autoencoder_stage.steps]


def test_a_run_that_is_not_there_or_not_finished(other, tmp_path):
    with pytest.raises(UserError, match="^autoencoder_from: .* holds no run"):
        handover.adopt_config(_heir(tmp_path / "nowhere"), tmp_path / "heir")
    lost = runs.debug(f"init_from={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="^init_from: .* holds no run"):
        loop.check(lost, tmp_path / "heir")
    shutil.rmtree(other / "autoencoder")
    with pytest.raises(UserError, match="^autoencoder_from: .* is not finished"):
        handover.adopt_config(_heir(other), tmp_path / "heir")


def test_a_copy_that_was_cut_off_is_made_again(other, tmp_path):
    workdir = tmp_path / "heir"
    config = _heir(other)
    step = config.autoencoder_stage.steps
    (workdir / "autoencoder" / f".{step}.partial" / "junk").mkdir(parents=True)
    handover.copy_checkpoint(config, workdir)
    assert not (workdir / "autoencoder" / str(step) / "junk").exists()
    assert checkpoint.Checkpoints(workdir / "autoencoder").finished()
