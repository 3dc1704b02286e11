import numpy as np
import pytest
from PIL import Image

from ldm_jax import picture


def test_to_uint8_rounds_and_clips():
    x = np.array([-9.0, -1.0, 0.0, 1.0, 9.0, -1 + 1.4 / 127.5])
    np.testing.assert_array_equal(picture.to_uint8(x), [0, 0, 128, 255, 255, 1])
    assert picture.to_uint8(x).dtype == np.uint8


def test_grid_places_every_picture_at_its_own_scale():
    images = np.stack([np.full((64, 64, 3), v, np.uint8) for v in (10, 120, 240)])
    sheet = np.asarray(picture.grid(images, columns=2))
    assert sheet.shape == (2 * 134, 2 * 134, 3)
    assert (sheet[:128, :128] == 10).all()
    assert (sheet[:128, 134 : 134 + 128] == 120).all()
    assert (sheet[134 : 134 + 128, :128] == 240).all()
    assert (sheet[134:, 134:] == 255).all()


def test_grid_writes_captions_under_the_pictures():
    images = np.zeros((2, 128, 128, 3), np.uint8)
    sheet = np.asarray(picture.grid(images, ["a red circle", ""]))
    below = sheet[128:]
    assert (below[:, :134] < 100).any()
    assert (below[:, 134:] == 255).all()


def test_save_leaves_no_partial_file(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    picture.save(image, tmp_path / "new" / "a.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]
    np.testing.assert_array_equal(Image.open(tmp_path / "new" / "a.png"), image)


def test_a_failing_save_keeps_the_old_picture(tmp_path):
    path = tmp_path / "a.png"
    picture.save(Image.new("RGB", (4, 4), "red"), path)
    before = path.read_bytes()

    class Failing:
        def save(self, where, format):
            where.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        picture.save(Failing(), path)
    assert path.read_bytes() == before
