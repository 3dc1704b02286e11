"""What models of other tasks are given: readers, flags, and pictures that come out."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import draw, inputs, sample
from ldm_jax import loaded as loaded_lib
from ldm_jax.config import UserError
from tests import runs


def _png(path, array):
    Image.fromarray(array).save(path)
    return str(path)


def _rgb(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def _read(flag, path):
    (entry,) = [entry for entry in inputs.INPUTS if entry.flag == flag]
    return inputs.read(entry, [str(path)])


# ---- Readers -------------------------------------------------------------------


def test_pictures_are_read_as_they_are(tmp_path):
    x = _rgb(8)
    read = _read("image", _png(tmp_path / "x.png", x))
    np.testing.assert_array_equal(read["image"], x[None])
    mask = np.array([[0, 127], [128, 255]], np.uint8)
    read = _read("mask", _png(tmp_path / "m.png", mask))
    np.testing.assert_array_equal(read["mask"], [[[0, 0], [1, 1]]])
    numbers = np.array([[0, 3], [21, 255]], np.uint8)
    read = _read("segmentation", _png(tmp_path / "s.png", numbers))
    np.testing.assert_array_equal(read["segmentation"], numbers[None])
    deep = np.array([[0, 1000], [2000, 65535]], np.uint16)
    read = _read("depth", _png(tmp_path / "d.png", deep))
    np.testing.assert_array_equal(read["depth"], deep[None])


def test_layouts_are_padded_to_the_longest(tmp_path):
    files = []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        entry = {"box": [0.1, 0.2, 0.5, 0.6], "category": 4}
        file.write_text(json.dumps([entry] * count))
        files.append(str(file))
    (entry,) = [entry for entry in inputs.INPUTS if entry.flag == "layout"]
    read = inputs.read(entry, files)
    np.testing.assert_array_equal(read["categories"], [[4, -1], [4, 4]])
    assert read["boxes"].shape == (2, 2, 4) and not read["boxes"][0, 1].any()


def _alpha(path):
    Image.fromarray(np.zeros((4, 4, 4), np.uint8)).save(path)


def _sixteen_bits(path):
    """A PNG of 16 bits in three channels, which pillow reads but does not write."""
    import struct
    import zlib

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(4)))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("flag", "write", "error"),
    [
        ("image", lambda path: None, "--image: no file"),
        ("image", lambda path: path.write_text("x"), "--image: .* is no picture"),
        ("image", _alpha, "--image: .* has an alpha channel; .* save it as RGB"),
        ("low_res", _sixteen_bits, "--low_res: .* has not 8 bits a channel"),
        ("segmentation", _alpha, "--segmentation: .* is of mode RGBA"),
        ("depth", _alpha, "--depth: .* is of mode RGBA"),
        ("layout", lambda path: path.write_text("[1]"), "--layout: .* is no list of"),
        ("layout", lambda path: path.write_text("[]"), "--layout: .* one or more"),
    ],
)
def test_wrong_files_take_one_line(tmp_path, flag, write, error):
    write(tmp_path / "x.png")
    with pytest.raises(UserError, match=error) as raised:
        _read(flag, tmp_path / "x.png")
    assert "\n" not in str(raised.value)


def test_labels_are_numbers():
    with pytest.raises(UserError, match="--label: .* give class numbers"):
        _read("label", "cat")


# ---- Rows ----------------------------------------------------------------------


def test_one_row_serves_for_all():
    given = {"caption": ["a", "b"], "depth": np.ones((1, 2, 2))}
    rows, n = inputs.collect(("caption", "depth"), given, None)
    assert n == 2 and rows["depth"].shape == (2, 2, 2)
    rows, n = inputs.collect(("caption",), {"caption": ["a"]}, 3)
    assert n == 3 and rows["caption"] == ["a"] * 3
    assert inputs.collect((), {}, 5) == ({}, 5)


@pytest.mark.parametrize(
    ("fields", "given", "count", "error"),
    [
        ((), {"caption": ["a"]}, None, "caption: this model takes none, it is uncond"),
        (("label",), {}, None, "label: none given"),
        (("label",), {"label": []}, None, "label: none given; give at least one"),
        (("a", "b"), {"a": [1, 2], "b": [1, 2, 3]}, None, "a: 2 given, but 3 of"),
        (("a",), {"a": [1, 2]}, 3, "count: 3, but 2 inputs are given"),
        ((), {}, 0, "count: 0; choose 1 or more"),
    ],
)
def test_wrong_rows(fields, given, count, error):
    with pytest.raises(UserError, match=error):
        inputs.collect(fields, given, count)


# ---- The command, for models of other tasks ------------------------------------


def _run(tmp_path_factory, task):
    workdir = tmp_path_factory.mktemp(task)
    config = config_lib.load(f"{runs.CONFIGS / task}.py:debug")
    runs.untrained(workdir, config)
    return workdir


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    return _run(tmp_path_factory, "inpainting")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    return _run(tmp_path_factory, "unconditional")


def _fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        sample.main(argv)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_help_lists_what_the_model_takes(inpainting, unconditional, capsys):
    cases = ((inpainting, {"image", "mask"}), (unconditional, {"label"}))
    for workdir, taken in cases:
        with pytest.raises(SystemExit):
            sample.main([f"--workdir={workdir}", "--help"])
        text = capsys.readouterr().out
        listed = {entry.flag for entry in inputs.INPUTS if f"--{entry.flag} " in text}
        assert listed == taken | {"mask"}  # that of --init_image, which all take
        assert "--init_image" in text and "--strength" in text


def test_the_command_starts_from_a_picture_and_keeps_its_mask(unconditional, tmp_path):
    photo, mask = _rgb(16), np.zeros((16, 16), np.uint8)
    mask[4:9, 2:] = 255
    out = tmp_path / "a.png"
    argv = [f"--workdir={unconditional}", f"--out={out}", "--count=1", "--steps=3"]
    argv.append(f"--init_image={_png(tmp_path / 'photo.png', photo)}")
    sample.main([*argv, f"--mask={_png(tmp_path / 'mask.png', mask)}"])
    drawn = np.asarray(Image.open(out))
    np.testing.assert_array_equal(drawn[mask == 0], photo[mask == 0])
    assert (drawn[mask > 0] != photo[mask > 0]).mean() > 0.5
    sample.main([*argv, "--strength=0.5", "--sampler=heun"])
    assert (np.asarray(Image.open(out)) != drawn).mean() > 0.5


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--interpolate=3", "--count=2"], (3, 1)),
        (["--progress", "--steps=4", "--count=2"], (4, 2)),
        (["--size=32x16", "--tile", "--count=2"], (2, 1)),
    ],
)
def test_sheets_of_the_command(unconditional, tmp_path, flags, size):
    out = tmp_path / "a.png"
    sample.main([f"--workdir={unconditional}", f"--out={out}", *flags])
    tile = 128 + 6
    columns, rows = size
    height = rows * (tile if "--tile" not in flags else 256 + 6)
    assert Image.open(out).size == (columns * tile, height)


def test_a_mask_alone_is_not_enough(unconditional, tmp_path, capsys):
    path = _png(tmp_path / "mask.png", np.zeros((16, 16), np.uint8))
    err = _fails(capsys, f"--workdir={unconditional}", f"--mask={path}")
    assert "--mask: this model takes no input" in err


def test_a_hole_is_filled_by_the_command_as_by_the_api(inpainting, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12] = 255
    files = [
        f"--image={_png(tmp_path / 'x.png', _rgb(16))}",
        f"--mask={_png(tmp_path / 'm.png', mask)}",
    ]
    out = tmp_path / "out"
    sample.main([f"--workdir={inpainting}", *files, "--count=2", f"--out={out}"])
    drawn = np.stack([np.asarray(Image.open(f)) for f in sorted(out.iterdir())])
    given = {"image": _rgb(16)[None], "mask": (mask > 0)[None].astype(np.uint8)}
    expected = loaded_lib.load(inpainting).sample(inputs=given, count=2)
    np.testing.assert_array_equal(drawn, expected)
    assert (drawn[0] != drawn[1]).any()
    # What is in the hole is not looked at, what is around it is.
    inside, outside = _rgb(16), _rgb(16)
    inside[4:12], outside[:4] = 0, 0
    loaded = loaded_lib.load(inpainting)
    for picture, same in ((inside, True), (outside, False)):
        again = loaded.sample(inputs=given | {"image": picture[None]}, count=2)
        assert np.array_equal(again, expected) == same


def test_an_unconditional_model_draws_as_many_as_asked(unconditional, tmp_path):
    out = tmp_path / "grid.png"
    sample.main([f"--workdir={unconditional}", "--count=3", f"--out={out}"])
    assert Image.open(out).width > 3 * 100


def test_inputs_of_another_task(inpainting, unconditional, tmp_path, capsys):
    err = _fails(capsys, f"--workdir={unconditional}", "--prompt=a")
    assert "--prompt: this model takes no input, --count alone; leave it out" in err
    err = _fails(capsys, f"--workdir={inpainting}", "--mask=x.png")
    assert "--image: none given; this model takes --image, --mask" in err
    x = _png(tmp_path / "x.png", _rgb(16))
    small = _png(tmp_path / "m.png", np.zeros((8, 8), np.uint8))
    err = _fails(capsys, f"--workdir={inpainting}", f"--image={x}", f"--mask={small}")
    assert "mask: 8x8, but the picture is 16x16" in err
    err = _fails(capsys, f"--workdir={unconditional}", "--count=1", "--noise_level=3")
    assert "--noise_level: no input of this model takes noise" in err


def test_noise_levels_have_a_range(tmp_path_factory):
    config = config_lib.load(f"{runs.CONFIGS / 'upscale'}.py:debug")
    model = runs.build(config)
    draw.check_noise_level(model, 349)
    with pytest.raises(UserError, match="--noise_level: 350; choose from 0 to 349"):
        draw.check_noise_level(model, 350)
