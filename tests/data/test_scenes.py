"""Composed scenes: what is said of them is so, and the splits share no combination."""

import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.data import (
    degrade,
    derive,
    masks,
    openmoji_scenes,
    pipeline,
    sources,
)

OPS = (("to_float", {}),)


@pytest.fixture(scope="module")
def scenes():
    return openmoji_scenes.columns("train", 64, 60)


def test_a_scene_is_the_same_whatever_came_before(scenes):
    again = openmoji_scenes.scene("train", 41, 64)
    for name, value in again.items():
        np.testing.assert_array_equal(value, scenes[name][41])
    other = openmoji_scenes.scene("compositional", 41, 64)
    assert other["caption"] != again["caption"]


def test_the_fields_agree(scenes):
    for i in range(60):
        there = scenes["categories"][i] >= 0
        assert 1 <= there.sum() <= openmoji_scenes.MAX_OBJECTS
        assert not scenes["boxes"][i][~there].any()
        segmentation, depth = scenes["segmentation"][i], scenes["depth"][i]
        np.testing.assert_array_equal(segmentation > 0, depth > 0)
        assert set(np.unique(segmentation)) - {0} <= set(
            scenes["categories"][i][there] + 1
        )
        assert depth.max() == 1.0  # the nearest hides the others
        nearest = np.argwhere(depth == 1.0)
        (top, left), (bottom, right) = nearest.min(axis=0), nearest.max(axis=0) + 1
        x0, y0, x1, y1 = scenes["boxes"][i][there][-1] * 64
        # A box is around all that shows, the map around what shows clearly.
        assert x0 <= left and y0 <= top and right <= x1 and bottom <= y1
        assert right - left > 0.5 * (x1 - x0) and bottom - top > 0.5 * (y1 - y0)


def test_captions_count_and_name_the_ground(scenes):
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3}
    for caption, categories, image, map_ in zip(
        *(scenes[k] for k in ("caption", "categories", "image", "segmentation")),
        strict=True,
    ):
        words = caption.removesuffix(" background").split()
        ground, things = words[-1], " ".join(words[:-3])
        for relation in openmoji_scenes.RELATIONS:
            things = things.replace(f" {relation} ", "|")
        said = sum(numbers[part.split()[0]] for part in things.split("|"))
        assert said == (categories >= 0).sum(), caption
        expected = openmoji_scenes.BACKGROUNDS[ground]
        bare = image[map_ == 0]
        assert (np.abs(bare - np.array(expected, int)).max(axis=1) == 0).mean() > 0.6


def test_relations_are_where_they_are_said_to_be():
    axis = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
    seen = set()
    for index in range(200):
        row = openmoji_scenes.scene("train", index, 64, (2, 2))
        for relation, (side, sign) in axis.items():
            if f" {relation} " in row["caption"]:
                first, second = row["boxes"][:2]
                middles = [box[side] + box[side + 2] for box in (first, second)]
                assert sign * (middles[1] - middles[0]) > 0, row["caption"]
                seen.add(relation)
    assert seen == set(axis)


def test_what_is_in_front_hides_what_is_behind():
    labels, seen = {n.name: n.label for n in openmoji_scenes.nouns()}, 0
    for index in range(300):
        row = openmoji_scenes.scene("train", index, 64, (2, 2))
        ((near, relation, far),) = _combinations(row["caption"])[0] or [(None,) * 3]
        if relation != "in front of":
            continue
        assert list(row["categories"][:2]) == [labels[far], labels[near]]
        map_, depth = row["segmentation"], row["depth"]
        assert set(map_[depth == 1.0]) == {1 + labels[near]}
        assert set(map_[depth == 0.5]) == {1 + labels[far]}
        seen += 1
    assert seen > 40


def test_a_held_out_combination_is_never_trained_on():
    train = set(openmoji_scenes.columns("train", 16, 4000)["caption"])
    heldout = set(openmoji_scenes.columns("compositional", 16, 400)["caption"])
    assert not train & heldout
    words = {word for caption in train for word in caption.split()}
    unseen = {w for caption in heldout for w in caption.split()} - words
    assert not unseen


def _combinations(caption):
    """What a caption tells: [(noun, relation, noun)] or [], and (count, noun, ground)s.

    The relation and its mirror are one, with the nouns in order.
    """
    singular = {noun.plural: noun.name for noun in openmoji_scenes.nouns()}
    words = caption.removesuffix(" background").split()
    things, relation = " ".join(words[:-3]), None
    for word in openmoji_scenes.RELATIONS:
        if f" {word} " in things:
            things, relation = things.replace(f" {word} ", "|"), word
    amounts = []
    for part in things.split("|"):
        count, noun = part.split(" ", 1)
        alone = count in ("a", "an")
        amounts.append(("a" if alone else count, noun if alone else singular[noun]))
    counted = {(count, noun, words[-1]) for count, noun in amounts}
    if relation is None:
        return [], counted
    first, second = (noun for _, noun in amounts)
    mirrored = {"right of": "left of", "below": "above", "behind": "in front of"}
    if relation in mirrored:
        first, relation, second = second, mirrored[relation], first
    return [(first, relation, second)], counted


def test_neither_mirrored_nor_as_a_part_is_a_held_out_combination_trained_on():
    rows = [openmoji_scenes.scene("train", i, 16) for i in range(6000)]
    pairs, counted = set(), set()
    for row in rows:
        pair, amounts = _combinations(row["caption"])
        pairs.update(pair)
        counted |= amounts
    for index in range(600):
        row = openmoji_scenes.scene("compositional", index, 16)
        pair, amounts = _combinations(row["caption"])
        assert not (pairs & set(pair) if pair else counted & amounts), row["caption"]


@pytest.mark.parametrize("objects", [(1, 1), (3, 4), (5, 6), (6, 6)])
def test_as_many_things_as_asked_for(objects):
    seen = {
        int((openmoji_scenes.scene("train", i, 16, objects)["categories"] >= 0).sum())
        for i in range(60)
    }
    assert seen == set(range(objects[0], objects[1] + 1))


@pytest.mark.parametrize("resolution", [8, 20, 48])
def test_any_resolution(resolution):
    for index in range(80):
        row = openmoji_scenes.scene("train", index, resolution)
        assert row["image"].shape == (resolution, resolution, 3)
        assert row["boxes"].min() >= 0 and row["boxes"].max() <= 1


def test_sources_of_scenes():
    heldout = sources.load(
        "openmoji_scenes", "compositional", resolution=16, count=80, objects=(1, 1)
    )
    assert len(heldout) == 10 and "OpenMoji" in heldout.attribution
    assert (heldout.fields["categories"][:, 1:] == -1).all()
    with pytest.raises(UserError, match=r"data.options.objects: \(3, 2\)"):
        openmoji_scenes.columns("train", 16, 1, (3, 2))
    with pytest.raises(UserError, match="openmoji_scenes has train"):
        openmoji_scenes.scene("test", 0, 16)


def test_derived_columns_are_the_same_in_every_run():
    data = dict(
        source="synthetic",
        options=dict(count=12),
        train_split="train",
        heldout_split="heldout",
        ops=(("to_float", {}),),
        derive=dict(low_res=dict(factor=4, kind="bsrgan_light"), mask=dict(full=0.0)),
    )
    first, _ = sources.load_splits(data, 16)
    again, heldout = sources.load_splits(data, 16)
    assert first.fields["low_res"].shape == (12, 4, 4, 3)
    assert first.fields["mask"].shape == (12, 16, 16)
    for name in ("low_res", "mask"):
        np.testing.assert_array_equal(first.fields[name], again.fields[name])
        assert (first.fields[name] != heldout.fields[name]).any()
    with pytest.raises(UserError, match="data.derive.lowres"):
        sources.load_splits(data | dict(derive=dict(lowres={})), 16)


def test_each_picture_of_each_split_is_degraded_by_its_own_draws(monkeypatch):
    def draw(image, factor, kind, rng):
        return rng.integers(0, 256, (4, 4, 3), np.uint8)

    monkeypatch.setattr(degrade, "degrade", draw)
    source = sources.load("synthetic", "train", resolution=16, count=3)
    made = {}
    for split in ("train", "heldout"):
        derived = derive.add(source, dict(low_res={}), split, (("to_float", {}),))
        made[split] = derived.fields["low_res"]
    rows = np.concatenate(list(made.values())).reshape(6, -1)
    assert len(np.unique(rows, axis=0)) == 6


def test_holes_are_large_and_now_and_then_everything():
    rngs = [np.random.default_rng(i) for i in range(400)]
    drawn = np.stack([masks.random_mask(rng, 32, 48, masks.FULL) for rng in rngs])
    assert drawn.shape == (400, 32, 48) and set(np.unique(drawn)) == {0, 1}
    share = drawn.mean(axis=(1, 2))
    assert 0.18 < (share == 1).mean() < 0.32
    assert 0.15 < share[share < 1].mean() < 0.6 and (share > 0).all()
    again = masks.random_mask(np.random.default_rng(7), 32, 48, masks.FULL)
    np.testing.assert_array_equal(again, drawn[7])


@pytest.mark.parametrize("kind", degrade.KINDS)
def test_every_degradation_keeps_the_picture(kind):
    image = openmoji_scenes.scene("train", 3, 64)["image"]
    small = degrade.degrade(image, 4, kind, np.random.default_rng(0))
    again = degrade.degrade(image, 4, kind, np.random.default_rng(0))
    assert small.shape == (16, 16, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(small, again)
    mean = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    limit = 40 if kind == "bsrgan" else 25
    assert np.abs(small - mean).mean() < limit


def test_plain_resizers_of_opencv():
    """Area is the mean of a cell; at a factor of 2 bilinear is too."""
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    mean = image.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3))
    rng = np.random.default_rng(0)
    for kind in ("cv_area", "cv_bilinear"):
        small = degrade.degrade(image, 2, kind, rng)
        assert np.abs(small - mean).max() <= 0.5 + 1e-9
    nearest = degrade.degrade(image, 2, "cv_nearest", rng)
    np.testing.assert_array_equal(nearest, image[::2, ::2])


@pytest.mark.parametrize(
    ("factor", "kind", "error"),
    [
        (3, "cv_area", "low_res.factor: 3 does not divide a picture of 64x64"),
        (4, "bsrgann", "low_res.kind: 'bsrgann'; did you mean 'bsrgan'"),
    ],
)
def test_wrong_degradations(factor, kind, error):
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UserError, match=error):
        degrade.degrade(image, factor, kind, np.random.default_rng(0))


# ---- Endless scenes ------------------------------------------------------------


def _endless(**options):
    options = dict(resolution=16, count=24, objects=(1, 2), endless=True) | options
    return sources.load("openmoji_scenes", "train", **options)


def test_endless_scenes_begin_with_the_stored_ones_and_go_on():
    source = _endless()
    for index in (0, 23):
        row = source.example(index)
        for name, column in source.fields.items():
            np.testing.assert_array_equal(row[name], column[index])
    far = source.example(10**9)
    assert all(np.any(far["image"] != x) for x in source.fields["image"])
    heldout = sources.load(
        "openmoji_scenes", "compositional", resolution=16, count=8, endless=True
    )
    assert heldout.example is None


def test_batches_of_endless_scenes_are_positions():
    """Also from a later step, and on two hosts."""
    source = derive.add(
        _endless(), dict(mask=dict(full=0.0), low_res=dict(factor=2)), "train", OPS
    )
    fields = ("image", "mask", "low_res", "depth", "categories")

    def batch(step, **hosts):
        batches = pipeline.train_batches(
            source,
            batch_size=4,
            seed=3,
            start_step=step,
            ops=OPS,
            fields=fields,
            **hosts,
        )
        return next(batches)

    for step in (0, 9):
        whole = batch(step)
        assert set(whole) == set(fields)
        for i in range(4):
            row = source.example(4 * step + i)
            expected = row["image"].astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(whole["image"][i], expected, atol=1e-6)
            for name in fields[1:]:
                np.testing.assert_array_equal(whole[name][i], row[name])
        halves = [batch(step, process_index=h, process_count=2) for h in (0, 1)]
        both = np.concatenate([half["image"] for half in halves])
        np.testing.assert_array_equal(both, whole["image"])


def test_what_is_derived_is_the_same_stored_and_made_anew():
    source = derive.add(_endless(), dict(mask=dict(), low_res=dict()), "train", OPS)
    for index in (0, 20):
        row = source.example(index)
        for name in ("mask", "low_res"):
            np.testing.assert_array_equal(row[name], source.fields[name][index])


def test_a_part_of_a_scene_says_where_it_lies():
    sides = []
    for index in range(30):
        row = openmoji_scenes.scene("train", index, 32, (1, 2), crop=0.5)
        x0, y0, x1, y1 = row["crop"]
        canvas = round(32 / (x1 - x0))
        assert row["image"].shape == (32, 32, 3) and row["depth"].shape == (32, 32)
        assert 0 <= x0 and 0 <= y0 and x1 <= 1 and y1 <= 1 and 32 <= canvas <= 64
        # What is on the part is inside of the boxes, which are of the whole.
        inside = np.zeros((32, 32), bool)
        for box in row["boxes"][row["categories"] >= 0] * canvas:
            left, top, right, bottom = np.round(box - np.tile([x0, y0], 2) * canvas)
            rows, columns = (
                slice(max(int(a), 0), max(int(b), 0))
                for a, b in ((top, bottom), (left, right))
            )
            inside[rows, columns] = True
        assert not row["segmentation"][~inside].any()
        sides.append(canvas)
    assert len(set(sides)) > 5
    whole = openmoji_scenes.scene("train", 3, 32)
    np.testing.assert_array_equal(whole["crop"], [0, 0, 1, 1])
    with pytest.raises(UserError, match="data.options.crop: 0; choose above 0"):
        openmoji_scenes.columns("train", 32, 1, crop=0)
