"""Files and folders are written whole or not at all."""

import pytest

from ldm_jax import workdir


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


def test_another_s_config_is_no_run(tmp_path):
    assert not workdir.is_run(tmp_path)
    workdir.config_path(tmp_path).write_text('{"_class_name": "UNet2DModel"}')
    assert not workdir.is_run(tmp_path)
    workdir.config_path(tmp_path).write_text('{"stages": []}')
    assert workdir.is_run(tmp_path)
