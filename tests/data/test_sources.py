"""Sources: columns of equal length from emoji, folders, TFDS and drawn shapes."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from ldm_jax.config import UserError
from ldm_jax.data import openmoji, sources


def write_pictures(root, names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (number, 0, 0)).save(root / name)


def test_source_columns():
    source = sources.Source({"a": np.arange(5), "b": np.zeros((5, 2))}, "someone")
    assert len(source) == 5
    more = source.with_fields(tokens=np.ones((5, 3), np.int32), a=np.arange(5) * 2)
    assert set(more.fields) == {"a", "b", "tokens"}
    assert more.fields["a"][-1] == 8 and source.fields["a"][-1] == 4
    assert len(more.take(2)) == 2 and len(more.take(9)) == 5
    assert more.take(2).attribution == "someone"
    with pytest.raises(ValueError, match="equally long"):
        source.with_fields(c=np.arange(4))


def test_unknown_source_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'openmoji'"):
        sources.load("openmojis", "train")
    with pytest.raises(UserError, match="openmoji, openmoji_scenes, folder, tfds"):
        sources.load("zzz", "train")


def test_unknown_argument_lists_the_legal_ones():
    with pytest.raises(UserError, match="size.*resolution"):
        sources.load("synthetic", "train", size=3)


def test_openmoji_source(data_dir):
    held = sources.load("openmoji", "compositional", resolution=16, data_dir=data_dir)
    entries = openmoji.entries("compositional")
    assert list(held.fields["code"]) == [entry.code for entry in entries]
    assert list(held.fields["caption"]) == [entry.caption for entry in entries]
    assert list(held.fields["label"]) == [entry.label for entry in entries]
    assert held.fields["label"].dtype == np.int32
    assert held.fields["image"].shape == (len(entries), 16, 16, 3)
    drawn = openmoji.on_white(openmoji.rasterise(entries[7].code, 16))
    np.testing.assert_array_equal(held.fields["image"][7], drawn)
    assert "CC BY-SA 4.0" in held.attribution
    train = sources.load("openmoji", "train", resolution=16, data_dir=data_dir)
    assert not set(train.fields["caption"]) & set(held.fields["caption"])
    with pytest.raises(UserError, match="split='test'"):
        sources.load("openmoji", "test", resolution=16, data_dir=data_dir)


def test_tfds_source_keeps_files_encoded(data_dir):
    by_name = sources.load(
        "tfds",
        "compositional",
        dataset="openmoji/16",
        caption="caption",
        label="label",
        data_dir=data_dir,
    )
    held = sources.load("openmoji", "compositional", resolution=16, data_dir=data_dir)
    assert sorted(by_name.fields["caption"]) == sorted(held.fields["caption"])
    assert by_name.fields["image"][0].startswith(b"\x89PNG")
    for wrong, message in [
        ({"caption": "text"}, "caption='text'.*features image"),
        ({"dataset": "openmojo/16"}, "dataset='openmojo/16'"),
    ]:
        with pytest.raises(UserError, match=message):
            arguments = {"dataset": "openmoji/16", "data_dir": data_dir, **wrong}
            sources.load("tfds", "train", **arguments)
    with pytest.raises(UserError, match="split='test'.*train, compositional"):
        sources.load("tfds", "test", dataset="openmoji/16", data_dir=data_dir)


def test_folder_captions_from_names_and_text_files(tmp_path):
    write_pictures(tmp_path, ["red_car.png", "a-blue-boat.jpg", "deep/tree.webp"])
    (tmp_path / "deep" / "tree.txt").write_text("an old tree\n")
    (tmp_path / "notes.md").write_text("no picture")
    source = sources.load("folder", "all", path=str(tmp_path))
    assert dict(zip(_names(source), source.fields["caption"], strict=True)) == {
        "a-blue-boat.jpg": "a blue boat",
        "red_car.png": "red car",
        "tree.webp": "an old tree",
    }
    assert "label" not in source.fields


def test_one_caption_for_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    source = sources.load("folder", "all", path=str(tmp_path), caption="zwx cat")
    assert source.fields["caption"].tolist() == ["zwx cat"] * 2
    several = ("a <toy>", "<toy>, red")
    source = sources.load("folder", "all", path=str(tmp_path), caption=several)
    rows = list(zip(_names(source), source.fields["caption"], strict=True))
    assert rows == [(name, c) for name in ("a.png", "b.png") for c in several]


def test_folder_captions_from_metadata(tmp_path):
    write_pictures(tmp_path, ["1.png", "2.png", "3.png"])
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in (1, 3)]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))
    source = sources.load("folder", "all", path=str(tmp_path))
    assert _names(source) == ["1.png", "3.png"]
    assert list(source.fields["caption"]) == ["picture 1", "picture 3"]

    metadata.write_text('{"file_name": "1.png"}')
    with pytest.raises(UserError, match="line 1"):
        sources.load("folder", "all", path=str(tmp_path))
    metadata.write_text('{"file_name": "9.png", "text": "x"}')
    with pytest.raises(UserError, match="'9.png' is not there"):
        sources.load("folder", "all", path=str(tmp_path))


def test_folder_labels_are_its_directories(tmp_path):
    write_pictures(tmp_path, ["dog/1.png", "cat/1.png", "cat/kitten/2.png"])
    source = sources.load("folder", "all", path=str(tmp_path))
    assert list(source.fields["label"]) == [0, 0, 1]


def test_folder_split_stays_when_pictures_come(tmp_path):
    write_pictures(tmp_path, [f"{i}.png" for i in range(60)])
    train, held = (
        sources.load("folder", split, path=str(tmp_path), heldout_percent=30)
        for split in ("train", "heldout")
    )
    assert len(train) + len(held) == 60 and 8 <= len(held) <= 28
    assert not set(_names(train)) & set(_names(held))
    write_pictures(tmp_path, [f"{i}.png" for i in range(60, 80)])
    later = sources.load("folder", "heldout", path=str(tmp_path), heldout_percent=30)
    assert set(_names(held)) <= set(_names(later))


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        sources.load("folder", "train", path=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no pictures"):
        sources.load("folder", "train", path=str(tmp_path))
    with pytest.raises(UserError, match="split='test'"):
        sources.load("folder", "test", path=str(tmp_path))


def test_synthetic_is_fast_repeatable_and_tells_the_truth():
    start = time.process_time()
    source = sources.load("synthetic", "train", resolution=48, count=512)
    assert time.process_time() - start < 1.0
    again = sources.load("synthetic", "train", resolution=48, count=512)
    other = sources.load("synthetic", "test", resolution=48, count=512)
    image = source.fields["image"]
    assert image.shape == (512, 48, 48, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, again.fields["image"])
    assert (image != other.fields["image"]).any()
    for picture, caption in zip(image, source.fields["caption"], strict=True):
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 2, caption
        red_on = caption.startswith("a red")
        assert (picture == (220, 50, 40)).all(-1).any() >= red_on
    assert len(set(source.fields["label"])) == 24


def _names(source):
    return [path.rpartition("/")[2] for path in source.fields["image"]]
