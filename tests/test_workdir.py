"""Files and folders are written whole or not at all."""

import errno
import os
import stat

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from ldm_jax import workdir
from ldm_jax.config import UserError


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_half_written_is_not_left(tmp_path, kind):
    path = tmp_path / "new" / "x.npy"

    def write(place):
        if kind == "folder":
            place.mkdir()
            place = place / "inside"
        place.write_text("all")

    with pytest.raises(KeyboardInterrupt), workdir.whole(path) as partial:
        write(partial)
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with workdir.whole(path) as partial:
        assert partial.suffix == path.suffix  # numpy would append its own
        write(partial)
        assert not path.exists()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_files_have_the_mode_of_all_others(tmp_path, kind, umask):
    path = tmp_path / ("x.safetensors" if kind == "file" else "x")
    before = os.umask(umask)
    try:
        with workdir.whole(path) as partial:
            file = partial
            if kind == "folder":
                file = partial / "unet" / "x.safetensors"
                file.parent.mkdir(parents=True)
            safetensors_numpy.save_file({"a": np.ones(3)}, file)
    finally:
        os.umask(before)
    (file,) = [path] if kind == "file" else path.rglob("*.safetensors")
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("option", "said"), [(None, ""), ("DST", "DST: ")])
@pytest.mark.parametrize("place", ["file/x", "file/deep/x", "full"])
def test_what_the_system_refuses_is_a_line(tmp_path, place, option, said):
    path = tmp_path / place
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=f"^{said}{path} can't be written .*; name anot"),
        workdir.whole(path, option) as partial,
    ):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_another_s_config_is_no_run(tmp_path):
    assert not workdir.is_run(tmp_path)
    workdir.config_path(tmp_path).write_text('{"_class_name": "UNet2DModel"}')
    assert not workdir.is_run(tmp_path)
    workdir.config_path(tmp_path).write_text('{"stages": []}')
    assert workdir.is_run(tmp_path)


def test_a_damaged_config_is_a_line(tmp_path):
    workdir.config_path(tmp_path).write_text('{"stages": ["autoencoder"')
    with pytest.raises(UserError, match="^--workdir: .*config.json is damaged .*copy"):
        workdir.read_config(tmp_path)
