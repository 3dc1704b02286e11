"""The openmoji data set: names, groups, pictures, splits, the build on disk."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data import openmoji


@pytest.fixture
def few_entries(monkeypatch):
    """Shortens the data set, where a test builds it but reads little of it."""
    few = tuple(openmoji.entries()[::100])
    monkeypatch.setattr(openmoji, "_entries", lambda: few)
    return few


def test_entries_are_sorted_named_once_and_plain_words():
    entries = openmoji.entries()
    assert len(entries) >= 3900
    codes = [entry.code for entry in entries]
    captions = [entry.caption for entry in entries]
    assert codes == sorted(codes)
    assert len(set(captions)) == len(captions)
    assert not any(set(caption) & set("_():’") for caption in captions)


@pytest.mark.parametrize(
    "code, caption, group",
    [
        ("1F353", "strawberry", "food"),
        ("1F600", "grinning face", "face"),
        ("1F469-1F3FE-200D-1F692", "woman firefighter medium-dark skin tone", "worker"),
        ("1F468-1F3FB-200D-1F9B0", "man light skin tone red hair", "person"),
        ("1F3C3-200D-2640-FE0F", "woman running", "sport"),
        ("1F468-200D-1F469-200D-1F467", "family man woman girl", "family"),
        ("1F44D-1F3FD", "thumbs up medium skin tone", "body"),
        ("1F1EF-1F1F5", "flag of Japan", "flag"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of Scotland", "flag"),
        ("1F435", "monkey face", "animal"),
        ("1F680", "rocket", "vehicle"),
        ("1F511", "key", "object"),
        ("2B05", "left arrow", "sign"),
        ("1F453", "glasses", "clothing"),
        ("1F452", "woman's hat", "clothing"),
    ],
)
def test_captions_and_groups(code, caption, group):
    entry = next(entry for entry in openmoji.entries() if entry.code == code)
    assert (entry.caption, entry.group) == (caption, group)
    assert openmoji.CLASS_NAMES[entry.label] == group


def test_every_class_has_examples_to_learn_from():
    count = collections.Counter(entry.label for entry in openmoji.entries("train"))
    assert set(count) == set(range(len(openmoji.CLASS_NAMES)))
    assert min(count.values()) >= 20


def test_no_code_point_is_listed_in_two_groups():
    seen = collections.Counter()
    for ranges in openmoji._GROUPS.values():
        for span in ranges.split():
            first, _, last = span.partition("-")
            seen.update(range(int(first, 16), int(last or first, 16) + 1))
    assert [f"{point:X}" for point, n in seen.items() if n > 1] == []


def test_split_holds_out_combinations_of_seen_words():
    train, held = openmoji.entries("train"), openmoji.entries("compositional")
    assert len(train) + len(held) == len(openmoji.entries())
    people = [e for e in openmoji.entries() if e.group in ("person", "worker", "sport")]
    assert 0.07 < len(held) / len(people) < 0.13
    words = {word for entry in train for word in entry.caption.split()}
    captions = {entry.caption for entry in train}
    for entry in held:
        assert entry.group in ("person", "worker", "sport")
        assert "skin tone" in entry.caption
        assert set(entry.caption.split()) <= words
        assert entry.caption not in captions


def test_every_role_keeps_four_skin_tones_in_training():
    def role(entry):
        return "-".join(p for p in entry.code.split("-") if not p.startswith("1F3F"))

    toned = [e for e in openmoji.entries("train") if "skin tone" in e.caption]
    trained = collections.Counter(map(role, toned))
    held = collections.Counter(map(role, openmoji.entries("compositional")))
    assert set(held.values()) == {1}
    assert all(trained[name] == 4 for name in held)


def test_rasterise_fills_the_canvas_on_white():
    rgba = openmoji.rasterise("1F600", 64)
    assert rgba.shape == (64, 64, 4) and rgba.dtype == np.uint8
    rgb = openmoji.on_white(rgba)
    assert (rgb[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    np.testing.assert_allclose(rgb[20, 32], (252, 234, 43), atol=2)  # #FCEA2B
    rows = np.flatnonzero(rgba[..., 3].any(axis=1))
    assert 40 <= rows[-1] - rows[0] <= 60


def test_on_white_blends_straight_alpha():
    rgba = np.array([[0, 0, 0, 0], [10, 20, 30, 255], [0, 100, 200, 51]], np.uint8)
    expected = [[255, 255, 255], [10, 20, 30], [204, 224, 244]]
    np.testing.assert_array_equal(openmoji.on_white(rgba), expected)


def test_prepare_builds_once_and_keeps_what_was_drawn(tmp_path, few_entries):
    builder = openmoji.prepare(16, tmp_path)
    assert builder.info.splits.total_num_examples == len(few_entries)
    assert "CC BY-SA" in builder.info.redistribution_info.license
    rows = list(builder.as_dataset(split="train").as_numpy_iterator())
    assert len(rows) == len(openmoji.entries("train"))
    by_code = {entry.code: entry for entry in few_entries}
    for row in rows:
        entry = by_code[row["code"].decode()]
        assert row["caption"].decode() == entry.caption
        assert row["label"] == entry.label
        drawn = openmoji.on_white(openmoji.rasterise(entry.code, 16))
        np.testing.assert_array_equal(row["image"], drawn)
    info = builder.data_path / "dataset_info.json"
    before = info.stat().mtime
    assert openmoji.prepare(16, tmp_path).is_prepared()
    assert info.stat().mtime == before


def test_prepare_at_a_resolution_that_is_not_listed(tmp_path, few_entries):
    builder = openmoji.prepare(20, tmp_path)
    assert builder.info.features["image"].shape == (20, 20, 3)


def test_prepare_clears_what_a_killed_build_left(tmp_path, few_entries):
    folder = tmp_path / "openmoji" / "16"
    (folder / "incomplete.ABC_1.0.0").mkdir(parents=True)
    (folder / "1.0.0").mkdir()
    (folder / "1.0.0" / "openmoji-train.tfrecord-00000-of-00001").write_bytes(b"half")
    builder = openmoji.prepare(16, tmp_path)
    rows = list(builder.as_dataset(split="train"))
    assert len(rows) == len(openmoji.entries("train"))
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_two_processes_prepare_at_once(tmp_path):
    program = (
        "import sys\n"
        "from ldm_jax.data import openmoji\n"
        "few = tuple(openmoji.entries()[::10])\n"
        "openmoji._entries = lambda: few\n"
        "builds = []\n"
        "build = openmoji.OpenMoji.download_and_prepare\n"
        "openmoji.OpenMoji.download_and_prepare = (\n"
        "    lambda self: (builds.append(1), build(self))\n"
        ")\n"
        "builder = openmoji.prepare(16, sys.argv[1])\n"
        "rows = len(list(builder.as_dataset(split='train')))\n"
        "print('RESULT', rows, len(builds))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    results = sorted(output.split("RESULT ")[1].strip() for output in outputs)
    few = openmoji.entries()[::10]
    rows = len([entry for entry in few if openmoji._split(entry) == "train"])
    assert results == [f"{rows} 0", f"{rows} 1"]


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"resvg_py.*pip install 'ldm_jax\[train\]'"):
        openmoji.prepare(16, tmp_path)


def test_wrong_split_and_resolution():
    with pytest.raises(UserError, match="train and compositional"):
        openmoji.entries("test")
    with pytest.raises(UserError, match="resolution=0"):
        openmoji.prepare(0)


def test_entries_need_no_tensorflow():
    program = (
        "import sys\n"
        "from ldm_jax.data import openmoji\n"
        "openmoji.rasterise(openmoji.entries()[0].code, 16)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
